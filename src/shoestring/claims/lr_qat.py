"""LR-QAT beside plain rounding with the same steps, full quantization-aware training, and a merged and rounded LoRA."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import TrainerCallback

from shoestring.core import catalog
from shoestring.core.claim import Claim
from shoestring.jobs.evaluate import heldout
from shoestring.kernels import formats
from shoestring.lab import rounded
from shoestring.lab.arms import Arms
from shoestring.models import surgery

_PAPER = (
    "outperforms common post-training quantization and equals full-model quantization-aware training at a fraction of "
    "its memory; a 7B model trains on one 24 GB consumer GPU"
)
_HERE = (
    "SmolLM2-135M-Instruct, the matrices of its last 15 blocks in 3 bits and groups of 64 (symmetric, first steps by "
    "the least fourth power of the error in every arm), products with packed integers; r 8, 8 steps of 2 examples of "
    "Python documentation (about 190 tokens), AdamW, linear decay; perplexity of 16 held-out answers; each arm's "
    "learning rate the best of three, factors of 3 apart, on validation data of seed 0 with the last 4 blocks and 6 "
    "steps (LR-QAT 1e-2, 10 times the paper's, for want of steps; full training 3e-4; LoRA 6e-3)"
)
CLAIMS = (
    Claim(
        "rounding",
        paper=_PAPER,
        here=_HERE + "; against plain rounding with the same steps",
        measure="perplexity",
        arm="lr_qat",
        against="rounded",
        expect="<= 0.8",
        cannot="10,000 steps of 32 sequences of 1024 tokens; LLaMA and Mistral; zero-shot averages",
    ),
    Claim(
        "full-training",
        paper=_PAPER,
        here=_HERE + "; against training all of these weights through the same rounding",
        measure="perplexity",
        arm="lr_qat",
        against="full",
        expect="<= 1.1",
        cannot="that it is equal after 10,000 steps",
    ),
    Claim(
        "merged-lora",
        paper=_PAPER,
        here=_HERE + "; against a LoRA in bfloat16 that is merged and then rounded",
        measure="perplexity",
        arm="lr_qat",
        against="lora-rounded",
        expect="< 1",
    ),
    Claim(
        "memory",
        paper=_PAPER,
        here=_HERE + "; bytes of these matrices, of what is trained, its gradients and the optimizer's state",
        measure="training_bytes",
        arm="lr_qat",
        against="full",
        expect="<= 0.125",
        cannot="24 GB cards; activations, which are the same in both",
    ),
)
STEPS = 8
BITS, GROUP, REACH, BLOCKS = 3, 64, "lp_p4", range(15, 30)
# Arm -> method and its options, learning rate.
ARMS: dict[str, tuple[str, dict[str, Any], float]] = {
    "rounded": ("", {}, 0.0),
    "lr_qat": ("lr_qat", {"bits": BITS, "group_size": GROUP, "reach": REACH, "r": 8}, 1e-2),
    "full": ("full", {}, 3e-4),
    "lora-rounded": ("lora", {"r": 8, "lora_alpha": 16}, 6e-3),
}


def run(arms: Arms) -> None:
    rows = examples(arms, "test")
    for name in ARMS:
        with arms.arm(name) as stage:
            figures = of_arm(arms, rows, name, *ARMS[name])
            stage.record("perplexity", figures["perplexity"], "perplexity", "measured")
            if "training_bytes" in figures:
                stage.record("training_bytes", figures["training_bytes"], "B", "counted")


def examples(arms: Arms, part: str) -> tuple[Any, Any]:
    """What is trained on, and the answers of `part` that perplexity is taken of."""
    sizes = {"train": 2 * arms.size(1, STEPS), part: arms.size(2, 16)}
    rows = arms.docs(arms.load().tokenizer, sizes, max_length=128)
    return rows["train"].rows, rows[part].rows


def of_arm(
    arms: Arms, rows: tuple[Any, Any], name: str, method: str, options: dict[str, Any], rate: float
) -> dict[str, float]:
    """Train and pack one arm; its perplexity, and the bytes that training held."""
    from shoestring.training import TrainOptions, train

    steps, loaded = arms.size(1, STEPS), arms.load()
    model: Any = loaded.model
    names = list(rounded.matrices(model, BLOCKS))
    count = _Count()
    if method == "full":
        model.requires_grad_(False)
        for place in names:
            surgery.replace_module(model, place, FullLinear(surgery.get_module(model, place)))
    elif method:
        wanted = {**options, "target_modules": names}
        model = catalog.contract("adapters").wrap(catalog.module(method), model, wanted)
    if method:
        settings = TrainOptions(
            learning_rate=rate, max_steps=steps, per_device_train_batch_size=2, seed=arms.seed, save_steps=0,
            lr_scheduler_type="linear", warmup_ratio=0.1,
        )  # fmt: skip
        folder, tokens = arms.folder / name, loaded.tokenizer
        train(model, rows[0], [], settings, folder, tokenizer=tokens, callbacks=[count])
    if method == "full":
        for place in names:
            surgery.replace_module(model, place, surgery.get_module(model, place).packed())  # type: ignore[operator]
    elif method:
        model = model.merge_and_unload()
    if not rounded.packed_bytes(model):
        rounded.pack_up(model, _pack, BLOCKS)
    perplexity = heldout(model.eval(), rows[1]).perplexity.value
    return {"perplexity": perplexity} | ({"training_bytes": count.bytes} if count.bytes else {})


class FullLinear(nn.Module):
    """A linear layer whose whole weight is trained through its rounding, and the steps with it."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.dtype = layer.weight.dtype
        self.weight = nn.Parameter(layer.weight.detach().float())
        self.scale = nn.Parameter(_rule().begin(layer.weight.detach(), REACH))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self._product, x, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]

    def packed(self) -> nn.Module:
        """The layer of packed integers that was trained."""
        from shoestring.models import packed

        rule, fmt = _rule(), formats.parse(f"uniform{BITS}/{GROUP}")
        levels = self._levels().round().clamp(rule.low, rule.high).flatten(1)
        codes = (levels - rule.low).to(torch.uint8)
        tensors = fmt.encode(codes, self._step().squeeze(-1), torch.zeros_like(self.scale))  # type: ignore[attr-defined]
        return packed.linear(fmt, tensors, self.weight.shape[1], dtype=self.dtype)

    def _step(self) -> Tensor:
        return self.scale.half().float().unsqueeze(-1)

    def _levels(self) -> Tensor:
        return self.weight.unflatten(1, (-1, GROUP)) / self._step()

    def _product(self, x: Tensor) -> Tensor:
        rule = _rule()
        with torch.autocast(x.device.type, enabled=False):
            levels = self._levels()
            codes = (levels + (levels.round() - levels).detach()).clamp(rule.low, rule.high)
            weight = (codes * self._step()).flatten(1)
        return F.linear(x, weight.to(x.dtype))


class _Count(TrainerCallback):
    """Bytes of the trained matrices' layers, their gradients and the optimizer's state, once there is one."""

    bytes = 0

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **given: Any) -> None:
        if self.bytes:
            return
        optimizer = getattr(given["optimizer"], "optimizer", given["optimizer"])
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        held = [*trained, *(p.grad for p in trained), *(v for p in trained for v in optimizer.state[p].values())]
        for base in (m.base_layer for m in model.modules() if hasattr(m, "base_layer")):
            held += [*base.parameters(), *base.buffers()]
        unique = {t.data_ptr(): t for t in held if isinstance(t, Tensor)}
        self.bytes = sum(t.numel() * t.element_size() for t in unique.values())


def _rule() -> Any:
    return catalog.module("lr_qat").LrQatRule(BITS, GROUP, 0.0)


def _pack(weight: Tensor) -> tuple[formats.Format, formats.Tensors]:
    rule, fmt = _rule(), formats.parse(f"uniform{BITS}/{GROUP}")
    steps = rule.begin(weight, REACH)
    levels = (weight.float().unflatten(1, (-1, GROUP)) / steps.unsqueeze(-1)).round().clamp(rule.low, rule.high)
    codes = (levels.flatten(1) - rule.low).to(torch.uint8)
    return fmt, fmt.encode(codes, steps, torch.zeros_like(steps))  # type: ignore[attr-defined]
