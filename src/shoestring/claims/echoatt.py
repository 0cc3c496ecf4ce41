"""EchoAtt beside the model it is made of: parameters, what sharing costs, what choosing and healing are worth, time."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from shoestring.core import catalog
from shoestring.core.claim import Claim
from shoestring.core.step import Work
from shoestring.jobs.evaluate import heldout
from shoestring.lab.arms import Arms

if TYPE_CHECKING:
    import torch

_PAPER = (
    "TinyLLaMA-1.1B: inference 15 % faster, training 25 % faster, about 4 % fewer parameters, and zero-shot "
    "performance improved"
)
_HERE = "SmolLM2-135M-Instruct, 7 blocks of 2 layers among its 28 inner ones"
_TEXT = "; perplexity on the answers of 16 held-out examples of Python documentation, at most 96 tokens"
CLAIMS = (
    Claim(
        "parameters",
        paper=_PAPER,
        here=_HERE,
        measure="parameters",
        arm="echoatt",
        against="teacher",
        expect="<= 0.98",
        cannot="the 1.1B model, whose embeddings are a smaller part of it",
    ),
    Claim(
        "cache",
        paper="no figure; followers need no keys",
        here=_HERE + "; bytes of the cache after 64 tokens",
        measure="cache_bytes",
        arm="echoatt",
        against="teacher",
        expect="<= 0.9",
    ),
    Claim(
        "choice",
        paper="layers are shared where their attention is similar, by the cosine of their attention matrices",
        here=_HERE
        + ", chosen by measured similarity against drawn from all ways to place them; before any training"
        + _TEXT,
        measure="perplexity_unhealed",
        arm="echoatt",
        against="random-blocks",
        expect="< 1.0",
    ),
    Claim(
        "healing",
        paper="knowledge distillation in two stages, from the teacher's pseudo-labels first, keeps performance",
        here=_HERE + _TEXT + "; by how much the loss is above the teacher's: after 8 steps of the first stage and 4 of "
        "the second, of 2 examples of at most 96 tokens, AdamW, against a teacher that was trained on the same 4; "
        "before training against the teacher as it is",
        measure="added_loss",
        arm="echoatt",
        against="sharing-alone",
        expect="<= 0.5",
        cannot="zero-shot benchmarks, and the paper's number of tokens",
    ),
    Claim(
        "prefill",
        paper=_PAPER,
        here=_HERE + "; prefill of 2,048 tokens at batch 1 in transformers, bfloat16, one thread, the faster of two "
        "interleaved passes",
        measure="prefill_seconds",
        arm="echoatt",
        against="teacher",
        expect="<= 0.95",
        cannot="training 25 % faster, which is training from scratch",
    ),
    Claim(
        "decode",
        paper=_PAPER,
        here=_HERE + "; the next 8 tokens after those 2,048, in transformers, the faster of two interleaved rounds",
        measure="decode_seconds",
        arm="echoatt",
        against="teacher",
        expect="<= 1.0",
    ),
    Claim(
        "engine prefill",
        paper=_PAPER,
        here=_HERE + "; prefill of 2,048 tokens in steps of 256 by the engine's native kernels, bfloat16, one thread, "
        "the fastest of three interleaved passes",
        measure="engine_prefill_seconds",
        arm="echoatt",
        against="teacher",
        expect="<= 0.97",
    ),
    Claim(
        "engine decode",
        paper=_PAPER,
        here=_HERE + "; the next 32 tokens after those 2,048, by the engine's native kernels, the fastest of three "
        "interleaved rounds",
        measure="engine_decode_seconds",
        arm="echoatt",
        against="teacher",
        expect="<= 0.99",
    ),
)
SHARE, SIZE = 0.5, 2
TRAINING = {"learning_rate": 2e-4, "per_device_train_batch_size": 2, "warmup_ratio": 0.0, "save_steps": 0}


def run(arms: Arms) -> None:
    from shoestring.training import TrainOptions, train

    echo = catalog.module("echoatt")
    steps = arms.size(2, 12)
    loaded = arms.load()
    base = loaded.model
    rows = arms.docs(loaded.tokenizer, {"train": 2 * steps, "test": arms.size(2, 16)}, max_length=96)
    texts, test = rows["train"].rows, rows["test"].rows
    options = echo.EchoAttOptions(block_size=SIZE, share=SHARE, texts=arms.size(2, 12), tokens=96, first_stage=2 / 3)
    with arms.arm("teacher") as stage:
        alone = heldout(base, test).loss.value
        _sizes(stage, base)
    with arms.arm("echoatt") as stage:
        converted = echo.convert(base, options, texts)
        model = converted.model
        before = heldout(model, test)
        stage.record("perplexity_unhealed", before.perplexity.value, "perplexity", "measured")
        _sizes(stage, model)
    with arms.arm("random-blocks") as stage:
        layers, count = len(converted.facts["share_map"]), len(converted.facts["blocks"])
        drawn = echo.student(base, echo.map_of(layers, _drawn(layers, count, arms.seed), SIZE))
        stage.record("perplexity_unhealed", heldout(drawn, test).perplexity.value, "perplexity", "measured")
        del drawn
    both = {"teacher": base, "echoatt": model}
    _time(arms, both, arms.size(64, 2048))
    _time_engine(arms, both, arms.size(64, 2048))
    with arms.arm("sharing-alone") as stage:
        stage.record("added_loss", before.loss.value - alone, "nat", "measured")
    training = {**TRAINING, "max_steps": steps, "seed": arms.seed}
    with arms.arm("echoatt") as stage:
        echo.heal(converted, base, options, texts, [], Work(arms.ledger, arms.folder / "healing", training=training))
        healed = heldout(model.eval(), test).loss.value
    with arms.arm("teacher-trained"):
        # What the second stage teaches of these texts it teaches the teacher too: the same steps, so that only what
        # sharing adds is compared.
        second = TrainOptions(**{**training, "max_steps": steps - round(steps * options.first_stage)})
        train(base, texts, [], second, arms.folder / "teacher")
        taught = heldout(base.eval(), test).loss.value
    with arms.arm("echoatt") as stage:
        stage.record("added_loss", healed - taught, "nat", "measured")


def _drawn(layers: int, count: int, seed: int) -> list[int]:
    """First layers of `count` separate blocks of inner layers, every placing as likely as any other."""
    import torch

    # A block stands for one of the places that are left when the others' inner layers are taken out.
    places = layers - 2 - count * (SIZE - 1)
    chosen = torch.randperm(places, generator=torch.Generator().manual_seed(seed))[:count].sort().values.tolist()
    return [1 + place + number * (SIZE - 1) for number, place in enumerate(chosen)]


def _sizes(stage: Any, model: torch.nn.Module) -> None:
    import torch

    stage.record("parameters", sum(p.numel() for p in model.parameters()), "parameter", "counted")
    with torch.inference_mode():
        cache = model(torch.full((1, 64), 5), logits_to_keep=1, use_cache=True).past_key_values
    parts = [part for layer in cache.layers for part in (layer.keys, layer.values)]
    stage.record("cache_bytes", sum(part.numel() * part.element_size() for part in parts), "B", "counted")


def _time(arms: Arms, models: dict[str, torch.nn.Module], tokens: int) -> None:
    import torch

    ids = torch.randint(3, 40_000, (1, tokens), generator=torch.Generator().manual_seed(arms.seed))
    taken: dict[tuple[str, str], list[float]] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        for _ in range(2):
            for name, model in models.items():
                began = time.perf_counter()
                cache = model(ids, logits_to_keep=1, use_cache=True).past_key_values
                read = time.perf_counter()
                for _ in range(8):
                    model(ids[:, :1], past_key_values=cache, use_cache=True)
                taken.setdefault((name, "prefill_seconds"), []).append(read - began)
                taken.setdefault((name, "decode_seconds"), []).append(time.perf_counter() - read)
    torch.set_num_threads(threads)
    for (name, measure), seconds in taken.items():
        with arms.arm(name) as stage:
            stage.record(measure, min(seconds), "s", "measured")


def _time_engine(arms: Arms, models: dict[str, Any], tokens: int) -> None:
    import numpy as np
    import torch

    from shoestring.engine.native_runner import NativeRunner
    from shoestring.engine.runner import BLOCK, Batch

    after = 32
    pages = -(-(tokens + after) // BLOCK)
    runners = {}
    for name, model in models.items():
        model.save_pretrained(arms.folder / f"{name}-arms")
        runners[name] = NativeRunner(arms.folder / f"{name}-arms", dtype="bfloat16", threads=1)
        runners[name].reserve(pages)
    drawn = torch.randint(3, 40_000, (tokens + after,), generator=torch.Generator().manual_seed(arms.seed))
    ids, table = drawn.numpy().astype(np.int32), np.arange(pages, dtype=np.int32)[None]

    def compute(runner: NativeRunner, begin: int, end: int) -> None:
        positions = np.arange(begin, end, dtype=np.int32)
        starts, context = np.array([0, end - begin], np.int32), np.array([begin], np.int32)
        batch = Batch(ids[begin:end], positions, starts, context, table)
        runner.logits(runner.run(batch), np.array([end - begin - 1]))

    taken: dict[tuple[str, str], list[float]] = {}
    for _ in range(3):
        for name, runner in runners.items():
            began = time.perf_counter()
            for begin in range(0, tokens, 256):
                compute(runner, begin, min(begin + 256, tokens))
            read = time.perf_counter()
            for at in range(tokens, tokens + after):
                compute(runner, at, at + 1)
            taken.setdefault((name, "engine_prefill_seconds"), []).append(read - began)
            taken.setdefault((name, "engine_decode_seconds"), []).append(time.perf_counter() - read)
    for (name, measure), seconds in taken.items():
        with arms.arm(name) as stage:
            stage.record(measure, min(seconds), "s", "measured")
    for runner in runners.values():
        runner.close()
