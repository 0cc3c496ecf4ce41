"""The modules that stand for float ones in a transformers model: linear layers, token tables, experts of a mixture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from shoestring.core.errors import UsageError
from shoestring.kernels import formats, ops
from shoestring.kernels.formats import Format
from shoestring.kernels.formats._format import Product
from shoestring.models.anatomy import DOWN, GATE_UP

PARTS = {GATE_UP: "gate_up", DOWN: "down"}  # parameter of a family's experts -> what packed ones call the matrices


class Packed(nn.Module):
    """A module that stands for a float weight [rows, columns] of `format`."""

    weight: torch.Tensor
    format: Format
    rows: int
    columns: int

    def unpacked(self) -> torch.Tensor:
        """The weight it stands for, float32 [rows, columns]."""
        return self.format.unpack(self.tensors(), self.columns)

    def bound(self) -> torch.Tensor:
        """The largest error that plain rounding may make of each number, [rows, columns]."""
        return self.format.bound(self.tensors(), self.columns)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: getattr(self, name) for name in self._names}

    def hold(self, format: Format, tensors: Mapping[str, torch.Tensor]) -> None:
        """Stand for these tensors from now on."""
        self.format = format
        for name, value in tensors.items():
            self._put(name, value)

    def _hold(self, format: Format, rows: int, columns: int, tied: bool = False) -> None:
        self.rows, self.columns, self.tied = rows, columns, tied
        self._names = tuple(format.layout.tensors(rows, columns))
        self.hold(format, format.empty(rows, columns))

    def _put(self, name: str, value: torch.Tensor) -> None:
        if name == "weight":
            self.weight = nn.Parameter(value, requires_grad=False)
        else:
            # Buffers: a model's dtype is that of its first floating-point parameter, which must not be the scales. Who
            # shares the table's weight borrows its scales too and stores none.
            self.register_buffer(name, value, persistent=not self.tied)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        kept = {name: getattr(self, name) for name in self._names if name != "weight"}
        moved = super()._apply(fn, recurse)
        # `model.to(dtype)` is about activations; scales are part of the stored format and only change device.
        for name, before in kept.items():
            now = getattr(self, name)
            if now.dtype != before.dtype:
                now.data = before.data.to(now.device)
        return moved

    def extra_repr(self) -> str:
        return f"{self.columns}, {self.rows}, format={self.format}"


class PackedLinear(Packed, nn.Linear):
    """A linear layer over packed weights. Input (..., in_features), output (..., out_features) of the same type."""

    def __init__(
        self, in_features: int, out_features: int, format: Format, bias: bool, dtype: torch.dtype, tied: bool = False
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self._hold(format, out_features, in_features, tied)
        values = nn.Parameter(torch.empty(out_features, dtype=dtype), requires_grad=False) if bias else None
        self.register_parameter("bias", values)

    def hold(self, format: Format, tensors: Mapping[str, torch.Tensor]) -> None:
        super().hold(format, tensors)
        layout = format.layout
        self._grouped = layout.kind == "int"
        if self._grouped:  # for which there are products without a second layout
            self._product: Any = ops.Product(layout.planes, layout.group, self.columns)
        else:
            self._product = Product(format, self.rows, self.columns)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        # Not through attributes: nn.Module is slow to find them, and a small layer takes a few microseconds in all.
        own: Any = self._parameters
        beside: Any = self._buffers
        if not input.is_floating_point():
            raise TypeError(
                f"a packed layer is given {input.dtype}: the model casts what enters it to the type of its weight, "
                "which is packed here; leave the layer out with modules_to_not_convert or exclude_modules"
            )
        if self._grouped:
            return self._product(input, own["weight"], beside["scales"], own["bias"])
        return self._product(input, {"weight": own["weight"], **beside}, own["bias"])


class PackedEmbedding(Packed, nn.Embedding):
    """An embedding table over packed rows. Input (...) of ids, output (..., embedding_dim) in `dtype`."""

    def __init__(
        self,
        rows: int,
        width: int,
        format: Format,
        padding_idx: int | None,
        scale: float | torch.Tensor,
        dtype: torch.dtype,
        tied: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim, self.padding_idx = rows, width, padding_idx  # type: ignore[assignment]
        self.scale, self.dtype = scale, dtype
        self._hold(format, rows, width, tied)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        layout = self.format.layout
        if input.is_meta:
            return torch.empty(*input.shape, self.columns, dtype=self.dtype, device="meta")
        if layout.kind == "int":
            codes = self.weight.flatten(1)
            rows = ops.embedding(
                input,
                codes,
                self.tensors()["scales"],
                layout.planes,
                layout.group,
                self.embedding_dim,
                dtype=self.dtype,
            )
        else:
            if input.numel() and not 0 <= int(input.min()) <= int(input.max()) < self.rows:
                raise UsageError(
                    f"Token ids {int(input.min())}..{int(input.max())} do not fit a table of {self.rows} rows",
                    remedy="Use the tokenizer that belongs to the model",
                )
            rows = self.format.rows(self.tensors(), input.flatten(), self.columns).to(self.dtype)
            rows = rows.view(*input.shape, self.columns)
        return scaled(rows, self.scale)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype
        return super()._apply(fn, recurse)


class ExpertMatrices(Packed):
    """One matrix [rows, columns] for each expert of a layer.

    Where the format fixes a row's bytes they stand one below the other, as one matrix would. Where the content decides
    on the length, `weight` has their bytes end to end and `starts`, int64 [experts + 1], where each begins.
    """

    def __init__(self, experts: int, rows: int, columns: int, format: Format) -> None:
        super().__init__()
        self.experts, self.each = experts, rows
        self._hold(format, experts * rows, columns)

    def _hold(self, format: Format, rows: int, columns: int, tied: bool = False) -> None:
        super()._hold(format, rows, columns, tied)
        if format.layout.says_its_size:
            self._names = (*self._names, "starts")
            self.register_buffer("starts", torch.empty(self.experts + 1, dtype=torch.int64, device="meta"))

    def hold(self, format: Format, tensors: Mapping[str, torch.Tensor]) -> None:
        super().hold(format, tensors)
        self._products = [Product(format, self.each, self.columns) for _ in range(self.experts)]

    def take(self, made: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """Stand for the matrices whose tensors the format made, one for each expert."""
        self.hold(*self.joined(made))

    def joined(self, made: Sequence[Mapping[str, torch.Tensor]]) -> tuple[Format, dict[str, torch.Tensor]]:
        """The format and the tensors of all experts from those of each."""
        joined = {name: torch.cat([tensors[name] for tensors in made]) for name in made[0]}
        if not self.format.layout.says_its_size:
            return self.format, joined
        sizes = torch.tensor([0, *(tensors["weight"].numel() for tensors in made)])
        format = formats.parse(f"{self.format.layout.native}/{joined['weight'].numel()}")
        return format, {**joined, "starts": sizes.cumsum(0)}

    def of(self, expert: int) -> dict[str, torch.Tensor]:
        """One expert's tensors, within those of all."""
        if self.format.layout.says_its_size:
            starts: Any = self.starts
            return {"weight": self.weight[starts[expert] : starts[expert + 1]]}
        begin = expert * self.each
        return {name: tensor[begin : begin + self.each] for name, tensor in self.tensors().items()}

    def forward(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        """x [tokens, columns] @ matrix.T of one expert."""
        layout, tensors = self.format.layout, self.of(expert)
        if layout.kind == "int" and not x.is_meta:
            codes = tensors["weight"].flatten(1)
            return ops.quantized_linear(x, codes, tensors["scales"], layout.planes, layout.group, self.columns)
        return self._products[expert](x, tensors, None)

    def each_of(self, answer: str) -> torch.Tensor:
        """What the format's `answer` ("unpack" or "bound") says of every expert, [experts * rows, columns]."""
        return torch.cat([getattr(self.format, answer)(self.of(e), self.columns) for e in range(self.experts)])

    def unpacked(self) -> torch.Tensor:
        return self.each_of("unpack")

    def bound(self) -> torch.Tensor:
        return self.each_of("bound")


class PackedExperts(nn.Module):
    """The experts of a layer over packed matrices; what it is called with and returns is the family's own.

    Args:
        family: the layer's own module, of the build of `anatomy.gated_experts`. It loses its weights.
        gate_up, down: formats of the matrices that stand for its parameters of these names.
    """

    stacked_experts = True  # for `models.anatomy`

    def __init__(self, family: nn.Module, gate_up: Format, down: Format) -> None:
        super().__init__()
        self.num_experts, wide, self.hidden_dim = family.get_parameter(GATE_UP).shape
        self.intermediate_dim = wide // 2
        self.gate_up = ExpertMatrices(self.num_experts, wide, self.hidden_dim, gate_up)
        self.down = ExpertMatrices(self.num_experts, self.hidden_dim, self.intermediate_dim, down)
        # The family's own module has the activation and what it needs. It has no weights any more, so it stands where
        # no one looks for modules to fill.
        for name in PARTS:
            delattr(family, name)
        self._family: tuple[Any] = (family,)

    @property
    def family(self) -> Any:
        return self._family[0]

    def matrices(self) -> dict[str, ExpertMatrices]:
        """By the family's own names of what they stand for."""
        return {name: getattr(self, part) for name, part in PARTS.items()}

    def expect(self) -> None:
        """Have parameters of the family's names until `came` says that they were read and packed."""
        for name, packed in self.matrices().items():
            empty = torch.empty(packed.experts, packed.each, packed.columns, device="meta")
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))

    def came(self, name: str) -> ExpertMatrices:
        """The matrices that stand for such a parameter, which is there no longer."""
        delattr(self, name)
        return self.matrices()[name]

    def float_module(self, dtype: torch.dtype) -> nn.Module:
        """The family's own module with plain weights in `dtype`. This one is of no use any more."""
        for name, packed in self.matrices().items():
            plain = packed.unpacked().to(dtype)
            setattr(self.family, name, nn.Parameter(plain.view(packed.experts, packed.each, packed.columns)))
        family: nn.Module = self.family
        return family

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        if hidden_states.is_meta:  # of which no one knows who goes where
            return torch.zeros_like(hidden_states)
        matrices = self.matrices()
        return routed(
            self.family,
            self.num_experts,
            lambda name, x, expert: matrices[name](x, expert),
            hidden_states,
            top_k_index,
            top_k_weights,
        )


def routed(
    family: Any,
    experts: int,
    product: Callable[[str, torch.Tensor, int], torch.Tensor],
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """What the experts of a layer answer, of the build of `anatomy.gated_experts`.

    Args:
        experts: how many there are; a route to one beyond them leads nowhere.
        product: of a parameter's name, x [tokens, columns] and an expert: x @ matrix.T of that expert.
        hidden_states: [tokens, width].
        top_k_index, top_k_weights: which experts a token meets, [tokens, chosen], and how much each counts.
    """
    out = torch.zeros_like(hidden_states)
    for expert in top_k_index.unique().tolist():
        if expert >= experts:
            continue
        tokens, place = torch.where(top_k_index == expert)
        inner = family._apply_gate(product(GATE_UP, hidden_states[tokens], expert))
        outer = product(DOWN, inner, expert) * top_k_weights[tokens, place, None]
        out = out.index_add(0, tokens, outer.to(out.dtype))
    return out


def scale_of(table: nn.Embedding) -> float | torch.Tensor:
    """By what an embedding multiplies the rows that it looks up; a tensor where it first rounds that to their type."""
    scale = getattr(table, "scalar_embed_scale", None)
    if scale is None:
        return float(getattr(table, "embed_scale", 1.0))
    return torch.tensor(float(scale), dtype=torch.float32, device="cpu")


def scaled(rows: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    if isinstance(scale, torch.Tensor):
        return rows * scale.to(rows.dtype)
    return rows if scale == 1.0 else rows * scale


def packed_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Packed))
