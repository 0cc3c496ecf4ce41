"""PERK beside no reading at all, beside the whole unrolling, and beside the same context as a prompt."""

from __future__ import annotations

from typing import Any

from shoestring.core.claim import Claim
from shoestring.lab.arms import Arms

_TOY = (
    "a frozen random Llama of 2 layers and width 64; rank 16 on its MLPs; episodes of 8 random pairs of a key and one "
    "of 30 values, asked for one of them; 4 plain gradient steps with learned rates; 300 outer steps of 4 episodes, "
    "Adam 1e-2; float32, one thread; alpha 1, since at the usual 16 these steps tell 95% before any meta-training"
)
_REAL = (
    "SmolLM2-135M-Instruct, float32, rank 8 on all projections, one inner step, segments of 256 tokens of the Python "
    "documentation one at a time; peak memory above the idle process"
)
CLAIMS = (
    Claim(
        "recall",
        paper="average absolute gains of up to 90 points over the prompt-based baseline (GPT-2)",
        here=_TOY + "; share of 200 values told rightly, after reading against without",
        measure="recall",
        arm="read",
        against="unread",
        expect=">= 0.85",
        by="difference",
        cannot="the paper's tasks and models: a 135M model can be meta-trained for a few dozen steps on two cores",
    ),
    Claim(
        "meta-learning",
        paper="a meta-learned start makes few steps suffice",
        here=_TOY + "; recall after meta-training against before",
        measure="recall",
        arm="read",
        against="untrained",
        expect=">= 0.5",
        by="difference",
    ),
    Claim(
        "truncation",
        paper="truncated unrolling lowers the cost of training",
        here=_TOY + "; processor seconds of the outer steps, two steps of four unrolled against all four",
        measure="outer_seconds",
        arm="read",
        against="whole",
        expect="< 1",
    ),
    Claim(
        "flat memory",
        paper="scales better at inference: 128k tokens on one GPU",
        here=_REAL + ", 4,096 tokens against 512",
        measure="peak_memory_above_floor",
        arm="encode 4096",
        against="encode 512",
        expect="<= 1.2",
        cannot="128k tokens",
    ),
    Claim(
        "the prompt's memory",
        paper="a long prompt's memory grows with it",
        here=_REAL + "; the same tokens as a prompt, 4,096 against 512",
        measure="peak_memory_above_floor",
        arm="prompt 4096",
        against="prompt 512",
        expect=">= 3",
    ),
    Claim(
        "less than a prompt",
        paper="reading takes less memory than a long prompt",
        here=_REAL + ", against the same 4,096 tokens as a prompt",
        measure="peak_memory_above_floor",
        arm="encode 4096",
        against="prompt 4096",
        expect="<= 1",
    ),
)
_KEYS, _VALUES, _PAIRS = 30, 30, 8


def run(arms: Arms) -> None:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        _recall(arms)
    finally:
        torch.set_num_threads(threads)
    _memory(arms)


def _recall(arms: Arms) -> None:
    import time

    import torch

    steps = arms.size(4, 300)
    for name, truncate in (("read", 2), ("whole", 0)):
        with arms.arm(name) as stage:
            model, draw = _toy(truncate), torch.Generator().manual_seed(arms.seed + 1)
            trained = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.Adam(trained, 1e-2)
            untrained = _told(model, arms.seed, arms.size(20, 200))
            begun = time.process_time()
            # The whole unrolling is only timed: a quarter of the steps tell its cost.
            for _ in range(steps if name == "read" else max(2, steps // 4)):
                loss = model(**_episodes(4, draw)).loss
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
            seconds = time.process_time() - begun
            share = 1.0 if name == "read" else steps / max(2, steps // 4)
            stage.record("outer_seconds", seconds * share, "s", "measured")
            if name == "read":
                stage.record("recall", _told(model, arms.seed, arms.size(20, 200)), "share", "measured")
                unread = _told(model, arms.seed, arms.size(20, 200), read=False)
        if name == "read":
            for arm, value in (("unread", unread), ("untrained", untrained)):
                with arms.arm(arm) as stage:
                    stage.record("recall", value, "share", "measured")


def _toy(truncate: int) -> Any:
    from peft import get_peft_model

    from shoestring.core import catalog
    from shoestring.lab import tiny

    config = catalog.load("perk")(
        r=16, alpha=1.0, dropout=0.0, target_modules=["gate_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM",
        inner_optimizer="sgd", inner_rate=0.5, weighting=False, truncate=truncate,
    )  # fmt: skip
    return get_peft_model(tiny.model(), config)


def _episodes(count: int, draw: Any) -> dict[str, Any]:
    """Contexts of key and value, each with one of its keys as the question and the value as the answer."""
    import torch

    from shoestring.data import Collator

    rows = []
    for _ in range(count):
        keys = 3 + torch.randperm(_KEYS, generator=draw)[:_PAIRS]
        values = 3 + _KEYS + torch.randint(_VALUES, (_PAIRS,), generator=draw)
        context = [[int(k), int(v)] for k, v in zip(keys, values)]
        asked = context[int(torch.randint(_PAIRS, (1,), generator=draw))]
        rows.append({"input_ids": asked, "labels": [-100, asked[1]], "context": context})
    return Collator(0)(rows)


def _told(model: Any, seed: int, count: int, read: bool = True) -> float:
    """Share of values told rightly over fresh episodes."""
    import torch

    batch = _episodes(count, torch.Generator().manual_seed(10_000 + seed))
    if not read:
        batch.pop("context")
    model.eval()
    with torch.no_grad():
        told = model(**batch).logits[:, 0].argmax(-1)
    model.train()
    return float((told == batch["labels"][:, 1]).float().mean())


def _memory(arms: Arms) -> None:
    import torch
    from peft import get_peft_model

    from shoestring.core import catalog
    from shoestring.lab.arms import DATA

    loaded = arms.load(dtype="float32")
    settings = {"r": 8, "inner_steps": 1, "truncate": 1, "dropout": 0.0, "task_type": "CAUSAL_LM"}
    model = get_peft_model(loaded.model, catalog.load("perk")(**settings)).eval()  # type: ignore[arg-type]
    from shoestring import data

    texts = [m["content"] for e in data.read(DATA).examples[arms.seed :: 7] for m in e.messages]
    ids = torch.tensor(loaded.tokenizer("\n".join(texts)).input_ids[:4096])
    for tokens in (arms.size(64, 512), arms.size(128, 4096)):
        label = "512" if tokens in (64, 512) else "4096"
        with arms.arm(f"encode {label}"):
            model.base_model.read(list(ids[:tokens].split(min(256, tokens // 2))), accumulate=True)  # type: ignore[operator]
        with arms.arm(f"prompt {label}"), torch.inference_mode():
            model(input_ids=ids[None, :tokens], use_cache=True, logits_to_keep=1)
