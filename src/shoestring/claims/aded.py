"""ADED: tokens of a pass with a table that learns, against the same table frozen and plain decoding; and the clock."""

import json
import random
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from shoestring.core import catalog
from shoestring.core.claim import Claim
from shoestring.data.builtin import python_docs
from shoestring.engine.engine import Engine
from shoestring.engine.hooks import Hooks
from shoestring.engine.open import open_model
from shoestring.engine.request import Sampling
from shoestring.lab.arms import MODEL, Arms

_HERE = (
    "SmolLM2-135M-Instruct, greedy, 10 prompts x 80 tokens; table of the model's own answers to 30 other prompts of "
    "the same kind; the last 16 tokens learnt, 24 paths, at most 64 nodes, always drafted"
)
_PAPER = "significantly accelerates the decoding process while maintaining high accuracy; up to 2.5x without training"
_CANNOT = "2.5x on a 7B model with a table of hundreds of megabytes, and verification that is free on a GPU"
CLAIMS = (
    Claim(
        "code",
        paper=_PAPER,
        here=_HERE + "; Python functions; tokens of a pass",
        measure="tokens_per_pass",
        arm="aded",
        against="plain",
        expect=">= 1.6",
        cannot=_CANNOT,
    ),
    Claim(
        "adaptation",
        paper="the table adapts while decoding",
        here=_HERE + "; Python functions; the same table frozen",
        measure="tokens_per_pass",
        arm="aded",
        against="frozen",
        expect=">= 1.1",
    ),
    Claim(
        "chat",
        paper=_PAPER,
        here=_HERE + "; questions; the same table frozen",
        measure="tokens_per_pass",
        arm="chat",
        against="chat-frozen",
        expect=">= 1.1",
    ),
    Claim(
        "again",
        paper="the table adapts while decoding",
        here=_HERE + "; the same Python functions a second time",
        measure="tokens_per_pass",
        arm="again",
        against="plain",
        expect=">= 3",
    ),
    Claim(
        "clock",
        paper="up to 2.5x without training, 1.9x with 253 MB of corpus",
        here="SmolLM2-135M-Instruct in bfloat16 under transformers' generate, 3 Python functions x 60 tokens, greedy; "
        "seconds of a token against plain greedy decoding",
        measure="token_seconds",
        arm="transformers-aded",
        against="transformers",
        expect="<= 0.91",
        cannot=_CANNOT,
    ),
)


def run(arms: Arms) -> None:
    code, talk = _questions(arms)
    learnt, asked, length = arms.size(3, 30), arms.size(2, 10), arms.size(24, 80)
    sampling = Sampling(max_tokens=length)
    files: dict[str, Path] = {}
    with arms.arm("plain") as stage, Engine(MODEL, threads=1) as engine:
        for name, questions, size in (("code", code, length), ("chat", talk, 4 * length)):
            answers = engine.generate(questions[asked : asked + learnt], Sampling(max_tokens=size))
            files[name] = arms.folder / f"{name}.jsonl"
            rows = [json.dumps({"text": found.text}) + "\n" for (found,) in answers if found.text.strip()]
            files[name].write_text("".join(rows), encoding="utf-8")
        stage.record("tokens_per_pass", _passes(engine, code[:asked], sampling), "token", "counted")
    for name, corpus, questions, increment in (
        ("frozen", "code", code, 0.0),
        ("chat-frozen", "chat", talk, 0.0),
        ("chat", "chat", talk, 0.04),
        ("aded", "code", code, 0.04),
    ):
        drafter = _drafter(files[corpus], increment)
        with Engine(MODEL, threads=1, hooks=Hooks(drafter=drafter)) as engine:
            with arms.arm(name) as stage:
                stage.record("tokens_per_pass", _passes(engine, questions[:asked], sampling), "token", "counted")
            if name == "aded":
                with arms.arm("again") as stage:
                    stage.record("tokens_per_pass", _passes(engine, questions[:asked], sampling), "token", "counted")
    _clock(arms, code[: arms.size(1, 3)], arms.size(24, 60), files["code"])


def _drafter(corpus: Path, increment: float = 0.04, **options: Any) -> Any:
    module = catalog.module("aded")
    config = module.AdedConfig(corpus=str(corpus), increment=increment, **{"prompts": False, "always": True, **options})
    return module.AdedDrafter(config, _tokenizer())


@cache
def _tokenizer() -> Any:
    opened = open_model(MODEL)
    opened.runner.close()
    return opened.tokenizer


def _passes(engine: Engine, questions: Sequence[Any], sampling: Sampling) -> float:
    """Tokens of a pass, without the passes that computed prompts and their first tokens."""
    before, count = engine.counts(), len(questions)
    for question in questions:
        engine.generate([question], sampling)
    after = engine.counts()
    tokens = after.generation_tokens - before.generation_tokens
    return (tokens - count) / (after.steps - before.steps - count)


def _clock(arms: Arms, questions: Sequence[Any], length: int, corpus: Path) -> None:
    import torch

    model, tokens_of = arms.load(dtype=torch.bfloat16).model.eval(), _tokenizer()
    module = catalog.module("aded")
    drafter = _drafter(corpus, prompts=True, always=False)
    prompts = [torch.tensor([tokens_of.chat(question)]) for question in questions]
    given: dict[str, Any] = dict(max_new_tokens=length, do_sample=False, pad_token_id=0)
    seconds = {"transformers": 0.0, "transformers-aded": 0.0}
    tokens = dict.fromkeys(seconds, 0)
    for i, prompt in enumerate([prompts[0], *prompts]):
        for arm in seconds:
            more = dict(custom_generate=module.generate, drafter=drafter) if arm.endswith("aded") and i else {}
            began = time.perf_counter()
            made = model.generate(prompt, **given, **more)
            if i:  # the first one warms up
                seconds[arm] += time.perf_counter() - began
                tokens[arm] += made.shape[1] - prompt.shape[1]
    for arm in seconds:
        with arms.arm(arm) as stage:
            stage.record("token_seconds", seconds[arm] / tokens[arm], "s", "measured")


def _questions(arms: Arms) -> tuple[list[Any], list[Any]]:
    """Requests for functions, and for explanations, about the standard library; the seed chooses which."""
    examples = python_docs()
    random.Random(arms.seed).shuffle(examples)
    code, talk = [], []
    for example in examples:
        title = example.messages[0]["content"].split("`")[1]
        about = example.messages[1]["content"].split("\n\n")[0].replace("\n", " ")
        if len(about) < 30:
            continue
        code.append(f"Write a Python function that does what `{title}` does: {about}")
        talk.append(f"What is `{title}` in Python good for, and what should a beginner know about it?")
        if len(code) == 60:
            break
    return [_asked(text) for text in code], [_asked(text) for text in talk]


def _asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]
