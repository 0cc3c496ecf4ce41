"""Ternary training in which dead weights learn as a bias, beside straight-through training; its bytes and its speed."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from shoestring.claims._stack import own_bfloat16, pass_seconds
from shoestring.core import catalog
from shoestring.core.claim import Claim
from shoestring.kernels import formats
from shoestring.lab import mixture
from shoestring.lab.arms import MODEL, Arms
from shoestring.models import packed, resolve, shape_of

_PAPER = (
    "more than 4% accuracy gain over the best ternary baseline on ARC, within 1% of full precision, after 10B tokens "
    "of training (Llama-3.2 1B and 3B)"
)
_HERE = (
    "Llama of 3 layers, width 128, 512 byte pairs, trained 220 steps of 8 x 128 tokens of Python documentation, then "
    "ternary in groups of 64 for 100 steps more; the paper's learning rate of 1e-3 for every arm; held-out loss on the "
    "test part; "
)
_CANNOT = "ARC, and what 10B tokens recover; in so few steps trapping is not visible"
CLAIMS = (
    Claim(
        "recovery",
        paper=_PAPER,
        here=_HERE + "against the same model made ternary without training",
        measure="heldout_loss",
        arm="tequila",
        against="untrained",
        expect="<= 0.85",
        cannot=_CANNOT,
    ),
    Claim(
        "no worse than straight-through",
        paper=_PAPER,
        here=_HERE + "against the same training with lambda = 0",
        measure="heldout_loss",
        arm="tequila",
        against="straight-through",
        expect="<= 0.005",
        by="difference",
        cannot=_CANNOT,
    ),
    Claim(
        "export",
        paper="merged into the bias, with nearly no overhead at inference",
        here=_HERE + "the packed model against the one that was trained",
        measure="heldout_loss",
        arm="exported",
        against="tequila",
        expect="<= 1.005",
    ),
    Claim(
        "storage",
        paper="ternary weights, 1.58 bits each by entropy",
        here="SmolLM2-135M-Instruct, all matrices of its layers at 2.25 bits and their biases, token table in 8 bits; "
        "bytes of the folder against bfloat16",
        measure="storage",
        arm="priced",
        against="bf16",
        expect="<= 0.25",
    ),
    Claim(
        "speed",
        paper="3.0x inference speed-up",
        here="96 ternary matrices of 1536 x 576 with random codes, more than the caches hold, batch 1, against torch's "
        "linear layer in bfloat16 on as many threads; seconds of a pass",
        measure="pass_seconds",
        arm="ternary",
        against="torch-bf16",
        expect="<= 0.5",
    ),
    Claim(
        "beside our own bfloat16",
        paper="3.0x inference speed-up",
        here="the same ternary matrices against the engine's own bfloat16 kernel; seconds of a pass",
        measure="pass_seconds",
        arm="ternary",
        against="own-bf16",
        expect="<= 0.5",
    ),
)
RECIPE = mixture.Recipe(length=128, batch=8, steps=220, rate=2e-3)
RATE, TEST = 1e-3, 2


def run(arms: Arms) -> None:
    _training(arms)
    _storage(arms)
    _speed(arms)


def _training(arms: Arms) -> None:
    module, windows = catalog.module("tequila"), arms.size(2, 64)
    torch.manual_seed(arms.seed)
    original = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=RECIPE.vocabulary, hidden_size=128, intermediate_size=384, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True,
            bos_token_id=0, eos_token_id=0, pad_token_id=0,
        )
    )  # fmt: skip
    recipe = replace(RECIPE, steps=arms.size(2, RECIPE.steps))
    with arms.arm("original") as stage:
        mixture.fit(original, recipe, arms.seed)
        _enter(stage, original, recipe, windows)
    trained: Any = None
    for arm, deadzone, steps in (
        ("untrained", 1e-3, 0),
        ("straight-through", 0.0, arms.size(2, 100)),
        ("tequila", 1e-3, arms.size(2, 100)),
    ):
        with arms.arm(arm) as stage:
            config = module.TequilaConfig(deadzone=deadzone)
            trained = module.prepare(copy.deepcopy(original), config)
            if steps:
                mixture.fit(trained, recipe, arms.seed + 1, steps=steps, rate=RATE)
            _enter(stage, trained, recipe, windows)
    with arms.arm("exported") as stage:
        _enter(stage, module.convert(trained), recipe, windows)


def _enter(stage: Any, model: nn.Module, recipe: mixture.Recipe, windows: int) -> None:
    stage.record("heldout_loss", mixture.heldout(model.eval(), recipe, windows, TEST), "nat", "measured")  # type: ignore[arg-type]


def _storage(arms: Arms) -> None:
    shape = shape_of(resolve(MODEL))
    price = catalog.module("tequila").price(shape, {"group_size": 64, "embeddings": 8})
    for arm, size in (("bf16", shape.storage), ("priced", price.shape.storage)):
        with arms.arm(arm) as stage:
            stage.record("storage", size, "B", "counted")


def _speed(arms: Arms) -> None:
    rows, columns, count = 1536, 576, arms.size(4, 96)
    format: Any = formats.parse("ternary/64")
    made = [
        format.encode(torch.randint(-1, 2, (rows, columns)), torch.rand(rows, columns // 64) * 0.02)
        for _ in range(count)
    ]
    plain = [nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16) for _ in range(count)]
    pass_seconds(
        arms,
        {
            "ternary": [packed.linear(format, tensors, columns) for tensors in made],
            "torch-bf16": [partial(F.linear, weight=layer.weight) for layer in plain],
            "own-bf16": [own_bfloat16(layer.weight) for layer in plain],
        },
        torch.randn(1, columns).bfloat16(),
    )
