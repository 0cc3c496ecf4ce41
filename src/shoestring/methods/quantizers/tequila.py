"""Tequila: train a model down to the weights -1, 0 and +1, with those at 0 still learning because they act as a bias.

How it works
    1. Every row of a weight matrix is cut into groups along the input dimension. In a group alpha = mean|w| and
       delta = alpha / 2; T = sign(w) where |w| >= delta, else 0. D marks where T is 0: the deadzone. Both are found
       anew in each forward pass and receive no gradient.
    2. Training computes y = x (alpha T)' + c + bias, where c_i = lambda sum_{j in D_i} w_ij: one number for each
       output, which does not depend on x.
    3. Its gradient, with g = dL/dy, is dL/dw_ij = (g'x)_ij + [j in D_i] lambda sum_t g_ti. The first term passes the
       rounding as if it were not there, for every weight, neither clipped nor multiplied by alpha. The second is the
       point: by the first alone a weight in the deadzone moves with the noise of x and stays trapped.
    4. All parameters are trained on the language-model loss alone, held in float32: bfloat16 loses small steps.
    5. Export packs T and alpha, adds c to the layer's bias (a new one where there was none) and drops w. Inference is a
       ternary product and a bias; nothing is left of lambda. 2 + 16 / group_size bits per weight; "1.58" is an entropy.
    With deadzone=0 the method is the plain straight-through baseline (absmean), and with scaling=twn, delta =
    0.75 mean|w| and alpha the mean of what is kept, ternary weight networks.

Where it bends
    It is training, of all weights, and long: the paper takes 10 tokens a parameter. After a few hundred steps a model
    is unusable, like any that is rounded to three values without training; below one token a parameter a warning says
    so, and the result's facts say how long it was trained. Groups of 64, for many widths are no multiple of the paper's
    128; a row's last group may be short, and its mean is over what is there. Warm-up takes a tenth of the steps (the
    paper's 61 % are of a very long run) and the rate then falls in a line to 0. Scales have the digits of float16
    already while training, so export changes no weight. Not for the token table and the head (`embeddings` rounds those
    after training), and not for mixtures whose experts stand in one tensor: what is trained here are linear layers, and
    their new biases would have no place in it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from shoestring import training
from shoestring.core.errors import UsageError, nearest
from shoestring.core.method import Method, Paper, Price
from shoestring.core.shape import PROJECTIONS, Shape, Weight
from shoestring.core.step import Work
from shoestring.kernels import formats, reference
from shoestring.methods.quantizers import _shared
from shoestring.models import packed, surgery
from shoestring.models.load import fast_bfloat16

METHOD = Method(
    paper=Paper(
        "Tequila: Trapping-free Ternary Quantization for Large Language Models",
        "2025-09",
        arxiv="2509.23809",
        code="Tencent/AngelSlim",
    ),
    provides="TequilaConfig",
    saves=("storage", "memory", "latency", "energy"),
    combines={
        "adapters": "yes",
        "pruners": "yes",
        "architectures": "yes",
        "quantizers": "the weights are codes already",
    },
    expects={"check_error_bound": "it trains the weights, so they do not stay near those they had"},
)
TRAINING = {"learning_rate": 1e-3, "weight_decay": 0.0, "warmup_ratio": 0.1, "lr_scheduler_type": "linear"}
SCALINGS = ("absmean", "twn")
ENOUGH = 1.0  # tokens a parameter below which the result is called unusable; the paper's run had 10


class TequilaConfig(_shared.FormatConfig):
    """What `prepare`, `convert` and `compress` are told.

    Args:
        group_size: weights that share a scale, along the input dimension.
        deadzone: lambda, how much the weights at 0 count as a bias; 0 for plain straight-through training.
        scaling: `absmean`, or `twn` for ternary weight networks.
        embeddings: bits of the embedding table and of a head tied to it after training; None leaves them as they are.
        modules_to_not_convert: names, or parts of names, of modules to leave alone.
        trained_tokens: how many tokens it was trained on; written by `compress`.
    """

    method = "tequila"

    def __init__(
        self,
        group_size: int = 64,
        deadzone: float = 1e-3,
        scaling: str = "absmean",
        embeddings: int | None = None,
        trained_tokens: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(group_size, embeddings, **kwargs)
        self.deadzone, self.scaling, self.trained_tokens = deadzone, scaling, trained_tokens
        if isinstance(deadzone, bool) or not isinstance(deadzone, int | float) or not 0 <= deadzone < float("inf"):
            raise UsageError(f"deadzone {deadzone!r} is not possible", remedy="Use 0 or more; the paper's is 1e-3")
        if scaling not in SCALINGS:
            raise UsageError(f"scaling {scaling!r} is not possible", remedy=nearest(str(scaling), SCALINGS))

    @property
    def format(self) -> str:
        return f"ternary/{self.group_size}"

    def fit(self, weight: Tensor, format: Any, name: str) -> dict[str, Tensor]:
        raise UsageError(
            "Ternary weights that were not trained are of no use",
            remedy="Run `shoestring compress MODEL --method tequila --data FILE`, or prepare, train and convert",
        )

    def facts(self) -> dict[str, Any]:
        """How long it was trained."""
        return {"trained_tokens": self.trained_tokens}


class TernaryLinear(nn.Linear):
    """A linear layer that computes with ternary weights and trains the plain ones behind them.

    Attributes:
        weight: the plain weights [out_features, in_features].
        group: columns that share a scale.
        deadzone: lambda.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, group: int, deadzone: float = 1e-3, scaling: str = "absmean"
    ) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight.detach())
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach()))
        self.group, self.deadzone, self.scaling = group, deadzone, scaling

    def forward(self, input: Tensor) -> Tensor:
        weight, dead = _Rounded.apply(self.weight, self.group, self.scaling)
        return F.linear(input, weight, self._bias(dead))

    def _bias(self, dead: Tensor) -> Tensor | None:
        if self.deadzone == 0:
            return self.bias
        trace = self.deadzone * (self.weight.float() * dead).sum(1)  # step 2: c
        trace = trace if self.bias is None else trace + self.bias.float()
        return trace.to(self.weight.dtype)

    @torch.no_grad()
    def export(self) -> tuple[Tensor, Tensor, Tensor]:
        """Trits int8 [out, in], scales float16 [out, groups], and bias + c [out]: all that is left (step 5)."""
        trits, scales = ternarize(self.weight, self.group, self.scaling)
        bias = self._bias(trits == 0)
        return trits, scales.half(), torch.zeros_like(self.weight[:, 0]) if bias is None else bias

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ternary/{self.group}, deadzone={self.deadzone}, scaling={self.scaling}"


class _Rounded(torch.autograd.Function):
    """alpha T and where T is 0; the gradient of the first goes to the weight as it is (step 3)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, group: int, scaling: str) -> tuple[Tensor, Tensor]:
        trits, scales = ternarize(weight, group, scaling)
        wide = scales.repeat_interleave(group, 1)[:, : weight.shape[1]]
        dead = trits == 0
        ctx.mark_non_differentiable(dead)
        return (trits * wide).to(weight.dtype), dead

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return grad, None, None


def ternarize(weight: Tensor, group: int, scaling: str = "absmean") -> tuple[Tensor, Tensor]:
    """Trits int8 [rows, columns] and scales [rows, groups] of plain weights; scales have float16's digits (step 1)."""
    columns = weight.shape[1]
    size = F.pad(weight.detach().float().abs(), (0, -columns % group)).unflatten(1, (-1, group))
    real = torch.full((size.shape[1],), group, device=weight.device)
    real[-1] -= -columns % group
    mean = size.sum(2) / real
    kept = size >= (0.5 if scaling == "absmean" else 0.75) * mean.unsqueeze(2)
    # A group of zeros keeps them all, and their sign is 0.
    trits = (kept.flatten(1)[:, :columns] * weight.detach().sign()).to(torch.int8)
    scales = mean if scaling == "absmean" else (size * kept).sum(2) / kept.sum(2).clamp(min=1)
    return trits, scales.half().float()


def prepare(model: PreTrainedModel, config: TequilaConfig | None = None) -> PreTrainedModel:
    """Replace the blocks' linear layers by `TernaryLinear`, in place, for any trainer to train.

    All parameters are held in float32 from here on: half precision would lose small steps.

    Raises:
        UsageError: most weights are not in linear layers, or one is not finite.
    """
    config = config or TequilaConfig()
    head = packed.tied_head(model)
    chosen: list[tuple[str, Any]] = [
        (name, module)
        for name, module in model.named_modules()
        if packed.packable(model, name, module)
        and not isinstance(module, nn.Embedding)
        and name != head
        and not config.left_alone(name)
    ]
    packed.refuse_unpacked(model, sum(module.weight.numel() for _, module in chosen))
    for name, module in chosen:
        try:
            reference.refuse_not_finite(module.weight)
        except UsageError as error:
            raise UsageError(f"{name} cannot be quantized: {error}") from None
    _cast(model, torch.float32)
    for name, module in chosen:
        weight = module.weight.t().contiguous() if isinstance(module, Conv1D) else module.weight
        made = TernaryLinear(weight, module.bias, config.group_size, config.deadzone, config.scaling)
        surgery.replace_module(model, name, made.train(module.training))
    return model


def convert(
    model: PreTrainedModel, config: TequilaConfig | None = None, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Pack the layers of a prepared and trained model, in place, so that `save_pretrained` writes it packed.

    Args:
        dtype: of biases, norms and the token table, where that is not packed.

    Raises:
        UsageError: no layer is prepared, or a scale is beyond float16.
    """
    config = config or TequilaConfig()
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, TernaryLinear)]
    if not found:
        raise UsageError("The model has no ternary layers to convert", remedy="Call prepare(model) first and train it")
    for name, module in found:
        format: Any = formats.parse(f"ternary/{module.group}")
        trits, scales, bias = module.export()
        made = packed.linear(format, format.encode(trits, scales), module.in_features, bias=bias, dtype=dtype)
        surgery.replace_module(model, name, made.train(module.training))
    _cast(model, dtype)
    for name, table in [(n, m) for n, m in model.named_modules() if m is model.get_input_embeddings()]:
        whole: Any = config.format_of(name, table.num_embeddings, table.embedding_dim, True)  # type: ignore[arg-type]
        if whole is not None:
            packed.replace_embedding(model, name, whole, whole.pack(table.weight))  # type: ignore[arg-type]
    packed.mark(model, config)
    return model


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    # Parameters alone: positions are computed from buffers, which stay in float32.
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def compress(
    model: PreTrainedModel, config: TequilaConfig, rows: Sequence[dict[str, Any]], work: Work
) -> PreTrainedModel:
    """Train `model` ternary on encoded text and pack it; checkpoints in `work.folder`/ternary.

    Raises:
        UsageError: a model that does not fit, or settings the training loop does not have.
    """
    own = model.dtype
    quick = own == torch.bfloat16 and fast_bfloat16("cpu")
    prepare(model, config).requires_grad_(True)
    parameters = sum(p.numel() for p in model.parameters())
    chosen = {"seed": work.seed, "dtype": "bfloat16" if quick else "float32", **work.training}
    options = training.TrainOptions(**chosen)
    result = training.train(model, rows, (), options, work.folder / "ternary", ledger=work.ledger, resume=work.resume)
    config.trained_tokens = result.tokens
    if result.tokens < ENOUGH * parameters:
        warnings.warn(
            f"only {result.tokens / parameters:.2g} tokens a parameter were trained on: expect an unusable model (the "
            "paper took 10)",
            stacklevel=2,
        )
    return convert(model.eval(), config, own)


def example() -> TequilaConfig:
    return TequilaConfig(group_size=64)


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying, most bits first."""
    return tuple({"group_size": group, "embeddings": bits} for bits in (None, 8) for group in (64, 128))


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    """With the biases that every ternary layer gets; all parameters are trained."""
    config = TequilaConfig(**options)
    known = {weight.name for weight in shape.weights}
    weights: list[Weight] = []
    for before, after in zip(shape.weights, _shared.price(shape, config, experts=False).weights):
        weights.append(after)
        bias = f"{before.name.removesuffix('.weight')}.bias"
        if before.role in PROJECTIONS and after is not before and bias not in known:
            size = before.dims[0] * (before.stored // before.count)
            weights.append(Weight(bias, "bias", before.dims[:1], size, size))
    return Price(replace(shape, weights=tuple(weights)), trainable=shape.parameters, train_flops=3.0)
