"""M2R2: a fast stream trained on the model's own answers, against a plain exit head, fewer steps and plain decoding."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shoestring.core import catalog
from shoestring.core.claim import Claim
from shoestring.core.ledger import Stage
from shoestring.engine.engine import Engine
from shoestring.engine.request import Sampling
from shoestring.lab import mixture
from shoestring.lab.arms import Arms
from shoestring.lab.exits import learn, own_answers, trained
from shoestring.models import load
from shoestring.models.anatomy import mixtures, route
from shoestring.models.cache import make_once
from shoestring.models.routing import Trace

_HERE = (
    "SmolLM2-135M-Instruct, gate behind layer 10 of 30, rank 48, 200 steps of 4 x 96 tokens on 80 of the model's own "
    "answers; 16 held-out answers"
)
_PAPER = "self-speculative decoding up to 2.8x on MT-Bench; better trade-off of quality and speed than early exit"
_AHEAD = "experts that the fast stream names are loaded ahead of time, 2.9x"
_MIXTURE = (
    "a Mixtral of 3 layers of 16 experts, top-2, trained for two minutes on Python documentation; gate behind layer 2, "
    "rank 48, 200 steps of 4 x 96 tokens of the same text; 1,024 held-out tokens"
)
_CACHE = _MIXTURE + "; replayed one at a time with places for half of the experts, 2 ms to load one, 1 ms a layer, LRU"
CLAIMS = (
    Claim(
        "agreement",
        paper=_PAPER,
        here=_HERE + "; share of tokens where the gate says what the whole model says",
        measure="agreement",
        arm="m2r2",
        against="whole",
        expect=">= 0.2",
        cannot="2.8x with 7B models, long training and GPUs",
    ),
    Claim(
        "divergence",
        paper="no figure; the fast stream is aligned with the final state early",
        here=_HERE + "; divergence of the whole model from the gate, in nats",
        measure="kl",
        arm="m2r2",
        against="whole",
        expect="<= 4.5",
        by="difference",
    ),
    Claim(
        "precision",
        paper="no figure; exits are early-aligned",
        here=_HERE + "; of tokens with a confidence above 0.8, the share where gate and model agree",
        measure="precision",
        arm="m2r2",
        against="whole",
        expect=">= 0.9",
    ),
    Claim(
        "training",
        paper="no figure",
        here=_HERE + "; divergence by that after 40 steps",
        measure="kl",
        arm="m2r2",
        against="few-steps",
        expect="<= 0.95",
    ),
    Claim(
        "head",
        paper="better than early exits without acceleration",
        here=_HERE
        + "; divergence by that of a plain exit head of rank 256 after as many steps (another stands behind layer 20)",
        measure="kl",
        arm="m2r2",
        against="head",
        expect="<= 1.0",
        cannot="an advantage that needs long training",
    ),
    Claim(
        "exact",
        paper="lossless self-speculation",
        here=_HERE + "; float32, 4 prompts x 32 tokens, drafts of up to 4: share of tokens equal to plain decoding",
        measure="equal",
        arm="drafting",
        against="plain",
        expect=">= 1.0",
    ),
    Claim(
        "cache",
        paper="no additional keys and values",
        here=_HERE + "; bytes of a page of keys and values",
        measure="page_bytes",
        arm="drafting",
        against="plain",
        expect="<= 1.0",
    ),
    Claim(
        "passes",
        paper=_PAPER,
        here=_HERE + "; as `exact`: layers of the whole model that one token costs, drafts included, by plain decoding",
        measure="layers_per_token",
        arm="drafting",
        against="plain",
        expect="<= 1.0",
        cannot="2.8x less time",
    ),
    Claim(
        "experts",
        paper=_AHEAD,
        here=_MIXTURE + "; share of the next layer's experts that its router names when the fast stream is asked, by "
        "2 of 16",
        measure="recall",
        arm="asking-fast",
        against="chance",
        expect=">= 1.5",
    ),
    Claim(
        "experts-slow",
        paper=_AHEAD,
        here=_MIXTURE + "; the same by that of the slow stream at the same layer",
        measure="recall",
        arm="asking-fast",
        against="asking-slow",
        expect=">= 1.0",
    ),
    Claim(
        "stall",
        paper=_AHEAD,
        here=_CACHE + "; seconds of waiting, by those of loading on demand",
        measure="stall",
        arm="asking-fast",
        against="on-demand",
        expect="<= 1.0",
        cannot="2.9x of large mixtures on GPUs",
    ),
    Claim(
        "stall-slow",
        paper=_AHEAD,
        here=_CACHE + "; seconds of waiting, by those of asking the slow stream",
        measure="stall",
        arm="asking-fast",
        against="asking-slow",
        expect="<= 1.0",
        cannot="2.9x of large mixtures on GPUs",
    ),
)
GATE = 10
LOAD, COMPUTE = 2e-3, 1e-3  # seconds: of reading an expert, of computing a layer


def run(arms: Arms) -> None:
    steps, held = arms.size(2, 200), arms.size(1, 16)
    rank, small = arms.size(4, 48), arms.size(4, 256)
    texts = own_answers()[-held:]
    fast = trained("m2r2", {"gates": [GATE], "r": rank}, steps, arms.seed)
    for arm, folder in {
        "m2r2": fast,
        "few-steps": trained("m2r2", {"gates": [GATE], "r": rank}, max(1, steps // 5), arms.seed),
        "head": trained("exit_heads", {"gates": [GATE, 20], "r": small}, steps, arms.seed),
    }.items():
        with arms.arm(arm) as stage:
            _judge(stage, folder, texts)
    with arms.arm("whole") as stage:
        for name, unit, value in (("agreement", "share", 1.0), ("kl", "nat", 0.0), ("precision", "share", 1.0)):
            stage.record(name, value, unit, "declared")
    sampling = Sampling(max_tokens=arms.size(4, 32), ignore_eos=True)
    prompts = [prompt for prompt, _ in texts[: arms.size(1, 4)]]
    how: dict[str, Any] = dict(runner="torch", dtype="fp32", cache_dtype="fp32", threads=1)
    with arms.arm("plain") as stage, Engine("smollm2", **how) as engine:
        wanted = _decode(stage, engine, prompts, sampling)
        stage.record("equal", 1.0, "share", "counted")
    with arms.arm("drafting") as stage, Engine("smollm2", plugs=[f"m2r2,streams={fast},exact=true"], **how) as engine:
        found = _decode(stage, engine, prompts, sampling)
        pairs = [(a, b) for one, other in zip(found, wanted) for a, b in zip(one, other, strict=True)]
        stage.record("equal", sum(a == b for a, b in pairs) / len(pairs), "share", "counted")
    _experts(arms)


@torch.no_grad()
def _judge(stage: Stage, folder: Any, texts: list[tuple[list[int], list[int]]]) -> None:
    """What a gate says at every place of the answers, beside the whole model."""
    from peft import PeftModel

    for name in ("m2r2", "exit_heads"):
        catalog.module(name)
    model: Any = PeftModel.from_pretrained(load("smollm2").model, str(folder)).eval()
    head = model.get_output_embeddings()
    same, sure, right = [], [], []
    divergence = 0.0
    for prompt, answer in texts:
        states, final, gate = _states(model, torch.tensor([prompt + answer]))
        places = slice(len(prompt) - 1, -1)
        said = head(final[0, places]).float()
        guess = head(gate(states[0, places]).to(final.dtype)).float()
        divergence += float((said.softmax(-1) * (said.log_softmax(-1) - guess.log_softmax(-1))).sum())
        agree = said.argmax(-1) == guess.argmax(-1)
        confident = (guess / gate.temperature).softmax(-1).amax(-1) > 0.8
        same += agree.tolist()
        sure += confident.tolist()
        right += agree[confident].tolist()
    stage.record("agreement", sum(same) / len(same), "share", "measured")
    stage.record("kl", divergence / len(same), "nat", "measured")
    stage.record("confident", sum(sure) / len(sure), "share", "measured")
    stage.record("precision", sum(right) / max(1, len(right)), "share", "measured")


def _states(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """What stands at the gate, what the head gets at the end, and the gate."""
    tuner, batch = model.base_model, {"input_ids": ids}
    if hasattr(tuner, "fast"):
        found, final, _ = tuner.fast("default", batch)
        return found[GATE], final, tuner.layers("default")[GATE - 1].gate["default"]
    layer = tuner.gates("default")[GATE]
    layer.seen = []
    out = model.base_model.model(input_ids=ids, output_hidden_states=True, use_cache=False)
    states, layer.seen = layer.seen[0], None
    return states, out.hidden_states[-1], layer.gate["default"]


def _decode(stage: Stage, engine: Engine, prompts: list[list[int]], sampling: Sampling) -> list[tuple[int, ...]]:
    """Answers one at a time; passes are counted in layers, each weighed by what it reads: once, however many rows."""
    run, layers = engine.runner.run, [0]

    def counting(batch: Any, first: int = 0, last: int | None = None, hidden: Any = None) -> Any:
        layers[0] += (engine.facts.layers if last is None else last) - first
        return run(batch, first, last, hidden)

    engine.runner.run = counting  # type: ignore[method-assign]
    found = [engine.generate([prompt], sampling)[0][0].tokens for prompt in prompts]
    stage.record("layers_per_token", layers[0] / sum(map(len, found)), "layer", "counted")
    stage.record("page_bytes", engine.facts.block_bytes, "B", "counted")
    return found


def _experts(arms: Arms) -> None:
    """Guesses of the next layers' experts by either stream, and a cache that reads them ahead."""
    recipe = replace(mixture.FINE, steps=2, batch=1) if arms.quick else mixture.FINE
    model = _through_experts(recipe, 2, arms.size(4, 48), arms.size(2, 200), arms.seed)
    ids = mixture.stream(recipe.vocabulary, 1)[1000 * arms.seed :][: arms.size(64, 1024)]
    slow, fast, asked = _met(model, ids)
    with arms.arm("chance") as stage:
        stage.record("recall", recipe.chosen / recipe.experts, "share", "declared")
    for arm, states in (("on-demand", []), ("asking-slow", slow), ("asking-fast", fast)):
        with arms.arm(arm) as stage:
            named = _named(model, states)
            for measure, far in (("recall", 1), ("recall_two", 2)):
                if hits := [_share(chosen, asked[at + far]) for (at, ahead), chosen in named.items() if ahead == far]:
                    stage.record(measure, sum(hits) / len(hits), "share", "counted")
            for part, share in (("", 2), ("_quarter", 4)):
                found = _replayed(asked, named, recipe, share)
                how = "one loader; a layer takes max(compute, loads that have not arrived)"
                stage.record(f"stall{part}", found.stall, "s", "modelled", how, load=LOAD, compute=COMPUTE)
                stage.record(f"hit_rate{part}", found.hit_rate, "share", "counted")


def _through_experts(recipe: mixture.Recipe, gate: int, rank: int, steps: int, seed: int) -> Any:
    """A trained mixture with a fast stream, which is trained now if the cache has none."""
    from peft import PeftModel

    options, source = {"gates": [gate], "r": rank}, mixture.mixture(recipe, seed)
    method = catalog.module("m2r2")

    def make(folder: Path) -> None:
        torch.manual_seed(seed)
        wrapped = catalog.contract("adapters").wrap(method, load(source, dtype="float32").model, options).train()
        text, draw = mixture.stream(recipe.vocabulary), torch.Generator().manual_seed(seed)

        def batch() -> tuple[torch.Tensor, torch.Tensor]:
            starts = torch.randint(len(text) - 96, (4,), generator=draw).tolist()
            ids = torch.stack([text[start : start + 96] for start in starts])
            return ids, ids

        learn(wrapped, batch, steps, method.TRAINING["learning_rate"]).save_pretrained(str(folder))

    said = {"mixture": source.name, "options": options, "steps": steps, "seed": seed, "version": 4}
    folder = make_once("m2r2", said, make)
    return PeftModel.from_pretrained(load(source, dtype="float32").model, str(folder)).eval()


@torch.no_grad()
def _met(model: Any, ids: torch.Tensor) -> tuple[list[torch.Tensor], ...]:
    """By layer: what the routers read of the slow and of the fast stream, (tokens, width), and the experts met."""
    calls: list[Any] = []
    experts = [model.get_submodule(found.experts) for found in mixtures(model)]
    handles = [part.register_forward_pre_hook(lambda _, given: calls.append(given)) for part in experts]
    parts: list[list[list[torch.Tensor]]] = []
    for window in ids.split(256):
        calls.clear()
        model.base_model.fast("default", {"input_ids": window[None]})
        plain, both = calls[: len(experts)], calls[len(experts) :]
        fast = [x[len(window) :] for x, *_ in both]
        parts.append([[x for x, *_ in plain][: len(fast)], fast, [chosen for _, chosen, _ in plain]])
    for handle in handles:
        handle.remove()
    return tuple([torch.cat(layer) for layer in zip(*kind)] for kind in zip(*parts))


@torch.no_grad()
def _named(model: Any, states: list[torch.Tensor]) -> dict[tuple[int, int], torch.Tensor]:
    """(layer, how far ahead) -> (tokens, k): the experts that a later router names when asked with these states."""
    routers = [model.get_submodule(found.router) for found in mixtures(model)]
    return {
        (at, later - at): route(routers[later], x)[2]
        for at, x in enumerate(states)
        for later in range(at + 1, len(routers))
    }


def _share(named: torch.Tensor, met: torch.Tensor) -> float:
    """Of the experts met, (tokens, k), those that had been named, (tokens, k)."""
    return (met[:, :, None] == named[:, None]).any(-1).float().mean().item()


def _replayed(
    asked: list[torch.Tensor], named: dict[tuple[int, int], torch.Tensor], recipe: mixture.Recipe, share: int
) -> Any:
    """A cache with places for one in `share` experts, asked for these and told those named one layer ahead."""
    experts = torch.stack(asked, 1).to(torch.int32).numpy()
    tokens, layers, _ = experts.shape
    counts = (recipe.experts,) * layers
    trace = Trace(experts, np.zeros(experts.shape, np.float32), np.arange(tokens, dtype=np.int32), counts)
    turn = itertools.count()

    def guess(layer: int, met: Sequence[int]) -> list[tuple[int, int, float]]:
        token = next(turn) // layers
        return [(layer + 1, e, 1.0) for e in named[layer, 1][token].tolist()] if (layer, 1) in named else []

    replay = catalog.module("expert_routing").replay
    return replay(trace, "lru", sum(counts) // share, guess=guess, compute=COMPUTE, load=LOAD)
