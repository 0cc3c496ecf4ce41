"""Two ternary planes beside rounding to 2, 3 and 4 bits, and the fit with outliers weighted beside the plain one."""

from __future__ import annotations

from typing import Any

from torch import nn

from shoestring.core import catalog
from shoestring.core.claim import Claim
from shoestring.jobs.evaluate import heldout
from shoestring.lab.arms import Arms
from shoestring.models.packed import PackedConfig, packable, packed_modules, tied_head

_PAPER = (
    "82.4% mathematical-reasoning retention against 0% for competing low-bit post-training quantization (LLaMA3.x and "
    "Qwen3, 0.6B to 70B)"
)
_HERE = (
    "SmolLM2-135M-Instruct (its file was 4-bit in groups of 32 once), all 210 matrices of its layers in groups of 64, "
    "the token table untouched; "
)
_PERPLEXITY = _HERE + "perplexity on the answers of 12 held-out examples; "
_ROUNDED = " with a float16 scale and offset for each group"
CLAIMS = (
    Claim(
        "two bits",
        paper=_PAPER,
        here=_PERPLEXITY + "plain fit (4.5 bits a weight) against rounding to 2 bits" + _ROUNDED + " (2.5)",
        measure="perplexity",
        arm="ptqtp",
        against="rounded-2",
        expect="<= 0.1",
        cannot="mathematical reasoning; and two planes of trits take more bytes than 2 bits do",
    ),
    Claim(
        "error at three bits",
        paper="no figure; the nine levels of a group follow its weights, those of rounding are evenly spaced",
        here=_HERE + "relative Frobenius error of all of them, plain fit against rounding to 3 bits" + _ROUNDED,
        measure="relative_error",
        arm="ptqtp",
        against="rounded-3",
        expect="< 1.0",
    ),
    Claim(
        "outliers",
        paper="no figure; the plain fit cuts off large weights, which is our finding and `outlier_weight` our remedy",
        here=_PERPLEXITY + "outlier_weight 5 against the plain fit, at the same 4.5 bits a weight",
        measure="perplexity",
        arm="ptqtp-outliers",
        against="ptqtp",
        expect="<= 0.6",
    ),
    Claim(
        "three bits",
        paper=_PAPER,
        here=_PERPLEXITY + "outlier_weight 5 against rounding to 3 bits" + _ROUNDED + " (3.5 bits a weight)",
        measure="perplexity",
        arm="ptqtp-outliers",
        against="rounded-3",
        expect="< 1.0",
    ),
    Claim(
        "equal bytes",
        paper=_PAPER,
        here=_PERPLEXITY + "outlier_weight 5 against rounding to 4 bits" + _ROUNDED + ": 4.5 bits a weight both",
        measure="perplexity",
        arm="ptqtp-outliers",
        against="rounded-4",
        expect="<= 1.0",
    ),
    Claim(
        "hours",
        paper="single-hour quantization against 10-14 GPU days for training-based 1.58-bit methods",
        here="nothing",
        measure="seconds",
        cannot="a 1.58-bit model trained for days",
    ),
)


def run(arms: Arms) -> None:
    reference = arms.load()
    rows = arms.docs(reference.tokenizer, {"test": arms.size(2, 12)})["test"].rows
    layers: dict[str, Any] = {
        name: module
        for name, module in reference.model.named_modules()
        if isinstance(module, nn.Linear)
        and packable(reference.model, name, module)
        and name != tied_head(reference.model)
    }
    packed = dict(list(layers.items())[: arms.size(7, len(layers))])
    kept = [name for name in layers if name not in packed] or None
    fitted = {"ptqtp": 0.0, "ptqtp-outliers": 5.0}
    plans: dict[str, Any] = {
        arm: catalog.load("ptqtp")(64, weight, embeddings=None, modules_to_not_convert=kept)
        for arm, weight in fitted.items()
    }
    for bits in (2, 3, 4):
        plans[f"rounded-{bits}"] = PackedConfig(packing=dict.fromkeys(packed, f"uniform{bits}/64"))
    for arm, plan in plans.items():
        with arms.arm(arm) as stage:
            model = arms.load(quantization_config=plan).model
            stage.record("perplexity", heldout(model, rows).perplexity.value, "perplexity", "measured")
            stage.record("relative_error", _error(model, packed), "ratio", "measured")
            del model


def _error(model: nn.Module, layers: dict[str, Any]) -> float:
    """The length of all differences from the original weights over the length of the weights."""
    off = size = 0.0
    for name, module in packed_modules(model):
        weight = layers[name].weight.detach().float()
        off += float((module.unpacked() - weight).double().square().sum())
        size += float(weight.double().square().sum())
    return (off / size) ** 0.5
