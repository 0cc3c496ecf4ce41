"""Planes of signs: their bytes, the fits beside each other, and look-up beside plain and unpacking products."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoestring.claims._stack import own_bfloat16, pass_seconds
from shoestring.core import catalog
from shoestring.core.claim import Claim
from shoestring.jobs.evaluate import heldout
from shoestring.kernels import formats
from shoestring.kernels.formats import Format
from shoestring.lab.arms import Arms
from shoestring.models import packed

_PAPER = "OPT-175B at 3 bits: token generation latency 2.1x better than OPTQ on one GPU"
_HERE = (
    "SmolLM2-135M-Instruct (its file was 4-bit in groups of 32 once), the 42 matrices of its first 6 layers in groups "
    "of 64, all else untouched; "
)
_PERPLEXITY = _HERE + "perplexity on the answers of 24 held-out examples; "
_STACK = "96 matrices of 1536 x 576 with random codes, more than the caches hold, batch 1, as many threads for each; "
CLAIMS = (
    Claim(
        "storage",
        paper="3 bits and a scale for each plane and group in place of 16 bits a weight",
        here=_HERE + "bytes of these at 3 bits with offset (4.0 bits a weight) against bfloat16",
        measure="bytes",
        arm="converted-3",
        against="bf16",
        expect="<= 0.25",
    ),
    Claim(
        "fit",
        paper="no figure; alternating beats greedy, and no round raises the error",
        here=_HERE + "relative Frobenius error at 3 bits without offset, 15 rounds against the greedy start",
        measure="relative_error",
        arm="alternating-3",
        against="greedy-3",
        expect="<= 0.85",
    ),
    Claim(
        "zero",
        paper="no figure; that a level at zero matters more than squared error is our finding",
        here=_PERPLEXITY + "3 bits, converted from rounding to nearest (4.0 bits a weight) against the alternating fit "
        "without offset (3.75)",
        measure="perplexity",
        arm="converted-3",
        against="alternating-3",
        expect="< 1.0",
    ),
    Claim(
        "zero at four bits",
        paper="no figure; that a level at zero matters more than squared error is our finding",
        here=_PERPLEXITY
        + "4 bits, converted from rounding to nearest (5.25 bits a weight) against the alternating fit "
        "without offset from the range (5.0)",
        measure="perplexity",
        arm="converted-4",
        against="alternating-4",
        expect="< 1.0",
    ),
    Claim(
        "speed",
        paper=_PAPER,
        here=_STACK + "look-up at 3 bits against torch's linear layer in bfloat16; seconds of a pass",
        measure="pass_seconds",
        arm="look-up",
        against="torch-bf16",
        expect="<= 0.5",
        cannot="GPUs, models of 175B, and OPTQ's kernels",
    ),
    Claim(
        "beside our own bfloat16",
        paper=_PAPER,
        here=_STACK + "look-up at 3 bits against the engine's own bfloat16 kernel; seconds of a pass",
        measure="pass_seconds",
        arm="look-up",
        against="own-bf16",
        expect="<= 0.5",
        cannot="GPUs, models of 175B, and OPTQ's kernels",
    ),
    Claim(
        "no unpacking",
        paper=_PAPER,
        here=_STACK + "look-up at 3 bits against unpacking to bfloat16 and torch's product; seconds of a pass",
        measure="pass_seconds",
        arm="look-up",
        against="unpacking",
        expect="<= 0.2",
        cannot="GPUs, models of 175B, and OPTQ's kernels",
    ),
)
PLANS: dict[str, dict[str, Any]] = {
    "converted-3": {"bits": 3},
    "greedy-3": {"bits": 3, "coding": "alternating", "rounds": 0},
    "alternating-3": {"bits": 3, "coding": "alternating"},
    "converted-4": {"bits": 4},
    "alternating-4": {"bits": 4, "coding": "alternating", "start": "range"},
}


def run(arms: Arms) -> None:
    _quality(arms)
    _speed(arms)


def _quality(arms: Arms) -> None:
    reference = arms.load()
    rows = arms.docs(reference.tokenizer, {"test": arms.size(2, 24)})["test"].rows
    head = packed.tied_head(reference.model)
    layers: dict[str, Any] = {
        name: module
        for name, module in reference.model.named_modules()
        if isinstance(module, nn.Linear) and packed.packable(reference.model, name, module) and name != head
    }
    chosen = dict(list(layers.items())[: arms.size(7, 42)])
    kept = [name for name in layers if name not in chosen]
    with arms.arm("bf16") as stage:
        stage.record("bytes", sum(2 * m.weight.numel() for m in chosen.values()), "B", "counted")
    for arm, options in PLANS.items():
        with arms.arm(arm) as stage:
            config = catalog.load("lut_gemm")(**options, group_size=64, embeddings=None, modules_to_not_convert=kept)
            model = arms.load(quantization_config=config).model
            if arm != "greedy-3":
                stage.record("perplexity", heldout(model, rows).perplexity.value, "perplexity", "measured")
            stage.record("relative_error", _error(model, chosen), "ratio", "measured")
            stored = sum(t.nbytes for _, module in packed.packed_modules(model) for t in module.tensors().values())
            stage.record("bytes", stored, "B", "counted")
            del model


def _error(model: nn.Module, layers: dict[str, Any]) -> float:
    """The length of all differences from the original weights over the length of the weights."""
    off = size = 0.0
    for name, module in packed.packed_modules(model):
        weight = layers[name].weight.detach().float()
        off += float((module.unpacked() - weight).double().square().sum())
        size += float(weight.double().square().sum())
    return (off / size) ** 0.5


def _speed(arms: Arms) -> None:
    rows, columns, count = 1536, 576, arms.size(4, 96)
    format = formats.parse("binary3/64")
    x = torch.randn(1, columns)
    made = [_random(format, rows, columns) for _ in range(count)]
    plain = [nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16) for _ in range(count)]
    pass_seconds(
        arms,
        {
            "look-up": [packed.linear(format, tensors, columns) for tensors in made],
            "torch-bf16": [partial(F.linear, weight=layer.weight) for layer in plain],
            "own-bf16": [own_bfloat16(layer.weight) for layer in plain],
            "unpacking": [partial(_unpacking, format=format, tensors=tensors) for tensors in made],
        },
        x.bfloat16(),
    )


def _random(format: Format, rows: int, columns: int) -> dict[str, Tensor]:
    made = format.empty(rows, columns, "cpu")
    codes = torch.randint(0, 256, made["weight"].shape, dtype=torch.uint8)
    return {"weight": codes, "scales": (torch.randn(made["scales"].shape) * 0.02).half()}


def _unpacking(x: Tensor, format: Format, tensors: dict[str, Tensor]) -> Tensor:
    return F.linear(x, format.unpack(tensors, x.shape[1]).to(x.dtype))
