"""Models whose folders bring Python code of their own: every job runs it when it is told so, and not otherwise."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from shoestring.core.errors import UsageError
from shoestring.jobs.at_work import at_work
from shoestring.jobs.compress import CompressRequest, compress
from shoestring.jobs.evaluate import evaluate
from shoestring.jobs.export import export
from shoestring.jobs.fit import FitRequest, fit
from shoestring.jobs.generate import generate
from shoestring.jobs.merge import merge
from shoestring.jobs.train import TrainRequest, train

_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
_TRUST: dict[str, Any] = {"trust_remote_code": True}
_STEPS = {"max_steps": 2, "per_device_train_batch_size": 4}


@pytest.fixture
def own(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model that only its own code can build."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder = tmp_path / "own"
    shutil.copytree(tiny, folder)
    (folder / "own.py").write_text(_CODE)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own",
        "architectures": ["OwnForCausalLM"],
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_compressed_and_unpacked(own: Path, data: Path, tmp_path: Path) -> None:
    request = CompressRequest(str(own), "int8", data=str(data), keep=0.5, eval_examples=2, **_TRUST)
    made = compress(request, out=tmp_path / "out")["model"]
    assert 'from_pretrained("PATH", trust_remote_code=True)' in (Path(made) / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(made, **_TRUST)
    assert type(model).__name__ == "OwnForCausalLM"
    plain = AutoModelForCausalLM.from_pretrained(export(made, tmp_path / "plain", dtype="float32", **_TRUST), **_TRUST)
    ids = torch.tensor([[5, 6, 7]])
    assert (plain(ids).logits - model(ids).logits).norm() < 0.05 * model(ids).logits.norm()
    assert evaluate(made, data=data, limit=2, work=False, **_TRUST)["quality"]["loss"]["value"] > 0
    assert len(list(generate(made, "w5", max_new_tokens=3, raw=True, **_TRUST))) >= 0
    with pytest.raises(UsageError, match="auto_map.*--trust-remote-code"):
        export(made, tmp_path / "refused")
    with pytest.raises(UsageError, match="no exact form in GGUF.*OwnForCausalLM"):
        export(made, tmp_path / "own.gguf", "gguf", **_TRUST)


def test_trained_and_folded(own: Path, data: Path, tmp_path: Path) -> None:
    request = TrainRequest(str(own), data=str(data), eval_examples=2, training=_STEPS, **_TRUST)
    adapter = train(request, out=tmp_path / "out")["model"]
    folded = merge(adapter, tmp_path / "folded", **_TRUST)
    assert folded["difference"] < 1e-3
    with pytest.raises(UsageError, match="auto_map.*--trust-remote-code"):
        merge(adapter, tmp_path / "refused")
    request = CompressRequest(
        str(own), "lora,int8", data=str(data), keep=0.5, eval_examples=2, training=_STEPS, **_TRUST
    )
    assert Path(compress(request, out=tmp_path / "stack")["model"]).is_dir()


def test_fitted(quick: None, own: Path, data: Path, tmp_path: Path) -> None:
    request = FitRequest(
        str(own), data=str(data), budget="storage=1MB", keep=0.5, eval_examples=4, training=_STEPS, **_TRUST
    )
    assert fit(request, out=tmp_path / "out")["status"] == "done"


def test_at_work(own: Path) -> None:
    with pytest.raises(UsageError, match="auto_map.*--trust-remote-code"):
        at_work(own, prompt_tokens=4, new_tokens=2, repeats=1)
    assert at_work(own, prompt_tokens=4, new_tokens=2, repeats=1, **_TRUST)["latency"] > 0
