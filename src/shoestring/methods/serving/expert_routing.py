"""Expert routing: records which experts each token meets, and says what caches, guesses and devices would make of it.

How it works
    1. Plugged in, it looks on while a mixture of experts answers: (layer, token, experts, gates) of the last `passes`
       passes. The engine's counts show how even the loads are, H / ln E with H = -sum p_e ln p_e, and how many experts
       a token shares with the one before it. With `file` the record is written when the engine is closed.
    2. As a meter (`shoestring measure expert-routing MODEL`) it records a model on data, and replays the record without
       the model: hits of `lru`, `lfu`, `cost` and `random` caches and of Belady's, which knows the future and bounds
       them all; the stalls of one loader with and without guesses, t = max(compute, loads that have not arrived).
    3. How many experts of each layer had been guessed one layer before: by the router of that layer on the earlier
       hidden state, by counts of what followed what, and by a linear map fitted to half of the record. The latter two
       are judged on the other half; the map is kept for serving with it.
    4. For `devices` it places each layer's experts: the heaviest first, each on the emptiest device, `replicas` more
       copies where the load of a copy is largest. Bytes of the all-to-all are 2 * pairs that leave their device *
       width * 2; with `capacity` a device turns away what exceeds that many times its even share of a pass.
    5. With `bits` on average over all experts, each gets 2 to 6: one bit more at a time where it lowers the sum of
       (gates of the expert) * || W - Q_b(W) ||^2 / || W ||^2 most.
    6. beta = median of g_2 / g_1 of each layer: what leaves out about half of the second experts.

Where it bends
    A replay takes each token as a pass of its own, as one answer is decoded; several answers at once ask for more
    experts in each pass. Devices, compute and load times are modelled. Tokens start on the devices in turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shoestring import data, models
from shoestring.core.errors import UsageError
from shoestring.core.method import Method, Paper
from shoestring.core.step import Work
from shoestring.lab import tiny_mixture
from shoestring.methods.serving import _placement
from shoestring.methods.serving._expert_bits import BITS, allocate, errors
from shoestring.methods.serving._expert_guess import ByHistory, ByRouter, Predictor, fit_linear, recalls
from shoestring.methods.serving._expert_replay import ORACLE, Together, replay
from shoestring.methods.serving._expert_slots import POLICIES
from shoestring.models.anatomy import mixtures
from shoestring.models.routing import Recorder, Trace, attach, watch

METHOD = Method(
    paper=Paper(
        "A Survey on Inference Optimization Techniques for Mixture of Experts Models",
        "2024-12",
        arxiv="2412.14219",
        code="MoE-Inf/awesome-moe-inference",
    ),  # fmt: skip
    provides="ExpertRoutingConfig",
    saves=("memory", "network"),
    combines={"adapters": "yes", "pruners": "yes", "expert_offloading": "yes"},
    traits={"plugs": "watch"},
)
TRACE, PREDICTOR = "routing.safetensors", "predictor.safetensors"
base = tiny_mixture.model


@dataclass(frozen=True)
class ExpertRoutingConfig:
    """What is recorded while a model answers.

    Args:
        file: where the record is written when the engine is closed; empty for nowhere.
        passes: the last so many passes are remembered.

    Raises:
        UsageError: no pass at all.
    """

    file: str = ""
    passes: int = 20_000

    def __post_init__(self) -> None:
        if self.passes < 1:
            raise UsageError(f"passes {self.passes!r} is not possible", remedy="Remember one or more")


@dataclass(frozen=True)
class Meter:
    """Settings of `measure`.

    Attributes:
        tokens: of the recording.
        slots: shares of all experts to replay caches of.
        compute_ms, load_ms: of one layer, and of one expert.
        bits: on average, for what each layer's experts would get.
        devices: for the placement; `replicas` more copies of experts in each layer, `capacity` as in step 4.
    """

    tokens: int = 2048
    slots: tuple[float, ...] = (0.25, 0.5)
    compute_ms: float = 1.0
    load_ms: float = 2.0
    devices: int = 4
    replicas: int = 2
    capacity: float = 1.25
    bits: float = 4.0

    @classmethod
    def read(cls, options: Mapping[str, Any]) -> Meter:
        """Raises UsageError on an option it does not know, or a value that cannot be."""
        stray = sorted(set(options) - set(cls.__dataclass_fields__))
        if stray:
            known = ", ".join(cls.__dataclass_fields__)
            raise UsageError(f"the meter has no option {', '.join(stray)}", remedy=f"Known: {known}")
        given = dict(options)
        if "slots" in given:
            said = given["slots"] if isinstance(given["slots"], list | tuple) else str(given["slots"]).split(",")
            try:
                given["slots"] = tuple(float(share) for share in said)
            except ValueError:
                raise UsageError(
                    f"slots={given['slots']!r} is no list of shares", remedy="Write slots=0.25,0.5"
                ) from None
        for name, value in given.items():
            kind = int if name in ("tokens", "devices", "replicas") else int | float
            if name != "slots" and (isinstance(value, bool) or not isinstance(value, kind)):
                raise UsageError(f"{name}={value!r} is no {'whole ' if kind is int else ''}number")
        made = cls(**given)
        if not BITS[0] <= made.bits <= BITS[-1]:
            raise UsageError(f"{made.bits} bits on average are not possible", f"there are {BITS[0]} to {BITS[-1]}")
        if made.tokens < 16 or made.devices < 1 or made.replicas < 0 or min(made.compute_ms, made.load_ms) < 0:
            raise UsageError(
                "the meter refuses its options", "tokens are 16 or more, devices 1 or more, times not below 0"
            )
        if not all(0 < share <= 1 for share in made.slots):
            raise UsageError(f"slots={made.slots} are no shares", remedy="Write slots=0.25,0.5")
        return made


def example() -> ExpertRoutingConfig:
    """The configuration that checks, documentation and the first-time user run."""
    return ExpertRoutingConfig()


def plug(config: ExpertRoutingConfig, opened: Any) -> Any:
    """Look on from now on. Raises UsageError for a model without experts."""
    from shoestring.engine.hooks import Hooks

    model = getattr(opened.runner, "model", None)
    if model is None:
        raise UsageError("The native runner runs no mixtures of experts", remedy="Use the torch runner")
    return Hooks(watch=Onlooker(config, *attach(model, most=config.passes)))


class Onlooker:
    """What the engine has of the record while it grows."""

    def __init__(self, config: ExpertRoutingConfig, recorder: Recorder, handles: Sequence[Any]) -> None:
        self.config, self.recorder, self._handles = config, recorder, handles

    def stats(self) -> dict[str, float]:
        trace = self.recorder.trace()
        if not len(trace.steps):
            return {"routing_tokens": 0.0}
        return {
            "routing_tokens": float(len(trace.steps)),
            "routing_entropy": float(np.mean(trace.entropy())),
            "routing_repeats": float(np.mean(trace.repeats())),
        }

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        if self.config.file:
            self.recorder.trace().save(Path(self.config.file).expanduser())


# --- the meter --------------------------------------------------------------------------------------------------------


def measure(source: Path, options: Mapping[str, Any], work: Work) -> dict[str, Any]:
    """Record the model on data and say what can be made of it.

    Args:
        options: fields of `Meter`.

    Returns:
        tables of the layers' routing, of caches, of placements; the record's file and that of the trained predictor.

    Raises:
        UsageError: options it does not know, a model without experts, or too little data.
    """
    meter = Meter.read(options)
    loaded = models.load(str(source), trust_remote_code=work.trust_remote_code)
    found = mixtures(loaded.model)
    first, second = (record(loaded, part, meter.tokens // 2) for part in (work.train, work.valid))
    trace = second.trace().as_decoding()
    whole = join(first.trace(), second.trace())
    whole.save(work.folder / TRACE)
    counts, chosen = trace.counts, max(mixture.chosen for mixture in found)
    linear = fit_linear(first, chosen)
    linear.save(work.folder / PREDICTOR)
    routers = [loaded.model.get_submodule(mixture.router).float() for mixture in found]
    history = ByHistory(counts, chosen)
    history.together.learn(first.trace())
    guessers: dict[str, Predictor] = {
        "router": ByRouter(routers, chosen, 0.0, 1, lambda *_: ()), "history": history, "linear": linear,
    }  # fmt: skip
    recall = {name: recalls(guesser, second) for name, guesser in guessers.items()}
    betas = median_ratios(whole)
    bits = allocate(errors(loaded.model, whole), meter.bits)
    layers = [
        {
            "layer": found[n].block, "experts": counts[n], "entropy": whole.entropy()[n], "repeats": whole.repeats()[n],
            **{f"recall by {name}": values[n] for name, values in recall.items()}, "beta": betas[n],
            "bits": bits[n],
        }
        for n in range(trace.layers)
    ]  # fmt: skip
    total = sum(counts)
    timed = partial(replay, compute=meter.compute_ms / 1000, load=meter.load_ms / 1000)
    together = Together(counts).learn(first.trace()).guesser(chosen)
    caches = []
    for share in meter.slots:
        slots = max(chosen, round(share * total))
        for name in (*POLICIES, ORACLE):
            plain, ahead = timed(trace, name, slots), timed(trace, name, slots, guess=together)
            caches.append(
                {
                    "slots": slots, "policy": name, "hit rate": plain.hit_rate, "stall s": plain.stall,
                    "stall s guessing": ahead.stall, "wasted": ahead.wasted / max(1, ahead.loads),
                }
            )  # fmt: skip
    best = min((c for c in caches if c["policy"] != ORACLE), key=lambda c: (c["slots"], c["stall s guessing"]))
    return {
        "tokens": len(whole.steps),
        "entropy": float(np.mean(whole.entropy())),
        "trace": str(work.folder / TRACE),
        "predictor": str(work.folder / PREDICTOR),
        "layers": layers,
        "caches": caches,
        "placement": placements(whole, int(loaded.model.config.get_text_config().hidden_size), meter),
        "advice": (
            f"With {best['slots']} of {total} experts in memory {best['policy']} waits least. An entropy near 1 means "
            "that experts are used alike: then only repetition from token to token helps a cache."
        ),
    }


def record(loaded: models.Loaded, corpus: Any, tokens: int) -> Recorder:
    """The routes of about so many tokens of a corpus, with what the routers read.

    Raises:
        UsageError: the corpus is shorter than 16 tokens.
    """
    rows = data.encode(corpus, loaded.tokenizer, 512, loss_on="all", on_long="truncate").rows
    left = tokens
    with watch(loaded.model, hidden=True) as recorder, torch.no_grad():
        for row in rows:
            ids = row["input_ids"][:left]
            if left < 2 or len(ids) < 2:
                break
            loaded.model(input_ids=torch.tensor([ids]), use_cache=False)
            left -= len(ids)
    if tokens - left < 16:
        raise UsageError("There is too little data to record routes on", f"{tokens - left} tokens", "Give more")
    return recorder


def join(first: Trace, second: Trace) -> Trace:
    """One trace after another."""
    steps = np.concatenate([first.steps, second.steps + (first.steps[-1] + 1 if len(first.steps) else 0)])
    pairs = [(a, b) for a, b in ((first.experts, second.experts), (first.gates, second.gates))]
    experts, gates = (np.concatenate(pair) for pair in pairs)
    return Trace(experts, gates, steps, first.counts)


def median_ratios(trace: Trace) -> list[float]:
    """Of each layer, the median of the second largest gate over the largest: `skip` of expert offloading."""
    ordered = -np.sort(-trace.gates, axis=-1)
    if ordered.shape[-1] < 2:
        return [0.0] * trace.layers
    return [float(np.median(ordered[:, n, 1] / ordered[:, n, 0])) for n in range(trace.layers)]


def placements(trace: Trace, width: int, meter: Meter) -> list[dict[str, Any]]:
    """What each way to place the experts makes of a trace, the layers together."""
    half = len(trace.steps) // 2
    cut = [slice(0, half), slice(half, None)]
    known, new = (Trace(trace.experts[s], trace.gates[s], trace.steps[s], trace.counts) for s in cut)
    loads = known.loads()
    ways = {
        "in order": [_placement.in_order(count, meter.devices) for count in trace.counts],
        "by load": [_placement.place(load.tolist(), meter.devices) for load in loads],
        f"by load, {meter.replicas} more": [
            _placement.place(load.tolist(), meter.devices, meter.replicas) for load in loads
        ],
    }
    rows = []
    for name, placed in ways.items():
        flows = [_placement.flow(new, n, placed[n], width, capacity=meter.capacity) for n in range(trace.layers)]
        free = [_placement.flow(new, n, placed[n], width) for n in range(trace.layers)]
        rows.append(
            {
                "placement": name, "fullest over mean": float(np.mean([f.imbalance for f in free])),
                "all-to-all bytes": sum(f.bytes for f in free), "remote": float(np.mean([f.remote for f in free])),
                f"dropped at {meter.capacity:g}": float(np.mean([f.dropped for f in flows])),
            }
        )  # fmt: skip
    return rows
