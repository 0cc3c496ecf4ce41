"""The network between model and instructions: a list of operators over named values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shoestring.core.errors import UsageError
from shoestring.methods.mapping._targets import BLOCK

if TYPE_CHECKING:
    from shoestring.models.llama_like import LlamaLike
    from shoestring.models.tensors import Source

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class Network:
    """A decoder-only model of equal layers, in numbers."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocab: int
    context: int = 2048
    epsilon: float = 1e-5

    def __post_init__(self) -> None:
        for what in ("hidden", "inner", "vocab"):
            if getattr(self, what) % BLOCK:
                raise UsageError(
                    f"{what} = {getattr(self, what)} is no multiple of {BLOCK}",
                    "weights are cut into blocks of 16 x 16",
                    "Choose another model",
                )
        if self.head_dim % 32 or self.heads % self.kv_heads:
            raise UsageError(
                f"{self.heads} heads of {self.head_dim} over {self.kv_heads} have no attention template",
                "it wants heads of a multiple of 32 and equal groups",
                "Choose another model",
            )

    def dims(self, role: str) -> tuple[int, int]:
        """Outputs and inputs of a role's matrix."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q": (query, self.hidden), "k": (key, self.hidden), "v": (key, self.hidden), "o": (self.hidden, query),
            "gate": (self.inner, self.hidden), "up": (self.inner, self.hidden), "down": (self.hidden, self.inner),
            "head": (self.vocab, self.hidden),
        }[role]  # fmt: skip

    @property
    def group(self) -> int:
        """Query heads that share one of keys and values."""
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class Operator:
    """One step of the network.

    Attributes:
        kind: "norm", "linear", "append" or "attention"; what the compiler has a template for.
        layer: -1 behind the last one.
        role: the matrix of a linear operator, or which norm.
        source, target: names of values.
        then: what follows each piece of a linear operator's outputs: "", "rope", "silu", "mul" or "add".
        other: the second operand of mul and add.
    """

    kind: str
    layer: int
    role: str = ""
    source: str = ""
    target: str = ""
    then: str = ""
    other: str = ""


# LLaMA2-7B, the model of the published profile.
LLAMA2_7B = Network(layers=32, hidden=4096, heads=32, kv_heads=32, head_dim=128, inner=11008, vocab=32000, context=4096)


def operators(network: Network, layers: int) -> Iterator[Operator]:
    """The operators of `layers` layers and of what follows them, in running order."""
    for n in range(layers):
        yield Operator("norm", n, "attention", "x", "h")
        yield Operator("linear", n, "q", "h", "q", "rope")
        yield Operator("linear", n, "k", "h", "k", "rope")
        yield Operator("linear", n, "v", "h", "v")
        yield Operator("append", n, source="k", target="v")
        yield Operator("attention", n, source="q", target="c")
        yield Operator("linear", n, "o", "c", "x", "add", "x")
        yield Operator("norm", n, "mlp", "x", "h")
        yield Operator("linear", n, "gate", "h", "g", "silu")
        yield Operator("linear", n, "up", "h", "g", "mul", "g")
        yield Operator("linear", n, "down", "g", "x", "add", "x")
    yield Operator("norm", -1, "final", "x", "h")
    yield Operator("linear", -1, "head", "h", "logits")


def described(source: Source) -> LlamaLike:
    """The Llama-like model of a folder or file.

    Raises:
        UsageError: a model of another kind, or one that is not whole.
    """
    from shoestring.models.llama_like import NotNative, describe

    try:
        return describe(source)
    except NotNative as error:
        # Its remedy is another runner, and there is none here.
        raise UsageError(
            "the compiler has no templates for this model",
            f"it compiles what the native runner computes: {error.what}",
            "Choose a plain Llama, such as smollm2",
        ) from None


def network_of(model: LlamaLike) -> Network:
    """The network of a Llama-like model.

    Raises:
        UsageError: it has an operator without a template, which is named.
    """
    missing = [
        name
        for name, has in {
            f"the activation {model.activation}": model.activation != "silu",
            "a bias": bool(model.biased),
            "norms of heads": model.head_norms,
            "a sliding window": any(model.windows),
            "layers without rotation": not all(model.rotates),
            "rotation of a part of a head": 2 * len(model.rotary.inverse) != model.head_dim,
            "layers of unequal sizes": bool(model.layer_kv_heads or model.layer_intermediate),
            "layers that share attention weights": model.shares,
            "scaled residuals": model.residual_scale != 1 or model.embedding_scale != 1 or model.logit_scale != 1,
            "rows stored in pairs": model.interleaved,
        }.items()
        if has
    ]
    if missing:
        raise UsageError(
            f"the compiler has no template for {', '.join(missing)}", remedy="Choose a plain Llama, such as smollm2"
        )
    return Network(
        model.layers, model.hidden, model.heads, model.kv_heads, model.head_dim, model.intermediate, model.vocab,
        model.context, model.epsilon,
    )  # fmt: skip
