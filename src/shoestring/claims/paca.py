"""PaCA beside LoRA: what a layer keeps for its backward pass, the time of a step, memory and quality of training."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

from shoestring.core import catalog
from shoestring.core.claim import Claim
from shoestring.jobs.evaluate import heldout
from shoestring.lab.arms import Arms

_LAYER = "one linear layer, 1024 x 1024, 2048 tokens, float32, rank 16 both, peft's LoRA"
_MODEL = (
    "SmolLM2-135M-Instruct, Python documentation, 16 steps of 4 examples of at most 256 tokens, AdamW, all linear "
    "layers, as many trained parameters: PaCA r 32 and LoRA r 16; learning rate 1e-3 and 2e-3"
)
CLAIMS = (
    Claim(
        "kept",
        paper="only partial activations, rather than full activations, need to be stored for gradient computation",
        here=_LAYER + "; bytes kept for the backward pass, parameters not counted",
        measure="kept_for_backward",
        arm="paca",
        against="lora",
        expect="<= 0.05",
    ),
    Claim(
        "time",
        paper="training time falls by 22% (LLaMA2-7B, MMLU, A100)",
        here=_LAYER + "; forward and backward in turns, median of 15",
        measure="step_seconds",
        arm="paca",
        against="lora",
        expect="< 1.0",
        cannot="the percentage, which comes from the latency of launching kernels on a GPU; 7B parameters",
    ),
    Claim(
        "memory",
        paper="total memory usage falls by 16% (LLaMA2-7B, MMLU, A100)",
        here=_MODEL + "; peak memory above the idle process, weights included",
        measure="peak_memory_above_floor",
        arm="paca",
        against="lora",
        expect="<= 0.84",
        cannot="GPU memory; 7B parameters",
    ),
    Claim(
        "quality",
        paper="comparable accuracy (fine-tuning on MMLU, instruction tuning on Oasst1)",
        here=_MODEL + "; PaCA's rate is the best of 1e-3, 2e-3 and 4e-3 on validation examples, LoRA's is given; "
        "held-out loss of the answers, nats a token",
        measure="heldout_loss",
        arm="paca",
        against="lora",
        expect="<= 0.1",
        by="difference",
        cannot="MMLU; Oasst1; 70B parameters",
    ),
)
RATES = {"lora": 2e-3, "paca": 1e-3}
OPTIONS = {"lora": {"r": 16, "lora_alpha": 32}, "paca": {"r": 32, "alpha": 32.0}}


def run(arms: Arms) -> None:
    from shoestring.training import TrainOptions, train

    for name, (seconds, kept) in _one_layer(repeats=arms.size(3, 15)).items():
        with arms.arm(name) as stage:
            stage.record("step_seconds", seconds, "s", "measured")
            stage.record("kept_for_backward", kept, "B", "measured")
    steps = arms.size(2, 16)
    for name, rate in RATES.items():
        with arms.arm(name) as stage:
            loaded = arms.load()
            rows = arms.docs(loaded.tokenizer, {"train": 4 * steps, "test": arms.size(4, 48)}, max_length=256)
            model = catalog.contract("adapters").wrap(catalog.module(name), loaded.model, OPTIONS[name])
            options = TrainOptions(
                learning_rate=rate, max_steps=steps, per_device_train_batch_size=4, seed=arms.seed, save_steps=0
            )
            train(model, rows["train"].rows, [], options, arms.folder / name, tokenizer=loaded.tokenizer)
            model.eval()
            stage.record("heldout_loss", heldout(model, rows["test"].rows).loss.value, "nat", "measured")
        del loaded, model


def _one_layer(repeats: int) -> dict[str, tuple[float, int]]:
    """Median seconds of forward and backward, and bytes kept in between, of both; they take turns."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch import nn

    made: dict[str, Any] = {"lora": LoraConfig, "paca": catalog.load("paca")}
    x = torch.randn(2048, 1024, requires_grad=True)
    models = {
        name: get_peft_model(nn.Sequential(nn.Linear(1024, 1024)), config(r=16, target_modules=["0"])).train()  # type: ignore[arg-type]
        for name, config in made.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(repeats + 1):
        for name, model in models.items():
            began = time.perf_counter()
            model(x).sum().backward()
            seconds[name].append(time.perf_counter() - began)
    return {name: (median(seconds[name][1:]), _kept(model, x)) for name, model in models.items()}


def _kept(model: Any, x: Any) -> int:
    import torch

    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    storages: dict[int, Any] = {}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(storage.nbytes() for storage in storages.values())
