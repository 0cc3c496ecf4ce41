"""The next token of every sequence, each by its own request's settings, whatever else is in the batch.

A row of logits goes through, in this order:

1. logit bias; repetition, then frequency and presence penalty;
2. what may not come: ends before `min_tokens`, tokens that the constraint forbids;
3. temperature; top-k, top-p, min-p, typical, in transformers' order, each on the distribution that the one before left;
4. one uniform number, looked up in the cumulative distribution of the remaining tokens in the order of their ids.

Penalties mean what they do in vLLM and OpenAI's interface: repetition counts prompt and answer, the others the answer.
Filters keep what transformers' logits processors keep. Log-probabilities are those of the raw logits, before all of the
above.

The uniform number is a function of (seed, index of the answer, position in the answer) alone. A draft can therefore be
verified by drawing: where it guessed the token that is drawn anyway, it is accepted, and the answer is the one that
decoding without drafts gives.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from shoestring.core.errors import ShoestringError
from shoestring.engine.constraint import Constraints, Described, Matcher
from shoestring.engine.request import Request, Sampling, TokenLogprob

_GREEDY = 1e-5  # a temperature below this divides float32 logits beyond their range
_BLOCK = 256  # of a cumulative sum over a whole vocabulary


@dataclass(frozen=True, slots=True)
class Choice:
    """A drawn token; with `error` there is none, and the sequence cannot go on."""

    token: int
    logprob: TokenLogprob | None = None
    error: str = ""


class SampleState:
    """How one answer draws: its settings, and what it has drawn so far. Made by `Sampler.state`."""

    def __init__(
        self,
        sampling: Sampling,
        seed: int,
        index: int,
        prompt: Iterable[int],
        ends: Sequence[int],
        matcher: Matcher | None,
    ) -> None:
        self.sampling = sampling
        self.greedy = sampling.temperature < _GREEDY
        self.answer: list[int] = []
        self.matcher = matcher
        self._key = np.array([seed % (1 << 64), index], np.uint64)
        self._ends = frozenset(ends)
        self._end_ids = np.array(sorted(self._ends), np.int64)
        self._bias = _bias(sampling)
        self._tally = _Tally(sampling, prompt) if _penalised(sampling) else None

    def accept(self, token: int) -> None:
        """Go on behind a token."""
        self.answer.append(token)
        if self._tally:
            self._tally.add(token)
        if self.matcher:
            self.matcher.accept(token)

    def rollback(self, count: int) -> None:
        """Take back the latest `count` tokens."""
        for _ in range(count):
            token = self.answer.pop()
            if self._tally:
                self._tally.remove(token)
        if self.matcher and count:
            self.matcher.rollback(count)

    @property
    def finished(self) -> bool:
        """Whether the latest token ended the answer."""
        return bool(self.answer) and self.answer[-1] in self._ends

    def uniform(self) -> float:
        """A number in [0, 1) for this position: 53 bits of Philox under the key (seed, index of the answer)."""
        bits = np.random.Philox(key=self._key, counter=len(self.answer)).random_raw()
        return (int(bits) >> 11) * 2.0**-53

    def changes(self) -> bool:
        """Whether logits are changed here before anything is drawn from them."""
        early = len(self.answer) < self.sampling.min_tokens
        return self._bias is not None or self._tally is not None or self.matcher is not None or early

    def change(self, row: np.ndarray) -> None:
        """Bias, penalties and what may not come, in place. row: float32 [vocab].

        Raises:
            ShoestringError: the constraint cannot be followed, or leaves no token.
        """
        if self._bias is not None:
            ids, values = self._bias
            row[ids] += values
        if self._tally is not None:
            self._tally.apply(row)
        # A constraint that is at its end needs an end token, however short the answer.
        if len(self.answer) < self.sampling.min_tokens and not (self.matcher and self.matcher.finished):
            row[self._end_ids] = -np.inf
        if self.matcher is not None:
            self.matcher.mask(row)


class Sampler:
    """Draws tokens. Used by one thread.

    Args:
        vocab: width of the logits.
        tokenizer: its end tokens, and for constraints its description.
    """

    def __init__(self, vocab: int, tokenizer: Described) -> None:
        self.vocab = vocab
        self.constraints = Constraints(tokenizer, vocab)
        self._eos = tuple(token for token in tokenizer.eos if token < vocab)
        self._changed = np.empty(vocab, np.float32)

    def state(self, request: Request, index: int) -> SampleState:
        """The state of answer `index` of a request, at its beginning.

        Raises:
            RequestError: the constraint cannot be used.
        """
        sampling = request.sampling
        seed = int.from_bytes(os.urandom(8), "little") >> 1 if sampling.seed is None else sampling.seed
        ends = (*(() if sampling.ignore_eos else self._eos), *sampling.stop_token_ids)
        matcher = self.constraints.matcher(sampling.constraint) if sampling.constraint else None
        return SampleState(sampling, seed, index, request.prompt, ends, matcher)

    def sample(self, logits: Iterable[np.ndarray], states: Sequence[SampleState]) -> list[Choice]:
        """Draw for each row; the states do not change. logits: rows of float32 [vocab], left as they are.

        A row that cannot be drawn from gives a choice with an error; the others are not concerned.
        """
        return [self._choose(row, state) for row, state in zip(logits, states)]

    def _choose(self, row: np.ndarray, state: SampleState) -> Choice:
        try:
            token = self._greedy(row, state) if state.greedy else self._drawn(row, state)
        except ShoestringError as error:
            return Choice(-1, error=str(error))
        top = state.sampling.logprobs
        return Choice(token, None if top is None else logprob_of(row, token, top))

    def _greedy(self, row: np.ndarray, state: SampleState) -> int:
        token = int(row.argmax())  # that of a NaN, where there is one
        _usable(row[token])
        if state.changes():
            row = self._change(row, state)
            token = int(row.argmax())
            _possible(row[token])
        return token

    def _drawn(self, row: np.ndarray, state: SampleState) -> int:
        peak = row.max()
        _usable(peak)
        if state.changes():
            row = self._change(row, state)
            peak = row.max()
            _possible(peak)
        ids, weights = filtered(row, peak, state.sampling)
        uniform = state.uniform()
        place = _crossing(weights, lambda whole: whole * uniform)
        return place if ids is None else int(ids[place])

    def _change(self, row: np.ndarray, state: SampleState) -> np.ndarray:
        np.copyto(self._changed, row)
        state.change(self._changed)
        return self._changed


def filtered(row: np.ndarray, peak: np.floating, sampling: Sampling) -> tuple[np.ndarray | None, np.ndarray]:
    """What temperature and filters leave of a row.

    Args:
        row: float32 [vocab], its largest entry `peak` finite.

    Returns:
        ids, ascending, of the tokens that are left (None: all), and their probabilities up to a common factor.
    """
    ids = None
    if 0 < sampling.top_k < len(row):
        ids = _largest(row, sampling.top_k)
        row = row[ids]
    weights = row - peak
    if sampling.temperature != 1:
        weights *= np.float32(1 / sampling.temperature)
    np.exp(weights, out=weights)
    for active, keep, share in (
        (sampling.top_p < 1, _nucleus, sampling.top_p),
        (sampling.min_p > 0, _above, sampling.min_p),
        (sampling.typical_p < 1, _typical, sampling.typical_p),
    ):
        if active:
            kept = keep(weights, share)
            weights = weights[kept]
            ids = kept if ids is None else ids[kept]
    return ids, weights


def _largest(row: np.ndarray, count: int) -> np.ndarray:
    """Ids, ascending, of the `count` largest entries and of those equal to the last of them."""
    groups = len(row) // 64
    if groups < 4 * count:
        return np.flatnonzero(row >= np.partition(row, len(row) - count)[len(row) - count])
    # So many entries are as large as the maxima of so many groups: few others remain to be partitioned.
    maxima = row[: groups * 64].reshape(64, groups).max(0)
    ids = np.flatnonzero(row >= np.partition(maxima, groups - count)[groups - count])
    values = row[ids]
    return ids[values >= np.partition(values, len(ids) - count)[len(ids) - count]]


def _nucleus(weights: np.ndarray, share: float) -> np.ndarray:
    """Places, ascending, of the fewest tokens with at least `share` of the mass; the first of equals, as if greedy."""
    whole = float(weights.sum(dtype=np.float64))
    spare = (1 - share) * whole  # what may be left out
    kept, values, out = None, weights, 0.0
    while len(values) > 1024:
        # Tokens below the average of what may still be left out are left out: together they cannot exceed it.
        stay = np.flatnonzero(values >= (spare - out) / len(values))
        if len(stay) > 0.9 * len(values):
            break
        kept = stay if kept is None else kept[stay]
        values = values[stay]
        out = whole - float(values.sum(dtype=np.float64))
    ordered = np.sort(values)
    removed = _crossing(ordered, lambda _: spare - out)
    border = ordered[removed]
    stay = np.flatnonzero(values >= border)
    equal = removed - int(np.searchsorted(ordered, border, side="left"))
    if equal:
        stay = np.delete(stay, np.flatnonzero(values[stay] == border)[-equal:])
    return stay if kept is None else kept[stay]


def _above(weights: np.ndarray, share: float) -> np.ndarray:
    """Places of tokens with at least `share` of the likeliest token's probability."""
    return np.flatnonzero(weights >= share * weights.max())


def _typical(weights: np.ndarray, share: float) -> np.ndarray:
    """Places of the tokens whose surprise is nearest to the entropy, until they have `share` of the mass."""
    places = np.flatnonzero(weights > 0)
    chances = weights[places]
    chances /= chances.sum(dtype=np.float64)
    surprise = -np.log(chances)
    distance = np.abs(surprise - (chances * surprise).sum(dtype=np.float64))
    # A whole sort would take milliseconds: add up by steps of distance, and sort inside the step of the border.
    steps = (distance * (2000 / max(float(distance.max()), 1e-30))).astype(np.intp)
    nearer = np.cumsum(np.bincount(steps, chances))
    step = min(int(np.searchsorted(nearer, share)), len(nearer) - 1)
    inside = np.flatnonzero(steps == step)
    inside = inside[np.argsort(distance[inside])]
    mass = np.cumsum(chances[inside], dtype=np.float64) + (nearer[step - 1] if step else 0.0)
    last = min(int(np.searchsorted(mass, share)), len(inside) - 1)
    return places[distance <= distance[inside[last]]]


def _crossing(weights: np.ndarray, target: Callable[[float], float]) -> int:
    """The place where the cumulative sum of weights first exceeds `target(their sum)`.

    Where rounding leaves no such place, the last that adds to the sum.
    """
    size = len(weights)
    if size <= 16 * _BLOCK:
        mass = np.cumsum(weights, dtype=np.float64)
        return _first_above(mass, target(mass[-1]))
    # A running sum over everything is slow: sums of blocks, then a running sum inside one of them.
    even = size // _BLOCK * _BLOCK
    sums = np.zeros(even // _BLOCK + 1, np.float64)
    weights[:even].reshape(-1, _BLOCK).sum(1, dtype=np.float64, out=sums[:-1])
    sums[-1] = weights[even:].sum(dtype=np.float64)
    blocks = np.cumsum(sums)
    goal = target(blocks[-1])
    block = _first_above(blocks, goal)
    before = blocks[block - 1] if block else 0.0
    start = block * _BLOCK
    return start + _first_above(np.cumsum(weights[start : start + _BLOCK], dtype=np.float64), goal - before)


def _first_above(mass: np.ndarray, target: float) -> int:
    place = int(np.searchsorted(mass, target, side="right"))
    return place if place < len(mass) else int(np.searchsorted(mass, mass[-1], side="left"))


def logprob_of(row: np.ndarray, token: int, top: int) -> TokenLogprob:
    """Natural log-probability of a token under raw logits, with the `top` likeliest. row: float32 [vocab]."""
    peak = row.max()
    shifted = row - peak
    norm = float(peak) + math.log(float(np.exp(shifted, out=shifted).sum(dtype=np.float64)))
    likeliest: tuple[tuple[int, float], ...] = ()
    if top:
        ids = _largest(row, min(top, len(row)))
        order = np.argsort(-row[ids], kind="stable")[:top]
        likeliest = tuple((int(i), float(row[i]) - norm) for i in ids[order])
    rank = 1 + int(np.count_nonzero(row > row[token]) + np.count_nonzero(row[:token] == row[token]))
    return TokenLogprob(token, float(row[token]) - norm, likeliest, rank)


def _usable(peak: np.floating) -> None:
    if not math.isfinite(peak):
        raise ShoestringError(
            f"The model's output is {peak} for this sequence",
            "Its activations left the range of numbers",
            "Try another weight format or a shorter prompt",
        )


def _possible(peak: np.floating) -> None:
    if not math.isfinite(peak):
        raise ShoestringError(
            "No token is possible here",
            "The constraint, min_tokens, stop_token_ids and logit_bias rule all of them out together",
        )


class _Tally:
    """The tokens that penalties apply to, with how often each occurs in the answer."""

    def __init__(self, sampling: Sampling, prompt: Iterable[int]) -> None:
        self._sampling = sampling
        known = list(dict.fromkeys(prompt)) if sampling.repetition_penalty != 1 else []
        self._ids = np.array(known + [0] * 64, np.int64)
        self._counts = np.zeros(len(self._ids), np.float32)
        self._places = {token: place for place, token in enumerate(known)}
        self._prompt = len(known)

    def add(self, token: int) -> None:
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._ids):
            self._ids, self._counts = (np.concatenate([a, np.zeros_like(a)]) for a in (self._ids, self._counts))
        self._ids[place] = token
        self._counts[place] += 1

    def remove(self, token: int) -> None:
        """Undo the latest `add`."""
        place = self._places[token]
        self._counts[place] -= 1
        if self._counts[place] == 0 and place >= self._prompt:
            del self._places[token]  # the latest to come, so that no other place changes

    def apply(self, row: np.ndarray) -> None:
        size, sampling = len(self._places), self._sampling
        ids, counts = self._ids[:size], self._counts[:size]
        values = row[ids]
        if sampling.repetition_penalty != 1:
            penalty = np.float32(sampling.repetition_penalty)
            values = np.where(values < 0, values * penalty, values / penalty)
        values -= sampling.frequency_penalty * counts
        values -= sampling.presence_penalty * (counts > 0)
        row[ids] = values


def _penalised(sampling: Sampling) -> bool:
    return sampling.repetition_penalty != 1 or sampling.presence_penalty != 0 or sampling.frequency_penalty != 0


def _bias(sampling: Sampling) -> tuple[np.ndarray, np.ndarray] | None:
    if not sampling.logit_bias:
        return None
    total: dict[int, float] = {}
    for token, value in sampling.logit_bias:
        total[token] = total.get(token, 0.0) + value
    return np.array(list(total), np.int64), np.array(list(total.values()), np.float32)
