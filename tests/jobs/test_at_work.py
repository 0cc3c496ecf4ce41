import json
import subprocess
import sys

import pytest

from shoestring.core.errors import ShoestringError, UsageError
from shoestring.jobs import at_work as job
from shoestring.lab import tiny
from shoestring.models import save


def test_figures_of_a_tiny_model(tmp_path):
    save(tiny.model(), None, tmp_path / "tiny")
    found = job.at_work(tmp_path / "tiny", prompt_tokens=8, new_tokens=6, repeats=2, threads=1)
    assert found["threads"] == 1 and found["repeats"] == 2 and found["dtype"] == "float32"
    assert found["storage"] == sum(f.stat().st_size for f in (tmp_path / "tiny").iterdir())
    assert 100e6 < found["floor_memory"] < found["peak_memory"] < found["floor_memory"] + 200e6
    decode = found["decode_tokens_per_s"]
    assert decode["min"] <= decode["median"] <= decode["max"]
    assert found["latency"] == pytest.approx(1 / decode["median"], rel=0.5)
    assert found["prefill_tokens_per_s"]["median"] > 0 and found["load_seconds"] > 0
    json.dumps(found)


def test_what_is_wrong_with_the_folder_comes_back(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="holds no weights"):
        job.at_work(tmp_path)


def test_a_process_that_dies_tells_its_reason(tmp_path, monkeypatch):
    def run(command, **options):
        code = "import os, sys; sys.stderr.write('MemoryError: no more\\n'); sys.exit(3)"
        return real([sys.executable, "-c", code], **options)

    def killed(command, **options):
        return real([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], **options)

    real = subprocess.run
    monkeypatch.setattr(job.subprocess, "run", run)
    with pytest.raises(ShoestringError, match="died. MemoryError: no more"):
        job.at_work(tmp_path)
    monkeypatch.setattr(job.subprocess, "run", killed)
    with pytest.raises(ShoestringError, match="SIGKILL.*short of memory"):
        job.at_work(tmp_path)


def test_impossible_arguments(tmp_path):
    with pytest.raises(UsageError, match="above"):
        job.at_work(tmp_path, new_tokens=1)


@pytest.mark.real
def test_the_default_model_at_work():
    found = job.at_work("smollm2", new_tokens=16, repeats=1)
    weights = found["storage"]
    assert weights < found["peak_memory"] - found["floor_memory"] < 2 * weights
    assert found["decode_tokens_per_s"]["median"] > 0.2
