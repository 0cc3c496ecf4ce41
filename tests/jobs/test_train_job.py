from __future__ import annotations

import json
from pathlib import Path

import pytest

from shoestring.core.errors import UsageError
from shoestring.jobs import train as job
from shoestring.jobs.compress import CompressRequest, compress
from shoestring.jobs.train import TrainRequest, train

SETTINGS = {"max_steps": 12, "per_device_train_batch_size": 16, "learning_rate": 1e-2}


def test_an_adapter_that_learned(tiny: Path, data: Path, tmp_path: Path) -> None:
    request = TrainRequest(str(tiny), str(data), "lora", {"r": 4}, SETTINGS)
    result = train(request, out=tmp_path / "out")
    assert result["loss_after"] < result["loss_before"] - 0.05
    assert (result["steps"], result["method"]) == (12, "lora") and result["tokens"] > 0 and result["trainable"] > 0
    adapter = json.loads((tmp_path / "out" / "model" / "adapter_config.json").read_text())
    assert adapter["r"] == 4 and adapter["base_model_name_or_path"] == str(tiny)
    said: list[str] = []
    assert train(request, out=tmp_path / "out", resume=True, say=said.append)["loss_after"] == result["loss_after"]
    assert len(said) == 1 and "nothing is left to do" in said[0]


def test_the_method_is_the_default_of_those_that_train(tiny: Path, data: Path, tmp_path: Path) -> None:
    result = train(TrainRequest(str(tiny), str(data), training={**SETTINGS, "max_steps": 1}), out=tmp_path / "out")
    assert result["method"] == "lora"


def test_a_run_that_broke_goes_on(tiny: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = TrainRequest(str(tiny), str(data), "lora", training={**SETTINGS, "max_steps": 2})

    def breaks(ref: object, **options: object) -> object:
        if "work" in str(ref):
            raise OSError("unplugged")
        return true(ref, **options)

    true = job.open_model
    with monkeypatch.context() as patch:
        patch.setattr(job, "open_model", breaks)
        with pytest.raises(OSError, match="unplugged"):
            train(request, out=tmp_path / "out")
    said: list[str] = []
    result = train(request, out=tmp_path / "out", resume=True, say=said.append)
    assert not list((tmp_path / "out" / "run" / "work").glob("lora"))
    assert result["steps"] == 2 and (tmp_path / "out" / "model" / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    ("change", "words"), [({"method": "int8"}, "int8 does not train"), ({"model": "/no/such"}, "/no/such")]
)
def test_refused_before_a_folder_is_made(change: dict, words: str, tiny: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words):
        train(TrainRequest(**{"model": str(tiny), "data": str(data), **change}), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_data_without_a_part_to_judge_by_is_refused_before_a_folder_is_made(tiny: Path, tmp_path: Path) -> None:
    alike = tmp_path / "alike.jsonl"
    alike.write_text('{"prompt": "w1", "completion": "w2"}\n' * 40)
    words = "alike.jsonl has too little in it to split: 40 examples give parts of 40, 0 and 0"
    with pytest.raises(UsageError, match=words):
        train(TrainRequest(str(tiny), str(alike), "lora"), out=tmp_path / "out")
    with pytest.raises(UsageError, match=words):
        compress(CompressRequest(str(tiny), "int4", data=str(alike)), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_option_that_does_not_exist_is_named(tiny: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no option rank"):
        train(TrainRequest(str(tiny), str(data), "lora", {"rank": 4}, SETTINGS), out=tmp_path / "out")
