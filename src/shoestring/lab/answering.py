"""What every method that plugs into the engine must leave as it is: answers, pages, ends. Rooms' contracts share it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from shoestring.core.errors import UsageError
from shoestring.engine.engine import Engine
from shoestring.engine.plug import configured
from shoestring.engine.request import Request, Sampling
from shoestring.lab import tiny

PROMPTS = [[3 + (7 * i + 3 * j * j + i * j) % (tiny.VOCAB - 3) for j in range(4 + 3 * i)] for i in range(4)] + [
    [3, 4, 5, 6] * 6,
    [9] * 20,
]
GREEDY = Sampling(max_tokens=16, ignore_eos=True)
DRAWN = Sampling(max_tokens=16, ignore_eos=True, temperature=0.9, top_p=0.9, seed=7)
Answers = list[tuple[int, ...]]


def folder(at: str | Path, make: Callable[..., Any] = tiny.model, **changes: object) -> Path:
    """A tiny model with a tokenizer in a folder, as users have models: a Llama; `changes` override its config.

    Its weights are large enough that answers vary, and here and there repeat themselves.
    """
    made = make(**{"num_hidden_layers": 4, "initializer_range": 0.2, **changes})
    made.save_pretrained(at)
    vocab = {f"w{i}": i for i in range(tiny.VOCAB)}
    plain = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="w2", pad_token="w0").save_pretrained(at)
    return Path(at)


def exact(model: Path, **how: object) -> Engine:
    """An engine whose answers do not depend on what else is computed: all numbers are float32."""
    return Engine(model, **{"dtype": "fp32", "cache_dtype": "fp32", "threads": 1, "context": 128, **how})  # type: ignore[arg-type]


def answers(engine: Engine, sampling: Sampling = GREEDY, prompts: Sequence[list[int]] = PROMPTS) -> Answers:
    """Tokens for all prompts, answered together."""
    return [found.tokens for (found,) in engine.generate(list(prompts), sampling)]


@contextmanager
def stage(module: ModuleType) -> Iterator[tuple[Engine, Engine]]:
    """A plain engine and one with the method plugged in, on one tiny model.

    A method that needs more than its name (a trained part, another process) defines `stage(model) -> Engine` as a
    context manager; one that is for other models than Llama defines `base(**changes)`, which makes a tiny one.
    """
    with tempfile.TemporaryDirectory() as at:
        model = folder(at, getattr(module, "base", tiny.model))
        name = module.__name__.rpartition(".")[2]
        own: AbstractContextManager[Engine] = (
            module.stage(model) if hasattr(module, "stage") else exact(model, plugs=[name])
        )
        with exact(model) as plain, own as other:
            yield plain, other


# --- checks, called by those of the rooms ---------------------------------------------------------------------------


def same_answers(module: ModuleType, sampling: Sampling) -> None:
    with stage(module) as (plain, other):
        wanted, found = answers(plain, sampling), answers(other, sampling)
        for i, (a, b) in enumerate(zip(wanted, found)):
            assert a == b, f"prompt {i}: plain decoding writes {a}, this method {b}"
        alone = [answers(other, sampling, [prompt])[0] for prompt in PROMPTS]
        assert alone == wanted, "answers differ when each is asked for alone"


def ends(module: ModuleType) -> None:
    """Length, stop token, cancelling, and no page is held afterwards."""
    with stage(module) as (plain, other):
        first = answers(plain)[0]
        for limit in (1, 2, 5):
            ((cut,),) = other.generate([PROMPTS[0]], Sampling(max_tokens=limit, ignore_eos=True))
            assert cut.finish_reason == "length" and len(cut.tokens) == limit, cut
        stop = Sampling(max_tokens=16, ignore_eos=True, stop_token_ids=(first[4],))
        ((one,),) = plain.generate([PROMPTS[0]], stop)
        ((two,),) = other.generate([PROMPTS[0]], stop)
        assert two.finish_reason == one.finish_reason == "stop", two.finish_reason
        request = Request(list(PROMPTS[1]), Sampling(max_tokens=40, ignore_eos=True))
        other.submit(request)
        for _ in range(3):
            other.step()
        other.cancel(request.id)
        for _ in range(3):
            other.step()
        assert other.idle, "a cancelled request is still there"
        assert other.pool.used == 0, f"{other.pool.used} pages are held after the last request"


def under_pressure(module: ModuleType) -> None:
    """More requests than places, and pages that run out: everybody ends, and pages are all free again."""
    with stage(module) as (_, other):
        sampling = Sampling(max_tokens=12, ignore_eos=True)
        requests = [Request(list(PROMPTS[i % len(PROMPTS)]), sampling, client=str(i % 3)) for i in range(24)]
        for request in requests:
            other.submit(request)
        ended: dict[str, str] = {}
        for _ in range(2000):
            ended |= {d.request_id: d.finish_reason for d in other.step() if d.finish_reason}
            if other.idle:
                break
        assert ended == {r.id: "length" for r in requests}, f"{len(ended)} of {len(requests)} requests ended"
        assert other.pool.used == 0


def counted(module: ModuleType) -> None:
    """Answers and steps are counted as they are."""
    with stage(module) as (_, other):
        found = answers(other)
        counts = other.counts()
        assert counts.generation_tokens == sum(map(len, found)), counts
        assert counts.steps > 0 and counts.accepted_draft_tokens <= counts.draft_tokens


def refuses(module: ModuleType) -> None:
    """An option that does not exist, and settings that are stated as fields, with literals in `plug`'s words."""
    name = module.__name__.rpartition(".")[2]
    try:
        configured(name, {"no_such_option": 1})
    except UsageError as error:
        assert "no_such_option" in str(error)
    else:
        raise AssertionError("an unknown option was taken")
    made = getattr(module, "PLUG", None) or type(module.example())
    assert all(isinstance(f.name, str) for f in fields(made)), "its configuration is no dataclass"
