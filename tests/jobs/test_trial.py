from __future__ import annotations

import json
import xml.etree.ElementTree as xml
from pathlib import Path
from typing import Any

import pytest

from shoestring.core.errors import DoesNotFit, ShoestringError, UsageError
from shoestring.jobs import trial as job
from shoestring.jobs.run import run_file
from shoestring.jobs.trial import TrialRequest, trial
from shoestring.jobs.trial_report import markdown
from shoestring.planner.plan import by_verb

TRAINING = {"max_steps": 6, "per_device_train_batch_size": 8}
FIGURES = {
    "interval": [2.0, 4.0], "steps": 200, "seconds": 50.0, "seconds_per_step": 0.25, "stopped_because": "max_steps",
    "above_floor": 1e8, "storage": 1000, "adapter": "somewhere", "trainable": 100, "peak_memory": 1e9,
}  # fmt: skip


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the process of each method says; "" is the untrained model. What was asked is kept under "asked"."""
    told: dict[str, Any] = {"asked": [], "": {"loss": 3.5, "interval": None}}

    def ask(asked: dict[str, Any]) -> dict[str, Any]:
        told["asked"].append(asked)
        answer = told[asked["method"]]
        if isinstance(answer, BaseException):
            raise answer
        return {**FIGURES, **answer} if "loss" in answer else answer

    monkeypatch.setattr(job, "_ask", ask)
    return told


def names(result: dict[str, Any]) -> list[str]:
    return [row["method"] for row in result["rows"]]


def test_real_methods_in_processes_of_their_own(tiny: Path, data: Path, tmp_path: Path) -> None:
    request = TrialRequest(str(tiny), str(data), "lora,ia3", training=TRAINING, eval_examples=8)
    said: list[str] = []
    result = trial(request, out=tmp_path / "out", say=said.append)
    assert sorted(names(result)) == ["ia3", "lora"] and {row["status"] for row in result["rows"]} == {"done"}, result
    assert [row["loss"] for row in result["rows"]] == sorted(row["loss"] for row in result["rows"])
    for row in result["rows"]:
        low, high = row["interval"]
        assert low < row["loss"] < high and row["steps"] == 6 and row["seconds"] > 0
        assert 0 < row["above_floor"] < row["peak_memory"]
        held = {file.name for file in Path(row["adapter"]).iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors"} <= held
        assert row["storage"] == sum(f.stat().st_size for f in Path(row["adapter"]).glob("adapter_*"))
    larger, smaller = sorted(result["rows"], key=lambda row: -row["trainable"])
    assert larger["method"] == "lora" and larger["storage"] > smaller["storage"]
    assert any(row["front"] for row in result["rows"])
    assert json.loads((tmp_path / "out" / "trial.json").read_text())["rows"] == result["rows"]
    text = (tmp_path / "out" / "trial.md").read_text()
    assert "| lora |" in text and "pareto.svg" in text and "untrained" in text
    words = "".join(xml.parse(tmp_path / "out" / "pareto.svg").getroot().itertext())
    assert "lora" in words and "ia3" in words and "peak memory" in words
    assert trial(request, out=tmp_path / "out", resume=True) == json.loads(json.dumps(result))


def test_all_is_every_method_that_trains(answers: dict[str, Any], tiny: Path, tmp_path: Path) -> None:
    every = [m.name for m in by_verb("train")]
    answers |= {name: {"loss": 3.0} for name in every}
    said: list[str] = []
    result = trial(TrialRequest(str(tiny)), out=tmp_path / "out", say=said.append)
    assert sorted(names(result)) == sorted(every)
    after = [line for line in said if "held-out loss" in line]
    assert after[0] == "  held-out loss 3.5000" and after[-1] == "  held-out loss 3.0000, 0 s"
    assert after[1] == f"  held-out loss 3.0000, 0 s; {len(every) - 1} more, about 1 min"
    asked = answers["asked"][-1]["training"]
    assert asked["max_steps"] == 200 and asked["save_steps"] == 0 and "max_seconds" not in asked


def test_a_method_that_fails_is_a_row(answers: dict[str, Any], tiny: Path, tmp_path: Path) -> None:
    answers |= {"lora": {"error": "it does not fit"}, "ia3": {"loss": 3.0}}
    result = trial(TrialRequest(str(tiny), method="lora,ia3"), out=tmp_path / "out")
    assert names(result) == ["ia3", "lora"] and result["rows"][1]["reason"] == "it does not fit"
    assert "failed: it does not fit" in markdown(result)


def test_when_all_fail_it_is_an_error_with_the_table(answers: dict[str, Any], tiny: Path, tmp_path: Path) -> None:
    answers["lora"] = {"error": "it does not fit"}
    with pytest.raises(ShoestringError, match="it does not fit") as error:
        trial(TrialRequest(str(tiny), method="lora"), out=tmp_path / "out")
    assert names(error.value.result) == ["lora"] and not (tmp_path / "out" / "pareto.svg").exists()


def test_the_front_is_of_what_keeps_the_budget(answers: dict[str, Any], tiny: Path, tmp_path: Path) -> None:
    answers |= {
        "lora": {"loss": 2.0, "peak_memory": 3e9},  # best, and over the budget
        "ia3": {"loss": 2.5, "trainable": 10},
        "vera": {"loss": 2.6, "trainable": 10},  # beaten by the one before
        "dora": {"loss": 2.4, "trainable": 90, "stopped_because": "max_seconds", "seconds": 601.0, "steps": 20},
    }
    request = TrialRequest(str(tiny), method="lora,ia3,vera,dora", budget="memory=2GB,time=10m")
    result = trial(request, out=tmp_path / "out")
    assert names(result) == ["lora", "dora", "ia3", "vera"]
    assert [row["front"] for row in result["rows"]] == [False, True, True, False]
    assert [row["status"] for row in result["rows"]] == ["over budget", "done", "done", "done"]
    assert result["rows"][0]["reason"] == "memory 3.0 GB > 2.0 GB"
    assert "time ended it after 20 steps" in markdown(result)
    assert {asked["training"].get("max_seconds") for asked in answers["asked"]} == {600}


def test_when_none_keeps_the_budget_it_is_an_error(answers: dict[str, Any], tiny: Path, tmp_path: Path) -> None:
    answers["lora"] = {"loss": 2.0}
    request = TrialRequest(str(tiny), method="lora", budget="memory=900MB")
    with pytest.raises(DoesNotFit, match="no method stays within memory=900MB"):
        trial(request, out=tmp_path / "out")
    with pytest.raises(DoesNotFit):
        trial(request, out=tmp_path / "out", resume=True)


def test_finished_rows_are_kept(answers: dict[str, Any], tiny: Path, tmp_path: Path) -> None:
    answers |= {"lora": {"loss": 3.0}, "ia3": KeyboardInterrupt()}
    request = TrialRequest(str(tiny), method="lora,ia3")
    with pytest.raises(KeyboardInterrupt):
        trial(request, out=tmp_path / "out")
    answers |= {"asked": [], "ia3": {"loss": 2.0}}
    assert names(trial(request, out=tmp_path / "out", resume=True)) == ["ia3", "lora"]
    assert [asked["method"] for asked in answers["asked"]] == ["ia3"]


def test_what_it_resolved_to_runs_again(answers: dict[str, Any], tiny: Path, tmp_path: Path) -> None:
    answers |= {"lora": {"loss": 3.0}, "ia3": {"loss": 2.0}}
    first = trial(TrialRequest(str(tiny), method="lora,ia3"), out=tmp_path / "out")
    again = run_file(tmp_path / "out" / "run" / "config.resolved.yaml", out=tmp_path / "again")
    assert names(again) == names(first)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "int8"}, "int8 does not train"),
        ({"method": "lora,lara"}, "unknown method lara"),
        ({"method": "lora,lora"}, "named twice"),
        ({"method": ","}, "no method is named"),
        ({"method": "lora,ia3", "options": {"r": 4}}, "the option r is given to 2 methods"),
        ({"budget": "energy=3kJ"}, "does not measure energy"),
        ({"model": "/no/such"}, "/no/such"),
    ],
)
def test_refused_before_anything_is_made(change: dict, words: str, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words):
        trial(TrialRequest(**{"model": str(tiny), **change}), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("does", "words"),
    [
        ("kill -9 $$", "ended by SIGKILL, probably short of memory"),
        ("echo a >&2; echo last words >&2; exit 3", "last words"),
        ("exit 3", "ended with code 3 and said nothing"),
    ],
)
def test_a_process_that_dies_says_how(does: str, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\ncat > /dev/null\n{does}\n")
    python.chmod(0o755)
    monkeypatch.setattr(job.sys, "executable", str(python))
    assert words in job._ask({})["error"]


def test_an_error_in_the_process_is_one_sentence(tiny: Path, data: Path, tmp_path: Path) -> None:
    request = TrialRequest(str(tiny), str(data), "lora", {"rank": 4}, training=TRAINING, eval_examples=8)
    with pytest.raises(ShoestringError, match="no option rank"):
        trial(request, out=tmp_path / "out")
