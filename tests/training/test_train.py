from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from training_cases import lora, make_rows, options
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback

from shoestring.core.errors import ShoestringError, UsageError
from shoestring.core.ledger import Ledger
from shoestring.lab import tiny
from shoestring.models import surgery
from shoestring.training import Interrupted, checkpoints, train


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def curve(result):
    return [(r["step"], r.get("loss"), r.get("eval_loss"), r.get("lr")) for r in result.log]


class StopAfter(TrainerCallback):
    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            self.action()


class Stopped(Exception):
    pass


def stop():
    raise Stopped


def test_learns_logs_and_leaves_the_model_as_it_was_beside_its_weights(rows, tmp_path):
    model = lora(tiny.model("llama")).eval()
    ledger = Ledger()
    with ledger:
        result = train(model, rows, rows[:8], options(max_steps=40, learning_rate=2e-2), tmp_path, ledger=ledger)
    assert result.loss < 0.96 * result.log[0]["loss"]
    assert result.steps == 40 and result.stopped_because == "max_steps" and result.eval_loss is not None
    assert ledger.figure("train", "tokens").value == result.tokens
    assert not model.training and model.config.use_cache
    surgery.replace_module(model, "base_model.model.model.norm", torch.nn.Identity())


def test_counts_tokens_without_padding(rows, tmp_path):
    result = train(lora(tiny.model()), rows, [], options(max_steps=-1, num_train_epochs=2), tmp_path)
    assert result.tokens == 2 * sum(len(row["input_ids"]) for row in rows)
    assert result.trained_tokens == 2 * sum(len(row["input_ids"]) - 2 for row in rows)
    assert result.stopped_because == "num_train_epochs" and result.steps == 20


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_accumulated_small_batches_equal_one_large(rows, tmp_path, family):
    rows = [{name: ids[:8] for name, ids in row.items()} for row in rows if len(row["input_ids"]) >= 8]
    curves = []
    for name, batch, accumulated in (("large", 8, 1), ("small", 2, 4)):
        model = tiny.model(family, **({"dropout_rate": 0.0} if family == "t5" else {}))
        chosen = options(
            max_steps=1, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulated, max_grad_norm=1e9
        )
        result = train(model, rows[:8], [], chosen, tmp_path / name)
        curves.append([r["grad_norm"] for r in result.log])
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_gradient_checkpointing_changes_nothing_but_memory(rows, tmp_path):
    ends = []
    for on in (False, True):
        model = lora(tiny.model())
        train(model, rows, [], options(gradient_checkpointing=on, max_steps=4), tmp_path / str(on))
        ends.append(weights(model))
    for name in ends[0]:
        torch.testing.assert_close(ends[0][name], ends[1][name])


def test_the_held_out_loss_does_not_depend_on_the_batches(rows, tmp_path):
    found = []
    for batch in (1, 8):
        chosen = options(max_steps=1, learning_rate=0.0, per_device_train_batch_size=batch)
        found.append(train(lora(tiny.model()), rows, rows[:9], chosen, tmp_path / str(batch)).eval_loss)
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_bfloat16_follows_the_float32_curve(rows, tmp_path):
    curves = {}
    for dtype in ("float32", "bfloat16"):
        model = lora(tiny.model(dtype=torch.bfloat16))
        result = train(model, rows, [], options(max_steps=20, dtype=dtype), tmp_path / dtype)
        curves[dtype] = [record["loss"] for record in result.log]
        assert all(p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16) for p in model.parameters())
    assert curves["bfloat16"] == pytest.approx(curves["float32"], rel=0.03)


def test_full_training_keeps_float32_masters(rows, tmp_path):
    model = tiny.model(dtype=torch.bfloat16)
    before = weights(model)
    # A step far below what bfloat16 resolves: lost every time unless the weights are held in float32.
    train(model, rows, [], options(max_steps=200, learning_rate=2e-5, logging_steps=50, save_steps=0), tmp_path)
    moved = sum(int((before[name] != now).sum()) for name, now in weights(model).items())
    assert moved > 0.3 * sum(p.numel() for p in model.parameters())
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


def test_a_time_limit_is_kept_and_the_schedule_reaches_its_end(rows, tmp_path):
    class Slow(TrainerCallback):
        def on_step_begin(self, *_, **__):
            time.sleep(0.03)

    began = time.monotonic()
    chosen = options(max_steps=10_000, max_seconds=5.0, save_steps=0, warmup_ratio=0.05)
    result = train(lora(tiny.model()), rows, rows[:4], chosen, tmp_path, callbacks=[Slow()])
    assert time.monotonic() - began < 6.5
    assert result.stopped_because == "max_seconds" and 3 < result.steps < 200
    rates = [record["lr"] for record in result.log if "lr" in record]
    assert rates[-1] < 0.05 * chosen.learning_rate < max(rates)


def test_an_unbroken_run_and_a_resumed_one_are_equal_bit_for_bit(rows, tmp_path):
    def model():
        return lora(tiny.model(), lora_dropout=0.2)

    whole = model()
    unbroken = train(whole, rows, rows[:8], options(max_steps=23, eval_steps=5), tmp_path / "whole")
    with pytest.raises(Stopped):
        train(
            model(),
            rows,
            rows[:8],
            options(max_steps=23, eval_steps=5),
            tmp_path / "broken",
            callbacks=[StopAfter(14, stop)],
        )
    (tmp_path / "broken").rename(tmp_path / "moved")
    torch.manual_seed(99)
    again = model()
    resumed = train(again, rows, rows[:8], options(max_steps=23, eval_steps=5), tmp_path / "moved", resume=True)
    assert same(weights(whole), weights(again))
    assert curve(unbroken) == curve(resumed)
    assert unbroken.tokens == resumed.tokens


def test_a_finished_run_is_not_run_again(rows, tmp_path):
    model = lora(tiny.model())
    done = train(model, rows, [], options(), tmp_path)
    again = lora(tiny.model())
    result = train(again, rows, [], options(), tmp_path, resume=True, callbacks=[StopAfter(1, stop)])
    assert same(weights(model), weights(again)) and result.log == done.log and result.steps == 12


KILLED = """
import sys, torch
sys.path.insert(0, {here!r})
from training_cases import lora, make_rows, options
from shoestring.lab import tiny
from shoestring.training import train
torch.set_num_threads(1)
model = lora(tiny.model(), lora_dropout=0.1)
print("go", flush=True)
train(model, make_rows(), [], options(max_steps=60, save_steps=5), {folder!r}, resume=True)
torch.save(dict((n, p) for n, p in model.named_parameters() if p.requires_grad), {folder!r} + "/end.pt")
"""


def test_a_run_killed_at_any_moment_resumes_to_the_same_end(tmp_path):
    whole = lora(tiny.model(), lora_dropout=0.1)
    unbroken = train(whole, make_rows(), [], options(max_steps=60, save_steps=5), tmp_path / "whole")
    folder = tmp_path / "killed"
    script = KILLED.format(here=str(Path(__file__).parent), folder=str(folder))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    for wait in (0.15,):
        child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment)
        assert child.stdout is not None
        child.stdout.readline()
        before = len(checkpoints.checkpoints(folder))
        until = time.monotonic() + 60
        while len(checkpoints.checkpoints(folder)) <= before and child.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(wait)
        child.send_signal(signal.SIGKILL)
        child.wait()
    again = lora(tiny.model(), lora_dropout=0.1)
    result = train(again, make_rows(), [], options(max_steps=60, save_steps=5), folder, resume=True)
    assert same(weights(whole), weights(again))
    assert curve(result) == curve(unbroken)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_request_to_stop_leaves_one_checkpoint_to_resume_from(rows, tmp_path, signum):
    whole = lora(tiny.model())
    train(whole, rows, [], options(), tmp_path / "whole")
    again = lora(tiny.model())
    ask = StopAfter(6, lambda: os.kill(os.getpid(), signum))
    with pytest.raises(Interrupted) as error:
        train(again, rows, [], options(), tmp_path / "asked", callbacks=[ask])
    assert error.value.exit_code == 128 + signum
    assert checkpoints.newest_complete(tmp_path / "asked").step in (6, 7)
    train(again, rows, [], options(), tmp_path / "asked", resume=True)
    assert same(weights(whole), weights(again))


@pytest.mark.parametrize(
    "change, field",
    [
        ({"seed": 5}, "seed"),
        ({"per_device_train_batch_size": 2}, "per_device_train_batch_size"),
        ({"learning_rate": 1.0}, "learning_rate"),
    ],
)
def test_resuming_with_other_options_is_refused(rows, tmp_path, change, field):
    train(lora(tiny.model()), rows, [], options(max_steps=4), tmp_path)
    with pytest.raises(UsageError, match=field):
        train(lora(tiny.model()), rows, [], options(max_steps=4, **change), tmp_path, resume=True)


def test_resuming_with_other_data_rank_or_base_is_refused(rows, tmp_path):
    chosen = options(max_steps=4)
    train(lora(tiny.model()), rows, [], chosen, tmp_path)
    with pytest.raises(UsageError, match="data was"):
        train(lora(tiny.model()), make_rows(seed=1), [], chosen, tmp_path, resume=True)
    with pytest.raises(UsageError, match="adapter default.r was 4, now 8"):
        train(lora(tiny.model(), rank=8), rows, [], chosen, tmp_path, resume=True)
    with pytest.raises(UsageError, match="base model"):
        train(lora(tiny.model(seed=1)), rows, [], chosen, tmp_path, resume=True)
    with pytest.raises(UsageError, match="another run"):
        train(lora(tiny.model()), rows, [], chosen, tmp_path)


def test_another_library_version_needs_force(rows, tmp_path, monkeypatch):
    train(lora(tiny.model()), rows, [], options(max_steps=4), tmp_path)
    monkeypatch.setattr("shoestring.training.fingerprint.version", lambda package: "0.0")
    with pytest.raises(UsageError, match=r"version.torch.*force"):
        train(lora(tiny.model()), rows, [], options(max_steps=4), tmp_path, resume=True)
    train(lora(tiny.model()), rows, [], options(max_steps=4), tmp_path, resume="force")


def test_a_loss_that_is_not_finite_names_the_row(rows, tmp_path):
    rows = [{**row, "source": "data.jsonl", "line": number + 1} for number, row in enumerate(rows)]
    rows[17]["input_ids"] = [63, *rows[17]["input_ids"]]
    rows[17]["labels"] = [-100, *rows[17]["labels"]]
    model = lora(tiny.model(tie_word_embeddings=False))
    with torch.no_grad():
        model.get_input_embeddings().weight[63] = math.nan
    others = [i for i, row in enumerate(rows) if i != 17 and 63 in row["input_ids"]]
    rows = [row for i, row in enumerate(rows) if i not in others]
    with pytest.raises(ShoestringError, match=r"data.jsonl:18") as error:
        train(model, rows, [], options(max_steps=-1), tmp_path)
    assert error.value.exit_code == 1 and "data.jsonl:1," not in str(error.value)


def test_a_full_disk_ends_the_run_and_spares_earlier_checkpoints(rows, tmp_path, monkeypatch):
    real = checkpoints.save_file

    def full(tensors, file, *args, **kwargs):
        if "checkpoint-8" in str(file):
            raise OSError(28, "No space left on device")
        return real(tensors, file, *args, **kwargs)

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(ShoestringError, match="no space is left"):
        train(lora(tiny.model()), rows, [], options(), tmp_path)
    assert [path.name for path in checkpoints.checkpoints(tmp_path)] == ["checkpoint-4"]
    assert checkpoints.newest_complete(tmp_path).step == 4


def test_nothing_to_train_and_a_bad_option_are_refused(rows, tmp_path):
    model = tiny.model()
    model.requires_grad_(False)
    with pytest.raises(UsageError, match="no parameter to train"):
        train(model, rows, [], options(), tmp_path)
    with pytest.raises(UsageError, match="no rows"):
        train(lora(tiny.model()), [], [], options(), tmp_path)
    with pytest.raises(UsageError, match="per_device_train_batch_size"):
        options(per_device_train_batch_size=0)


def test_a_loss_function_of_ones_own(rows, tmp_path):
    seen = []

    def half(output, labels, num_items_in_batch=None):
        seen.append(output.logits.shape)
        flat = output.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
        return 0.5 * torch.nn.functional.cross_entropy(*flat, reduction="sum") / num_items_in_batch

    own = train(lora(tiny.model()), rows, rows[:4], options(max_steps=2), tmp_path / "a", loss_func=half)
    usual = train(lora(tiny.model()), rows, rows[:4], options(max_steps=2), tmp_path / "b")
    assert seen and own.log[0]["loss"] == pytest.approx(0.5 * usual.log[0]["loss"], rel=1e-5)


def test_the_log_is_json_lines(rows, tmp_path):
    result = train(lora(tiny.model()), rows, [], options(max_steps=3), tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result.log and len(lines) == 3


def test_adapters_that_the_model_reads_past_are_named(rows, tmp_path, caplog):
    settings = dict(vocab_size=tiny.VOCAB, hidden_size=32, num_hidden_layers=1, state_size=4, pad_token_id=0)
    mamba = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **settings))
    train(lora(mamba, exclude_modules=["out_proj"]), rows, [], options(max_steps=2), tmp_path / "mamba")
    assert "2 of 6 trained tensors got no gradient" in caplog.text and "dt_proj.lora_A" in caplog.text
    caplog.clear()
    train(lora(tiny.model()), rows, [], options(max_steps=2), tmp_path / "llama")
    assert not caplog.text
