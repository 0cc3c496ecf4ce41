from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shoestring import models
from shoestring.core.budget import Budget
from shoestring.core.errors import DoesNotFit, QualityGate, UsageError
from shoestring.jobs import fit as job
from shoestring.jobs.fit import FitRequest, fit
from shoestring.jobs.runs import open_run
from shoestring.planner import machine

KEYS = {
    "name", "created", "status", "request", "before", "adapted", "after", "limits", "quality_kept", "compared_with",
    "comparison", "candidates", "prediction_error", "spent", "stages", "loss_curve", "samples", "environment",
    "commands", "python", "notes", "model", "missed",
}  # fmt: skip
STEPS = {"max_steps": 4, "per_device_train_batch_size": 8, "logging_steps": 1}


def asked(model: Path, data: Path, **changes: Any) -> FitRequest:
    plain: dict[str, Any] = dict(
        model=str(model), data=str(data), budget="storage=1MB", keep=0.5, eval_examples=8, training=STEPS
    )
    return FitRequest(**{**plain, **changes})


def manifest(out: Path) -> dict[str, Any]:
    return json.loads((out / "run" / "manifest.json").read_text())


def tight(request: FitRequest, share: float) -> str:
    """A storage limit that the closest candidate passes `share` times over."""
    shape = models.shape_of(request.model)
    candidates, _ = job.plans(request, shape, Budget.parse("storage=1B"))
    return f"storage={int(candidates[0].predicted.storage / share)}B"


def test_from_request_to_report(tiny: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one run here whose figures are measured in processes of their own."""
    monkeypatch.setattr(machine, "_floor", lambda: 500_000_000)
    out, said = tmp_path / "out", []
    limits = "storage=150kB,memory=2GB"
    result = fit(asked(tiny, data, budget=limits, compress="int4"), out=out, say=said.append)
    assert set(result) == KEYS and result["status"] == "done" and result["missed"] == []
    assert json.loads((out / "run" / "result.json").read_text()) == json.loads(json.dumps(result, default=str))
    assert result["limits"] == {"storage": 150_000, "memory": 2e9}
    files = [f for f in (out / "model").rglob("*") if f.is_file()]
    card = (out / "model" / "README.md").read_text()
    assert sum(f.stat().st_size for f in files) - len(card.encode()) == result["after"]["storage"] < 150_000
    assert 100e6 < result["after"]["memory"] < 2e9 and result["after"]["decode_tokens_per_s"] > 0
    assert "import shoestring.methods.quantizers" in card and "lora → int4" in card
    assert "import shoestring.methods.quantizers" in result["python"]
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    ids = AutoTokenizer.from_pretrained(out / "model")("w5 w6", return_tensors="pt").input_ids
    assert torch.isfinite(model(ids).logits).all()
    assert (out / "report.html").read_text().startswith("<!") and not (out / "run" / "work").exists()
    assert {p.name for p in (out / "run").iterdir()} >= {"manifest.json", "config.resolved.yaml", "plan.json",
                                                        "ledger.json", "result.json"}  # fmt: skip
    assert manifest(out)["status"] == "done" and manifest(out)["seconds"] > 0
    assert [c["verdict"] for c in result["candidates"]].count("chosen") == 1
    assert len(result["loss_curve"]) >= 4 and len(result["samples"]) == 3
    assert set(result["prediction_error"]) >= {"storage", "memory"}
    assert abs(result["prediction_error"]["storage"]) < 0.1
    assert any("training lora" in line for line in said)


def test_the_generated_snippet_runs_in_a_fresh_interpreter(tiny: Path, data: Path, tmp_path: Path, quick: None) -> None:
    result = fit(asked(tiny, data, adapt="none", compress="int8"), out=tmp_path / "out")
    code = result["python"] + "\nprint(type(model).__name__, len(tokenizer))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.split() == ["LlamaForCausalLM", "64"], done.stderr


def test_nothing_to_do_copies_the_model(
    tiny: Path, data: Path, tmp_path: Path, quick: None, digest: Callable[[Path], str]
) -> None:
    before = digest(tiny)
    result = fit(asked(tiny, data, adapt="none", compress="none"), out=tmp_path / "out")
    assert digest(tiny) == before, "the user's own folder was changed"
    model = tmp_path / "out" / "model"
    assert (model / "model.safetensors").read_bytes() == (tiny / "model.safetensors").read_bytes()
    assert "import shoestring" not in (model / "README.md").read_text()
    assert [c["name"] for c in result["candidates"]] == ["as it is"]
    assert result["quality_kept"]["value"] == pytest.approx(1.0) and result["adapted"] is None


def test_over_budget_keeps_the_closest(tiny: Path, data: Path, tmp_path: Path, quick: None) -> None:
    request = asked(tiny, data, adapt="none", compress="int4")
    request = replace(request, budget=tight(request, 1.3))
    with pytest.raises(DoesNotFit, match="Relax the budget to storage=") as caught:
        fit(request, out=tmp_path / "out")
    result = caught.value.result
    assert caught.value.exit_code == 3 and result["status"] == "over budget"
    assert result["missed"][0]["resource"] == "storage"
    assert AutoModelForCausalLM.from_pretrained(result["model"]) is not None
    assert manifest(tmp_path / "out")["status"] == "over budget"
    remedy = str(caught.value).partition("Relax the budget to ")[2].partition(", or bring")[0]
    assert fit(replace(request, budget=remedy), out=tmp_path / "relaxed")["status"] == "done"
    # Asked again, the verdict is the same error and no work.
    with pytest.raises(DoesNotFit):
        fit(request, out=tmp_path / "out", resume=True, say=lambda line: None)


def test_what_no_fixed_setting_keeps_is_kept_by_formats_for_each_layer(
    tiny: Path, data: Path, tmp_path: Path, quick: None
) -> None:
    request = asked(tiny, data, adapt="none", keep=0.1)
    limit = tight(replace(request, compress="int4"), 1.05)
    assert fit(replace(request, budget=limit), out=tmp_path / "out")["status"] == "done"


def test_a_limit_on_memory_is_held_against_what_was_measured(
    tiny: Path, data: Path, tmp_path: Path, quick: None
) -> None:
    with pytest.raises(DoesNotFit, match="memory 600 MB > 550 MB") as caught:
        fit(asked(tiny, data, budget="memory=550MB", adapt="none", compress="none"), out=tmp_path / "out")
    assert caught.value.result["missed"] == [{"resource": "memory", "value": 600_000_000, "limit": 550e6}]


def test_below_quality_keeps_the_best(
    tiny: Path, data: Path, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def worse(*args: Any) -> Any:
        return replace(true(*args), value=2.0)

    true = job.perplexity_ratio
    monkeypatch.setattr(job, "perplexity_ratio", worse)
    with pytest.raises(QualityGate, match="keeps 50.0% of the quality, and --keep asks for 90.0%") as caught:
        fit(asked(tiny, data, adapt="none", compress="int4", keep=0.9), out=tmp_path / "out")
    assert caught.value.exit_code == 4 and caught.value.result["status"] == "below quality"
    assert (tmp_path / "out" / "model" / "config.json").is_file() and (tmp_path / "out" / "report.html").is_file()
    assert len([c for c in caught.value.result["candidates"] if c["measured"]]) == job._TRIES


def test_a_hopeless_budget_is_refused_before_anything_is_made(
    tiny: Path, data: Path, tmp_path: Path, quick: None
) -> None:
    with pytest.raises(DoesNotFit, match="nothing fits storage=1kB.*predicted to need storage"):
        fit(asked(tiny, data, budget="storage=1kB"), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_too_few_examples(tiny: Path, tmp_path: Path, quick: None) -> None:
    file = tmp_path / "few.jsonl"
    file.write_text('{"prompt": "w5", "completion": "w6"}\n' * 3)
    with pytest.raises(UsageError, match="too little in it to split: 3 examples"):
        fit(asked(tiny, file), out=tmp_path / "out")
    assert manifest(tmp_path / "out")["status"] == "failed"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"budget": "network=1MB"}, "does not measure network"),
        ({"budget": "storage=1"}, "has no unit"),
        ({"keep": 0.0}, "keep is 0"),
        ({"keep": 1.5}, "keep is 1.5"),
        ({"adapt": "int4"}, "int4 does not train"),
        ({"compress": "lora"}, "lora does not compress"),
        ({"compress": "int5"}, "unknown method int5"),
    ],
)
def test_refused_before_any_work(
    changes: dict[str, Any], words: str, tiny: Path, data: Path, tmp_path: Path, quick: None
) -> None:
    with pytest.raises(UsageError, match=words):
        fit(asked(tiny, data, **changes), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_training_that_harms_is_left_out(
    tiny: Path, data: Path, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def harmed(*given: Any) -> Any:
        model, log = adapt(*given)
        torch.manual_seed(0)
        table = model.model.get_input_embeddings().weight
        table.data.add_(torch.randn_like(table))
        return model, log

    adapt, said = job._Fit._adapt, list[str]()
    monkeypatch.setattr(job._Fit, "_adapt", harmed)
    result = fit(asked(tiny, data, compress="none"), out=tmp_path / "out", say=said.append)
    assert any("training made the model no better" in line for line in said)
    assert result["adapted"]["loss"]["value"] > result["before"]["loss"]["value"]
    assert result["after"]["loss"]["value"] == pytest.approx(result["before"]["loss"]["value"], abs=1e-5)
    assert result["compared_with"] == "the original model"
    kept, original = (AutoModelForCausalLM.from_pretrained(p) for p in (result["model"], tiny))
    assert all(torch.equal(a, b) for a, b in zip(kept.parameters(), original.parameters()))


def test_a_finished_run_is_not_done_again(
    tiny: Path, data: Path, tmp_path: Path, quick: None, digest: Callable[[Path], str]
) -> None:
    request, said = asked(tiny, data, adapt="none", compress="int8"), []
    result = fit(request, out=tmp_path / "out")
    before = digest(tmp_path / "out")
    again = fit(request, out=tmp_path / "out", resume=True, say=said.append)
    assert again == json.loads(json.dumps(result, default=str)) and digest(tmp_path / "out") == before
    assert len(said) == 1 and "nothing is left to do" in said[0]
    with pytest.raises(UsageError, match="already holds a run"):
        fit(request, out=tmp_path / "out")
    assert digest(tmp_path / "out") == before


def test_resume_is_for_the_same_request(tiny: Path, data: Path, tmp_path: Path, quick: None) -> None:
    request = asked(tiny, data, adapt="none")
    with pytest.raises(ZeroDivisionError):
        fit(request, out=tmp_path / "out", say=lambda line: 1 / 0 if "measuring" in line else None)
    assert manifest(tmp_path / "out")["status"] == "failed"
    with pytest.raises(UsageError, match="was started with budget=storage=1MB, and now budget=storage=2MB"):
        fit(replace(request, budget="storage=2MB"), out=tmp_path / "out", resume=True)
    assert fit(request, out=tmp_path / "out", resume=True)["status"] == "done"


_CHILD = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, {here!r})
from job_cases import fake_at_work
from shoestring.jobs import fit
from shoestring.planner import machine
machine._floor = lambda: 500_000_000
fit.at_work = fake_at_work
fit.fit(fit.FitRequest(**json.loads(sys.argv[1])), out=sys.argv[2])
"""


def test_killed_while_training_it_goes_on(tiny: Path, data: Path, tmp_path: Path, quick: None) -> None:
    out = tmp_path / "out"
    training = {**STEPS, "max_steps": 100, "save_steps": 5}
    request = asked(tiny, data, training=training, compress="int8", keep=0.2)
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD.format(here=str(Path(__file__).parent)), json.dumps(request.__dict__), str(out)],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not (found := list(out.rglob("checkpoint-*/weights.safetensors"))):
            assert child.poll() is None, child.communicate()[1]
            assert time.monotonic() < deadline, "no checkpoint came"
            time.sleep(0.02)
        # Two on one folder: the second is turned away and says by whom.
        with pytest.raises(UsageError, match=f"in use by process {child.pid}"):
            fit(request, out=out, resume=True)
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.communicate()
    assert found and manifest(out)["status"] == "running" and not (out / "model").exists()
    result = fit(request, out=out, resume=True)
    assert result["status"] == "done" and manifest(out)["status"] == "done" and not (out / "run" / "work").exists()
    steps = [row["step"] for row in result["loss_curve"] if "step" in row]
    assert steps[-1] == 100 and steps == sorted(steps), "the log holds both parts"
    alone = fit(request, out=tmp_path / "alone")
    weights = [(run / "model" / "model.safetensors").read_bytes() for run in (out, tmp_path / "alone")]
    assert weights[0] == weights[1], "a run that was killed gives the model of one that was not"
    assert alone["after"]["loss"] == result["after"]["loss"]


def test_a_folder_in_use(tmp_path: Path) -> None:
    with (
        open_run(tmp_path / "out", "fit", {"a": 1}),
        pytest.raises(UsageError, match="in use"),
        open_run(tmp_path / "out", "fit", {"a": 1}, resume=True),
    ):
        pass
