"""Gradients of windows, answers beside training, the scheduler's arithmetic, and going on after a stop."""

from __future__ import annotations

import gc
import json
import random
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel

from shoestring.core.errors import ShoestringError, UsageError
from shoestring.data.corpus import Example as Read
from shoestring.engine.chat_template import Template
from shoestring.engine.engine import Engine
from shoestring.engine.hooks import Spare
from shoestring.engine.native_runner import NativeRunner
from shoestring.engine.open import Opened, open_model
from shoestring.engine.request import Sampling
from shoestring.engine.tokenizer import from_gguf
from shoestring.engine.tuning import Told, TuningJob
from shoestring.kernels.matrix import make, to_int8
from shoestring.lab import answering
from shoestring.methods.serving import _frozen, flexllm
from shoestring.methods.serving._frozen import Frozen, Rooms, unpacked
from shoestring.methods.serving._latency import SIZES, Clock, Table
from shoestring.methods.serving._training import Moments, _of_chat, checkpoints, encoded
from shoestring.methods.serving._windows import (
    IGNORED,
    REMATERIALISE,
    Bytes,
    Example,
    LowRank,
    Pass,
    Shape,
    dropped,
)
from shoestring.models.guard import check_gguf
from shoestring.models.load import DEFAULT, locate

VOCAB = 96
_SIZES: dict[str, Any] = dict(
    vocab_size=VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=2, hidden_size=64, intermediate_size=96,
    num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
    initializer_range=0.2,
)  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": dict(head_dim=32),
    "mistral": dict(sliding_window=7),
    "smollm3": dict(no_rope_layers=[1, 0, 1], tie_word_embeddings=True),
    "granite": dict(logits_scaling=4.0, residual_multiplier=0.5, attention_multiplier=0.3),
}
Windows = Callable[[str, int], int]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def _examples(*sizes: int) -> list[Example]:
    """Random tokens; the first third and the last two are not learned."""
    draw = torch.Generator().manual_seed(0)
    found = []
    for size in sizes:
        ids = torch.randint(3, VOCAB, (size,), generator=draw).tolist()
        labels = [IGNORED if i < max(1, size // 3) or i >= size - 2 else ids[i] for i in range(size)]
        found.append(Example(tuple(ids), tuple(labels)))
    return found


class Case:
    """A tiny model on the kernels and in transformers with peft, with the same LoRA."""

    def __init__(self, folder: Path, family: str = "llama", **shape: Any) -> None:
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(family, **{**_SIZES, **FAMILIES[family]})
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        model.save_pretrained(folder)
        self.runner = NativeRunner(folder, dtype="fp32", threads=1)
        self.frozen = Frozen(self.runner.model, self.runner.weights)
        self.low_rank = LowRank(Shape(rank=4, alpha=8.0, **shape), self.runner.model, seed=1)
        with torch.no_grad():
            for _, b in self.low_rank.pairs.values():
                b.normal_(0, 0.05)
        self.low_rank.save(folder / "lora", "base")
        self.peft = PeftModel.from_pretrained(model, str(folder / "lora"), is_trainable=True)

    def exact(self, examples: list[Example]) -> tuple[float, dict[str, torch.Tensor]]:
        """Loss and gradients of loss.backward() over whole sequences, one at a time."""
        self.peft.zero_grad()
        targets, loss = sum(example.targets for example in examples), torch.zeros(())
        for example in examples:
            logits = self.peft(input_ids=torch.tensor([example.ids])).logits[0, :-1]
            wanted = torch.tensor(example.labels[1:])
            loss = loss + torch.nn.functional.cross_entropy(logits, wanted, reduction="sum") / targets
        loss.backward()
        named = {name.replace(".default", ""): p.grad for name, p in self.peft.named_parameters() if p.requires_grad}
        return float(loss.detach()), named

    def run(self, examples: list[Example], window: Windows, **how: Any) -> tuple[Pass, dict[str, torch.Tensor]]:
        for parameter in self.low_rank.parameters():
            parameter.grad = None
        targets = sum(example.targets for example in examples)
        made = Pass(self.frozen, self.low_rank, examples, targets=targets, window=window, **how)
        for _ in made.units():
            pass
        names = iter(self.low_rank.state())
        return made, {next(names): half.grad for pair in self.low_rank.pairs.values() for half in pair}


def _far(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    assert found.keys() == wanted.keys()
    return max(float((found[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("case"))


def _window(name: str) -> Windows:
    draw = random.Random(0)
    return (lambda kind, position: draw.randint(1, 40)) if name == "random" else lambda kind, position: int(name)


# ---- gradients ----


@pytest.mark.parametrize("how", REMATERIALISE)
@pytest.mark.parametrize("window", ["1", "7", "64", "999", "random"])
def test_any_windows_give_the_gradient_of_the_whole(case: Case, window: str, how: str) -> None:
    examples = _examples(90)
    loss, wanted = case.exact(examples)
    done, found = case.run(examples, _window(window), rematerialise=how)
    assert _far(found, wanted) < 1e-5
    assert done.totals.loss / done.totals.targets == pytest.approx(loss, abs=1e-5)
    assert done.totals.targets == examples[0].targets


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_and_examples_that_lie_end_to_end(family: str, tmp_path: Path) -> None:
    own = Case(tmp_path, family)
    examples = _examples(50, 9, 33)
    _, wanted = own.exact(examples)
    for how in ("cheap", "all"):
        _, found = own.run(examples, _window("random"), rematerialise=how)
        assert _far(found, wanted) < 1e-5


def test_one_label_in_the_middle_and_one_far_from_the_rest(case: Case) -> None:
    ids = tuple(range(3, 63))
    labels = tuple(ids[i] if i in (5, 31) else IGNORED for i in range(60))
    examples = [Example(ids, labels)]
    _, wanted = case.exact(examples)
    done, found = case.run(examples, _window("7"))
    assert _far(found, wanted) < 1e-5
    assert done.size == 31  # what comes after the last label teaches nothing


def test_dropout_is_the_same_however_the_tokens_are_cut(tmp_path: Path) -> None:
    own = Case(tmp_path, dropout=0.3)
    examples = _examples(70)
    _, whole = own.run(examples, _window("999"), seed=5)
    for window in ("7", "random"):
        for how in ("cheap", "all"):
            assert _far(own.run(examples, _window(window), seed=5, rematerialise=how)[1], whole) < 1e-5
    assert _far(own.run(examples, _window("7"), seed=6)[1], whole) > 0.1
    drawn = dropped(torch.arange(1000), 64, 3, 0.3)
    assert float((drawn == 0).float().mean()) == pytest.approx(0.3, abs=0.01)
    assert float(drawn.mean()) == pytest.approx(1, abs=0.02)
    assert abs(float(torch.corrcoef(torch.stack([drawn[:-1].flatten(), drawn[1:].flatten()]))[0, 1])) < 0.02


@pytest.mark.parametrize("spec", ["fp32", "bf16"])
def test_weights_are_those_that_answer(case: Case, spec: str) -> None:
    matrix = case.runner.weights.blocks[0].q
    if spec == "fp32":
        assert unpacked(matrix).data_ptr() == matrix.data.ctypes.data  # not a copy: the same memory
        assert np.shares_memory(unpacked(matrix).numpy().view(np.uint8).reshape(-1), matrix.data)
    else:
        from shoestring.models.tensors import bfloat16

        values = unpacked(matrix)
        packed = make("bf16", matrix.rows, matrix.cols, bfloat16(values.numpy()))
        assert torch.equal(unpacked(packed, 2, 5), values.bfloat16().float()[2:5])


@pytest.fixture
def packed(case: Case) -> tuple[Any, Any]:
    """The case's weights, some of them in 8 bits; and with what these codes stand for as float32."""
    blocks, plain = [], []
    for block in case.runner.weights.blocks:
        parts, floats = {}, {}
        for role in ("q", "gate", "down"):
            matrix = getattr(block, role)
            codes, scales = to_int8(unpacked(matrix).numpy(), 32)
            parts[role] = make("int8", matrix.rows, matrix.cols, codes, scales=scales)
            floats[role] = make("fp32", matrix.rows, matrix.cols, unpacked(parts[role]).numpy())
        blocks.append(replace(block, **parts))
        plain.append(replace(block, **floats))
    return replace(case.runner.weights, blocks=tuple(blocks)), replace(case.runner.weights, blocks=tuple(plain))


@pytest.mark.parametrize("whole_layers", [True, False])
def test_packed_weights_are_trained_on_as_they_answer(
    case: Case, packed: tuple[Any, Any], whole_layers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient is that of the model whose weights are what the codes stand for."""
    if not whole_layers:  # as of a large model, whose matrices of one shape take turns
        monkeypatch.setattr(_frozen, "_LAYER_BYTES", 0)
    found = []
    for weights in packed:
        monkeypatch.setattr(case, "frozen", Frozen(case.runner.model, weights))
        found.append(case.run(_examples(40), _window("7"))[1])
    assert _far(found[0], found[1]) < 1e-6


def test_packed_weights_are_unpacked_once_a_direction(
    case: Case, packed: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However small the windows are: what a layer costs must not grow with what waits for it."""
    counted: list[Any] = []
    monkeypatch.setattr(
        _frozen, "unpacked", lambda matrix, *where, **how: counted.append(matrix) or unpacked(matrix, *where, **how)
    )
    found = []
    for window in ("999", "7"):
        counted.clear()
        monkeypatch.setattr(case, "frozen", Frozen(case.runner.model, packed[0]))
        case.run(_examples(60), _window(window))
        found.append(sum(matrix.format == "int8" for matrix in counted))
    assert found[0] == found[1] > 0


# ---- what is kept ----


def test_pruning_and_rematerialisation_are_worth_what_the_shapes_say(case: Case) -> None:
    examples, model = _examples(96), case.runner.model
    held: dict[tuple[str, bool], int] = {}
    peak: dict[tuple[str, bool], int] = {}
    for how in REMATERIALISE:
        for prune in (True, False):
            count = Bytes()
            done, found = case.run(examples, _window("16"), rematerialise=how, prune=prune, count=count)
            assert _far(found, case.exact(examples)[1]) < 1e-5
            held[how, prune], peak[how, prune] = count.held, count.peak
    each = 4 * done.size * model.layers
    keys = 2 * model.kv_heads * model.head_dim  # with values
    assert held["all", True] == held["all", False] == each * (model.hidden + keys)
    products = 2 * model.hidden + keys + 2 * model.intermediate  # of q and o; k and v; gate and up
    assert held["cheap", True] == each * (model.hidden + keys + products)
    assert held["nothing", True] > 1.2 * held["cheap", True] > 2 * held["all", True]
    # What a window needs while it is computed is small beside what a sequence keeps, and pruning is part of that.
    assert peak["all", True] < 0.7 * peak["cheap", True] < 0.7 * peak["nothing", True]


def test_products_are_kept_in_as_many_layers_as_fit(case: Case) -> None:
    model, rooms = case.runner.model, Rooms()
    keys = 2 * model.kv_heads * model.head_dim
    products = 2 * model.hidden + keys + 2 * model.intermediate
    for tokens, layers in ((60, model.layers), (96, 1), (33, 0), (60, 1)):
        examples, count = _examples(tokens), Bytes()
        size = len(Pass(case.frozen, None, examples, targets=1, window=_window("9")).ids)
        given = {"most": 4 * size * products * layers, "rooms": rooms, "count": count}
        _, found = case.run(examples, _window("9"), **given)
        assert _far(found, case.exact(examples)[1]) < 1e-5
        assert count.held == 4 * size * (model.layers * (model.hidden + keys) + layers * products)


def test_memory_is_used_again_when_it_suffices() -> None:
    rooms = Rooms()
    large, small = rooms.take("a", (3, 4), (2,))
    assert (large.shape, small.shape) == ((3, 4), (2,))
    large.fill_(1.0)
    small.fill_(2.0)
    assert float(large.sum()) == 12
    (again,) = rooms.take("a", (5,))
    assert again.data_ptr() == large.data_ptr()
    (beside,) = rooms.take("b", (5,))
    assert beside.data_ptr() != again.data_ptr()
    (grown,) = rooms.take("a", (100, 100))
    assert grown.shape == (100, 100)


def test_pruning_keeps_no_inputs_of_frozen_weights_without_a_lora(tmp_path: Path) -> None:
    own = Case(tmp_path, targets=("q",))
    peaks = []
    for prune in (True, False):
        count = Bytes()
        own.run(_examples(96), _window("999"), rematerialise="nothing", prune=prune, count=count)
        peaks.append(count.held)
    # Of o and down the input is theirs alone: heads * head_dim and the intermediate size for each token and layer.
    assert peaks[1] - peaks[0] >= 4 * 90 * 3 * 96


# ---- the scheduler ----


def test_the_table_is_linear_between_and_careful_beyond() -> None:
    table = Table()
    assert table.likely("forward", 8, 0) is None
    assert table.largest("forward", 0, 1.0, 512) == SIZES[0]
    for _ in range(40):
        table.add("forward", 16, 0, 0.010)
        table.add("forward", 64, 0, 0.040)
    assert table.likely("forward", 16, 0) == pytest.approx(0.010, rel=0.05)
    assert table.likely("forward", 40, 0) == pytest.approx(0.025, rel=0.05)
    assert table.likely("forward", 128, 0) == pytest.approx(0.080, rel=0.05)
    assert table.likely("forward", 8, 0) == table.likely("forward", 16, 0)
    assert table.likely("forward", 64, 5000) == table.likely("forward", 64, 0)  # the nearest context that is known
    assert table.largest("forward", 0, 0.045, 512) == 64
    assert table.largest("forward", 0, 0.045, 30) == 30
    assert table.largest("forward", 0, 0.005, 512) == 0
    for _ in range(40):
        table.add("forward", 64, 5000, 0.200)
    assert table.largest("forward", 5000, 0.045, 512) < 64 == table.largest("forward", 0, 0.045, 512)


def test_a_few_figures_do_not_shut_a_size_out() -> None:
    table = Table()
    table.add("forward", 8, 0, 60.0)  # a bad moment
    for _ in range(40):
        table.add("forward", 64, 0, 0.010)
    table.add("forward", 128, 0, 0.018)  # the first one, which might be twice as much the next time
    assert table.likely("forward", 128, 0) == pytest.approx(0.020, rel=0.05)
    assert table.largest("forward", 0, 0.022, 512) == 128


def test_training_gets_what_the_objective_leaves() -> None:
    clock = Clock(first_token=1.0, each_token=0.1, share=1.0)
    for _ in range(40):
        clock.steps.add("step", 1, 100, 0.02)
        clock.steps.add("step", 4, 100, 0.06)
        clock.steps.add("step", 4, 4000, 0.12)
    assert clock.allowed(1, 100, 0.0) == pytest.approx(0.08, abs=0.002)
    assert clock.allowed(4, 100, 0.0) == pytest.approx(0.04, abs=0.004)
    assert clock.allowed(4, 4000, 0.0) < 0  # a long context costs more: nothing is left
    assert clock.allowed(0, 0, 0.0) == clock.round
    assert clock.longest(0) <= clock.first_token / 4


def test_a_bad_moment_does_not_stop_an_idle_machine(opened: Opened, data: Path, tmp_path: Path) -> None:
    trainer = flexllm.Trainer(flexllm.FlexllmConfig(), opened)
    training = trainer.prepare(_job(data, tmp_path / "out", epochs=1))
    for kind in ("forward", "loss", "backward", "update"):
        trainer.clock.units.add(kind, SIZES[0], 0, 60.0)
    told: list[Told] = []
    trainer.start(training, told.append)
    assert trainer.work(Spare(64, running=1, seconds=0.001)) == 0  # somebody waits, and it would be long
    # Nobody waits: every call does something, be it of the loss or of the optimizer, which are of no tokens.
    while trainer.stats()["training_jobs"]:
        assert trainer.work(Spare(64, urgent=lambda: True)) > 0
    training.close()
    assert told[-1].kind == "finished"


def test_what_has_ended_is_forgotten(opened: Opened, data: Path, tmp_path: Path) -> None:
    trainer = flexllm.Trainer(flexllm.FlexllmConfig(), opened)
    ended = []
    for number in range(3):
        training = trainer.prepare(replace(_job(data, tmp_path / str(number), epochs=1), id=str(number)))
        trainer.start(training, lambda told: None)
        while trainer.stats()["training_jobs"]:
            trainer.work(Spare(64))
        training.close()
        ended.append(weakref.ref(training))
        del training
    gc.collect()
    assert sum(one() is not None for one in ended) <= 1


ROWS = [
    {"messages": [{"role": "user", "content": f"w{7 + i % 3}"}, {"role": "assistant", "content": "w20 w21 w22"}]}
    for i in range(12)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return answering.folder(tmp_path_factory.mktemp("flex") / "model")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


@pytest.fixture
def opened(model: Path) -> Iterator[Opened]:
    found = open_model(model, dtype="fp32", cache_dtype="fp32", threads=1)
    yield found
    found.runner.close()


def _job(data: Path, folder: Path, **more: Any) -> TuningJob:
    return TuningJob("job", "model", data, folder, batch_size=4, rate=20.0, **more)


def _train(opened: Opened, job: TuningJob, steps: int | None = None, **options: Any) -> tuple[Any, list[Told]]:
    """Train to the end, or so many steps and then drop everything, as a kill does."""
    trainer = flexllm.Trainer(flexllm.FlexllmConfig(**options), opened)
    told: list[Told] = []
    training = trainer.prepare(job)
    trainer.start(training, told.append)
    while trainer.stats()["training_jobs"] and (steps is None or training.step < steps):
        trainer.work(Spare(64, urgent=lambda: steps is not None))
    training.close()
    return training, told


def test_a_job_learns_and_its_adapter_is_what_peft_and_the_engine_load(
    opened: Opened, data: Path, tmp_path: Path, model: Path
) -> None:
    training, told = _train(opened, _job(data, tmp_path / "out", epochs=15, validation=data))
    losses = [t.figures["train_loss"] for t in told if t.kind == "step"]
    assert len(losses) == 45 and losses[-1] < losses[0] / 10
    last = told[-1]
    assert last.kind == "finished" and last.folder is not None and last.figures["full_valid_mean_token_accuracy"] == 1
    base = transformers.AutoModelForCausalLM.from_pretrained(model)
    adapted = PeftModel.from_pretrained(base, str(last.folder))
    (example,) = {e.ids: e for e in training.examples if e.ids[2] == 7}.values()
    ids = torch.tensor([example.ids])
    with torch.no_grad():
        loss = adapted(input_ids=ids, labels=torch.tensor([example.labels])).loss
    assert float(loss) < 0.1
    with answering.exact(model) as engine:
        engine.add_adapter("tuned", last.folder)
        ((found,),) = engine.generate([[*example.ids[:-4]]], Sampling(max_tokens=4), adapter="tuned")
        assert found.tokens == example.ids[-4:]


def test_answers_beside_training_are_those_of_plain_serving(model: Path, data: Path, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    prompts = [draw.integers(3, 60, size=int(draw.integers(2, 30))).tolist() for _ in range(50)]
    drawn = Sampling(max_tokens=8, ignore_eos=True, temperature=0.9, seed=3)
    with answering.exact(model) as plain:
        wanted = [answering.answers(plain, sampling, prompts) for sampling in (answering.GREEDY, drawn)]
    with answering.exact(model, max_step_tokens=64) as engine:
        trainer = flexllm.Trainer(flexllm.FlexllmConfig(), Opened(engine.runner, engine.tokenizer, "model", model))
        engine.plug_filler(trainer)
        trainer.start(trainer.prepare(_job(data, tmp_path / "out", epochs=900)), lambda told: None)
        found = [answering.answers(engine, sampling, prompts) for sampling in (answering.GREEDY, drawn)]
        counts = engine.counts()
        assert counts.filler_tokens > 0 and counts.plugged["training_tokens"] > 0
    assert found == wanted


def test_a_request_keeps_the_version_it_began_with(model: Path, opened: Opened, data: Path, tmp_path: Path) -> None:
    """An adapter comes, and another goes, in the middle of answers."""
    _, told = _train(opened, _job(data, tmp_path / "out", epochs=8), checkpoints=4, keep=99)
    early, late = (t.folder for t in (next(t for t in told if t.kind == "checkpoint"), told[-1]))
    assert early and late
    from shoestring.engine.request import Request

    sampling = Sampling(max_tokens=20, ignore_eos=True)
    with answering.exact(model) as engine:
        engine.add_adapter("early", early)
        wanted = engine.generate([[7, 8, 9]], sampling, adapter="early")[0][0].tokens
        request = Request([7, 8, 9], sampling, adapter="early")
        engine.submit(request)
        tokens: list[int] = []
        for step in range(30):
            if step == 5:
                engine.add_adapter("late", late)
                engine.drop_adapter("early")
            tokens += [token for delta in engine.step() for token in delta.tokens]
        assert tuple(tokens) == wanted
        assert engine.generate([[7, 8, 9]], sampling, adapter="late")[0][0].tokens != wanted
        assert list(engine.adapters) == ["late"]


# ---- stops ----


def test_a_killed_job_goes_on_as_if_nothing_had_happened(opened: Opened, data: Path, tmp_path: Path) -> None:
    options = dict(checkpoints=2, dropout=0.1)
    whole, _ = _train(opened, _job(data, tmp_path / "whole", epochs=4), **options)
    cut, told = _train(opened, _job(data, tmp_path / "cut", epochs=4), steps=7, **options)
    assert cut.step == 7 and told[-1].kind != "finished"
    assert checkpoints(tmp_path / "cut")[0].name == "checkpoint-6"
    again, told = _train(opened, _job(data, tmp_path / "cut", epochs=4), **options)
    assert [t.step for t in told if t.kind == "step"] == [7, 8, 9, 10, 11, 12]
    for (name, a), b in zip(whole.low_rank.state().items(), again.low_rank.state().values()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)  # windows may have been cut otherwise
    finished, told = _train(opened, _job(data, tmp_path / "cut", epochs=4), **options)
    assert [t.kind for t in told] == ["started", "finished"]


def test_steps_are_those_of_adamw() -> None:
    draw = torch.Generator().manual_seed(0)
    ours = torch.randn(5, 7, generator=draw, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    optimizer = torch.optim.AdamW([theirs], weight_decay=0.1)
    moments = Moments.of(ours)
    for step in range(1, 20):
        optimizer.param_groups[0]["lr"] = 0.01 * step
        ours.grad = torch.randn(5, 7, generator=draw) * 10.0 ** (step % 5 - 3)
        theirs.grad = ours.grad.clone()
        moments.update(ours, step, 0.01 * step, 0.1)
        optimizer.step()
        assert torch.equal(ours, theirs), step
    ours.grad = None
    moments.update(ours, 20, 0.2, 0.1)
    assert torch.equal(ours, theirs)


def test_a_server_that_trains_does_not_load_the_compiler(model: Path, data: Path, tmp_path: Path) -> None:
    program = f"""
import sys
from pathlib import Path
from shoestring.engine.hooks import Spare
from shoestring.engine.open import open_model
from shoestring.engine.tuning import TuningJob
from shoestring.methods.serving import flexllm
opened = open_model(Path({str(model)!r}), threads=1)
trainer = flexllm.Trainer(flexllm.FlexllmConfig(), opened)
data, out = Path({str(data)!r}), Path({str(tmp_path / "out")!r})
training = trainer.prepare(TuningJob("job", "model", data, out, batch_size=4))
trainer.start(training, lambda told: None)
while trainer.stats()["training_jobs"]:
    trainer.work(Spare(64))
training.close()
assert training.step > 0 and "torch" in sys.modules
print([name for name in ("torch._dynamo", "sympy") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_a_pause_in_the_middle_of_a_layer_changes_nothing(opened: Opened, data: Path, tmp_path: Path) -> None:
    def run(folder: str, pause: bool) -> dict[str, torch.Tensor]:
        trainer = flexllm.Trainer(flexllm.FlexllmConfig(window=8), opened)
        for table in (trainer.clock.units,):
            for kind in ("forward", "backward", "loss", "update"):
                for _ in range(40):
                    table.add(kind, 8, 0, 1e-6)  # windows are then of 8 tokens in both runs
        training = trainer.prepare(_job(data, tmp_path / folder, epochs=1))
        trainer.start(training, lambda told: None)
        kinds = set()
        while trainer.stats()["training_jobs"]:
            trainer.work(Spare(64, urgent=lambda: True))  # one unit at a time
            run = next(iter(trainer._runs.values()), None)
            if pause and run and run.ahead:
                kinds.add(run.ahead.kind)
                trainer.pause("job")
                assert trainer.work(Spare(64)) == 0
                trainer.resume("job")
        assert not pause or kinds == {"forward", "loss", "backward", "update"}
        training.close()
        return training.low_rank.state()

    a, b = run("a", False), run("b", True)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_urgent_things_wait_for_one_unit_at_most(opened: Opened, data: Path, tmp_path: Path) -> None:
    trainer = flexllm.Trainer(flexllm.FlexllmConfig(), opened)
    training = trainer.prepare(_job(data, tmp_path / "out"))
    trainer.start(training, lambda told: None)
    asked: list[float] = []

    def urgent() -> bool:
        asked.append(time.perf_counter())
        return True

    assert trainer.work(Spare(64, urgent=urgent)) > 0
    assert len(asked) == 1
    assert trainer.work(Spare(64, running=1, seconds=5.0)) == 0  # the step alone is over the objective
    training.close()


# ---- what is refused ----


def test_examples_learn_answers_alone(opened: Opened, data: Path) -> None:
    (example, *_) = encoded(data, opened.tokenizer, 1024)
    assert [label for label in example.labels if label != IGNORED] == [20, 21, 22, 2]
    with pytest.raises(UsageError, match="rows.jsonl:1.*tokens.*max_length"):
        encoded(data, opened.tokenizer, 5)


def test_calls_of_tools_are_learned_by_a_template_without_them(tmp_path: Path) -> None:
    """As the server asks and finds them; left out, the model would learn to answer with nothing."""
    words = from_gguf(check_gguf(locate(DEFAULT)).values)
    assert words
    call = {"id": "1", "type": "function", "function": {"name": "w", "arguments": "{}"}}
    row = {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}],
        "tools": [{"type": "function", "function": {"name": "w"}}],
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps(row), "utf-8")
    (example,) = encoded(tmp_path / "rows.jsonl", words, 1024)
    said = words.decode([label for label in example.labels if label != IGNORED])
    assert said == '<tool_call>\n{"name": "w", "arguments": {}}\n</tool_call>'


THINKING = (
    "{% for m in messages %}{{ m.role }}: "
    "{% if m.role == 'assistant' and loop.last %}(thought) {% endif %}"
    "{{ m.content }}{% for call in m.tool_calls or [] %}[{{ call.function.name }}]{% endfor %}<e>"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_a_turn_that_is_written_otherwise_later_is_learned_as_it_is_said() -> None:
    """Templates that keep the thoughts, or the calls, of the last turn only."""

    class Letters:
        eos = (0,)

        def encode(self, text: str, whole: bool = True) -> list[int]:
            return [0 if c == "\0" else ord(c) for c in text.replace("<e>", "\0")]

        def chat(self, messages: Any, tools: Any = None, add_generation_prompt: bool = True) -> list[int]:
            return self.encode(
                Template(THINKING).render({"messages": messages, "add_generation_prompt": add_generation_prompt})
            )

    call = [{"type": "function", "function": {"name": "look", "arguments": {}}}]
    row = Read(
        [
            {"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": call},
            {"role": "user", "content": "b"}, {"role": "assistant", "content": "B"},
        ]
    )  # fmt: skip
    said = [
        "".join(chr(i) for i, label in zip(e.ids, e.labels) if label != IGNORED)
        for e in _of_chat(row, Letters())  # type: ignore[arg-type]
    ]
    assert said == ["(thought) B\0", "(thought) [look]\0"]


def test_clear_errors(opened: Opened, data: Path, tmp_path: Path, model: Path) -> None:
    for wrong in (dict(rank=0), dict(rematerialise="some"), dict(tpot=0), dict(data="x"), dict(dropout=1.0)):
        with pytest.raises(UsageError):
            flexllm.FlexllmConfig(**wrong)
    with pytest.raises(UsageError, match="cannot carry a LoRA"):
        _train(opened, _job(data, tmp_path / "a"), targets="q,nose")
    with Engine(model, runner="torch") as slow, pytest.raises(UsageError, match="torch runner does not show"):
        flexllm.Trainer(flexllm.example(), Opened(slow.runner, slow.tokenizer, "model", model))
    _train(opened, _job(data, tmp_path / "out", epochs=1))
    with pytest.raises(UsageError, match="other settings"):
        _train(opened, _job(data, tmp_path / "out", epochs=1), rank=2)
    (checkpoints(tmp_path / "out")[0] / "moments.safetensors").unlink()
    with pytest.raises(ShoestringError, match="no state of the optimizer"):
        _train(opened, _job(data, tmp_path / "out", epochs=1))


def test_it_plugs_in_by_name_and_trains_at_once(model: Path, data: Path, tmp_path: Path) -> None:
    word = f"flexllm,data={data},out={tmp_path / 'out'},epochs=2,batch_size=4"
    with answering.exact(model, plugs=[word]) as engine:
        end = time.monotonic() + 30
        while engine.counts().plugged["training_jobs"]:
            engine.step()
            assert time.monotonic() < end
    assert checkpoints(tmp_path / "out")[0].name == "checkpoint-6"
