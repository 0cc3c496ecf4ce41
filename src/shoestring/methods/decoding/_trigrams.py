"""Which token follows a pair of tokens: counted in a corpus, kept in a file, corrected while answers are written."""

from __future__ import annotations

import hashlib
import json
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from shoestring.core.errors import ShoestringError, UsageError
from shoestring.core.files import atomic_file

_BITS = 21  # of a token id inside a key
_IDS = (1 << _BITS) - 1
_PART = 1 << 22  # tokens that are counted together
_WIDEST = 4  # a row that has grown to so many times its width is cut to it
_OWNERS = 4096  # that are told apart at the same time
_FORMAT = "shoestring trigrams 1"
_SHARES = 8  # classes of shares
_LEVELS = (0.2, 0.6, 1.001)  # of values, which say how much is known: seen once, an answer's worth, a corpus, more
KINDS = _SHARES * (len(_LEVELS) + 1)


def kind_of(share: float, value: float) -> int:
    """The class, below `KINDS`, of a successor with such a share of its row and such a value."""
    return min(int(share * _SHARES), _SHARES - 1) * (len(_LEVELS) + 1) + bisect_right(_LEVELS, value)


def share_of(kind: int) -> float:
    """The largest share that a kind stands for."""
    return (kind // (len(_LEVELS) + 1) + 1) / _SHARES


class Named(Protocol):
    """A tokenizer, as far as its ids are concerned."""

    vocab: int

    def token_bytes(self, token: int) -> bytes: ...


def identity(tokenizer: Named) -> str:
    """A hash of what each token id stands for."""
    digest = hashlib.sha256()
    for token in range(tokenizer.vocab):
        text = tokenizer.token_bytes(token)
        digest.update(len(text).to_bytes(4, "little") + text)
    return digest.hexdigest()


@dataclass(frozen=True)
class Counted:
    """How often each triple of tokens occurs, before anything is left out.

    Attributes:
        triples: uint64 [n], ascending: three ids of 21 bits each, the first one highest.
        counts: uint32 [n].
        tokenizer: `identity` of the tokenizer that made the ids.
        corpus: a hash of what was counted.
    """

    triples: np.ndarray
    counts: np.ndarray
    tokenizer: str
    corpus: str = ""

    def save(self, file: Path) -> None:
        from safetensors.numpy import save_file

        about = {"format": _FORMAT, "tokenizer": self.tokenizer, "corpus": self.corpus}
        with atomic_file(file) as aside:
            save_file({"triples": self.triples, "counts": self.counts}, str(aside), about)


def load(file: Path, tokenizer: str) -> Counted:
    """The table in a file.

    Raises:
        UsageError: it is none, or its ids are those of another tokenizer.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), "np") as opened:
            about = opened.metadata() or {}
            if about.get("format") != _FORMAT:
                raise UsageError(f"{file} is no table of this kind", remedy="Name another file, or one yet to be made")
            triples, counts = opened.get_tensor("triples"), opened.get_tensor("counts")
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{file} cannot be read", str(error), "Delete it: it is made anew from the corpus") from None
    if about.get("tokenizer") != tokenizer:
        raise UsageError(
            f"{file} was made with another tokenizer",
            "the same ids stand for other words, so that no draft of it would be right",
            "Make a table for this model under another name",
        )
    sound = triples.dtype == np.uint64 and counts.dtype == np.uint32 and triples.shape == counts.shape == (len(counts),)
    if not sound or (triples[1:] <= triples[:-1]).any() or not counts.all():
        raise UsageError(f"{file} is damaged", remedy="Delete it: it is made anew from the corpus")
    return Counted(triples, counts, tokenizer, about.get("corpus", ""))


def count(texts: Iterable[Sequence[int]], tokenizer: str = "", corpus: str = "") -> Counted:
    """Every triple inside each of the texts; those of fewer than three tokens add nothing.

    Args:
        texts: token ids of each text.

    Raises:
        ShoestringError: an id of 2^21 or more.
    """
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    waiting: list[np.ndarray] = []
    size = 0
    for text in texts:
        if len(text) < 3:
            continue
        ids = np.asarray(text, np.int64)
        if ids.min() < 0 or ids.max() > _IDS:
            raise ShoestringError(f"Token id {int(ids.max())} has no place in a table", f"ids have {_BITS} bits there")
        wide = ids.astype(np.uint64)
        waiting.append(wide[:-2] << 2 * _BITS | wide[1:-1] << _BITS | wide[2:])
        size += len(waiting[-1])
        if size >= _PART:
            parts, waiting, size = [_merged([*parts, _counted(waiting)])], [], 0
    if waiting:
        parts.append(_counted(waiting))
    triples, counts = _merged(parts)
    return Counted(triples, np.minimum(counts, 2**32 - 1).astype(np.uint32), tokenizer, corpus)


def _counted(some: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    triples, counts = np.unique(np.concatenate(some), return_counts=True)
    return triples, counts.astype(np.int64)


def _merged(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    if not parts:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    triples, places = np.unique(np.concatenate([t for t, _ in parts]), return_inverse=True)
    counts = np.zeros(len(triples), np.int64)
    np.add.at(counts, places, np.concatenate([c for _, c in parts]))
    return triples, counts


class _Pruned:
    """The likeliest successors of each pair, as arrays; looked up by bisection."""

    def __init__(self, counted: Counted, successors: int) -> None:
        pairs, counts = counted.triples >> _BITS, counted.counts.astype(np.int64)
        starts = np.flatnonzero(np.concatenate([[True], pairs[1:] != pairs[:-1]])) if len(pairs) else np.zeros(0, int)
        sizes = np.diff(np.append(starts, len(pairs)))
        sums = np.add.reduceat(counts, starts) if len(starts) else counts
        shares = (counts / np.repeat(sums, sizes)).astype(np.float32)  # (eq. 1) before pruning; not renormalised
        order = np.lexsort((counted.triples & np.uint64(_IDS), -counts, pairs))
        rank = np.arange(len(pairs)) - np.repeat(starts, sizes)
        kept = order[rank < successors]
        self.pairs = pairs[starts]
        self.starts = np.concatenate([[0], np.cumsum(np.minimum(sizes, successors))])
        self.tokens = (counted.triples[kept] & np.uint64(_IDS)).astype(np.int32)
        self.values = shares[kept]

    def row(self, pair: int) -> dict[int, float] | None:
        at = int(self.pairs.searchsorted(np.uint64(pair)))
        if at == len(self.pairs) or int(self.pairs[at]) != pair:
            return None
        part = slice(self.starts[at], self.starts[at + 1])
        return dict(zip(self.tokens[part].tolist(), self.values[part].tolist()))


class Row:
    """Successors of a pair with their values; `view` is what a search reads, made when it is first asked for."""

    __slots__ = ("values", "_view")

    def __init__(self, values: dict[int, float]) -> None:
        self.values = values
        self._view: View | None = None

    def changed(self) -> None:
        self._view = None

    def view(self, width: int) -> View:
        if self._view is None:
            if len(self.values) == 1:  # most are so, and they are looked at in every step
                ((token, value),) = self.values.items()
                self._view = View((token,), (value,), (kind_of(1.0, value),), (value,))
                return self._view
            best = sorted(self.values.items(), key=lambda item: (-item[1], item[0]))[:width]
            values = tuple([value for _, value in best])
            total = sum(values)
            kinds = tuple([kind_of(value / total, value) for value in values])
            self._view = View(tuple([token for token, _ in best]), values, kinds, tuple(accumulate(values)))
        return self._view


class View(NamedTuple):
    """The most valued successors of a pair, best first: their values, `kind_of` each, and running sums of values."""

    tokens: tuple[int, ...]
    values: tuple[float, ...]
    kinds: tuple[int, ...]
    sums: tuple[float, ...]


class Trigrams:
    """M[(a, b)] -> {c: value}. What is counted is shared by all owners; what is learnt belongs to one.

    Safe to use from several threads.

    Args:
        counted: the corpus; None begins with nothing.
        successors: kept of each pair.
        entries: pairs that are kept in memory beside what was counted; the least recently learnt one goes first.
        increment, cap: added to a triple each time it is seen, and the highest value it reaches.
        window: tokens at the end of a text that are seen in each step.
    """

    def __init__(
        self,
        counted: Counted | None = None,
        *,
        successors: int = 12,
        entries: int = 100_000,
        increment: float = 0.04,
        cap: float = 3.0,
        window: int = 16,
    ) -> None:
        self.successors, self.entries = successors, entries
        self.increment, self.cap, self.window = increment, cap, window
        self.learnt = 0  # triples that were not in the table before
        self.lock = threading.RLock()
        self._counted = _Pruned(counted, successors) if counted is not None and len(counted.counts) else None
        self._rows: OrderedDict[int, Row] = OrderedDict()
        self._owners: OrderedDict[str, int] = OrderedDict()
        self._next = 0

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def counted(self) -> int:
        """Pairs of the corpus."""
        return len(self._counted.pairs) if self._counted else 0

    def owner(self, word: str) -> int:
        """A number for whoever must not see what others taught; what the longest unseen one taught is forgotten."""
        with self.lock:
            number = self._owners.pop(word, None)
            if number is None:
                number, self._next = self._next, self._next + 1
                if len(self._owners) >= _OWNERS:
                    self._owners.popitem(last=False)
            self._owners[word] = number
            return number

    def view(self, owner: int, first: int, second: int) -> View | None:
        """What may follow a pair; None when nothing is known."""
        key = owner << 2 * _BITS | first << _BITS | second
        row = self._rows.get(key) or self._taken(key)
        return row.view(self.successors) if row else None

    def learn(self, owner: int, tokens: Sequence[int], steps: int = 1) -> None:
        """Reinforce the triples in the window at the end of `tokens`, as in so many steps."""  # (eq. 2)
        self._reinforce(owner, tokens[-self.window :], self.increment * steps)

    def learn_all(self, owner: int, tokens: Sequence[int]) -> None:
        """Reinforce all triples of a text as much as if the window had passed over it token by token."""
        self._reinforce(owner, tokens, self.increment * (self.window - 2))

    def _reinforce(self, owner: int, tokens: Sequence[int], amount: float) -> None:
        if not amount or len(tokens) < 3:
            return
        rows, cap, most = self._rows, self.cap, _WIDEST * self.successors
        high = owner << _BITS
        a, b = tokens[0], tokens[1]
        with self.lock:
            for c in tokens[2:]:
                key = (high | a) << _BITS | b
                row = rows.get(key)
                if row is None:
                    row = self._taken(key) or self._new(key)
                values = row.values
                value = values.get(c)
                if value is None:
                    self.learnt += 1
                    values[c] = min(amount, cap)
                    row.changed()
                    if len(values) > most:
                        best = sorted(values.items(), key=lambda item: -item[1])[: self.successors - 1]
                        row.values = {**dict(best), c: values[c]}
                elif value < cap:
                    value += amount
                    values[c] = value if value < cap else cap
                    row.changed()
                rows.move_to_end(key)
                a, b = b, c

    def _taken(self, key: int) -> Row | None:
        """A pair's row from what was counted, kept from now on."""
        found = self._counted.row(key & ((1 << 2 * _BITS) - 1)) if self._counted else None
        return None if found is None else self._keep(key, Row(found))

    def _new(self, key: int) -> Row:
        return self._keep(key, Row({}))

    def _keep(self, key: int, row: Row) -> Row:
        with self.lock:
            self._rows[key] = row
            if len(self._rows) > self.entries:
                self._rows.popitem(last=False)
        return row


def texts(corpus: str, tokenizer: Any) -> Iterator[list[int]]:
    """Token ids of each text or conversation in a data file.

    Raises:
        UsageError: as `data.read`.
    """
    from shoestring.data.formats import read

    for example in read(corpus).examples:
        if example.text is not None:
            yield tokenizer.encode(example.text)
        else:
            yield tokenizer.chat(example.messages, example.tools, add_generation_prompt=False)


def counted_from(corpus: str, file: str, tokenizer: Any) -> Counted | None:
    """The table of a data file, kept in `file` when that is given; of either alone; None without both.

    Raises:
        UsageError: neither can be read, or `file` belongs to another tokenizer or corpus.
    """
    if not (corpus or file):
        return None
    name, place = identity(tokenizer), Path(file).expanduser()
    origin = _origin(corpus) if corpus else ""
    if file and place.exists():
        found = load(place, name)
        if corpus and found.corpus != origin:
            raise UsageError(
                f"{file} was made from another corpus than {corpus}",
                remedy="Leave one of them out, or delete the table",
            )
        return found
    if not corpus:
        raise UsageError(f"There is no table {file}", remedy="Say corpus=FILE as well, of which it is made")
    made = count(texts(corpus, tokenizer), name, origin)
    if file:
        made.save(place)
    return made


def _origin(corpus: str) -> str:
    path = Path(corpus).expanduser()
    if not path.is_file():
        return json.dumps(corpus)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
