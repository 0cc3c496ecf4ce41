"""Mixtures of experts: what config.json says of them, and what files call their tensors. Plain data, no torch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from shoestring.core.errors import UsageError
from shoestring.models import stated
from shoestring.models.stated import NotNative

ROLES = (
    "router", "weigher", "shared_gate", "shared_up", "shared_down", "experts", "expert_gate", "expert_up",
    "expert_gate_up", "expert_down", "latent_gate", "latent_up", "latent_down",
)  # fmt: skip
# How files name what stands in the place of a feed-forward: the module's name, an expert's matrices.
STEMS = ("mlp", "block_sparse_moe")
_APART = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_FUSED, _PACKED = ("gate_up_proj", "down_proj"), ("gate_up", "down")
CORRECTION = "e_score_correction_bias"
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
_MOST_CHOICES = 1 << 16


@dataclass(frozen=True)
class Latent:
    """Spaces that neighbouring experts share.

    Attributes:
        group: how many experts share one.
        size: its dimensions.
        down: whether experts are added up there and leave it together; without, each has a way out of its own.
    """

    group: int
    size: int
    down: bool

    @property
    def names(self) -> dict[str, str]:
        """Role -> tensor of all experts, or of all spaces, of a layer."""
        own = ("gate", "up", "down") if self.down else ("gate", "up")
        down = {} if self.down else {"expert_down": "down_proj"}
        return (
            {f"expert_{part}": f"own_{part}" for part in own}
            | down
            | {f"latent_{part}": f"shared_{part}" for part in own}
        )


@dataclass(frozen=True)
class Experts:
    """Mixtures of experts in the place of feed-forwards.

    Attributes:
        targets: of each layer, the expert that each choice of its router stands for; empty where the layer is dense.
        chosen: how many choices a token makes.
        width, shared: neurons of an expert, and of the one that all tokens meet, 0 where there is none.
        weighed: the shared expert has a gate of its own.
        scores: what becomes of a router's products, "softmax" or "sigmoid".
        normalized: the scores of those chosen are divided by their sum.
        corrected: something is added to the scores to find the largest.
        scale: of the gates.
        stem: what files call the module that holds router and experts.
        shared_name: and in it the expert that all tokens meet.
        parts: of each layer, what a file calls the matrices of its experts: three names where each expert has its own,
            two where all have theirs together, `_PACKED` where these are packed, those of `latent` where there is one;
            empty where the layer is dense.
        latent: the spaces that experts share, None where each reads the stream.
    """

    targets: tuple[tuple[int, ...], ...]
    chosen: int
    width: int
    shared: int = 0
    weighed: bool = False
    scores: str = "softmax"
    normalized: bool = False
    corrected: bool = False
    scale: float = 1.0
    stem: str = STEMS[0]
    shared_name: str = "shared_expert"
    parts: tuple[tuple[str, ...], ...] = ()
    latent: Latent | None = None

    def count(self, layer: int) -> int:
        """How many experts a layer has."""
        return max(self.targets[layer], default=-1) + 1

    def packed(self, layer: int) -> bool:
        """Whether a layer's experts are packed together."""
        return self.parts[layer] == _PACKED

    def shape_of(self, role: str, layer: int, hidden: int) -> tuple[int, int]:
        """Rows and columns of a router, of a shared expert's matrix, or of one expert's or latent space's."""
        outer, inner = hidden, self.shared if role.startswith("shared") else self.width
        if self.latent and role.startswith("latent"):
            inner = self.latent.size
        elif self.latent and role.startswith("expert") and (self.latent.down or not role.endswith("down")):
            outer = self.latent.size
        if role.endswith("down"):
            return outer, inner
        inner = 2 * inner if role == "expert_gate_up" else inner
        return {"router": len(self.targets[layer]), "weigher": 1}.get(role, inner), outer

    def name(self, role: str, layer: int) -> str:
        """What a file calls a role of `ROLES`, without the last word; of "experts" the module that holds them."""
        beside = {"router": "gate", "weigher": "shared_expert_gate", "experts": "experts"}
        leaf = beside.get(role) or f"{self.shared_name}.{role.removeprefix('shared_')}_proj"
        return f"model.layers.{layer}.{self.stem}.{leaf}"

    def names(self, layer: int) -> Iterator[str]:
        """Names of all tensors of a layer's experts, behind that of the module which holds them."""
        parts = self.parts[layer]
        if len(parts) == 3:
            yield from (f"{number}.{part}.weight" for number in range(self.count(layer)) for part in parts)
        elif self.packed(layer):
            yield from (f"{part}.weight" for part in parts)
        else:
            yield from parts

    def spelled(self, tensors: Collection[str]) -> Experts:
        """The same with the names that a file has for them."""
        mixed = [layer for layer, to in enumerate(self.targets) if to]
        stems = (s for s in STEMS if any(f"model.layers.{layer}.{s}.gate.weight" in tensors for layer in mixed))
        stem = next(stems, STEMS[0])
        forms = (tuple(self.latent.names.values()),) if self.latent else (*_APART, _FUSED, _PACKED)

        def there(layer: int, parts: tuple[str, ...]) -> bool:
            first = "0." * (len(parts) == 3) + parts[0] + ".weight" * (parts != _FUSED)
            return f"model.layers.{layer}.{stem}.experts.{first}" in tensors

        parts = (next((f for f in forms if there(n, f)), forms[0]) if to else () for n, to in enumerate(self.targets))
        return replace(self, stem=stem, parts=tuple(parts))


def experts(config: Mapping[str, Any], family: str, layers: int) -> Experts:
    """The mixtures that a config.json describes; what it leaves open is that of its family.

    Raises:
        NotNative: a way to choose experts that the native kernels do not know. UsageError: what no mixture can have.
    """
    if config.get("n_group", 1) not in (1, None):
        raise NotNative("The native runner does not choose experts by groups")
    has = _has_experts(config, family, layers)
    given = config["layer_expert_maps"]
    if given is None:
        # The family's own number stands beside what config.json may call otherwise.
        called = next((word for word in _EXPERT_COUNTS if config.get(word) is not None and word != "num_experts"), "")
        count = stated.size(config, called or "num_experts", _MOST_CHOICES)
        given = [list(range(count))] * sum(has)
    usable = isinstance(given, list) and len(given) == sum(has)
    usable = usable and all(isinstance(to, list) and 0 < len(to) < _MOST_CHOICES for to in given)
    if not usable or not all(type(e) is int and 0 <= e < len(to) for to in given for e in to):
        raise UsageError("config.json has no usable layer_expert_maps", f"{sum(has)} lists", "Get an intact model")
    lists = iter(given)
    targets = tuple(tuple(next(lists)) if mixes else () for mixes in has)
    chosen = stated.size(config, "num_experts_per_tok", _MOST_CHOICES)
    fewest = min((len(to) for to in targets if to), default=chosen)
    if chosen > fewest:
        raise UsageError(f"A token cannot meet {chosen} experts of {fewest}", remedy="Get an intact model")
    plain = family in ("mixtral", "olmoe")
    width = stated.size(config, "intermediate_size" if plain else "moe_intermediate_size")
    shared = stated.size(config, "shared_expert_intermediate_size") if family == "qwen2_moe" else 0
    normalized = family == "mixtral" or stated.flag(config, "norm_topk_prob")
    if family != "dots1":
        latent = _latent(config, targets, width)
        return Experts(targets, chosen, width, shared, weighed=bool(shared), normalized=normalized, latent=latent)
    return Experts(
        targets, chosen, width, width * stated.size(config, "n_shared_experts"), scores="sigmoid", corrected=True,
        normalized=normalized, scale=stated.number(config, "routed_scaling_factor"), shared_name="shared_experts",
    )  # fmt: skip


def _latent(config: Mapping[str, Any], targets: tuple[tuple[int, ...], ...], width: int) -> Latent | None:
    if config["factor_down"] is None:
        return None
    counts, hidden = {max(to) + 1 for to in targets if to}, stated.size(config, "hidden_size")
    given = {key: stated.size(config, key) if config[key] else 0 for key in ("experts_per_group", "latent_dim")}
    group = given["experts_per_group"] or max(counts, default=1)
    if any(count % group for count in counts):
        raise UsageError(f"{max(counts)} experts do not make groups of {group}", remedy="Get an intact model")
    size, most = given["latent_dim"] or min(width, hidden), min(group * width, hidden)
    if size > most:
        raise UsageError(
            f"config.json has latent_dim={size}",
            f"{group} experts of {width} x {hidden} have {most} directions",
            "Get an intact model",
        )
    return Latent(group, size, stated.flag(config, "factor_down"))


def _has_experts(config: Mapping[str, Any], family: str, layers: int) -> tuple[bool, ...]:
    if family == "dots1":
        first = config["first_k_dense_replace"] or 0
        if type(first) is not int:
            raise UsageError("config.json has no usable first_k_dense_replace", remedy="Get an intact model")
        return tuple(layer >= first for layer in range(layers))
    if family not in ("qwen2_moe", "qwen3_moe"):
        return (True,) * layers
    dense = config["mlp_only_layers"] or []
    if not isinstance(dense, list):
        raise UsageError("config.json has mlp_only_layers that are no list", remedy="Get an intact model")
    step = stated.size(config, "decoder_sparse_step")
    return tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(layers))
