"""Expert offloading: runs a mixture of experts with few of its experts in memory and the others in a file.

How it works
    1. The experts stand in one safetensors file, each in one piece. Everything else (attention, routers, experts that
       all tokens share, embeddings) is in memory. The model is read part by part, so all experts are never held.
    2. `slots` experts have a place in memory. Those that a token meets are pinned until they have been computed; when
       another one needs a place, `policy` names who leaves: `lru` the one used longest ago, `lfu` the one used least
       where a use counts half after 64 visits of its layer, `cost` the one with the least
       (share of recent visits) * (time to load) / (layers until its turn), `random` any. One pool serves all layers,
       or with `quota` each layer has as many places.
    3. One thread reads. What the computation waits for is read first, neighbours in the file at once; a guess is read
       in parts and put off when somebody waits. t = max(compute, loads that have not arrived): what is there is
       computed while the rest is read.
    4. Guesses are read ahead: `router` applies the router of the next layer (of `ahead` layers) to the present hidden
       state, 1 - (1 - p)^k with p = softmax(R_(l+1) x_l), `history` takes P(e at l+1 | experts at l) from counts,
       `linear` a trained map of x_l. Those with at least `confidence` are taken: who is in memory stays, and who is not
       is read, as long as the layer's guesses come true at least as often as what they push out is asked for again. A
       guess takes a place when its reading begins, and is given up when its layer has come without asking for it. A
       wrong one costs bandwidth; never an answer. Guessing itself takes time too: passes with guesses and without them
       take turns until one kind is known to be faster, which goes on alone; now and then the other is tried again.
    5. The family's own code computes, on the places instead of its stacked parameters. Tokens are grouped, ordered and
       summed as it does that, so outputs are bit for bit those of the resident model, whatever the number of places and
       of threads.
    6. A prompt meets nearly all experts: each layer then streams them through its places once.
    7. Two modes change answers, and are off unless asked for. `small` keeps a second copy of `small_width` bits, and a
       miss whose share of the gates is below `small` reads that one. `skip` leaves out an expert with
       g < skip * (largest gate of the token), and `mass` all but the smallest set whose gates sum to that share; with
       `renormalise` the gates that are left sum to what they summed to before.

Where it bends
    transformers 5 keeps a layer's experts in stacked parameters: while the file is written, one layer of them is in
    memory. Experts in modules of their own, routers that need more than the hidden state (Llama 4, AFMoE), packed
    weights and devices other than the CPU are refused. Experts are computed by `grouped_mm` (the default) or `eager`;
    `batched_mm` sums differently with every batch. Pages that the system caches are its own and go when memory is
    needed; `cached=False` drops them at once. The linear predictor looks one layer ahead.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shoestring.core.errors import UsageError, nearest
from shoestring.core.method import Method, Paper
from shoestring.kernels import formats
from shoestring.lab import tiny_mixture
from shoestring.methods.serving import _expert_file as files
from shoestring.methods.serving._expert_file import EXACT, ExpertFile
from shoestring.methods.serving._expert_guess import ByHistory, ByLinear, ByRouter, Predictor
from shoestring.methods.serving._expert_pool import Pool, views
from shoestring.methods.serving._expert_replay import check_slots
from shoestring.methods.serving._expert_slots import POLICIES, Key, policy
from shoestring.methods.serving._expert_trial import Trials
from shoestring.models import Loaded, surgery
from shoestring.models.anatomy import Mixture, mixtures
from shoestring.models.cache import make_once
from shoestring.models.load import load_tokenizer
from shoestring.models.streamed import Streamed, unload

METHOD = Method(
    paper=Paper(
        "A Survey on Inference Optimization Techniques for Mixture of Experts Models",
        "2024-12",
        arxiv="2412.14219",
        code="MoE-Inf/awesome-moe-inference",
    ),  # fmt: skip
    provides="ExpertOffloadingConfig",
    saves=("memory", "money"),
    combines={
        "adapters": "yes",
        "pruners": "yes",
        "quantizers": "experts are read as plain floats; what packs them is refused",
    },
    traits={"plugs": "weights"},
)
PREFETCH = ("none", "router", "history", "linear")
COMPUTE = ("grouped_mm", "eager")


@dataclass(frozen=True)
class ExpertOffloadingConfig:
    """How many experts stay in memory, and how the others come.

    Args:
        slots: experts in memory over all layers: a number, or a share of all of them up to 1.0.
        policy: who leaves: lru, lfu, cost or random.
        quota: divide the slots evenly among the layers.
        prefetch: who guesses: none, router, history or linear.
        predictor: file of the trained predictor, for `linear`; `shoestring measure expert-routing` writes one.
        always: guess whether or not it pays.
        ahead: layers that the router guesses ahead.
        guesses: experts a token and layer; 0 for as many as a token meets.
        confidence: least probability of a guess that is read.
        small: share of a token's gates below which a miss reads the copy of fewer bits; answers change. 0 is off.
        small_width: format of that copy.
        skip: an expert whose gate is below this times the token's largest is left out; one number, or one for each
            layer. Answers change. 0 is off.
        mass: keep the smallest set of experts whose gates sum to this share; answers change. 1 is off.
        renormalise: raise the gates that are left to the sum they had.
        cached: let the system keep what was read in memory that nobody needs.
        delay_ms: milliseconds that reading an expert takes at least: a slower memory, for experiments.
        folder: where the file of experts is written; empty for the cache.

    Raises:
        UsageError: values that are not possible.
    """

    slots: int | float = 0.5
    policy: str = "cost"
    quota: bool = False
    prefetch: str = "router"
    predictor: str = ""
    always: bool = False
    ahead: int = 1
    guesses: int = 0
    confidence: float = 0.2
    small: float = 0.0
    small_width: str = "int4/32"
    skip: float | tuple[float, ...] = 0.0
    mass: float = 1.0
    renormalise: bool = True
    cached: bool = True
    delay_ms: float = 0.0
    folder: str = ""

    def __post_init__(self) -> None:
        for name, known in (("policy", POLICIES), ("prefetch", PREFETCH)):
            if getattr(self, name) not in known:
                raise UsageError(
                    f"{name} {getattr(self, name)!r} is unknown", remedy=nearest(getattr(self, name), known)
                )
        whole = isinstance(self.slots, int) and not isinstance(self.slots, bool) and self.slots >= 1
        if not whole and not (isinstance(self.slots, float) and 0 < self.slots <= 1):
            raise UsageError(f"slots {self.slots!r} is not possible", "it is a number of experts, or a share up to 1.0")
        if isinstance(self.skip, list):  # as the command line has it
            object.__setattr__(self, "skip", tuple(self.skip))
        betas = self.skip if isinstance(self.skip, tuple) else (self.skip,)
        for name, value, most in (
            ("confidence", self.confidence, 1.0), ("small", self.small, 1.0), ("mass", self.mass, 1.0),
            *(("skip", beta, 1.0) for beta in betas), ("delay_ms", self.delay_ms, 1e6),
        ):  # fmt: skip
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
                raise UsageError(f"{name} {value!r} is not possible", f"it lies between 0 and {most:g}")
        if self.ahead < 1 or self.guesses < 0 or self.mass == 0:
            raise UsageError("ahead is 1 or more, guesses 0 or more, and mass above 0")
        if (self.prefetch == "linear") != bool(self.predictor):
            raise UsageError("predictor and prefetch=linear belong together", remedy="Give both, or neither")
        formats.parse(self.small_width)

    @property
    def exact(self) -> bool:
        """Whether answers are those of the model with all experts in memory."""
        return not (self.small or any(self.skip if isinstance(self.skip, tuple) else (self.skip,)) or self.mass < 1)


def example() -> ExpertOffloadingConfig:
    """The configuration that checks, documentation and the first-time user run."""
    return ExpertOffloadingConfig()


def base(**changes: Any) -> Any:
    """A tiny mixture of eight experts, two of which each token meets."""
    return tiny_mixture.model(**{"num_hidden_layers": 4, "num_local_experts": 8, **changes})


# --- plugging in ------------------------------------------------------------------------------------------------------


def load(
    config: ExpertOffloadingConfig, folder: Path, *, dtype: str | torch.dtype = "auto", trust_remote_code: bool = False,
    predictor: Predictor | None = None,
) -> Loaded:  # fmt: skip
    """The model of a folder with its experts in a file, read part by part; `offloader(model)` tells what it does.

    Args:
        predictor: guesses in place of the one that `config.prefetch` names.

    Raises:
        UsageError: a model without experts, or with experts or routers of another kind; fewer slots than a token's
            experts.
    """
    streamed = Streamed(folder, dtype=dtype, trust_remote_code=trust_remote_code)
    model = streamed.model
    found = mixtures(model)
    _check(model, found)
    kinds = [_slices(model, mixture) for mixture in found]
    _slots(config, found)
    streamed.load(*(mixture.router for mixture in found))
    mark = files.fingerprint([model.get_submodule(mixture.router) for mixture in found])
    widths = (config.small_width,) if config.small else ()

    def layer(number: int) -> dict[str, Tensor]:
        # A second model without weights, so that the first one is not filled.
        name = found[number].experts
        reader = Streamed(folder, dtype=dtype, trust_remote_code=trust_remote_code)
        reader.load(name)
        experts = reader.model.get_submodule(name)
        return {tensor: experts.get_parameter(tensor) for tensor in found[number].tensors}

    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(folder.glob("*.safetensors"))]
    source = hashlib.sha256(json.dumps(stats).encode()).hexdigest()

    def make(to: Path) -> None:
        files.write(to / "experts.safetensors", found, kinds, streamed.dtype, layer, mark, widths, source)

    if config.folder:
        path = Path(config.folder).expanduser() / "experts.safetensors"
        # Routers alike do not say that the experts are: those of a model that was tuned or pruned are others.
        if not path.is_file() or _source(path, mark) != source:
            make(path.parent)
    else:
        said = {"folder": str(folder.resolve()), "files": stats, "dtype": str(streamed.dtype), "widths": widths}
        path = make_once("experts", {**said, "routers": mark}, make) / "experts.safetensors"
    _replace(model, found, config, ExpertFile(path, mark), predictor)
    streamed.load_rest()
    streamed.load(*(block.name for block in streamed.anatomy.blocks))
    return Loaded(model, load_tokenizer(folder, trust_remote_code), folder, str(folder), "causal")


def offload(
    model: nn.Module, config: ExpertOffloadingConfig = ExpertOffloadingConfig(), predictor: Predictor | None = None
) -> Offloader:
    """Move the experts of a loaded transformers model into a file; `model` then works as before, with less memory.

    Args:
        predictor: as for `load`.

    Returns:
        what tells how it goes; `close` ends the loader, and the model with it.

    Raises:
        UsageError: as `load`.
    """
    found = mixtures(model)
    _check(model, found)
    _slots(config, found)
    kinds = [_slices(model, mixture) for mixture in found]
    mark = files.fingerprint([model.get_submodule(mixture.router) for mixture in found])
    dtype = next(model.get_submodule(found[0].experts).parameters()).dtype
    held = None if config.folder else tempfile.TemporaryDirectory(prefix="experts-")
    path = Path(config.folder or held.name) / "experts.safetensors"  # type: ignore[union-attr]

    def layer(number: int) -> dict[str, Tensor]:
        experts = model.get_submodule(found[number].experts)
        return {tensor: experts.get_parameter(tensor) for tensor in found[number].tensors}

    if held or not path.is_file():
        files.write(path, found, kinds, dtype, layer, mark, (config.small_width,) if config.small else ())
    file = ExpertFile(path, mark)
    for number in range(0 if held else len(found)):
        if not file.holds((number, 0), {name: tensor[0].detach() for name, tensor in layer(number).items()}):
            raise UsageError(
                f"{path} has other experts than this model",
                "only their routers are alike",
                "Delete it, so that it is written anew",
            )
    made = _replace(model, found, config, file, predictor)
    made.held = held
    return made


def offloader(model: nn.Module) -> Offloader | None:
    """What keeps the experts of a model in a file; None when they are all in memory."""
    return next((module.owner for module in model.modules() if isinstance(module, OffloadedExperts)), None)


def plug(config: ExpertOffloadingConfig, opened: Any) -> Any:
    """The model was read by `load`; what is left to say is how it goes.

    Raises:
        UsageError: it was read in another way and cannot be changed.
    """
    from shoestring.engine.hooks import Hooks

    model = getattr(opened.runner, "model", None)
    if model is None:
        raise UsageError("The native runner holds no experts", remedy="Use the torch runner")
    return Hooks(weights=offloader(model) or offload(model, config))


# --- the model's side -------------------------------------------------------------------------------------------------


class Offloader:
    """The experts of one model: who is in memory, and what has happened.

    Attributes:
        pool: the places and the loader; `pool.tally` has all counts and `pool.tally.timeline` what took how long.
        predictor: guesses, None for no guesses; may be replaced at any time between passes.
        trials: whether it pays to ask it.
        skipped, met: pairs of token and expert that were left out, and all of them.
    """

    def __init__(
        self, found: Sequence[Mixture], config: ExpertOffloadingConfig, pool: Pool, predictor: Predictor | None
    ) -> None:
        self.mixtures, self.config, self.pool, self.predictor = found, config, pool, predictor
        self.trials = Trials()
        self.skipped = self.met = 0
        self.held: Any = None  # the folder of a file that nobody else needs

    def stats(self) -> dict[str, float]:
        t = self.pool.tally
        return {
            "expert_slots": float(self.pool.slots.count),
            "expert_bytes_resident": float(self.pool.memory.numel()),
            "expert_hit_rate": t.hits / max(1, t.hits + t.misses),
            "expert_hits": float(t.hits),
            "expert_misses": float(t.misses),
            "expert_late_hits": float(t.late),
            "expert_stall_seconds": t.stall,
            "expert_loading_seconds": t.loading,
            "expert_reads": float(t.reads),
            "expert_bytes_read": float(t.bytes),
            "expert_bytes_wasted": float(t.wasted_bytes),
            "expert_guess_gain": self.trials.gain,
            "expert_small_loads": float(t.small),
            "expert_skipped_share": self.skipped / max(1, self.met),
        }

    def close(self) -> None:
        """End the loader and give the places back. The model cannot compute any more."""
        self.pool.close()
        if self.held:
            self.held.cleanup()

    def compute(self, layer: int, family: Any, x: Tensor, choices: Tensor, gates: Tensor) -> Tensor:
        """What the experts make of x [tokens, width], as the family's own code computes it."""
        pool, guesses = self.pool, self.predictor
        if guesses and not self.config.always:
            if layer == 0:
                self.trials.begin(len(x))
            guesses = guesses if self.trials.on else None
        pool.enter(layer)
        gates, kept = self._kept(layer, choices, gates)
        experts = [
            e for e in (choices if kept is None else choices[kept]).unique().tolist() if e < self.mixtures[layer].count
        ]
        widths = self._widths(experts, choices, gates)
        wanted: dict[Key, str] = {(layer, e): width for e, width in zip(experts, widths)}
        given = pool.want(layer, list(wanted.items()))
        try:
            if guesses:
                pool.guess(layer, [(at, expert) for at, expert, _ in guesses(layer, x, choices)])
            apart = len(given) == choices.numel() and family.config._experts_implementation == "grouped_mm"
            if apart and (len(given) < 2 or all(map(pool.ready, given))):  # one row an expert: none to keep in order
                pool.wait(given)
                out: Tensor = family(x, self._places(layer, choices, given), gates)
                return out
            return self._in_rounds(layer, family, x, choices, gates, kept, wanted, given)
        finally:
            pool.done(given)
            if layer == len(self.mixtures) - 1 and self.predictor and not self.config.always:
                self.trials.end()

    def _in_rounds(
        self, layer: int, family: Any, x: Tensor, choices: Tensor, gates: Tensor, kept: Tensor | None,
        wanted: dict[Key, str], given: list[Key],
    ) -> Tensor:  # fmt: skip
        """Experts that are there first, the others as they come; every pair of token and expert apart until the end.

        Args:
            given: those of `wanted` that have a place; it is kept up to date, and those that are computed leave it.
        """
        pool, (tokens, k) = self.pool, choices.shape
        eager = family.config._experts_implementation == "eager"
        pairs = x.new_zeros(tokens * k, x.shape[1])
        flat, left = choices.flatten(), dict(wanted)
        # What a row of a matrix product comes to may depend on the rows around it. So each expert's stand in the order
        # in which the family has them when all experts are there: by choice and token, or as its sort leaves them.
        order = torch.arange(tokens * k).view(tokens, k).T.flatten() if eager else flat.sort().indices
        while left:
            rest = [(key, width) for key, width in left.items() if key not in given]
            if rest:
                given += pool.want(layer, rest, first=False, wait=not given)
            now = [key for key in given if pool.ready(key)]
            if not now:
                pool.wait(given[:1])
                continue
            chosen = torch.isin(flat, torch.tensor([expert for _, expert in now]))
            if kept is not None:
                chosen &= kept.flatten()
            at = order[chosen[order]]
            places = self._places(layer, flat[at], now)
            if not eager:
                places, by = places.sort(stable=True)
                # The family sorts what it is given, and not stably: laid out so that they come out of that in order.
                at = torch.empty_like(at).scatter_(0, places.sort().indices, at[by])
            ones = torch.ones(len(at), 1, dtype=x.dtype)
            pairs[at] = family(x[at // k], places[:, None], ones)
            pool.done(now)
            for key in now:
                given.remove(key)
                del left[key]
        if not eager:
            return (pairs * gates.reshape(-1, 1)).view(tokens, k, -1).sum(1).to(x.dtype)
        out = torch.zeros_like(x)
        for _, expert in sorted(wanted):
            place, token = torch.where((choices == expert).T)
            values = pairs.view(tokens, k, -1)[token, place] * gates[token, place, None]
            out.index_add_(0, token, values.to(out.dtype))
        return out

    def _kept(self, layer: int, choices: Tensor, gates: Tensor) -> tuple[Tensor, Tensor | None]:
        """The gates, and which pairs are computed (None for all): what `skip` and `mass` leave."""
        config = self.config
        if config.exact or not (config.skip or config.mass < 1):
            return gates, None
        beta = config.skip[layer] if isinstance(config.skip, tuple) else config.skip
        largest, total = gates.amax(-1, keepdim=True), gates.sum(-1, keepdim=True)
        kept = gates >= beta * largest
        if config.mass < 1:
            ordered, order = gates.sort(-1, descending=True)
            enough = ordered.cumsum(-1) - ordered < config.mass * total
            kept &= torch.zeros_like(kept).scatter(-1, order, enough)
        self.met, self.skipped = self.met + kept.numel(), self.skipped + int((~kept).sum())
        left = torch.where(kept, gates, 0.0)
        if config.renormalise:
            left = left * (total / left.sum(-1, keepdim=True))
        return left, kept

    def _widths(self, experts: Sequence[int], choices: Tensor, gates: Tensor) -> list[str]:
        if not self.config.small:
            return [EXACT] * len(experts)
        shares = gates / gates.sum(-1, keepdim=True)
        largest = [float(shares[choices == expert].max()) for expert in experts]
        return [self.config.small_width if share < self.config.small else EXACT for share in largest]

    def _places(self, layer: int, choices: Tensor, keys: Sequence[Key]) -> Tensor:
        table = torch.zeros(self.mixtures[layer].count + 1, dtype=torch.long)
        for key in keys:
            table[key[1]] = self.pool.slot(key)
        return table[choices]


class OffloadedExperts(nn.Module):
    """Stands where a layer had its experts. It is called as they were, and has the places as its only buffer."""

    stacked_experts = True  # for `models.anatomy`

    def __init__(self, owner: Offloader, layer: int, family: Any) -> None:
        super().__init__()
        self.owner, self.layer, self.num_experts = owner, layer, owner.mixtures[layer].count
        pool = owner.pool
        self.register_buffer("places", pool.memory, persistent=False)
        # The family's own module has its arithmetic. It stands where nobody looks for weights to fill.
        for name, tensor in views(pool, pool.file.records[(layer, 0), EXACT]).items():
            delattr(family, name)
            setattr(family, name, tensor)
        family.num_experts = pool.slots.count
        self._family: tuple[Any] = (family,)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        with torch.no_grad():  # nobody trains experts that come and go
            return self.owner.compute(self.layer, self._family[0], hidden_states, top_k_index, top_k_weights)


def _replace(
    model: nn.Module, found: Sequence[Mixture], config: ExpertOffloadingConfig, file: ExpertFile,
    predictor: Predictor | None,
) -> Offloader:  # fmt: skip
    count, each = _slots(config, found)
    if config.small and config.small_width not in file.widths:
        raise UsageError(
            f"{file.path} has no copies of {config.small_width}",
            "it was written without them",
            "Delete it, so that it is written anew",
        )
    sizes = {key: record.size for (key, width), record in file.records.items() if width == EXACT}
    layers = len(found)
    kept = policy(config.policy, layers, seconds=lambda key: float(sizes[key]))
    pool = Pool(
        file, count, kept, layers=layers, quota=each, delay=config.delay_ms / 1000, keep_cached=config.cached
    )  # fmt: skip
    made = Offloader(found, config, pool, predictor)
    if predictor is None and config.prefetch != "none":
        made.predictor = _predictor(model, found, config)
    for layer, mixture in enumerate(found):
        family = model.get_submodule(mixture.experts)
        unload(family)
        surgery.replace_module(model, mixture.experts, OffloadedExperts(made, layer, family))
    return made


def _source(path: Path, mark: str) -> str:
    file = ExpertFile(path, mark)
    file.close()
    return file.source


def _predictor(model: nn.Module, found: Sequence[Mixture], config: ExpertOffloadingConfig) -> Predictor:
    counts, guesses = [mixture.count for mixture in found], config.guesses or max(m.chosen for m in found)
    history = ByHistory(counts, guesses, config.confidence)
    if config.prefetch == "history":
        return history
    if config.prefetch == "linear":
        width = int(model.config.get_text_config().hidden_size)  # type: ignore[union-attr, operator]
        return ByLinear.load(Path(config.predictor).expanduser(), width, counts, guesses, config.confidence)
    routers = [model.get_submodule(mixture.router) for mixture in found]
    return ByRouter(routers, guesses, config.confidence, config.ahead, history)


def _slots(config: ExpertOffloadingConfig, found: Sequence[Mixture]) -> tuple[int, int]:
    """Places in all, and those of each layer or 0. Raises UsageError where a token's experts do not fit."""
    total, chosen = sum(mixture.count for mixture in found), max(mixture.chosen for mixture in found)
    count = config.slots if isinstance(config.slots, int) else round(config.slots * total)
    count = min(count, total)
    each = count // len(found) if config.quota else 0
    check_slots(each if config.quota else count, chosen, config.quota)
    if isinstance(config.skip, tuple) and len(config.skip) != len(found):
        raise UsageError(f"skip has {len(config.skip)} numbers, and the model {len(found)} layers of experts")
    return each * len(found) if config.quota else count, each


def _slices(model: nn.Module, mixture: Mixture) -> dict[str, tuple[int, ...]]:
    experts = model.get_submodule(mixture.experts)
    return {name: tuple(experts.get_parameter(name).shape[1:]) for name in mixture.tensors}


def _check(model: nn.Module, found: Sequence[Mixture]) -> None:
    """Raises UsageError for what cannot be computed on places."""
    name = type(model).__name__
    for mixture in found:
        experts: Any = model.get_submodule(mixture.experts)
        if isinstance(experts, OffloadedExperts):
            raise UsageError(f"The experts of this {name} are in a file already")
        how = getattr(getattr(experts, "config", None), "_experts_implementation", None)
        if how not in COMPUTE:
            raise UsageError(
                f"The experts of this {name} are computed {f'by {how}' if how else 'in a way of its own'}",
                f"only {' and '.join(COMPUTE)} compute an expert alone as among others",
                'Load it with experts_implementation="grouped_mm"' if how else "Use Mixtral, OLMoE or their kin",
            )
        others = [n for n, _ in experts.named_parameters() if n not in mixture.tensors]
        kinds = {experts.get_parameter(n).dtype for n in mixture.tensors}
        if others or not mixture.tensors or len(kinds) != 1 or not next(iter(kinds)).is_floating_point:
            raise UsageError(
                f"The experts of {name} are packed or of another build",
                f"{mixture.experts} holds {', '.join(others) or 'no plain weights'}",
                "Use a model whose experts are plain floats",
            )
        if experts.get_parameter(mixture.tensors[0]).device.type not in ("cpu", "meta"):
            raise UsageError("Experts are kept in a file for the CPU alone", remedy="Load the model on the CPU")
