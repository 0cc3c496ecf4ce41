"""MoS: build every layer's low-rank update from shards of pools that the layers share, several times fewer numbers.

How it works
    L layers of one kind (name and shape, in -> out) share a pool. Equivalent rank e sets the budget, active rank r the
    form of each layer's update, p the private rank, c the shards of a vector.
    1. A pool is two trained matrices of e L c rows, PA (in / c wide) and PB (out / c wide). A row is a shard: the
       c-th part of a rank vector. Together e L (in + out) numbers, those of a LoRA of rank e, whatever r is.  (eq. 1)
    2. The first (e - p) L c rows are public. Of the others, layer i owns p c: those from ((e - p) L + i p) c.  (eq. 2)
    3. At creation layer i draws (r - p) c public rows without repetition and adds its own, once for A and once more
       for B. The draw is never trained; it is saved with the adapter.                                         (eq. 3)
    4. Row k of A (r x in) is the shards k c ... k c + c - 1 of the draw, one after another; B^T (r x out) likewise
       from PB.                                                                                               (eq. 4)
    5. h = W x + (alpha / r) B A dropout(x). A public shard learns from every layer that drew it.              (eq. 5)
    6. PA starts uniform within 1 / sqrt(in), the bound of a whole vector; PB at zero: training starts at the base.

    Each means of telling layers apart has its switch: subset selection (`r` = e L takes all of the pool everywhere),
    pair dissociation (`pair_dissociation=False` draws once for A and B), sharding (`shards=1`), privatisation
    (`private_rank=0`). With p = e = r and c = 1 nothing is shared: LoRA.

Where it bends
    The four numbers are arguments without defaults in the authors' scripts; e 2, r 16, p 1, c 4 are ours, and r shrinks
    where a pool of few layers has no 16 (one asked for is refused instead). alpha / r is small while r is much larger
    than e: learning rates are higher than LoRA's. Layers of one name but several shapes get a pool for each shape; the
    config lists pools and layers. The authors' per-rank scales, fixed at 1, are left out. Draws are int32. Two adapters
    are combined as weights or exported LoRAs: pools of different draws cannot be averaged.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from shoestring.core.method import Method, Paper, Price
from shoestring.core.shape import PROJECTIONS, Shape
from shoestring.methods.adapters import _shared

METHOD = Method(
    paper=Paper(
        "MoS: Unleashing Parameter Efficiency of Low-Rank Adaptation with Mixture of Shards",
        "2024-10",
        arxiv="2410.00938",
        code="Forence1999/MoS",
    ),
    provides="MosConfig",
    saves=("parameters", "storage", "memory"),
    combines={"quantizers": "yes"},
    traits={
        "family": "reparameterised",
        "acts_on": "weight",
        "merges": "yes",
        "parameters": "e (in + out) a layer, whatever the rank r of its update",
    },
)
TRAINING = {"learning_rate": 5e-3}
USUAL_RANK = 16
CACHED = 8  # adapters whose assembled matrices a layer keeps


@dataclass
class MosConfig(_shared.AdapterConfig):
    """Settings of a mixture of shards.

    Args:
        equivalent_rank: e; the adapter has as many numbers as a LoRA of this rank.
        r: rank of each layer's update, at most p + (e - p) L; left out, it is 16 or that bound, pool by pool.
        private_rank: p; how many of the e ranks belong to one layer alone.
        shards: c; every rank vector is put together from this many parts, so it must divide all widths.
        alpha: the update is scaled by alpha / r.
        dropout: share of the inputs of A that is dropped in training.
        pair_dissociation: whether A and B draw their shards independently.
        pools: pool -> the layers that share it; filled in when the adapter is made.

    Raises:
        ValueError: numbers that cannot be together.
    """

    TYPE: ClassVar[str] = "mos"

    equivalent_rank: int = field(default=2, metadata={"help": "Rank of the LoRA with as many numbers"})
    r: int | None = field(default=None, metadata={"help": "Rank of each layer's update"})
    private_rank: int = field(default=1, metadata={"help": "Ranks that belong to one layer alone"})
    shards: int = field(default=4, metadata={"help": "Parts of a rank vector"})
    alpha: float = field(default=16.0, metadata={"help": "The update is scaled by alpha / r"})
    dropout: float = field(default=0.0, metadata={"help": "Dropout before A"})
    pair_dissociation: bool = field(default=True, metadata={"help": "A and B draw independently"})
    pools: dict[str, list[str]] | None = field(default=None, metadata={"help": "Filled in: pool -> its layers"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("equivalent_rank", 1), ("private_rank", 0), ("shards", 1)):
            _shared.whole(name, getattr(self, name), least)
        if self.r is not None:
            _shared.whole("r", self.r)
        _shared.number("alpha", self.alpha, 0)
        _shared.number("dropout", self.dropout, 0, 0.999)
        if self.private_rank > self.equivalent_rank:
            raise ValueError(
                f"private_rank={self.private_rank} is more than equivalent_rank={self.equivalent_rank}, of which it is "
                f"a part; give at most {self.equivalent_rank}"
            )
        if self.r is not None and self.r < self.private_rank:
            raise ValueError(f"r={self.r} is less than private_rank={self.private_rank}, which every layer uses")

    def rank(self, pool: str, layers: int) -> int:
        """Rank of the layers of a pool that `layers` share.

        Raises:
            ValueError: the pool has too few vectors for the `r` that is asked for.
        """
        public = (self.equivalent_rank - self.private_rank) * layers
        most = self.private_rank + public
        if self.r is None:
            return min(USUAL_RANK, most)
        if self.private_rank == self.equivalent_rank and self.r != self.equivalent_rank:
            raise ValueError(
                f"r={self.r} needs public shards, and private_rank = equivalent_rank = {self.private_rank} leaves "
                f"none; give r={self.equivalent_rank}, or a smaller private_rank"
            )
        if self.r > most:
            enough = self.private_rank + math.ceil((self.r - self.private_rank) / layers)
            raise ValueError(
                f"r={self.r} is more than the pool {pool} of {layers} layers has vectors for; give r of at most "
                f"{most}, or equivalent_rank of at least {enough}"
            )
        return self.r


class MosLinear(_shared.LinearLayer):
    """A linear layer that assembles its update from shards. It owns its draw; the pools are the tuner's."""

    adapter_layer_names = ("moshard_dropout",)
    other_param_names = ("moshard_index_A", "moshard_index_B", "pool", "r", "scaling")
    cast_input_dtype_enabled = True

    def containers(self) -> None:
        self.moshard_dropout = nn.ModuleDict()
        self.moshard_index_A = BufferDict(persistent=True)
        self.moshard_index_B = BufferDict(persistent=True)
        self.pool: dict[str, str] = {}
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self._assembled: dict[str, tuple[tuple[Any, ...], Tensor, Tensor]] = {}

    def fill(self, adapter_name: str, config: Any, key: str, **shared: Any) -> None:
        # In a tuple the pools are no submodules of the layer, so they are counted, saved and moved once, by the tuner.
        self._pools: tuple[nn.ModuleDict, nn.ModuleDict] = shared["pools"]
        pool, place, layers = shared["pool"], shared["place"], shared["layers"]
        rank = config.rank(pool, layers)
        self.pool[adapter_name], self.r[adapter_name] = pool, rank
        self.scaling[adapter_name] = config.alpha / rank
        self.moshard_dropout[adapter_name] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.moshard_index_A[adapter_name] = drawn = draw(config, rank, place, layers)
        self.moshard_index_B[adapter_name] = (
            draw(config, rank, place, layers) if config.pair_dissociation else drawn.clone()
        )
        self._assembled.pop(adapter_name, None)

    def matrices(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """A (r, in) and the transpose of B (r, out), assembled from the pools; gradients flow to these.

        Kept only while nothing can change them: in eval mode, without gradients, from pools that do not train.
        """
        a, b = (cast(nn.ParameterDict, pools[adapter_name])[self.pool[adapter_name]] for pools in self._pools)
        rows = self.moshard_index_A[adapter_name], self.moshard_index_B[adapter_name]
        keep = not (self.training or torch.is_grad_enabled() or a.requires_grad or b.requires_grad)
        if not keep:
            self._assembled.pop(adapter_name, None)
            return self._assemble(a, rows[0], adapter_name), self._assemble(b, rows[1], adapter_name)
        state = tuple((t.data_ptr(), t.dtype, t._version) for t in (a, b, *rows))
        found = self._assembled.pop(adapter_name, None)
        if found is None or found[0] != state:
            found = state, self._assemble(a, rows[0], adapter_name), self._assemble(b, rows[1], adapter_name)
        self._assembled[adapter_name] = found
        while len(self._assembled) > CACHED:
            del self._assembled[next(iter(self._assembled))]
        return found[1], found[2]

    def _assemble(self, pool: Tensor, rows: Tensor, adapter_name: str) -> Tensor:
        return pool.index_select(0, rows.to(pool.device)).reshape(self.r[adapter_name], -1)  # (eq. 4)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        a, b = self.matrices(adapter_name)
        return (b.T @ a) * self.scaling[adapter_name]

    def adapted(self, x: Tensor, names: list[str]) -> Tensor:
        out = self.base_layer(x)
        for name in names:
            a, b = self.matrices(name)
            inner = nn.functional.linear(self.moshard_dropout[name](self._cast_input_dtype(x, a.dtype)), a)
            out = out + (inner * self.scaling[name]) @ b  # (eq. 5)
        return out

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._assembled.pop(adapter_name, None)

    def train(self, mode: bool = True) -> MosLinear:
        if mode:
            self._assembled.clear()
        return super().train(mode)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True


class MosModel(_shared.LinearTuner):
    """The tuner: it owns the pools, adapter first."""

    prefix = "moshard_"
    tuner_layer_cls = MosLinear
    uses_shared_state = True

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if "moshard_A" not in self._modules:
            self.moshard_A, self.moshard_B = nn.ModuleDict(), nn.ModuleDict()
            self._places: dict[str, dict[str, tuple[str, int]]] = {}
        # A new adapter must not change whether those before it train; peft sees to it for what the layers own.
        before = [(p, p.requires_grad) for p in self._shards(set(self.moshard_A) - {adapter_name})]
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        for parameter, trains in before:
            parameter.requires_grad_(trains)

    def shared(self, adapter_name: str, config: Any, key: str) -> dict[str, Any]:
        if adapter_name not in self._places:
            self._make_pools(adapter_name, config)
        pool, place = self._places[adapter_name][key]
        layers = len(config.pools[pool])
        return {"pools": (self.moshard_A, self.moshard_B), "pool": pool, "place": place, "layers": layers}

    def _make_pools(self, adapter_name: str, config: MosConfig) -> None:
        """Look at all targets before the first is replaced, and make their pools.

        Raises:
            ValueError: a width that `shards` does not divide, or an `r` that a pool has no room for.
            TypeError: a target is no linear layer.
        """
        pools: dict[str, list[str]] = {}
        bases: dict[str, Any] = {}
        inside = ""
        for key, module in self.model.named_modules():
            if inside and key.startswith(inside):
                continue
            if isinstance(module, BaseTunerLayer):
                inside = key + "."
            if not key or not self._check_target_module_exists(config, key):
                continue
            base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
            self._check_target(base, key, (nn.Linear, Conv1D), "linear layers")
            for side, width in zip(("inputs", "outputs"), _shared.sizes(base)):
                if width % config.shards:
                    raise ValueError(
                        f"shards={config.shards} does not divide the {width} {side} of {key}; choose one that does"
                    )
            pools.setdefault(pool_of(key, *_shared.sizes(base)), []).append(key)
            bases[key] = base
        for pool, layers in pools.items():
            config.rank(pool, len(layers))
        config.pools = pools
        first, second = nn.ParameterDict(), nn.ParameterDict()
        for pool, layers in pools.items():
            base = bases[layers[0]]
            inputs, outputs = _shared.sizes(base)
            rows, device = config.equivalent_rank * len(layers) * config.shards, base.weight.device
            start = torch.empty(rows, inputs // config.shards, device=device)
            start.uniform_(-1 / math.sqrt(inputs), 1 / math.sqrt(inputs))  # kaiming's bound for a whole vector
            first[pool] = nn.Parameter(start)
            second[pool] = nn.Parameter(torch.zeros(rows, outputs // config.shards, device=device))
        self.moshard_A[adapter_name], self.moshard_B[adapter_name] = first, second
        self._places[adapter_name] = {
            key: (pool, place) for pool, layers in pools.items() for place, key in enumerate(layers)
        }

    def _shards(self, names: Any) -> list[nn.Parameter]:
        pools = (side[name] for name in names if name in self.moshard_A for side in (self.moshard_A, self.moshard_B))
        return [parameter for pool in pools for parameter in pool.parameters()]

    def _train_only(self, names: Any) -> None:
        for name in self.moshard_A:
            for parameter in self._shards([name]):
                parameter.requires_grad_(name in names)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        self._train_only([] if inference_mode else self.active_adapters)

    def set_requires_grad(self, adapter_names: Any, requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad)
        for parameter in self._shards([adapter_names] if isinstance(adapter_names, str) else adapter_names):
            parameter.requires_grad_(requires_grad)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        super()._enable_adapter_layers(enabled)
        self._train_only(self.active_adapters if enabled else [])

    def delete_adapter(self, adapter_name: str) -> None:
        was_active = adapter_name in self.active_adapters
        super().delete_adapter(adapter_name)
        del self.moshard_A[adapter_name], self.moshard_B[adapter_name], self._places[adapter_name]
        if was_active:
            self._train_only(self.active_adapters)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        found = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        own = model.state_dict()
        rows = {pool: config.equivalent_rank * len(layers) * config.shards for pool, layers in config.pools.items()}
        pool_of_key = {key: pool for pool, layers in config.pools.items() for key in layers}
        for key, value in found.items():
            if ".moshard_index_" in key and key in own:
                layer = key.partition(".moshard_index_")[0].removeprefix("base_model.model.")
                if value.dtype != torch.int32 or value.min() < 0 or value.max() >= rows[pool_of_key[layer]]:
                    raise ValueError(
                        f"{key} of the adapter's file draws shards that its pool does not have; save it again"
                    )
        return found


def pool_of(key: str, inputs: int, outputs: int) -> str:
    """Name of the pool for a layer: its own name, without numbers, and its shape."""
    words = [word for word in key.split(".") if not word.isdigit()]
    return f"{words[-1] if words else 'layer'}_{inputs}x{outputs}"


def draw(config: MosConfig, rank: int, place: int, layers: int) -> Tensor:
    """Rows of the pool that layer `place` of `layers` takes, (rank c,) int32: public ones at random, then its own."""
    private = config.private_rank * config.shards
    public = (config.equivalent_rank - config.private_rank) * layers * config.shards
    drawn = torch.randperm(public)[: rank * config.shards - private]  # (eq. 3)
    own = torch.arange(public + place * private, public + (place + 1) * private)  # (eq. 2)
    return torch.cat([drawn, own]).to(torch.int32)


def register() -> None:
    _shared.join("mos", MosConfig, MosModel)


def example() -> MosConfig:
    return MosConfig(**settings()[0])


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying, most parameters first."""
    return ({"equivalent_rank": 2, "private_rank": 1, "shards": 4, "alpha": 16.0, "target_modules": "all-linear"},)


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    """e (in + out) trainable parameters per adapted weight (eq. 1); the merged model costs what the base does."""
    rank = int({**settings()[0], **options}["equivalent_rank"])
    trained = sum(rank * sum(w.dims) for w in shape.of(*PROJECTIONS) if len(w.dims) == 2)
    return Price(shape, trainable=trained, train_flops=2.0)


def as_lora(folder: Path, out: Path) -> None:
    """Write the adapter in `folder` to `out` as an ordinary LoRA: every layer's own A and B, the same scale.

    It answers the same and loads wherever LoRA does; that the layers share their numbers is lost.
    """
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "adapter_model.safetensors")
    pairs = {}
    for pool, layers in config["pools"].items():
        for layer in layers:
            pair = []
            for side in "AB":
                rows = tensors.pop(f"base_model.model.{layer}.moshard_index_{side}")
                shards = tensors[f"base_model.moshard_{side}.{pool}"].index_select(0, rows)
                pair.append(shards.reshape(len(rows) // config["shards"], -1))
            pairs[layer] = pair[0], pair[1].T.contiguous()
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith("base_model.moshard_")}
    _shared.write_lora(out, config, pairs, dict.fromkeys(pairs, config["alpha"]), rest)
