"""The example pool: past requests and answers of one file, found by meaning within their own scope."""

from __future__ import annotations

import json
import os
import re
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from shoestring.core.errors import UsageError

VERSION = "1"
FLAT = 64  # examples of a scope below which comparing with each is cheaper than an index
GROWTH = 0.2  # share by which a scope grows before its clusters are made again
PROBES = 3  # clusters that are looked into
EXACT = 200  # examples up to which the knapsack is solved exactly
AGEING = 0.9  # of gain and value, an hour
OVERHEAD = 64  # bytes of an example beside its texts and its vector
_COLUMNS = (
    "id",
    "scope",
    "request",
    "answer",
    "producer",
    "tokens",
    "quality",
    "vector",
    "uses",
    "gain",
    "value",
    "at",
)
_TEMPLATE = re.compile(r"<\|[^|<>]{1,40}\|>|</?s>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|<(?:bos|eos|pad)>")
_PRIVATE = (
    (re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+"), "[email]"),
    (re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){3,7}(?: ?[A-Z0-9]{1,3})?\b"), "[account]"),
    (re.compile(r"\b(?:\d{1,3}\.){3}\d{1,3}\b"), "[address]"),
    (re.compile(r"(?<![\w.])\+?\(?\d(?:[ ()/.-]{0,2}\d){7,}(?!\w)"), "[number]"),
)


@dataclass(frozen=True)
class Example:
    """A request and its answer.

    Attributes:
        id: 0 before it is in a pool.
        scope: only requests of the same scope ever see it.
        producer: name of the model that answered.
        tokens: of request and answer, estimated.
        quality: 0..1.
        uses: prompts it was in.
        gain: running mean of what a better answer would have been worth (eq. 7), as of `at`.
        value: running mean of the good answers that a cheaper model gave with it (eq. 8), as of `at`.
        at: seconds of the clock when gain and value were last written.
    """

    scope: str
    request: str
    answer: str
    producer: str
    tokens: int
    quality: float
    vector: np.ndarray
    uses: int = 0
    gain: float = 0.0
    value: float = 0.0
    at: float = 0.0
    id: int = 0

    @property
    def size(self) -> int:
        """Bytes that count against the pool's capacity."""
        return len(self.request.encode()) + len(self.answer.encode()) + self.vector.nbytes + OVERHEAD

    def aged(self, now: float) -> Example:
        """With gain and value as they are now: dead topics fade."""
        fade = AGEING ** (max(0.0, now - self.at) / 3600)
        return replace(self, gain=self.gain * fade, value=self.value * fade, at=max(now, self.at))


def stripped(text: str, people: Sequence[str] = ()) -> str:
    """The text without mail addresses, account and telephone numbers, network addresses and the names of `people`."""
    for pattern, word in _PRIVATE:
        text = pattern.sub(word, text)
    for name in people:
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "[name]", text, flags=re.IGNORECASE)
    return text


def unfit(request: str, answer: str) -> str:
    """Why this pair must never be an example; empty when it may be."""
    if not re.search(r"\w", answer) or not re.search(r"\w", request):
        return "empty"
    if _TEMPLATE.search(answer) or _TEMPLATE.search(request):
        return "template"  # it could pose as another speaker in every later prompt
    return ""


def knapsack(values: Sequence[float], sizes: Sequence[int], room: int) -> list[int]:
    """Indices of a subset of the largest value within `room`: exact for few items, else greedily by value a byte.

    The greedy choice is at least half as good as the best: it is the better of the densest items and the single best.
    """
    if sum(sizes) <= room:
        return list(range(len(sizes)))
    fitting = [i for i, size in enumerate(sizes) if size <= room]
    if not fitting:
        return []
    if len(fitting) <= EXACT:
        from scipy.optimize import Bounds, LinearConstraint, milp

        weights = np.array([sizes[i] for i in fitting], float)
        worth = np.array([values[i] for i in fitting], float)
        found = milp(
            -worth, constraints=LinearConstraint(weights[None] / room, ub=1.0), bounds=Bounds(0, 1),
            integrality=np.ones(len(fitting)),
        )  # fmt: skip
        if found.success:
            chosen = [i for i, x in zip(fitting, found.x) if x > 0.5]
            if sum(sizes[i] for i in chosen) <= room:  # the solver's tolerance is not ours
                return chosen
    chosen, used = [], 0
    for i in sorted(fitting, key=lambda i: (-values[i] / sizes[i], i)):
        if used + sizes[i] <= room:
            chosen.append(i)
            used += sizes[i]
    best = max(fitting, key=lambda i: values[i])
    return [best] if values[best] > sum(values[i] for i in chosen) else sorted(chosen)


class Index:
    """Vectors of one scope in two levels: round(sqrt(N)) clusters, then the members of the nearest few (eq. 1)."""

    def __init__(self, width: int, faiss: Any) -> None:
        self._faiss, self._width = faiss, width
        self._rows: dict[int, np.ndarray] = {}
        self._index: Any = None
        self._made_for = 0
        self.clusters = 0
        self.compared = 0  # vectors that the last search looked at

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, number: int, vector: np.ndarray) -> None:
        self._rows[number] = vector
        if self._index is not None:
            self._index.add_with_ids(vector[None], np.array([number], np.int64))
        if len(self) >= max(FLAT, (1 + GROWTH) * self._made_for):
            self._cluster()

    def remove(self, number: int) -> None:
        del self._rows[number]
        if self._index is not None:
            self._index.remove_ids(np.array([number], np.int64))
        if len(self) < FLAT:
            self._index, self._made_for, self.clusters = None, 0, 0

    def search(self, vector: np.ndarray, count: int) -> list[tuple[int, float]]:
        """The (number, cosine) of up to `count` near ones, nearest first; `compared` says what that took."""
        if not self._rows:
            self.compared = 0
            return []
        if self._index is None:
            return self.exact(vector, count)
        cosines, numbers = self._index.search(vector[None], count)
        lists = self._index.quantizer.search(vector[None], self._index.nprobe)[1][0]
        members = sum(self._index.invlists.list_size(int(k)) for k in lists if k >= 0)
        self.compared = self.clusters + members
        return [(int(n), float(c)) for n, c in zip(numbers[0], cosines[0]) if n >= 0]

    def exact(self, vector: np.ndarray, count: int) -> list[tuple[int, float]]:
        """The same by comparing with every vector."""
        numbers = np.fromiter(self._rows, np.int64, len(self._rows))
        cosines = np.stack(list(self._rows.values())) @ vector
        self.compared = len(numbers)
        order = np.lexsort((numbers, -cosines))[:count]
        return [(int(numbers[i]), float(cosines[i])) for i in order]

    def _cluster(self) -> None:
        faiss = self._faiss
        self.clusters = round(len(self) ** 0.5)  # which minimises clusters + members of one
        faiss.omp_set_num_threads(1)
        quantizer = faiss.IndexFlatIP(self._width)
        index = faiss.IndexIVFFlat(quantizer, self._width, self.clusters, faiss.METRIC_INNER_PRODUCT)
        index.cp.min_points_per_centroid, index.cp.spherical, index.cp.seed = 1, True, 1
        index.nprobe = min(PROBES, self.clusters)
        vectors = np.stack(list(self._rows.values()))
        index.train(vectors)
        index.add_with_ids(vectors, np.fromiter(self._rows, np.int64, len(self._rows)))
        self._index, self._made_for = index, len(self)


class Pool:
    """Examples of all scopes within `capacity` bytes, and what was learned, in one SQLite file.

    Every change is one transaction: a process that is killed finds all of it or nothing of it. Used from one thread.

    Args:
        file: the file; ":memory:" keeps nothing.
        made_by: what the vectors were made by; a file of another maker is refused.
        width: of the vectors, which have length 1.

    Raises:
        UsageError: no room, a file of another embedding model or none of ours, or faiss is not installed.
    """

    def __init__(self, file: Path | str, made_by: str, width: int, capacity: int, clock: Callable[[], float]) -> None:
        if capacity <= 0:
            raise UsageError(f"a pool of {capacity} bytes holds nothing", remedy="Give it room, such as 64MB")
        try:
            import faiss
        except ImportError:
            raise UsageError(
                "the example pool needs faiss, which is not installed", remedy="pip install 'shoestring[cache]'"
            ) from None
        self.capacity, self.width, self._faiss, self._clock = capacity, width, faiss, clock
        self._indices: dict[str, Index] = {}
        self.examples: dict[int, Example] = {}
        self.bytes = 0
        self.evicted = 0
        if str(file) != ":memory:":
            file = Path(file).expanduser()
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                os.close(os.open(file, os.O_CREAT | os.O_RDWR, 0o600))  # it holds what people wrote
            except OSError as error:
                raise UsageError(f"the pool {file} cannot be written", error.strerror or "") from None
        self._base = sqlite3.connect(str(file), isolation_level=None, check_same_thread=False, timeout=1.0)
        try:
            self._open(file, made_by)
        except sqlite3.DatabaseError as error:
            self._base.close()
            raise UsageError(
                f"{file} cannot be used as an example pool", str(error), "Name another file; no two servers share one"
            ) from None
        except BaseException:
            self._base.close()
            raise

    def _open(self, file: Path | str, made_by: str) -> None:
        base = self._base
        base.execute("PRAGMA locking_mode=EXCLUSIVE")  # what is in memory must be what is in the file
        base.execute("PRAGMA journal_mode=WAL")
        base.execute("PRAGMA synchronous=NORMAL")
        base.execute("CREATE TABLE IF NOT EXISTS about (name TEXT PRIMARY KEY, text TEXT NOT NULL)")
        ours = {"version": VERSION, "embedding": made_by, "width": str(self.width)}
        about: dict[str, str] = dict(base.execute("SELECT name, text FROM about"))
        for name, wanted in ours.items():
            if about and about.get(name) != wanted:
                raise UsageError(
                    f"the pool {file} has {name} {about.get(name)}, and {wanted} is needed",
                    "its vectors cannot be compared with those made now",
                    "Use the embedding model it was made with, or name another file",
                )
        with self.change():
            base.executemany("INSERT OR IGNORE INTO about VALUES (?, ?)", ours.items())
            base.execute(f"CREATE TABLE IF NOT EXISTS examples (id INTEGER PRIMARY KEY, {', '.join(_COLUMNS[1:])})")
            base.execute("CREATE TABLE IF NOT EXISTS notes (kind TEXT, name TEXT, at REAL, text TEXT, "
                         "PRIMARY KEY (kind, name))")  # fmt: skip
        self._load()

    def _load(self) -> None:
        self.examples, self._indices, self.bytes = {}, {}, 0
        for row in self._base.execute(f"SELECT {', '.join(_COLUMNS)} FROM examples"):
            stored = dict(zip(_COLUMNS, row))
            self._hold(Example(**{**stored, "vector": np.frombuffer(stored["vector"], np.float32)}))

    def close(self) -> None:
        self._base.close()

    @contextmanager
    def change(self) -> Iterator[None]:
        """All writes of the block, or none of them; within another block it is part of that one."""
        if self._base.in_transaction:
            yield
            return
        self._base.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._base.execute("COMMIT")
        except BaseException:
            self._base.execute("ROLLBACK")
            self._load()
            raise

    # ---- looking ----

    def search(self, scope: str, vector: np.ndarray, count: int) -> list[tuple[Example, float]]:
        """Up to `count` examples of the scope with their cosines, nearest first."""
        index = self._indices.get(scope)
        return [(self.examples[n], cosine) for n, cosine in index.search(vector, count)] if index else []

    def recall(self, scope: str, vectors: Sequence[np.ndarray], count: int) -> float:
        """Share of the truly nearest `count` that the index finds."""
        index = self._indices[scope]
        shares = []
        for vector in vectors:
            truly = {n for n, _ in index.exact(vector, count)}
            shares.append(len(truly & {n for n, _ in index.search(vector, count)}) / len(truly))
        return float(np.mean(shares))

    def index(self, scope: str) -> Index | None:
        return self._indices.get(scope)

    # ---- changing ----

    def admit(self, example: Example, near: float) -> tuple[int, str]:
        """Take the example in; its id. Or 0 and why not: it is unfit, too large, or like one that is at least as good.

        The same request with a better answer takes the old one's place.
        """
        why = unfit(example.request, example.answer) or ("too_large" if example.size > self.capacity else "")
        if why:
            return 0, why
        for other, cosine in self.search(example.scope, example.vector, 3):
            if cosine > near and other.quality >= example.quality:
                return 0, "duplicate"
            if other.request == example.request:
                with self.change():
                    self.write(replace(other, answer=example.answer, producer=example.producer, tokens=example.tokens,
                                       quality=example.quality))  # fmt: skip
                    self.shrink()
                return other.id, ""
        with self.change():
            made = self._base.execute(f"INSERT INTO examples VALUES (NULL{', ?' * (len(_COLUMNS) - 1)})", _row(example))
            number = int(made.lastrowid or 0)
            self._hold(replace(example, id=number))
            self.shrink()
        return number, ""

    def write(self, example: Example) -> None:
        """Store a changed example in place of the one with its id; nothing when that one is gone."""
        old = self.examples.get(example.id)
        if old is None:
            return
        columns = ", ".join(f"{column}=?" for column in _COLUMNS[1:])
        self._base.execute(f"UPDATE examples SET {columns} WHERE id=?", (*_row(example), example.id))
        self.bytes += example.size - old.size
        self.examples[example.id] = example

    def drop(self, number: int) -> None:
        example = self.examples.pop(number, None)
        if example is None:
            return
        self._base.execute("DELETE FROM examples WHERE id=?", (number,))
        self.bytes -= example.size
        index = self._indices[example.scope]
        index.remove(number)
        if not len(index):
            del self._indices[example.scope]

    def shrink(self) -> None:
        """Keep the examples of the largest value that fit (eq. 8)."""
        if self.bytes <= self.capacity:
            return
        now = self._clock()
        held = [example.aged(now) for example in self.examples.values()]
        kept = set(knapsack([e.value for e in held], [e.size for e in held], self.capacity))
        for i, example in enumerate(held):
            if i not in kept:
                self.drop(example.id)
                self.evicted += 1

    # ---- notes: what else must outlive the process ----

    def note(self, kind: str, name: str, data: Any) -> None:
        self._base.execute(
            "INSERT OR REPLACE INTO notes VALUES (?, ?, ?, ?)", (kind, name, self._clock(), json.dumps(data))
        )

    def noted(self, kind: str) -> Mapping[str, Any]:
        """The notes of a kind by name, oldest first."""
        rows = self._base.execute("SELECT name, text FROM notes WHERE kind=? ORDER BY at", (kind,))
        return {name: json.loads(text) for name, text in rows}

    def take_note(self, kind: str, name: str) -> Any:
        """The note, None without one."""
        row = self._base.execute("SELECT text FROM notes WHERE kind=? AND name=?", (kind, name)).fetchone()
        return json.loads(row[0]) if row else None

    def forget(self, kind: str, name: str) -> None:
        self._base.execute("DELETE FROM notes WHERE kind=? AND name=?", (kind, name))

    def expire(self, kind: str, before: float, most: int) -> None:
        """Forget the notes of a kind from before a time, and all but the newest `most`."""
        self._base.execute("DELETE FROM notes WHERE kind=? AND at<?", (kind, before))
        self._base.execute(
            "DELETE FROM notes WHERE kind=? AND name NOT IN "
            "(SELECT name FROM notes WHERE kind=? ORDER BY at DESC LIMIT ?)", (kind, kind, most),
        )  # fmt: skip

    # ---- inside ----

    def _hold(self, example: Example) -> None:
        self.examples[example.id] = example
        self.bytes += example.size
        if example.scope not in self._indices:
            self._indices[example.scope] = Index(self.width, self._faiss)
        self._indices[example.scope].add(example.id, example.vector)


def _row(example: Example) -> tuple[Any, ...]:
    """What is stored of an example, without its id."""
    stored = {**vars(example), "vector": np.ascontiguousarray(example.vector, np.float32).tobytes()}
    return tuple(stored[column] for column in _COLUMNS[1:])
