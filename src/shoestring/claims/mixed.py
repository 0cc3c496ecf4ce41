"""Formats chosen layer by layer beside one format for all, at the same bytes."""

from pathlib import Path
from typing import Any

from shoestring.core import catalog
from shoestring.core.claim import Claim
from shoestring.core.step import Work
from shoestring.jobs.evaluate import compare
from shoestring.lab.arms import Arms
from shoestring.models import packed

_HERE = (
    "SmolLM2-135M-Instruct, every linear layer in 3 bits in groups of 64 and the token table in 8, against formats "
    "chosen by layer within the same bytes; 2,048 tokens to calibrate on; divergence on 24 held-out examples. The file "
    "was 4-bit in groups of 32 once, so such groups would be exact for linear layers: they are on offer at 5 bits each"
)
CLAIMS = (
    Claim(
        "choice",
        paper="1.71% higher accuracy on MobileNetV2 than DFQ, without data, in less than 30 s",
        here=_HERE + "; both rounded with compensation",
        measure="kl",
        arm="mixed",
        against="equal",
        expect="<= 0.9",
        cannot="the paper's image models, and calibration without any data",
    ),
    Claim(
        "compensation",
        paper="no figure; GPTQ: 3 or 4 bits per weight with negligible accuracy degradation (175B parameters)",
        here=_HERE + "; equal formats, rounded with compensation against to the nearest",
        measure="kl",
        arm="equal",
        against="nearest",
        expect="<= 0.9",
    ),
    Claim(
        "limit",
        paper="no figure; a plan keeps to its model size",
        here=_HERE + "; bytes of all tensors",
        measure="storage",
        arm="mixed",
        against="equal",
        expect="<= 1.0",
    ),
)

ARMS: dict[str, dict[str, Any]] = {"equal": {}, "nearest": {"rounding": "nearest"}, "mixed": {}}


def run(arms: Arms) -> None:
    mixed = catalog.module("mixed")
    reference = arms.load(dtype="float32")
    parts = arms.docs(reference.tokenizer, {"train": arms.size(8, 48), "test": arms.size(2, 24)})
    calibration = arms.size(256, 2048)
    names = [name for name, _ in mixed.places(reference.model, mixed.example())]
    table = reference.model.get_input_embeddings()
    modules = dict(reference.model.named_modules())
    plan = {name: "int8/64" if modules[name] is table else "uniform3/64" for name in names}
    limit = 0
    for arm, given in ARMS.items():
        with arms.arm(arm) as stage:
            model = arms.load(dtype="float32").model
            own = {"bytes": limit} if arm == "mixed" else {"packing": plan, **given}
            config = mixed.MixedConfig(calibration=calibration, **own)
            model = mixed.compress(model, config, parts["train"].rows, Work(arms.ledger, Path(arms.folder)))
            size = _bytes(model)
            limit = limit or size
            stage.record("kl", compare(model, reference.model, parts["test"].rows).kl.value, "nat", "measured")
            stage.record("storage", size, "B", "counted")
            del model


def _bytes(model: object) -> int:
    """Bytes of all tensors, shared ones once."""
    tensors = {t.data_ptr(): t.numel() * t.element_size() for t in model.state_dict().values()}  # type: ignore[attr-defined]
    assert any(packed.packed_modules(model))  # type: ignore[arg-type]
    return sum(tensors.values())
