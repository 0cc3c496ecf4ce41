"""(IA)^3: multiply keys, values and the inner activations of the MLP by learned vectors.

How it works
    1. Attention computes softmax(Q (l_k * K)^T / sqrt(d)) (l_v * V) with trained vectors l_k and l_v, and the MLP
       (l_ff * act(W_1 x)) W_2.                                                                          (section 3.3)
    2. All vectors start at one: training starts at the base model.
    3. After training the vectors are folded into the weights they follow or precede.

Where it bends
    peft's own tuner, unchanged. peft chooses the projections for each model family it knows (for Llama keys, values
    and the MLP's last one); for another, name target_modules and feedforward_modules. So few parameters want a large
    learning rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import IA3Config
from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as MLP
from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as MODULES

from shoestring.core.method import Method, Paper, Price
from shoestring.core.shape import Shape
from shoestring.methods.adapters._peft import targets

METHOD = Method(
    paper=Paper(
        "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
        "2022-05",
        arxiv="2205.05638",
        code="r-three/t-few",
        licence="MIT",
    ),
    provides="IA3Config",
    saves=("parameters", "memory", "storage"),
    combines={"quantizers": "yes"},
    traits={
        "family": "additive",
        "acts_on": "activation",
        "merges": "yes",
        "parameters": "out per key or value weight, in per MLP output weight",
    },
    expects={
        "check_unmerge_restores_the_base": "peft subtracts what it added, which may leave the last bit different",
    },
)
TRAINING = {"learning_rate": 1e-2}


def example() -> IA3Config:
    return IA3Config(**settings()[0])


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying, most parameters first."""
    return ({},)


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    """One trainable parameter for each output of an adapted weight; of an MLP's last weight for each input."""
    chosen = {"feedforward_modules": MLP.get(shape.family, ()), **settings()[0], **options}
    inner = {w.name for w in targets(shape, {"target_modules": chosen["feedforward_modules"]})}
    trained = sum(w.dims[w.name in inner] for w in targets(shape, chosen, MODULES) if len(w.dims) == 2)
    return Price(shape, trainable=trained, train_flops=2.0)
