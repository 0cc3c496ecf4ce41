"""QMoE: ternary experts in a dictionary code, below one bit per weight, for mixture-of-experts models.

How it works
    1. Only the experts are compressed. Router, attention, embeddings, norms and dense layers stay as they are.
    2. A row's grid is {min, 0, max}, its own two ends, both forced to include 0: w > max/2 becomes max, w < min/2
       becomes min, anything else 0. The ends are outliers, so nine weights in ten become 0.
    3. Rounding is GPTQ: with H = X^T X over the tokens that were routed to the expert, H_jj += max(0.1 mean H_jj, 1e-6)
       and U the upper Cholesky factor of H^-1, each column i is rounded, err = (w_i - q_i) / U_ii, and the columns
       after it take W -= err U_i. 16 experts go through it at once; one whose H has no inverse, or that saw fewer than
       16 tokens, is rounded to the nearest. An expert sees at most four times its fair share of the tokens; special
       tokens are left out.
    4. The model is read block by block. The activations of all samples wait in one list; a block without its experts
       says which token goes where, both of an expert's matrices are calibrated on the same uncompressed pass, and the
       block's output with the compressed experts becomes the next block's input.
    5. Rows are stored in the fixed dictionary code of `shoestring.kernels.formats.dictionary`: 16 bits a code word and
       64 a row, about 0.74 + 64 / columns bits a weight where 88.5% are zero.
    6. A product runs on the code words: sums of the activations that meet min and max, two multiplications a row. Only
       experts that received tokens run.

Where it bends
    The dense part of a block runs twice, once for the routes and once for the output, so that no family's residual
    connections need to be known. Experts that stand in fused gate_up and down tensors are understood (Mixtral, OLMoE,
    Qwen-MoE and their kin), without biases; Switch keeps others. The 2-bit form without the code is not here.
    Ternary weights suit very large mixtures; small ones lose much, and dense models are refused. How long the code gets
    depends on the weights: the price is that of 88.5% zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shoestring.core.errors import UsageError
from shoestring.core.method import Method, Paper, Price
from shoestring.core.shape import Shape, Weight
from shoestring.core.step import Work
from shoestring.kernels import formats
from shoestring.kernels.formats import dictionary
from shoestring.lab import tiny_mixture
from shoestring.methods.quantizers import _shared
from shoestring.methods.quantizers._gptq import gptq
from shoestring.models import surgery
from shoestring.models.anatomy import DOWN, GATE_UP, expert_reads, gated_experts, stacked
from shoestring.models.load import load_tokenizer
from shoestring.models.packed import PackedConfig, PackedExperts, expert_stacks, mark
from shoestring.models.streamed import Streamed, unload

METHOD = Method(
    paper=Paper(
        "QMoE: Practical Sub-1-Bit Compression of Trillion-Parameter Models",
        "2023-10",
        arxiv="2310.16795",
        code="IST-DASLab/qmoe",
        licence="Apache-2.0",
    ),
    provides="QMoEConfig",
    saves=("storage", "memory", "money"),
    combines={
        "adapters": "yes",
        "quantizers": "the experts are ternary already",
        "architectures": "it packs whole experts in fused tensors, which other builds no longer have",
    },
    expects={
        "check_bytes_are_as_promised": "the code's length depends on the weights; the price is that of 88.5% zeros",
        "check_error_bound": "later columns take over the errors of earlier ones, so no weight has a bound of its own",
    },
)
AT_ONCE, SHARE, FEW = 16, 4, 16  # experts; times the fair share of tokens; tokens
CODE_BITS = 0.7375  # a weight in code words where 88.5% are zero


class QMoEConfig(PackedConfig):
    """Ternary experts in the dictionary code, calibrated on data.

    Args:
        samples: examples to calibrate on, the first ones of the data.
        rounding: "gptq", or "nearest" for no calibration.
        modules_to_not_convert: names, or parts of names, of experts to leave alone.
    """

    method = "qmoe"

    def __init__(
        self,
        samples: int = 128,
        rounding: str = "gptq",
        modules_to_not_convert: list[str] | None = None,
        packing: Mapping[str, str] | None = None,
        **stray: Any,
    ) -> None:
        super().__init__(modules_to_not_convert, packing, **stray)
        self.samples, self.rounding = samples, rounding
        if not isinstance(samples, int) or samples < 1:
            raise UsageError(f"samples {samples!r} is not possible", remedy="Give a number from 1 upwards")
        if rounding not in ("gptq", "nearest"):
            raise UsageError(f"rounding {rounding!r} is unknown", remedy="Use gptq or nearest")


def example() -> QMoEConfig:
    return QMoEConfig(samples=128)


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying, the best calibrated first."""
    return {"samples": 512}, {"samples": 128}


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    """What it becomes where 88.5% of the experts' weights are zero. Raises UsageError for a model without experts."""
    chosen = QMoEConfig(**options)
    stacks = {weight.name for pair in expert_stacks(shape) for weight in pair}
    if not stacks:
        if any(len(weight.dims) == 3 for weight in shape.of("expert")):
            raise _other(f"a {shape.family} model")
        raise _dense(f"A {shape.family} model")

    def touch(weight: Weight) -> Weight:
        if weight.name not in stacks or chosen.left_alone(weight.name.rpartition(".")[0]):
            return weight
        experts, rows, columns = weight.dims
        words = round(experts * rows * columns * CODE_BITS / 16)
        size = 2 * words + experts * (8 * rows + 4) + 8 * (experts + 1)
        return Weight(weight.name, weight.role, weight.dims, size, size, weight.tied, weight.used)

    return Price(shape.change(touch))


def base(**changes: Any) -> PreTrainedModel:
    """A tiny mixture whose head is tied to its table."""
    return tiny_mixture.model(**{"tie_word_embeddings": True, **changes})


class QMoEQuantizer(_shared.PackedQuantizer):
    """The transformers side, which reads what was packed and packs nothing itself."""

    quantization_config: QMoEConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if not self.pre_quantized:
            raise UsageError(
                "The experts are rounded with the help of data, which is not at hand while a model is loaded",
                remedy="Run `shoestring compress MODEL --method qmoe --data FILE` and load the folder that it writes",
            )
        return super()._process_model_before_weight_loading(model, **kwargs)


QUANTIZER = QMoEQuantizer


# --- compressing ------------------------------------------------------------------------------------------------------


def stream(source: Path, folder: Path, config: QMoEConfig, rows: list[dict[str, Any]], work: Work) -> dict[str, Any]:
    """Compress the model at `source` into `folder`; in memory at any time are the result, one block and activations.

    Raises:
        UsageError: a model without experts, or with experts of another build, or weights that are not finite.
    """
    streamed = Streamed(source, trust_remote_code=work.trust_remote_code)
    model = streamed.model
    mixtures = dict(_experts(model))
    special = set(getattr(load_tokenizer(source, work.trust_remote_code), "all_special_ids", ()))
    samples = [list(row["input_ids"]) for row in rows[: config.samples]]
    plain = torch.tensor([token not in special for row in samples for token in row])
    streamed.load_rest()
    calls = streamed.block_calls(samples)
    states = [call[0][0][0] for call in calls]
    zeros = weights = 0
    for index, block in enumerate(streamed.anatomy.blocks):
        streamed.load(block.name)
        with_rest = [(call[index][0][1:], call[index][1]) for call in calls]
        for name in [n for n in mixtures if n.startswith(block.name + ".") and not config.left_alone(n)]:
            experts = mixtures[name]
            _check_finite(name, experts)
            hidden, routes = _routed(block.module, experts, states, with_rest)
            packed, empty, count = _compressed(experts, hidden[plain], routes[plain], config)
            zeros, weights = zeros + empty, weights + count
            surgery.replace_module(model, name, packed)
        states = list(_outputs(block.module, states, with_rest))
    mark(model, config)
    model.save_pretrained(folder)
    size = sum(tensor.nbytes for _, m in _shared.packed_modules(model) for tensor in m.tensors().values())
    return {"zeros": zeros / weights if weights else 0.0, "expert_bits": 8 * size / weights if weights else 0.0}


def _experts(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Full name and module of each layer's experts. Raises UsageError where a model has none that fit."""
    found = stacked(model)
    if not all(gated_experts(module) for _, module in found):
        raise _other(type(model).__name__)
    if not found:
        raise _dense(type(model).__name__)
    yield from found


def _other(name: str) -> UsageError:
    return UsageError(f"The experts of {name} are of another build than Mixtral's")


def _dense(name: str) -> UsageError:
    return UsageError(
        f"{name} has no experts",
        "only the many experts of a mixture survive ternary weights; a dense model would lose most of its quality",
        "Compress it with another method of `shoestring methods`, such as int4",
    )


def _check_finite(name: str, experts: nn.Module) -> None:
    for tensor, weight in experts.named_parameters():
        if not torch.isfinite(weight).all():
            raise UsageError(f"{name}.{tensor} cannot be quantized: it holds values that are not finite")


@torch.no_grad()
def _routed(block: nn.Module, experts: nn.Module, states: list[Tensor], rest: list) -> tuple[Tensor, Tensor]:
    """What the experts would read, [tokens, hidden], and which of them each token goes to, [tokens, k]."""
    hidden, routes = [], []

    def note(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        hidden.append(x)
        routes.append(index)
        return torch.zeros_like(x)

    experts.forward = note  # type: ignore[method-assign, assignment]
    try:
        list(_outputs(block, states, rest))
    finally:
        del experts.forward
    return torch.cat(hidden), torch.cat(routes)


@torch.no_grad()
def _outputs(block: nn.Module, states: list[Tensor], rest: list) -> Iterator[Tensor]:
    for state, (args, named) in zip(states, rest, strict=True):
        out = block(state, *args, **named)
        yield out[0] if isinstance(out, tuple) else out


@torch.no_grad()
def _compressed(experts: Any, hidden: Tensor, routes: Tensor, config: QMoEConfig) -> tuple[PackedExperts, int, int]:
    """The experts packed, how many of their weights are 0, and how many there are."""
    count = len(experts.get_parameter(GATE_UP))
    most = max(FEW, SHARE * routes.numel() // count)
    blobs: dict[str, list[Tensor]] = {GATE_UP: [], DOWN: []}
    zeros = 0
    for first in range(0, count, AT_ONCE):
        group = range(first, min(count, first + AT_ONCE))
        tokens = [torch.where((routes == expert).any(1))[0][:most] for expert in group]
        read = [expert_reads(experts, e, hidden[some]) for e, some in zip(group, tokens)]
        for tensor, made in blobs.items():
            weight = experts.get_parameter(tensor)[group.start : group.stop]
            inputs = [reads[tensor] for reads in read]
            symbols, low, high = gptq(weight, _hessians(inputs, weight.shape[-1], config.rounding))
            zeros += int((symbols == 0).sum())
            made += [dictionary.encode(*matrix) for matrix in zip(symbols, low, high)]
    weights = sum(experts.get_parameter(tensor).numel() for tensor in blobs)
    unload(experts)
    packed = PackedExperts(experts, *[formats.parse("dictionary/0")] * 2)
    for tensor, matrices in packed.matrices().items():
        matrices.take([{"weight": blob} for blob in blobs[tensor]])
    return packed, zeros, weights


def _hessians(inputs: list[Tensor], columns: int, rounding: str) -> Tensor:
    """X^T X of each expert, float32 [experts, columns, columns]; the identity where there is too little to go by."""
    unit = torch.eye(columns)
    return torch.stack([x.float().T @ x.float() if len(x) >= FEW and rounding == "gptq" else unit for x in inputs])
