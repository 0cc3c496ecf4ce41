from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from shoestring.core.errors import UsageError
from shoestring.data import Collator
from shoestring.data.corpus import Corpus, Example
from shoestring.lab import tiny
from shoestring.methods.adapters import perk
from shoestring.methods.adapters.perk import PerkConfig, PerkModel, TestTimeMemory

perk.register()
MLP = ["gate_proj", "up_proj", "down_proj"]


def wrapped(dtype: torch.dtype = torch.float32, family: str = "llama", **options: Any) -> PeftModel:
    torch.manual_seed(0)
    config = PerkConfig(
        **{
            "r": 4,
            "dropout": 0.0,
            "init_std": 0.1,
            "target_modules": MLP,
            "inner_rate": 0.05,
            "task_type": "CAUSAL_LM",
            **options,
        }
    )
    return get_peft_model(tiny.model(family, dtype=dtype), config, autocast_adapter_dtype=False).eval()  # type: ignore[arg-type,return-value]


def tuner(model: PeftModel) -> PerkModel:
    return model.base_model  # type: ignore[return-value]


def segments(count: int = 3, length: int = 9, seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(3, tiny.VOCAB, (length - i % 2,), generator=draw) for i in range(count)]


def episode(seed: int = 0) -> dict[str, Tensor]:
    rows = [
        {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8], "context": [s.tolist() for s in segments(seed=seed)]}
    ]
    return Collator(0)(rows)


def flat(values: Any) -> Tensor:
    return torch.cat([v.flatten() for v in values])


# ---------------------------------------------------------------- the outer gradient


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("truncate", [0, 2, 4])
def test_the_outer_gradient_is_that_of_the_kept_steps(optimizer: str, truncate: int) -> None:
    """Against finite differences of the loss as a function of the point at which the kept steps begin."""
    options = dict(truncate=truncate, inner_optimizer=optimizer, inner_rate=1e-3, weighting=False)
    # Nothing in this family is rounded to float32 on the way.
    model = wrapped(torch.float64, "gpt2", target_modules=["c_fc", "c_proj"], **options)
    own, batch = tuner(model), episode()
    model(**batch).loss.backward()
    start = own.start("default")
    found = flat(p.grad for p in start.values())

    constants: list[list[Tensor]] = []
    original = PerkModel._gradients

    def replay(self: PerkModel, phi: Any, parts: Any, name: str, kept: bool, accumulate: bool) -> list[Tensor]:
        step = len(constants)
        made = original(self, phi, parts, name, False, accumulate)
        constants.append([g.clone() for g in made])
        return recorded[step] if step < truncate and recorded else made

    recorded: list[list[Tensor]] = []
    own._gradients = replay.__get__(own)  # type: ignore[method-assign]
    values = [p.data for p in start.values()]
    with torch.no_grad():
        model(**batch)
        recorded = [list(g) for g in constants]  # the first steps' gradients, held while phi_0 is moved
        torch.manual_seed(1)
        direction = [torch.randn_like(v) for v in values]
        losses = []
        for sign in (1, -1):
            constants.clear()
            for value, move in zip(values, direction):
                value += sign * 1e-8 * move
            losses.append(model(**batch).loss)
            for value, move in zip(values, direction):
                value -= sign * 1e-8 * move
    slope = (losses[0] - losses[1]) / 2e-8
    assert torch.allclose(found @ flat(direction), slope, rtol=2e-4, atol=1e-8)


def test_truncation_and_first_order_give_other_gradients() -> None:
    found = {}
    for name, options in {
        "whole": {"truncate": 0}, "half": {"truncate": 2}, "none": {"truncate": 4}, "first": {"first_order": True},
    }.items():  # fmt: skip
        model = wrapped(torch.float64, **options)
        model(**episode()).loss.backward()
        found[name] = flat(p.grad for p in tuner(model).start("default").values())
    assert torch.allclose(found["none"], found["first"])
    assert not torch.allclose(found["whole"], found["half"], rtol=1e-3)
    assert not torch.allclose(found["half"], found["none"], rtol=1e-3)


def test_rates_and_weighting_learn_and_can_be_left_out() -> None:
    model = wrapped()
    own = tuner(model)
    torch.nn.init.normal_(own.perk_weighting["default"].out.weight)
    model(**episode()).loss.backward()
    rates = own.perk_rates["default"]
    assert rates.shape == (4, len(own.start("default"))) and (rates.grad.abs().sum(1) > 0).all()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in own.perk_weighting["default"].parameters())
    plain = tuner(wrapped(weighting=False, learn_rates=False))
    assert not plain.perk_rates["default"].requires_grad and "default" not in plain.perk_weighting
    assert not any(p.requires_grad for p in tuner(wrapped(first_order=True)).perk_weighting.parameters())


def test_all_tokens_weigh_the_same_at_the_start() -> None:
    weights = tuner(wrapped()).perk_weighting["default"](torch.randn(3, 5, 64))
    assert torch.allclose(weights, weights.flatten()[0].expand_as(weights)) and weights.min() > 0


def test_the_start_learns_to_be_read_into() -> None:
    model = wrapped(inner_optimizer="sgd", inner_rate=0.01, weighting=False)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 2e-3)
    losses = []
    for _ in range(30):
        loss = model(**episode()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3, losses


# ---------------------------------------------------------------- reading


def test_one_segment_at_a_time_reads_the_same() -> None:
    own = tuner(wrapped(torch.float64))
    parts = segments(5)
    whole, single = own.read(parts), own.read(parts, accumulate=True)
    assert all(torch.allclose(whole[n], single[n], atol=1e-5) for n in whole)


def test_the_order_of_segments_does_not_matter() -> None:
    own = tuner(wrapped(torch.float64))
    parts = segments(5)
    one, two = own.read(parts), own.read(parts[::-1])
    assert all(torch.allclose(one[n], two[n], atol=1e-5) for n in one)


def test_reading_leaves_the_model_alone_and_memories_apart() -> None:
    model = wrapped()
    own = tuner(model)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    one, two = own.read(segments(seed=1)), own.read(segments(seed=2))
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert not any(a.requires_grad for a in one.values())
    assert any(not torch.allclose(one[n], two[n]) for n in one)


def test_the_answer_follows_the_context_which_the_prompt_does_not_hold() -> None:
    model = wrapped()
    with torch.no_grad():
        a, b = model(**episode(1)), model(**episode(2))
    assert torch.equal(episode(1)["input_ids"], episode(2)["input_ids"]) and not torch.allclose(a.logits, b.logits)


def test_rows_of_a_batch_are_read_apart() -> None:
    model = wrapped()
    row = {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}
    contexts = [[s.tolist() for s in segments(2, seed=1)], [s.tolist() for s in segments(4, 6, seed=2)]]
    with torch.no_grad():
        both = model(**Collator(0)([{**row, "context": c} for c in contexts])).logits
        alone = [model(**Collator(0)([{**row, "context": c}])).logits for c in contexts]
    assert torch.allclose(both, torch.cat(alone), atol=1e-6)


def test_optimizer_state_does_not_outlive_a_context() -> None:
    own = tuner(wrapped())
    first = own.read(segments(seed=1))
    own.read(segments(seed=2))
    again = own.read(segments(seed=1))
    assert all(torch.equal(first[n], again[n]) for n in first)


# ---------------------------------------------------------------- what comes out


def test_saved_with_rates_and_weighting(tmp_path: Path) -> None:
    model = wrapped()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.model(), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**episode()).logits, model(**episode()).logits)


def test_phi_as_plain_lora(tmp_path: Path) -> None:
    model = wrapped()
    model.save_pretrained(tmp_path / "perk")
    perk.as_lora(tmp_path / "perk", tmp_path / "lora")
    plain = PeftModel.from_pretrained(tiny.model(), tmp_path / "lora").eval()
    assert plain.peft_config["default"].peft_type == peft.PeftType.LORA
    assert torch.allclose(tiny.logits(plain), tiny.logits(model), atol=1e-5)


@pytest.mark.real
def test_a_memory_on_the_default_model(tmp_path: Path) -> None:
    from shoestring import models

    loaded = models.load("smollm2", dtype="float32")
    model = get_peft_model(
        loaded.model, PerkConfig(r=4, target_modules=["q_proj", "v_proj"], inner_rate=5e-2, inner_steps=1, truncate=1)
    )
    blank = TestTimeMemory(model, loaded.tokenizer)
    question = "What is the name of the cat?"
    read = blank.encode(["The cat is called Marmaduke.", "The dog is called Rex."])
    assert read.phi is not None and blank.phi is None
    unread, told = blank.answer(question, max_new_tokens=4), read.answer(question, max_new_tokens=4)
    assert told != unread
    read.save(tmp_path / "read")
    read.forget()
    assert read.answer(question, max_new_tokens=4) == unread
    model.unload()
    assert PeftModel.from_pretrained(loaded.model, tmp_path / "read").peft_config["default"].r == 4


# ---------------------------------------------------------------- data


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    from shoestring.models import resolve

    return AutoTokenizer.from_pretrained(resolve("smollm2"))


def corpus(*turns: str) -> Corpus:
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    return Corpus([Example(messages, line=7)], "chat", source="data.jsonl")


def test_rows_hold_the_question_alone(tokenizer: Any) -> None:
    story = "The cat is called Marmaduke.\n\nIt sleeps."
    rows = perk.encode(
        corpus(f"{story}\n\nWhat is it called?", "Marmaduke"), tokenizer, 512, options={}, on_long="error"
    )
    text = tokenizer.decode(rows.rows[0]["input_ids"])
    assert "What is it called?" in text and "Marmaduke" in text and "sleeps" not in text
    context = tokenizer.decode([t for part in rows.rows[0]["context"] for t in part])
    assert context.startswith("doc_1: ") and "called Marmaduke" in context and "sleeps" in context


def test_long_documents_are_split(tokenizer: Any) -> None:
    parts = perk.segment(["cat " * 100, "dog"], tokenizer, 40)
    assert len(parts) == 4 and max(map(len, parts)) <= 40
    assert sum(tokenizer.decode(p).count("cat") for p in parts) == 100
    assert tokenizer.decode(parts[-1]) == "doc_2: dog" and tokenizer.decode(parts[1]).startswith("doc_1: ")


def test_an_example_without_a_context_is_named(tokenizer: Any) -> None:
    with pytest.raises(UsageError, match=r"data\.jsonl:7 has no context"):
        perk.encode(corpus("What is it called?", "Marmaduke"), tokenizer, 512, options={}, on_long="error")


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"truncate": 9}, "truncate=9"),
        ({"inner_steps": 0}, "inner_steps=0"),
        ({"inner_optimizer": "adam"}, "inner_optimizer='adam'"),
        ({"inner_rate": 0}, "inner_rate=0"),
        ({"dropout": 2}, "dropout=2"),
    ],
)
def test_impossible_settings(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        PerkConfig(**options)


def test_checkpointing_has_no_second_derivatives() -> None:
    model = wrapped().train()
    model.base_model.model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="first_order=True"):
        model(**episode())
    first = wrapped(first_order=True).train()
    first.base_model.model.gradient_checkpointing_enable()
    first(**episode()).loss.backward()


def test_a_context_is_never_passed_over() -> None:
    with pytest.raises(ValueError, match="task_type"):
        wrapped(task_type=None)(**episode())


def test_an_empty_context() -> None:
    with pytest.raises(ValueError, match="context is empty"):
        tuner(wrapped()).read([])


def test_held_out_loss_is_that_of_the_answer_after_reading() -> None:
    from shoestring.jobs.evaluate import heldout

    model, batch = wrapped(), episode()
    row = {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8], "context": [s.tolist() for s in segments(seed=0)]}
    with torch.no_grad():
        expected = float(model(**batch).loss)
    assert heldout(model, [row]).loss.value == pytest.approx(expected, rel=1e-5)
    assert heldout(model, [{**row, "context": [[9, 10, 11]]}]).loss.value != pytest.approx(expected, rel=1e-3)
