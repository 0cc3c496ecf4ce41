"""What every group-wise weight format shares: the packed modules and their transformers quantizer.

A packed weight keeps the name `weight` (its scales stand beside it as `scales`), so tying, saving, sharding and device
maps of transformers work on it unchanged, while its shape differs from the float one: a reader that does not know the
format meets a size mismatch instead of nonsense.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from shoestring.core.errors import UsageError
from shoestring.core.shape import Shape, Weight
from shoestring.kernels import ops
from shoestring.kernels.reference import GROUPS
from shoestring.models import surgery

# transformers skips a quantization method it does not know and goes on with random weights. Naming a file that cannot
# exist as the weights makes it stop instead, with the remedy in its message.
SEAL = "needs-the-line__import-shoestring.methods.quantizers__before-from_pretrained.safetensors"
SCALE = torch.bfloat16


class GroupConfig(QuantizationConfigMixin):
    """Group-wise weight quantization. A method subclasses it and sets `bits`.

    Args:
        group_size: weights that share a scale, along the input dimension.
        embeddings: bits of the embedding table and of a head tied to it (8 or 4); None leaves them as they are.
        modules_to_not_convert: names, or parts of names, of modules to leave alone.
    """

    bits = 0
    method = ""
    quant_method: Any

    def __init__(
        self,
        group_size: int = 64,
        embeddings: int | None = 8,
        modules_to_not_convert: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        self.quant_method = f"shoestring_{self.method}"
        self.group_size, self.embeddings = group_size, embeddings
        self.modules_to_not_convert = modules_to_not_convert
        if group_size not in GROUPS:
            raise UsageError(
                f"group_size {group_size!r} is not possible", remedy=f"Use one of {', '.join(map(str, GROUPS))}"
            )
        if embeddings not in (None, 8, 4):
            raise UsageError(
                f"embeddings {embeddings!r} is not possible", remedy="Use 8, 4, or None to leave them as they are"
            )
        stray = set(kwargs) - {"quant_method", "bits"}
        if stray:
            raise UsageError(f"{type(self).__name__} has no option {', '.join(sorted(stray))}")

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "bits": self.bits}

    def bits_of(self, name: str, embedding: bool) -> int | None:
        """Bits of the module called `name`, None to leave it alone."""
        if any(part in name for part in self.modules_to_not_convert or ()):
            return None
        return self.embeddings if embedding else self.bits


class Packed(nn.Module):
    """A module that stands for a float weight. Every format of the room has one; the room's checks speak to it."""

    def unpacked(self) -> torch.Tensor:
        """The weight it stands for, float32 (out, in)."""
        raise NotImplementedError

    def bound(self) -> torch.Tensor:
        """The largest error each weight may have, (out, in)."""
        raise NotImplementedError


class _Grouped(Packed):
    """Rows of groups: `weight` holds integer codes, `scales` one number per row and group."""

    weight: torch.Tensor
    scales: torch.Tensor

    def _hold(self, rows: int, columns: int, bits: int, group: int, tied: bool = False) -> None:
        self.columns, self.bits, self.group = columns, bits, group
        groups = math.ceil(columns / group)
        # Three dimensions keep 8-bit codes from passing for a float weight of the same shape.
        codes = (
            torch.empty(rows, groups, group, dtype=torch.int8)
            if bits == 8
            else torch.empty(rows, groups * group // 2, dtype=torch.uint8)
        )
        self.weight = nn.Parameter(codes, requires_grad=False)
        # A buffer: a model's dtype is that of its first floating-point parameter, which must not be the scales. A
        # tied head borrows the table's and stores none.
        self.register_buffer("scales", torch.empty(rows, groups, dtype=SCALE), persistent=not tied)

    def codes(self) -> torch.Tensor:
        """Codes as the kernels take them, one row after another."""
        return self.weight.flatten(1) if self.bits == 8 else self.weight

    def pack(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scales of a float weight (out, in). Raises UsageError when it is not finite."""
        codes, scales = ops.quantize(weight, self.bits, self.group)
        return codes.view(self.weight.shape), scales.to(SCALE)

    def unpacked(self) -> torch.Tensor:
        return ops.dequantize(self.codes(), self.scales, self.bits, self.group, self.columns)

    def bound(self) -> torch.Tensor:
        # Half a step, but for the end of a 4-bit range that is cut; scales are stored with 8 significant bits.
        return 1.02 * self.scales.float().abs().repeat_interleave(self.group, 1)[:, : self.columns]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        scales = self.scales.data
        moved = super()._apply(fn, recurse)
        # `model.to(dtype)` is about activations; scales are part of the stored format and only change device.
        if self.scales.dtype != SCALE:
            self.scales.data = scales.to(self.scales.device)
        return moved

    def extra_repr(self) -> str:
        return f"{self.columns}, {self.weight.shape[0]}, bits={self.bits}, group={self.group}"


class PackedLinear(_Grouped, nn.Linear):
    """A linear layer over packed weights. Input (..., in_features), output (..., out_features) of the same type."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        group: int,
        bias: bool,
        dtype: torch.dtype,
        tied: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self._product = ops.Product(bits, group, in_features)
        self._hold(out_features, in_features, bits, group, tied)
        values = nn.Parameter(torch.empty(out_features, dtype=dtype), requires_grad=False) if bias else None
        self.register_parameter("bias", values)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        # Not through attributes: nn.Module is slow to find them, and a small layer takes a few microseconds in all.
        own: Any = self._parameters
        beside: Any = self._buffers
        return self._product(input, own["weight"], beside["scales"], own["bias"])


class PackedEmbedding(_Grouped, nn.Embedding):
    """An embedding table over packed rows. Input (...) of ids, output (..., embedding_dim) in `dtype`."""

    def __init__(
        self, rows: int, width: int, bits: int, group: int, padding_idx: int | None, scale: float, dtype: torch.dtype
    ) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim, self.padding_idx = rows, width, padding_idx  # type: ignore[assignment]
        self.scale, self.dtype = scale, dtype
        self._hold(rows, width, bits, group)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rows = ops.embedding(
            input, self.codes(), self.scales, self.bits, self.group, self.embedding_dim, dtype=self.dtype
        )
        return rows if self.scale == 1.0 else rows * self.scale

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.scales.device)).dtype
        return super()._apply(fn, recurse)


class Pack(ConversionOps):
    """Turns one float weight into codes and scales while transformers reads it, so no whole model is ever inflated."""

    def __init__(self, quantizer: GroupQuantizer) -> None:
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], *_: Any, **given: Any) -> dict[str, Any]:
        name: str = given["full_layer_name"]
        value = next(iter(input_dict.values()))
        value = value[0] if isinstance(value, list) else value
        owner = name.rpartition(".")[0]
        packed: Any = given["model"].get_submodule(owner)
        if owner in self.quantizer.transposed:
            value = value.t()
        try:
            codes, scales = packed.pack(value.contiguous())
        except UsageError as error:
            # transformers would bury it in a report: kept until the weights are read.
            self.quantizer.refusals.append(f"{name} cannot be quantized: {error}")
            codes, scales = packed.pack(torch.zeros_like(value))
        return {name: codes, f"{owner}.scales": scales}


class GroupQuantizer(HfQuantizer):
    """The transformers side of `GroupConfig`: quantizes while loading a float model, and loads what it saved."""

    requires_calibration = False
    quantization_config: GroupConfig

    def __init__(self, quantization_config: QuantizationConfigMixin, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.transposed: set[str] = set()
        self.refusals: list[str] = []

    def update_attn_implementation(self, config: Any) -> Any:
        # The one hook that sees the config before the weight files are looked up.
        if getattr(config, "transformers_weights", None) == SEAL:
            del config.transformers_weights
        return config

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        config = self.quantization_config
        dtype = kwargs.get("dtype") or model.dtype
        tied = _tied_head(model)
        for name, module in list(model.named_modules()):
            bits = config.bits_of(name, embedding=isinstance(module, nn.Embedding) or name == tied)
            if bits is None or not _packable(model, name, module):
                continue
            with torch.device("meta"):
                if isinstance(module, nn.Embedding):
                    scale = float(getattr(module, "scalar_embed_scale", 1.0))
                    new: nn.Module = PackedEmbedding(
                        module.num_embeddings,
                        module.embedding_dim,
                        bits,
                        config.group_size,
                        module.padding_idx,
                        scale,
                        dtype,
                    )
                else:
                    rows, columns = _linear_dims(module)
                    new = PackedLinear(
                        columns, rows, bits, config.group_size, module.bias is not None, dtype, tied=name == tied
                    )
            if isinstance(module, Conv1D):
                self.transposed.add(name)
            new.train(module.training)
            surgery.replace_module(model, name, new)
        _refuse_unpacked(model)
        return model

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        owner, _, tensor = param_name.rpartition(".")
        return not self.pre_quantized and tensor == "weight" and isinstance(model.get_submodule(owner), Packed)

    def get_quantize_ops(self) -> Pack:
        return Pack(self)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.refusals:
            raise UsageError(*self.refusals[:3])
        tie_scales(model)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        # A config that was read from disk says its dtype as a word.
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or model.dtype
        for name, module in list(model.named_modules()):
            if isinstance(module, Packed):
                surgery.replace_module(model, name, _float_module(module, dtype))
        model.tie_weights()
        return model


def price(shape: Shape, config: GroupConfig) -> Shape:
    """The shape after quantization: bytes of codes and scales for what is packed, untouched for the rest."""

    def touch(weight: Weight) -> Weight:
        owner, _, tensor = weight.name.rpartition(".")
        embedding = weight.role == "embed" or (weight.role == "head" and bool(weight.tied))
        if tensor != "weight" or len(weight.dims) != 2 or weight.role == "expert":
            return weight
        bits = config.bits_of(owner, embedding)
        if bits is None or (weight.role == "head" and not weight.tied):
            return weight
        size = packed_bytes(*weight.dims, bits, config.group_size)
        return Weight(weight.name, weight.role, weight.dims, size, size, weight.tied, weight.used)

    return shape.change(touch)


def packed_bytes(rows: int, columns: int, bits: int, group: int) -> int:
    """Bytes of a packed matrix: codes of whole groups plus one 2-byte scale per row and group."""
    groups = math.ceil(columns / group)
    return rows * groups * (group * bits // 8 + SCALE.itemsize)


def seal(folder: Path) -> None:
    """Make a saved folder refuse readers that do not know the format, with the remedy in their error."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["transformers_weights"] = SEAL
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def tie_scales(model: PreTrainedModel) -> None:
    """Give a tied head the scales of the embedding it shares its codes with."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if isinstance(head, PackedLinear) and isinstance(table, PackedEmbedding) and head.weight is table.weight:
        head.scales = table.scales


def packed_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Packed))


def _linear_dims(module: nn.Module) -> tuple[int, int]:
    rows, columns = list(module.weight.shape)  # type: ignore[union-attr, arg-type]
    return (rows, columns) if isinstance(module, nn.Linear) else (columns, rows)


def _tied_head(model: PreTrainedModel) -> str | None:
    head = model.get_output_embeddings()
    if head is None:
        return None
    name = next((n for n, m in model.named_modules() if m is head), None)
    return name if name and f"{name}.weight" in model.all_tied_weights_keys else None


def _packable(model: PreTrainedModel, name: str, module: nn.Module) -> bool:
    if isinstance(module, nn.Embedding):
        # Only the token table: position and type tables are small and often indexed in other ways.
        return module is model.get_input_embeddings()
    if not isinstance(module, nn.Linear | Conv1D):
        return False
    # An untied head is as sensitive as the embedding is; a tied one shares the embedding's codes.
    return module is not model.get_output_embeddings() or name == _tied_head(model)


def _refuse_unpacked(model: PreTrainedModel) -> None:
    """A promise of size must not be broken in silence by matrices that no packed module holds (fused experts, say)."""
    packed = sum(m.weight.numel() for _, m in packed_modules(model))
    head = model.get_output_embeddings()
    left = {
        name: p.numel()
        for name, p in model.named_parameters()
        if p.dim() > 2 and p.is_floating_point() and (head is None or p is not getattr(head, "weight", None))
    }
    if not packed or sum(left.values()) > 0.1 * packed:
        examples = ", ".join(list(left)[:2]) or "no linear layers found"
        raise UsageError(
            f"{type(model).__name__} does not fit weight quantization of linear layers",
            f"most of its weights stand elsewhere ({examples})",
            "Use a model of linear layers, such as LlamaForCausalLM",
        )


class _ScaledEmbedding(nn.Embedding):
    """A float table that scales what it looks up, as some families' own do."""

    scale = 1.0

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rows = super().forward(input)
        return rows if self.scale == 1.0 else rows * self.scale


def _float_module(packed: Any, dtype: torch.dtype) -> nn.Module:
    weight = packed.unpacked().to(dtype)
    if isinstance(packed, nn.Embedding):
        table = _ScaledEmbedding.from_pretrained(weight, freeze=False, padding_idx=packed.padding_idx)
        table.scale = packed.scale
        return table
    with torch.device("meta"):
        linear = nn.Linear(packed.in_features, packed.out_features, packed.bias is not None)
    linear.weight = nn.Parameter(weight)
    if packed.bias is not None:
        linear.bias = nn.Parameter(packed.bias.data.to(dtype))
    return linear
