"""L4Q beside plain rounding, a merged and rounded LoRA, and a LoRA on a rounded base, all ending in 3-bit integers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from shoestring.core import catalog
from shoestring.core.claim import Claim
from shoestring.jobs.evaluate import heldout
from shoestring.kernels import formats
from shoestring.lab import rounded
from shoestring.lab.arms import Arms

_PAPER = (
    "sub-4-bit linear quantized LLaMA models with higher accuracy than PTQ followed by PEFT, at training time "
    "comparable to PEFT on a quantized model; no figure in the abstract"
)
_HERE = (
    "SmolLM2-135M-Instruct, every matrix of the blocks in 3 bits and groups of 64 (3.5 bits a weight, the format "
    "uniform3/64 in every arm), products with packed integers; r 4, 8 steps of 2 examples of Python documentation "
    "(about 190 tokens), AdamW; perplexity of 16 held-out answers; each arm's learning rate the best of 2e-3, 6e-3 and "
    "2e-2 on validation data of seed 0, where only the last 4 blocks were packed and 6 steps were taken"
)
CLAIMS = (
    Claim(
        "merged-lora",
        paper=_PAPER,
        here=_HERE + "; against a LoRA in bfloat16 that is merged and then rounded",
        measure="perplexity",
        arm="l4q",
        against="lora-rounded",
        expect="<= 0.8",
        cannot="MMLU, models of 7B to 33B parameters, hundreds of steps of warm-up",
    ),
    Claim(
        "on-rounded",
        paper=_PAPER,
        here=_HERE + "; against a LoRA trained on the rounded model, merged and rounded again",
        measure="perplexity",
        arm="l4q",
        against="rounded-lora-rounded",
        expect="< 1",
        cannot="MMLU, models of 7B to 33B parameters",
    ),
    Claim(
        "rounding",
        paper=_PAPER,
        here=_HERE + "; against plain rounding without training",
        measure="perplexity",
        arm="l4q",
        against="rounded",
        expect="<= 0.8",
        cannot="MMLU, models of 7B to 33B parameters",
    ),
    Claim(
        "storage",
        paper="4-bit and 3-bit models of n + 32 / G bits a weight, no adapter beside them",
        here=_HERE + "; bytes of the matrices of the blocks, against bfloat16",
        measure="matrices",
        arm="l4q",
        against="bfloat16",
        expect="<= 0.21875",
    ),
)
FORMAT, STEPS = "uniform3/64", 8
_L4Q: dict[str, Any] = {"bits": 3, "group_size": 64, "r": 4, "alpha": 8.0, "target_modules": "all-linear"}
_LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
# Arm -> method and its options, learning rate, whether the base is rounded first.
ARMS: dict[str, tuple[str, dict[str, Any], float, bool]] = {
    "bfloat16": ("", {}, 0.0, False),
    "rounded": ("", {}, 0.0, True),
    "l4q": ("l4q", _L4Q, 6e-3, False),
    "lora-rounded": ("lora", _LORA, 6e-3, False),
    "rounded-lora-rounded": ("lora", _LORA, 2e-2, True),
}


def run(arms: Arms) -> None:
    rows = examples(arms, "test")
    for name in ARMS:
        with arms.arm(name) as stage:
            figures = of_arm(arms, rows, name, *ARMS[name])
            stage.record("perplexity", figures["perplexity"], "perplexity", "measured")
            stage.record("matrices", figures["matrices"], "B", "counted")


def examples(arms: Arms, part: str) -> tuple[Any, Any]:
    """What is trained on, and the answers of `part` that perplexity is taken of."""
    sizes = {"train": 2 * arms.size(1, STEPS), part: arms.size(2, 16)}
    rows = arms.docs(arms.load().tokenizer, sizes, max_length=128)
    return rows["train"].rows, rows[part].rows


def of_arm(
    arms: Arms, rows: tuple[Any, Any], name: str, method: str, options: dict[str, Any], rate: float, rounds: bool
) -> dict[str, float]:
    """Train and pack one arm; its perplexity, and the bytes of its matrices."""
    from shoestring.training import TrainOptions, train

    steps, loaded = arms.size(1, STEPS), arms.load()
    model: Any = loaded.model
    if rounds:
        rounded.round_off(model, _pack)
    if method:
        model = catalog.contract("adapters").wrap(catalog.module(method), model, options)
        settings = TrainOptions(
            learning_rate=rate, max_steps=steps, per_device_train_batch_size=2, seed=arms.seed, save_steps=0
        )
        train(model, rows[0], [], settings, arms.folder / name, tokenizer=loaded.tokenizer)
        model = model.merge_and_unload()
    size = sum(2 * layer.weight.numel() for layer in rounded.matrices(model).values())
    if name != "bfloat16":
        if not rounded.packed_bytes(model):
            rounded.pack_up(model, _pack)
        size = rounded.packed_bytes(model)
    found = heldout(model.eval(), rows[1])
    return {"perplexity": found.perplexity.value, "matrices": size}


def _pack(weight: Tensor) -> tuple[formats.Format, formats.Tensors]:
    made = formats.parse(FORMAT)
    return made, made.pack(weight)
