from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from shoestring.core.errors import UsageError
from shoestring.jobs.fit import FitRequest, fit
from shoestring.jobs.run import run_file

TRAINING = {"max_steps": 2, "per_device_train_batch_size": 4}


def test_steps(tiny: Path, data: Path, tmp_path: Path, quick: None) -> None:
    steps = [{"verb": "train", "method": "lora", "options": {"r": 4}}, {"verb": "merge"},
             {"verb": "compress", "method": "int8"}]  # fmt: skip
    written = {"model": str(tiny), "data": str(data), "steps": steps, "training": TRAINING, "seed": 1}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(written))
    result = run_file(tmp_path / "p.yaml", out=tmp_path / "out")
    assert result["steps"] == ["lora (r=4)", "merge", "int8"]
    assert result["storage"] == sum(f.stat().st_size for f in (tmp_path / "out" / "model").iterdir())
    assert AutoModelForCausalLM.from_pretrained(result["model"]) is not None
    facts = json.loads((tmp_path / "out" / "run" / "result.json").read_text())["facts"]
    assert facts[0]["steps"] == 2 and facts[1]["difference"] < 1e-3
    assert yaml.safe_load((tmp_path / "out" / "run" / "config.resolved.yaml").read_text())["seed"] == 1


def test_what_a_fit_resolved_to_gives_the_same_model(tiny: Path, data: Path, tmp_path: Path, quick: None) -> None:
    request = FitRequest(str(tiny), str(data), "storage=1MB", 0.5, compress="int4", options={"group_size": 32},
                         training=TRAINING, eval_examples=6)  # fmt: skip
    first = fit(request, out=tmp_path / "one")
    second = run_file(tmp_path / "one" / "run" / "config.resolved.yaml", out=tmp_path / "two")
    one, two = ((tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two and first["after"]["loss"] == second["after"]["loss"]
    assert any("run/config.resolved.yaml" in command for command in first["commands"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: x\nstep: []\n", "unknown key step. Did you mean steps"),
        ("model: x\n", "there are no steps"),
        ("verb: fitt\n", "unknown verb fitt. Did you mean fit"),
        ("verb: fit\nbudgett: storage=1MB\n", "unknown key budgett. Did you mean budget"),
        ("verb: fit\nbudget: storage=1\n", "has no unit"),
        ("verb: measure\nmodel: x\n", "meter is missing"),
        ("verb: trial\nmethods: all\n", "unknown key methods. Did you mean method"),
        ("model: x\nsteps: [{verb: merge, optoins: {}}]\n", "is not a step"),
        ("model: x\nsteps: [{verb: compress, method: int8}]\ntraining: {max_step: 1}\n", "unknown training setting"),
    ],
)
def test_refused_before_a_folder_is_made(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(UsageError, match=words):
        run_file(tmp_path / "p.yaml", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
