"""Mixtures with few experts in memory, fewer experts, joint experts, skipped experts and bits by importance."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shoestring.core import catalog
from shoestring.core.claim import Claim
from shoestring.core.step import Work
from shoestring.lab import mixture
from shoestring.lab.arms import Arms
from shoestring.models import load
from shoestring.models.routing import watch

METHODS = ("expert_offloading", "expert_routing", "expert_pruning", "expert_merging")

_PAPER = "a survey, without figures of its own"
_FINE = (
    "a Mixtral of 3 layers of 16 experts, top-2, trained for two minutes on Python documentation; held-out text, one "
    "token at a time; "
)
_WIDE = (
    "a Mixtral of 12.6M parameters (3 layers of 8 experts, top-2) trained for a minute on Python documentation; "
    "held-out text; "
)
_CANNOT = "Mixtral and DeepSeek themselves, GPUs and their buses, several machines"
CLAIMS = (
    Claim(
        "recency",
        paper=_PAPER,
        here=_FINE + "places for 25% of the experts, hit rate of LRU against leaving by lot",
        measure="hit_rate",
        arm="lru",
        against="random",
        expect="> 1.0",
        cannot=_CANNOT,
    ),
    Claim(
        "frequency",
        paper=_PAPER,
        here=_FINE + "places for 25% of the experts, hit rate of LFU against leaving by lot",
        measure="hit_rate",
        arm="lfu",
        against="random",
        expect="> 1.0",
        cannot=_CANNOT,
    ),
    Claim(
        "half",
        paper=_PAPER,
        here=_FINE + "places for 50% of the experts, hit rate of LRU against leaving by lot",
        measure="hit_rate_half",
        arm="lru",
        against="random",
        expect="> 1.0",
        cannot=_CANNOT,
    ),
    Claim(
        "bound",
        paper=_PAPER,
        here=_FINE
        + "places for 25% of the experts, hit rate of Belady's, which knows the future, against the best other",
        measure="hit_rate",
        arm="belady",
        against="best",
        expect=">= 1.0",
    ),
    Claim(
        "guessing",
        paper=_PAPER,
        here=_WIDE
        + "places for 50% of the experts, 2 ms to load one, seconds in which decoding waits after the prompt, with "
        "guesses by the next layer's router, whether or not they pay, against none; policy LRU in both",
        measure="stall",
        arm="guessing",
        against="waiting",
        expect="<= 0.7",
        cannot=_CANNOT,
    ),
    Claim(
        "guessing-quarter",
        paper=_PAPER,
        here=_WIDE + "the same with places for 25% of the experts",
        measure="stall_quarter",
        arm="guessing",
        against="waiting",
        expect="<= 0.7",
        cannot=_CANNOT,
    ),
    Claim(
        "memory",
        paper=_PAPER,
        here=_WIDE + "float32, resident memory of a fresh process after 32 tokens above that of one with two places: "
        "places for 25% of the experts against all of them in memory",
        measure="expert_memory",
        arm="quarter",
        against="all",
        expect="<= 0.3",
        cannot=_CANNOT,
    ),
    Claim(
        "exact",
        paper=_PAPER,
        here=_WIDE
        + "largest difference of the logits from the resident model's, 25% and 50% of the places, guesses on",
        measure="difference",
        arm="guessing",
        against="resident",
        expect="<= 0",
        by="difference",
    ),
    Claim(
        "pruning-search",
        paper=_PAPER,
        here=_WIDE
        + "25% of the experts taken out, held-out perplexity, the best subset on calibration text against the "
        "most frequent experts",
        measure="perplexity",
        arm="search",
        against="frequency",
        expect="<= 1.0",
        cannot=_CANNOT,
    ),
    Claim(
        "pruning-frequency",
        paper=_PAPER,
        here=_WIDE + "25% of the experts taken out, held-out perplexity, the most frequent experts against any",
        measure="perplexity",
        arm="frequency",
        against="lot",
        expect="<= 1.0",
        cannot=_CANNOT,
    ),
    Claim(
        "merging",
        paper=_PAPER,
        here=_WIDE
        + "8 experts a layer joined to 4, what the held-out loss rises by, neurons aligned against as they are",
        measure="loss_rise",
        arm="aligned",
        against="naive",
        expect="<= 0.8",
        cannot=_CANNOT,
    ),
    Claim(
        "skipping",
        paper=_PAPER,
        here=_WIDE
        + "the second expert left out when its gate is below the layer's median share of the first's; pairs of "
        "token and expert computed against all of them",
        measure="pairs",
        arm="skipping",
        against="all pairs",
        expect="<= 0.8",
        cannot=_CANNOT,
    ),
    Claim(
        "bits",
        paper=_PAPER,
        here=_WIDE
        + "experts rounded to 3 bits on average: 2 to 6 by gates and sensitivity against 3 for all, held-out "
        "loss in nats a token",
        measure="heldout_loss",
        arm="mixed bits",
        against="equal bits",
        expect="<= 0",
        by="difference",
        cannot=_CANNOT,
    ),
)


def run(arms: Arms) -> None:
    fine, wide = ((replace(r, steps=2, batch=1) if arms.quick else r) for r in (mixture.FINE, mixture.WIDE))
    _caches(arms, fine)
    _offloading(arms, wide)
    _smaller(arms, wide)


def _caches(arms: Arms, recipe: mixture.Recipe) -> None:
    replaying = catalog.module("expert_routing")
    model = load(mixture.mixture(recipe, arms.seed), dtype="float32").model
    trace = _trace(model, recipe, arms.size(64, 2048), arms.seed).as_decoding()
    total = sum(trace.counts)
    rates = {}
    for name in ("random", "lru", "lfu", "cost", replaying.ORACLE):
        with arms.arm(name) as stage:
            rates[name] = replaying.replay(trace, name, total // 4, seed=arms.seed).hit_rate
            half = replaying.replay(trace, name, total // 2, seed=arms.seed).hit_rate
            stage.record("hit_rate", rates[name], "share", "counted")
            stage.record("hit_rate_half", half, "share", "counted")
            stage.record("routing_entropy", float(np.mean(trace.entropy())), "share", "counted")
            stage.record("routing_repeats", float(np.mean(trace.repeats())), "share", "counted")
    with arms.arm("best") as stage:
        best = max(rate for name, rate in rates.items() if name != replaying.ORACLE)
        stage.record("hit_rate", best, "share", "counted")


def _offloading(arms: Arms, recipe: mixture.Recipe) -> None:
    offloading = catalog.module("expert_offloading")
    source = mixture.mixture(recipe, arms.seed)
    ids = mixture.stream(recipe.vocabulary, 1)[1000 * arms.seed :]
    prompt, following = ids[:32], ids[32 : 32 + arms.size(4, 96)]
    with arms.arm("resident") as stage:
        model = load(source, dtype="float32").model
        wanted, _ = _decode(model, prompt, following)
        stage.record("difference", 0.0, "logit", "measured")
        entropy = float(np.mean(_trace(model, recipe, 512, arms.seed).entropy()))
        del model
    for arm, prefetch in (("waiting", "none"), ("guessing", "router")):
        with arms.arm(arm) as stage:
            for metric, slots in (("stall", 0.5), ("stall_quarter", 0.25)):
                config = offloading.ExpertOffloadingConfig(
                    slots=slots, policy="lru", prefetch=prefetch, always=True, delay_ms=2.0
                )
                loaded = offloading.load(config, source, dtype="float32")
                owner = offloading.offloader(loaded.model)
                found, stall = _decode(loaded.model, prompt, following, owner)
                stage.record(metric, stall, "s", "measured")
                stage.record(f"hit_rate_{metric}", owner.stats()["expert_hit_rate"], "share", "counted")
                owner.close()
                stage.record("difference", float((found - wanted).abs().max()), "logit", "measured")
            stage.record("routing_entropy", entropy, "share", "counted")
    floor = _resident(source, 2)
    for arm, slots in (("quarter", 0.25), ("all", 1.0)):
        with arms.arm(arm) as stage:
            stage.record("expert_memory", _resident(source, slots) - floor, "B", "measured")


_PROCESS = """
import sys, torch
from shoestring.core import catalog
torch.set_num_threads(1)
offloading = catalog.module("expert_offloading")
config = offloading.ExpertOffloadingConfig(slots=eval(sys.argv[2]))
from pathlib import Path
model = offloading.load(config, Path(sys.argv[1]), dtype="float32").model
ids = torch.arange(3, 67)[None]
with torch.no_grad():
    out = model(input_ids=ids, use_cache=True)
    for token in range(32):
        out = model(input_ids=ids[:, token : token + 1], past_key_values=out.past_key_values, use_cache=True)
said = dict(line.split(":") for line in open("/proc/self/status") if line.startswith("Vm"))
print(int(said["VmRSS"].split()[0]) * 1024)
offloading.offloader(model).close()
"""


def _resident(source: Path, slots: float) -> int:
    """Resident bytes of a fresh process that has answered with so many places."""
    run = [sys.executable, "-c", _PROCESS, str(source), repr(slots)]
    return int(subprocess.run(run, capture_output=True, text=True, check=True).stdout.split()[-1])


def _smaller(arms: Arms, recipe: mixture.Recipe) -> None:
    pruning, merging = catalog.module("expert_pruning"), catalog.module("expert_merging")
    room = catalog.contract("pruners")
    source, windows = mixture.mixture(recipe, arms.seed), arms.size(2, 24)
    loaded = load(source, dtype="float32")
    whole = mixture.heldout(loaded.model, recipe, windows)
    stream = mixture.stream(recipe.vocabulary)
    starts = torch.randint(len(stream) - 256, (arms.size(1, 8),), generator=torch.Generator().manual_seed(arms.seed))
    rows = [{"input_ids": stream[at : at + 256].tolist()} for at in starts.tolist()]
    plans: dict[str, tuple[Any, Any]] = {
        "search": (pruning, pruning.ExpertPruningOptions(tokens=512)),
        "frequency": (pruning, pruning.ExpertPruningOptions(tokens=512, way="frequency")),
        "lot": (pruning, pruning.ExpertPruningOptions(tokens=512, way="random")),
        "aligned": (merging, merging.ExpertMergingOptions()),
        "naive": (merging, merging.ExpertMergingOptions(align=False)),
    }
    for arm, (module, options) in plans.items():
        with arms.arm(arm) as stage:
            work = Work(arms.ledger, arms.folder / arm, seed=arms.seed)
            small = room.run(module, loaded, options, rows, [], work)
            loss = mixture.heldout(small.model, recipe, windows)
            stage.record("perplexity", float(np.exp(loss)), "perplexity", "measured")
            stage.record("loss_rise", loss - whole, "nat", "measured")
            stage.record("perplexity_elsewhere", _elsewhere(small.model, recipe, arms), "perplexity", "measured")
            stage.record("routing_entropy", float(np.mean(small.facts["routing_entropy"])), "share", "counted")
            del small
    _skipping(arms, recipe, source, rows, windows)
    _bits(arms, recipe, source, rows, windows)


def _skipping(arms: Arms, recipe: mixture.Recipe, source: Path, rows: Sequence[Any], windows: int) -> None:
    offloading, routing = catalog.module("expert_offloading"), catalog.module("expert_routing")
    model = load(source, dtype="float32").model
    with watch(model) as recorder, torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False)
    betas = tuple(routing.median_ratios(recorder.trace()))
    for arm, skip in (("all pairs", 0.0), ("skipping", betas)):
        with arms.arm(arm) as stage:
            config = offloading.ExpertOffloadingConfig(slots=1.0, prefetch="none", skip=skip)
            loaded = offloading.load(config, source, dtype="float32")
            owner = offloading.offloader(loaded.model)
            loss = mixture.heldout(loaded.model, recipe, windows)
            stage.record("pairs", 1 - owner.stats()["expert_skipped_share"], "share", "counted")
            stage.record("perplexity", float(np.exp(loss)), "perplexity", "measured")
            owner.close()


def _bits(arms: Arms, recipe: mixture.Recipe, source: Path, rows: Sequence[Any], windows: int) -> None:
    from shoestring.methods.serving import _expert_bits as bits

    for arm in ("equal bits", "mixed bits"):
        with arms.arm(arm) as stage:
            model = load(source, dtype="float32").model
            with watch(model) as recorder, torch.no_grad():
                for row in rows:
                    model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False)
            costs = bits.errors(model, recorder.trace())
            each = bits.allocate(costs, 3.0) if arm == "mixed bits" else [[3] * len(layer) for layer in costs]
            average = bits.round_experts(model, each)
            loss = mixture.heldout(model, recipe, windows)
            stage.record("heldout_loss", loss, "nat", "measured")
            stage.record("bits", average, "bit", "counted")


def _trace(model: Any, recipe: mixture.Recipe, tokens: int, seed: int) -> Any:
    ids = mixture.stream(recipe.vocabulary, 1)[1000 * seed :][:tokens]
    with watch(model) as recorder, torch.no_grad():
        for part in ids.split(256):
            model(input_ids=part[None], use_cache=False)
    return recorder.trace()


@torch.no_grad()
def _decode(model: Any, prompt: Tensor, following: Tensor, owner: Any = None) -> tuple[Tensor, float]:
    """Logits of each following token, one pass a token, (tokens, vocabulary), and seconds in which these passes waited.

    A prompt meets nearly all experts and waits for them whatever is guessed, so that its wait is no part of it."""
    waited = lambda: owner.stats()["expert_stall_seconds"] if owner else 0.0
    out = model(input_ids=prompt[None], use_cache=True)
    logits, before = [], waited()
    for token in following:
        out = model(input_ids=token.view(1, 1), past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits[0, -1])
    return torch.stack(logits), waited() - before


@torch.no_grad()
def _elsewhere(model: Any, recipe: mixture.Recipe, arms: Arms) -> float:
    """Perplexity on text of another kind than the calibration's: program code."""
    text = Path(argparse.__file__).read_text(encoding="utf-8")
    ids = mixture.tokenizer(recipe.vocabulary)(text)["input_ids"][: arms.size(64, 768)]
    loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids]), use_cache=False).loss
    return float(loss.exp())
