"""The fused step of a Llama-like model on the native kernels: numpy arrays in and out, no torch.

`Llama` holds the weights, `Cache` the pages, `Adapter` low-rank additions.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from shoestring.core.errors import DoesNotFit, UsageError
from shoestring.kernels.matrix import AS_STORED, SAY_THEIR_SIZE, Matrix, Memory, SkMatrix, library, make, to_int8

PAGE = 16  # tokens; SK_PAGE of native/kernels.h
TILE = 16  # rows; SK_TILE
CACHE_TYPES = ("bf16", "int8", "fp32")
ACTIVATIONS = ("silu", "gelu_tanh")
SCORES = ("softmax", "sigmoid")
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
_FEED_FORWARD = ("gate", "up", "down")
_JOBS = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))  # projections of the same tokens
MOST_HEAD_DIM = 512

# (layer, q [tokens, heads, head_dim], k and v [tokens, kv_heads, head_dim]) -> [tokens, heads, head_dim], all float32.
Attend = Callable[[int, np.ndarray, np.ndarray, np.ndarray], np.ndarray]
# (layer, q) of the call of Attend that follows.
Queries = Callable[[int, np.ndarray], None]


class Batch(Protocol):
    """What a step reads of a ragged batch; `engine.runner.Batch` says what it means. Arrays are contiguous int32."""

    @property
    def ids(self) -> np.ndarray: ...
    @property
    def positions(self) -> np.ndarray: ...
    @property
    def starts(self) -> np.ndarray: ...
    @property
    def contexts(self) -> np.ndarray: ...
    @property
    def tables(self) -> np.ndarray: ...
    @property
    def parents(self) -> np.ndarray | None: ...
    @property
    def adapters(self) -> np.ndarray | None: ...


_Address, _Count, _Real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


class _SkExpert(ctypes.Structure):
    _fields_ = [*((name, SkMatrix) for name in _FEED_FORWARD), ("up_first", _Count)]


class _SkMixture(ctypes.Structure):
    _fields_ = [
        ("router", SkMatrix),
        ("weigher", SkMatrix),
        *((name, _Address) for name in ("experts", "latents", "shared", "targets", "correction")),
        *((name, _Count) for name in ("choices", "count", "chosen", "latent_count", "scores", "normalized")),
        ("scale", _Real),
    ]


class _SkBlock(ctypes.Structure):
    _fields_ = [
        *((name, SkMatrix) for name in PROJECTIONS),
        *((name, _Address) for name in ("mixture", "attention_norm", "mlp_norm", "q_norm", "k_norm")),
        ("rotate", _Count),
        ("window", _Count),
        ("leader", _Count),
        ("whole_norms", _Count),
    ]


class _SkModel(ctypes.Structure):
    _fields_ = [
        *((n, _Count) for n in ("layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate", "vocab")),
        *((name, _Count) for name in ("rotary", "positions", "activation")),
        *((n, _Real) for n in ("epsilon", "attention_scale", "embedding_scale", "residual_scale", "logit_scale")),
        *((name, _Address) for name in ("blocks", "embedding", "head", "final_norm", "cosines", "sines")),
    ]


class _SkCache(ctypes.Structure):
    _fields_ = [("data", _Address), ("pages", _Count), ("page_bytes", _Count), ("type", _Count)]


class _SkLowRank(ctypes.Structure):
    _fields_ = [("a", SkMatrix), ("b", SkMatrix)]


_FLOATS = ctypes.POINTER(ctypes.c_float)
_SkAttend = ctypes.CFUNCTYPE(None, ctypes.c_int64, _FLOATS, _FLOATS, _FLOATS, _FLOATS)
_SkQueries = ctypes.CFUNCTYPE(None, ctypes.c_int64, _FLOATS)


class _SkBatch(ctypes.Structure):
    _fields_ = [
        *((name, _Count) for name in ("tokens", "sequences", "table_stride", "first_layer", "last_layer")),
        *(
            (n, _Address)
            for n in ("ids", "positions", "starts", "contexts", "tables", "parents", "adapters", "low_rank")
        ),
        ("adapter_count", _Count),
        ("from_hidden", _Count),
        ("hidden", _Address),
        ("attend", _Address),
        ("queries", _Address),
    ]


@dataclass(frozen=True, eq=False)
class Latent:
    """A space that experts share: gate and up [size, hidden] lead into it, each to the half that theirs read.

    Attributes:
        down: [hidden, size], leads the sum of what its experts say out of it; None where their own lead to the stream.
    """

    gate: Matrix
    up: Matrix
    down: Matrix | None = None

    @property
    def width(self) -> int:
        return self.gate.rows

    @property
    def size(self) -> int:
        """Bytes that a token reads which enters it."""
        return self.gate.size + self.up.size + (self.down.size if self.down else 0)

    def fits(self, hidden: int) -> bool:
        """Whether its matrices belong together, and it has no more dimensions than the stream."""
        ways = {(self.gate.rows, self.gate.cols), (self.up.rows, self.up.cols)}
        ways |= {(self.down.cols, self.down.rows)} if self.down else set()
        return ways == {(self.width, hidden)} and self.width <= hidden


@dataclass(frozen=True, eq=False)
class Expert:
    """A gated feed-forward: down [hidden, width], gate and up [width, hidden].

    Where it shares a latent space, that one's size takes the place of `hidden` in gate and up, and in down where the
    space has a down of its own.

    Attributes:
        up: None where `gate` is [2 width, hidden] and has up's rows after its own.
    """

    gate: Matrix
    up: Matrix | None
    down: Matrix

    @property
    def width(self) -> int:
        return self.down.cols

    @property
    def size(self) -> int:
        """Bytes that a token reads which meets it."""
        return self.gate.size + (self.up.size if self.up else 0) + self.down.size

    def fits(self, hidden: int, latent: Latent | None = None) -> bool:
        """Whether its matrices belong together, and kernels can begin at the first row of up."""
        if latent:
            wide, out = (self.width, latent.width), latent.width if latent.down else hidden
            halves = [(half.rows, half.cols) for half in (self.gate, self.up) if half]
            return halves == [wide, wide] and self.down.rows == out
        if self.up is None:
            whole = self.width % TILE == 0 or self.gate.format in (*AS_STORED, *SAY_THEIR_SIZE)
            return whole and (self.gate.rows, self.gate.cols, self.down.rows) == (2 * self.width, hidden, hidden)
        wide = (self.width, hidden)
        return wide == (self.gate.rows, self.gate.cols) == (self.up.rows, self.up.cols) and self.down.rows == hidden


@dataclass(frozen=True, eq=False)
class Mixture:
    """Experts of which a router chooses a few for each token.

    A token's scores are the softmax or the sigmoids of the router's products; it meets the experts of the `chosen`
    largest, of equal ones the first, and adds up what they say by the scores times `scale`.

    Attributes:
        router: [choices, hidden].
        targets: the expert that each choice stands for; of one that is chosen twice the gates add up. Empty where
            choice i is expert i.
        normalized: the scores of those chosen are divided by their sum.
        correction: float32 [choices], added to scores only to find the largest, or None.
        shared: an expert that every token meets too.
        weigher: [1, hidden]: the shared expert counts as the sigmoid of its product says; None: wholly.
        latents: spaces that neighbouring experts share, all of one size and with equally many experts; empty where
            experts read the stream.
    """

    router: Matrix
    experts: tuple[Expert, ...]
    chosen: int
    targets: tuple[int, ...] = ()
    scores: str = "softmax"
    normalized: bool = False
    scale: float = 1.0
    correction: np.ndarray | None = None
    shared: Expert | None = None
    weigher: Matrix | None = None
    latents: tuple[Latent, ...] = ()

    @property
    def everyone(self) -> tuple[Expert, ...]:
        """The experts and the shared one."""
        return (*self.experts, *((self.shared,) if self.shared else ()))

    @property
    def size(self) -> int:
        """Bytes that a token reads, on average over the experts, which share as few latent spaces as they can."""
        beside = (
            self.router.size + (self.weigher.size if self.weigher else 0) + (self.shared.size if self.shared else 0)
        )
        if self.latents:
            entered = min(self.chosen, len(self.latents))
            beside += sum(latent.size for latent in self.latents) * entered // len(self.latents)
        return beside + sum(expert.size for expert in self.experts) * self.chosen // len(self.experts)

    def check(self, hidden: int) -> None:
        """Raises UsageError when parts do not belong together."""
        choices, count = self.router.rows, len(self.experts)
        targets = self.targets or tuple(range(choices))
        if not count or len(targets) != choices or not set(targets) <= set(range(count)) or count > choices:
            raise UsageError(f"{choices} choices of a router do not name {count} experts")
        if not 0 < self.chosen <= choices:
            raise UsageError(f"A token cannot meet {self.chosen} experts of {choices}")
        if self.scores not in SCORES:
            raise UsageError(f"The kernels have no scores {self.scores}", remedy=f"they are one of {SCORES}")
        if self.latents and (count % len(self.latents) or len({(x.width, x.down is None) for x in self.latents}) > 1):
            raise UsageError(f"{count} experts cannot share {len(self.latents)} latent spaces")
        for number, latent in enumerate(self.latents):
            if not latent.fits(hidden):
                raise UsageError(
                    f"Latent space {number} does not fit a stream of {hidden}", "its matrices have other shapes"
                )
        for number, expert in enumerate(self.everyone):
            shares = self.latents and number < count
            if not expert.fits(hidden, self.latents[number * len(self.latents) // count] if shares else None):
                name = f"Expert {number}" if number < count else "The shared expert"
                raise UsageError(f"{name} does not fit a stream of {hidden}", "its matrices have other shapes")
        for name, matrix, rows in (("router", self.router, choices), ("weigher", self.weigher, 1)):
            if matrix is not None and (matrix.rows, matrix.cols) != (rows, hidden):
                raise UsageError(f"The {name} is {matrix.rows} x {matrix.cols}, not {rows} x {hidden}")
        if self.correction is not None and self.correction.shape != (choices,):
            raise UsageError(f"The correction is {list(self.correction.shape)}, not [{choices}]")
        if self.weigher and not self.shared:
            raise UsageError("There is no shared expert to weigh")


@dataclass(frozen=True, eq=False)
class Block:
    """The weights of one layer: attention, and either a feed-forward of its own or a mixture of experts.

    Attributes:
        attention_norm, mlp_norm: float32 [hidden].
        q_norm, k_norm: float32 [head_dim], applied to each head before rotation, or None; as wide as q and k, they are
            applied to these as a whole.
        rotate: whether queries and keys are rotated.
        window: positions a token looks back on, itself included; 0 for all.
        leader: the earlier layer whose attention weights it takes, and then it has neither q nor k; None for its own.
    """

    q: Matrix | None
    k: Matrix | None
    v: Matrix
    o: Matrix
    gate: Matrix | None
    up: Matrix | None
    down: Matrix | None
    attention_norm: np.ndarray
    mlp_norm: np.ndarray
    q_norm: np.ndarray | None = None
    k_norm: np.ndarray | None = None
    rotate: bool = True
    window: int = 0
    leader: int | None = None
    mixture: Mixture | None = None

    @property
    def matrices(self) -> dict[str, Matrix]:
        """Projection -> its matrix, of those that the layer has; experts are not among them."""
        return {name: matrix for name in PROJECTIONS if (matrix := getattr(self, name)) is not None}

    @property
    def widths(self) -> tuple[int, ...]:
        """Neurons of its feed-forward, or of each expert."""
        if self.mixture:
            return tuple(expert.width for expert in self.mixture.everyone)
        return (self.gate.rows if self.gate else 0,)

    @property
    def size(self) -> int:
        """Bytes that a token reads."""
        return sum(matrix.size for matrix in self.matrices.values()) + (self.mixture.size if self.mixture else 0)


@dataclass(frozen=True, eq=False)
class Cache:
    """Pages of keys and values.

    Attributes:
        data: uint8, aligned to 64 bytes: the pages of each layer one after another.
        page_bytes: of one page, in each layer.
    """

    data: np.ndarray
    page_bytes: tuple[int, ...]
    type: str

    @property
    def pages(self) -> int:
        return len(self.data) // sum(self.page_bytes)

    @functools.cached_property
    def struct(self) -> _SkCache:
        return _SkCache(self.data.ctypes.data, self.pages, sum(self.page_bytes), CACHE_TYPES.index(self.type))

    @functools.cached_property
    def layers(self) -> tuple[np.ndarray, ...]:
        """Of each layer uint8 [pages, its bytes of a page]."""
        ends = np.cumsum([self.pages * size for size in self.page_bytes])
        return tuple(part.reshape(self.pages, -1) for part in np.split(self.data, ends[:-1]))

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole pages (from, to) in every layer, in order."""
        for source, target in pairs:
            if not (0 <= source < self.pages and 0 <= target < self.pages):
                raise UsageError(f"Page {source} cannot be copied to {target}: the cache has pages 0..{self.pages - 1}")
            for pages in self.layers:
                pages[target] = pages[source]


@dataclass(frozen=True, eq=False)
class Adapter:
    """Low-rank additions y += b (a x) to the projections of the model whose `adapter` made it.

    Attributes:
        layers: of the model.
        parts: (layer, projection) -> a [rank, in], b [out, rank].
    """

    layers: int
    parts: dict[tuple[int, str], tuple[Matrix, Matrix]]

    @functools.cached_property
    def struct(self) -> Any:
        structs = (_SkLowRank * (self.layers * len(PROJECTIONS)))()
        for (layer, name), (a, b) in self.parts.items():
            structs[layer * len(PROJECTIONS) + PROJECTIONS.index(name)] = _SkLowRank(a.struct, b.struct)
        return structs


@dataclass(frozen=True, eq=False)
class Llama:
    """A Llama-like model: norm, attention, norm, gated feed-forward or a mixture of such in every block.

    Blocks may have fewer heads and a narrower feed-forward than the largest, as many queries to a key in each.

    Attributes:
        heads, kv_heads: of the largest block.
        embedding, head: [vocab, hidden]; the same matrix when tied.
        final_norm: float32 [hidden].
        cosines, sines: float32 [positions, rotary / 2]; a head's leading `rotary` dimensions are turned in halves.
        attention_scale: of scores; None for 1 / sqrt(head_dim).

    Raises:
        UsageError: shapes that do not belong together, or a head_dim the kernels do not have.
    """

    blocks: tuple[Block, ...]
    embedding: Matrix
    head: Matrix
    final_norm: np.ndarray
    cosines: np.ndarray
    sines: np.ndarray
    heads: int
    kv_heads: int
    epsilon: float
    activation: str = "silu"
    attention_scale: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    _kept: list[Any] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        self._check()

    @property
    def hidden(self) -> int:
        return self.embedding.cols

    @property
    def vocab(self) -> int:
        return self.embedding.rows

    @property
    def head_dim(self) -> int:
        return max(block.o.cols for block in self.blocks) // self.heads

    @property
    def intermediate(self) -> int:
        return max(width for block in self.blocks for width in block.widths)

    @property
    def weight_bytes(self) -> int:
        """Bytes that a step of one token reads, an embedding of its own not counted."""
        return sum(block.size for block in self.blocks) + self.head.size

    def page_bytes(self, cache_type: str = "bf16") -> tuple[int, ...]:
        """Bytes of a page, in each layer."""
        struct, number = ctypes.byref(self._struct), CACHE_TYPES.index(cache_type)
        return tuple(int(library().sk_page_bytes(struct, layer, number)) for layer in range(len(self.blocks)))

    def cache(self, pages: int, cache_type: str = "bf16") -> Cache:
        """Fresh pages. The memory is taken from the system page by page as it is first written.

        Raises:
            DoesNotFit: it is not to be had.
        """
        sizes = self.page_bytes(cache_type)
        return Cache(allocate(pages * sum(sizes), "cache"), sizes, cache_type)

    def run(
        self,
        cache: Cache | None,
        batch: Batch,
        *,
        first: int = 0,
        last: int | None = None,
        hidden: np.ndarray | None = None,
        adapters: Sequence[Adapter | None] = (),
        attend: Attend | None = None,
        queries: Queries | None = None,
        threads: int = 1,
    ) -> np.ndarray:
        """Layers first..last-1 (None: all) over a batch: the residual stream, float32 [tokens, hidden].

        Args:
            hidden: the stream to start from, changed in place; None starts from the batch's ids (with first = 0).
            adapters: what `batch.adapters` counts in; None for one that was dropped.
            attend: computes attention instead of the kernels; then nothing is cached and cache may be None.
            queries: gets a layer's queries before its keys and values are computed, ahead of the call of `attend`.

        Raises:
            UsageError: an index in the batch outside its range; nothing was written.
            DoesNotFit: no memory for what a step needs beside the cache.
        """
        given = hidden is not None
        if not given and first != 0:
            raise UsageError(f"Layers from {first} on need the stream of the layers before them")
        self._check_leaders(first, len(self.blocks) if last is None else last, attend is not None)
        if hidden is None:
            hidden = np.empty((len(batch.ids), self.hidden), np.float32)
        elif (
            hidden.shape != (len(batch.ids), self.hidden) or hidden.dtype != np.float32 or not hidden.flags.c_contiguous
        ):
            raise UsageError(
                f"A stream {list(hidden.shape)} {hidden.dtype} is not float32 [{len(batch.ids)}, {self.hidden}]"
            )
        failure: list[BaseException] = []
        low_rank = self._low_rank(adapters)
        worker = _worker(self, attend, len(batch.ids), failure) if attend else None
        early = _early(self, queries, len(batch.ids), failure) if queries and attend else None
        arrays = [batch.ids, batch.positions, batch.starts, batch.contexts, batch.tables, batch.parents, batch.adapters]
        _fits(batch)
        struct = _SkBatch(
            len(batch.ids),
            len(batch.contexts),
            batch.tables.shape[1],
            first,
            len(self.blocks) if last is None else last,
            *(None if array is None else array.ctypes.data for array in arrays),
            ctypes.addressof(low_rank) if low_rank is not None else None,
            len(adapters),
            int(given),
            hidden.ctypes.data,
            ctypes.cast(worker, _Address) if worker else None,
            ctypes.cast(early, _Address) if early else None,
        )
        pages = None if cache is None else ctypes.byref(cache.struct)
        code = library().sk_run(ctypes.byref(self._struct), pages, ctypes.byref(struct), threads)
        if failure:
            raise failure[0]
        if code == 2:
            raise DoesNotFit(f"Memory for a step of {len(batch.ids)} tokens is not to be had")
        if code:
            raise UsageError("The batch does not fit the model or the cache: an index lies outside its range")
        return hidden

    def logits(self, hidden: np.ndarray, rows: np.ndarray, threads: int = 1) -> np.ndarray:
        """Final norm and head on rows of the stream: float32 [len(rows), vocab]."""
        out = np.empty((len(rows), self.vocab), np.float32)
        self._finish(hidden, rows, out, None, threads)
        return out

    def normed(self, hidden: np.ndarray, rows: np.ndarray, threads: int = 1) -> np.ndarray:
        """Final norm on rows of the stream: float32 [len(rows), hidden]."""
        out = np.empty((len(rows), self.hidden), np.float32)
        self._finish(hidden, rows, None, out, threads)
        return out

    def adapter(self, parts: Mapping[tuple[int, str], tuple[np.ndarray, np.ndarray]]) -> Adapter:
        """Low-rank additions laid out for this model.

        Beside a matrix of float32 they stay float32. Beside others they become 8-bit codes in groups of 16 or more
        columns; a number is then off by at most 1/253 of the largest of its group.

        Args:
            parts: (layer, projection) -> a [rank, in], b [out, rank], float32, with the adapter's scale in either.

        Raises:
            UsageError: a projection that the model does not have, or other shapes.
            DoesNotFit: no memory.
        """
        for (layer, name), (a, b) in parts.items():
            if not 0 <= layer < len(self.blocks) or name not in PROJECTIONS:
                raise UsageError(f"The adapter names {name} of layer {layer}, which the model does not have")
            matrix = self.blocks[layer].matrices.get(name)
            if matrix is None:
                why = "has experts there" if name in _FEED_FORWARD else "takes another's attention weights"
                raise UsageError(f"The adapter names {name} of layer {layer}, which {why}")
            if not len(a) or a.shape != (len(a), matrix.cols) or b.shape != (matrix.rows, len(a)):
                raise UsageError(
                    f"The adapter's {name} of layer {layer} is {list(a.shape)} and {list(b.shape)}",
                    f"the model's is {matrix.rows} x {matrix.cols}",
                )
        memory = Memory()
        made: dict[tuple[int, str], tuple[Matrix, Matrix]] = {}
        # In the order of use: eight adapters in a batch are more bytes than some models.
        for layer, block in enumerate(self.blocks):
            for job in _JOBS:
                names = [name for name in job if (layer, name) in parts]
                halves = []
                for name in names:
                    beside: Matrix = getattr(block, name)
                    group = 32 if beside.format in AS_STORED else beside.group  # the same codes of x for both
                    halves.append(_beside(beside, parts[layer, name][0], group, memory))
                for name, half in zip(names, halves, strict=True):
                    b = parts[layer, name][1] * np.float32(self.residual_scale if name in ("o", "down") else 1)
                    group = next((group for group in (16, 32, 64) if half.rows <= group), 128)
                    made[layer, name] = half, _beside(getattr(block, name), b, group, memory)
        return Adapter(len(self.blocks), made)

    def move(self, cache: Cache, table: Sequence[int], moves: Sequence[tuple[int, int]]) -> None:
        """Copy slots (from, to) of the sequence with this table, in order, in every layer.

        Raises:
            UsageError: a slot or page that is not there.
        """
        pages, pairs = _int32(table), np.asarray(moves, np.int32).reshape(-1, 2)
        source, target = _int32(pairs[:, 0]), _int32(pairs[:, 1])
        slots = len(pages) * PAGE
        outside = len(pairs) and not (0 <= int(pairs.min()) <= int(pairs.max()) < slots)
        if outside or library().sk_move(
            ctypes.byref(self._struct), ctypes.byref(cache.struct), pages.ctypes.data, source.ctypes.data,
            target.ctypes.data, len(pairs),
        ):  # fmt: skip
            raise UsageError(f"Moves {list(moves)} do not all lie in the {slots} slots of {len(pages)} pages")

    def _finish(
        self, hidden: np.ndarray, rows: np.ndarray, logits: np.ndarray | None, normed: np.ndarray | None, threads: int
    ) -> None:
        chosen = _int32(rows)
        if hidden.ndim != 2 or hidden.shape[1] != self.hidden or hidden.dtype != np.float32:
            raise UsageError(f"A stream {list(hidden.shape)} {hidden.dtype} is not float32 [tokens, {self.hidden}]")
        if len(chosen) and not 0 <= int(chosen.min()) <= int(chosen.max()) < len(hidden):
            raise UsageError(f"Rows {chosen.min()}..{chosen.max()} do not all lie in a stream of {len(hidden)} tokens")
        stream = np.ascontiguousarray(hidden)
        code = library().sk_logits(
            ctypes.byref(self._struct), stream.ctypes.data, chosen.ctypes.data, len(chosen),
            None if logits is None else logits.ctypes.data, None if normed is None else normed.ctypes.data, threads,
        )  # fmt: skip
        if code:
            raise DoesNotFit(f"Memory for the logits of {len(chosen)} tokens is not to be had")

    def _check(self) -> None:
        if not self.blocks:
            raise UsageError("A model without layers cannot run")
        if self.heads < 1 or self.kv_heads < 1 or self.heads % self.kv_heads:
            raise UsageError(f"{self.heads} heads cannot share {self.kv_heads} heads of keys and values")
        dim, most = self.head_dim, max(block.o.cols for block in self.blocks)
        if most % self.heads or dim % 2 or not 2 <= dim <= MOST_HEAD_DIM:
            raise UsageError(f"Heads of {most / self.heads:g} dimensions", f"must be even and at most {MOST_HEAD_DIM}")
        if self.activation not in ACTIVATIONS:
            raise UsageError(f"The kernels have no activation {self.activation}", remedy=f"it is one of {ACTIVATIONS}")
        rotary = self.cosines.shape[-1] * 2
        if self.cosines.ndim != 2 or self.cosines.shape != self.sines.shape or rotary > dim:
            raise UsageError(f"Cosines {self.cosines.shape} and sines {self.sines.shape} do not fit heads of {dim}")
        for number, block in enumerate(self.blocks):
            kv = block.v.rows
            if block.mixture:
                block.mixture.check(self.hidden)
            if not kv or kv % dim or not min(block.widths):
                raise UsageError(f"Layer {number} has {kv / dim:g} heads of keys and {min(block.widths)} neurons")
            q, wide = kv * (self.heads // self.kv_heads), (block.widths[0], self.hidden)
            shapes = {"q": (q, self.hidden), "k": (kv, self.hidden), "v": (kv, self.hidden), "o": (self.hidden, q)}
            if block.mixture is None:
                shapes |= {"gate": wide, "up": wide, "down": wide[::-1]}
            elif block.gate or block.up or block.down:
                raise UsageError(f"Layer {number} has both experts and a feed-forward of its own")
            if block.leader is not None:
                self._check_follower(number, block)
                del shapes["q"], shapes["k"]
            for name, shape in shapes.items():
                matrix: Matrix | None = getattr(block, name)
                if matrix is None or (matrix.rows, matrix.cols) != shape:
                    found = "not there" if matrix is None else f"{matrix.rows} x {matrix.cols}"
                    raise UsageError(f"Layer {number}: {name} is {found}, not {shape}")
            whole = _whole_norms(block, dim)
            for name, width in (
                ("attention_norm", self.hidden),
                ("mlp_norm", self.hidden),
                ("q_norm", q if whole else dim),
                ("k_norm", kv if whole else dim),
            ):
                norm: np.ndarray | None = getattr(block, name)
                if norm is not None and norm.shape != (width,):
                    raise UsageError(f"Layer {number}: {name} is {list(norm.shape)}, not [{width}]")
        if (self.head.rows, self.head.cols) != (self.vocab, self.hidden) or self.final_norm.shape != (self.hidden,):
            raise UsageError(
                f"The head or the final norm does not fit {self.vocab} tokens and a stream of {self.hidden}"
            )

    def _check_follower(self, number: int, block: Block) -> None:
        leader = block.leader
        assert leader is not None
        between = {later.leader for later in self.blocks[leader + 1 :]} & set(range(leader + 1, number))
        if not 0 <= leader < number or self.blocks[leader].leader is not None or between or block.q or block.k:
            raise UsageError(
                f"Layer {number} cannot take the attention weights of layer {leader}",
                "a layer takes those of the last one before it whose weights are taken, and has no q and k",
            )
        if self.blocks[leader].v.rows != block.v.rows:
            raise UsageError(f"Layer {number} has other heads than layer {leader}, whose attention weights it takes")

    def _check_leaders(self, first: int, last: int, elsewhere: bool) -> None:
        for number, block in enumerate(self.blocks[first:last], first):
            if block.leader is not None and (elsewhere or block.leader < first):
                raise UsageError(
                    f"Layer {number} has no attention weights to take",
                    "attention is computed elsewhere" if elsewhere else "it runs without the layers before it",
                    "Run the layers of a block together, from the model itself",
                )

    @functools.cached_property
    def _struct(self) -> _SkModel:
        blocks = (_SkBlock * len(self.blocks))()
        for number, (struct, block) in enumerate(zip(blocks, self.blocks, strict=True)):
            for name, matrix in block.matrices.items():
                setattr(struct, name, matrix.struct)
            for name in ("attention_norm", "mlp_norm", "q_norm", "k_norm"):
                setattr(struct, name, self._address(getattr(block, name)))
            struct.rotate, struct.window = int(block.rotate), block.window
            struct.leader = number if block.leader is None else block.leader
            struct.whole_norms = int(_whole_norms(block, self.head_dim))
            if block.mixture:
                struct.mixture = ctypes.addressof(self._mixture(block.mixture))
        self._kept.append(blocks)
        scale = self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale
        return _SkModel(
            len(self.blocks), self.hidden, self.heads, self.kv_heads, self.head_dim, self.intermediate, self.vocab,
            self.cosines.shape[1] * 2, len(self.cosines), ACTIVATIONS.index(self.activation),
            self.epsilon, scale, self.embedding_scale, self.residual_scale, self.logit_scale,
            ctypes.addressof(blocks), ctypes.addressof(self.embedding.struct), ctypes.addressof(self.head.struct),
            self._address(self.final_norm), self._address(self.cosines), self._address(self.sines),
        )  # fmt: skip

    def _mixture(self, mixture: Mixture) -> _SkMixture:
        experts = (_SkExpert * len(mixture.everyone))()
        for struct, expert in zip(experts, mixture.everyone, strict=True):
            up, first = (expert.gate, expert.width) if expert.up is None else (expert.up, 0)
            struct.gate, struct.up, struct.down, struct.up_first = (
                expert.gate.struct,
                up.struct,
                expert.down.struct,
                first,
            )
        latents = (_SkExpert * len(mixture.latents))()
        for struct, latent in zip(latents, mixture.latents, strict=True):
            struct.gate, struct.up = latent.gate.struct, latent.up.struct
            if latent.down:
                struct.down = latent.down.struct
        count, choices = len(mixture.experts), mixture.router.rows
        made = _SkMixture(router=mixture.router.struct, experts=ctypes.addressof(experts))
        if mixture.latents:
            made.latents, made.latent_count = ctypes.addressof(latents), len(mixture.latents)
        if mixture.weigher:
            made.weigher = mixture.weigher.struct
        if mixture.shared:
            made.shared = ctypes.addressof(experts[count])
        made.targets = self._address(_int32(mixture.targets or range(choices)), np.int32)
        made.correction = self._address(mixture.correction)
        made.choices, made.count, made.chosen = choices, count, mixture.chosen
        made.scores, made.normalized = SCORES.index(mixture.scores), int(mixture.normalized)
        made.scale = mixture.scale
        self._kept.extend((experts, latents, made))
        return made

    def _address(self, values: np.ndarray | None, dtype: Any = np.float32) -> int | None:
        if values is None:
            return None
        kept = np.ascontiguousarray(values, dtype)
        self._kept.append(kept)
        return int(kept.ctypes.data)

    def _low_rank(self, adapters: Sequence[Adapter | None]) -> Any:
        if not adapters:
            return None
        table = (_Address * len(adapters))()
        for number, adapter in enumerate(adapters):
            if adapter is not None:
                if adapter.layers != len(self.blocks):
                    raise UsageError(
                        f"An adapter for {adapter.layers} layers does not fit a model of {len(self.blocks)}"
                    )
                table[number] = ctypes.addressof(adapter.struct)
        return table


def _whole_norms(block: Block, head_dim: int) -> bool:
    """Whether queries and keys are normed as a whole. Where there is one head of each, both are the same."""
    return any(norm is not None and norm.shape != (head_dim,) for norm in (block.q_norm, block.k_norm))


def allocate(size: int, purpose: str) -> np.ndarray:
    """Fresh memory, in large pages where the system has them."""
    try:
        block = mmap.mmap(-1, max(size, 1))
    except (OSError, ValueError, OverflowError) as error:
        raise DoesNotFit(f"{size} bytes for a {purpose} are not to be had", str(error)) from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        block.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(block, np.uint8, size)


def _worker(model: Llama, attend: Attend, tokens: int, failure: list[BaseException]) -> Any:
    q_shape, kv_shape = (tokens, model.heads, model.head_dim), (tokens, model.kv_heads, model.head_dim)

    def call(layer: int, q: Any, k: Any, v: Any, out: Any) -> None:
        result = np.ctypeslib.as_array(out, q_shape)
        try:
            if failure:
                raise failure[0]
            given = (np.ctypeslib.as_array(p, s) for p, s in ((q, q_shape), (k, kv_shape), (v, kv_shape)))
            result[...] = attend(layer, *given)
        except BaseException as error:  # cannot pass through the native code: it is raised when that has returned
            failure[:1] = [error]
            result[...] = 0

    return _SkAttend(call)


def _early(model: Llama, queries: Queries, tokens: int, failure: list[BaseException]) -> Any:
    shape = (tokens, model.heads, model.head_dim)

    def call(layer: int, q: Any) -> None:
        try:
            if not failure:
                queries(layer, np.ctypeslib.as_array(q, shape))
        except BaseException as error:  # raised by the call of `attend` that follows
            failure[:1] = [error]

    return _SkQueries(call)


def _fits(batch: Batch) -> None:
    arrays = {
        "ids": (batch.ids, (len(batch.ids),)),
        "positions": (batch.positions, (len(batch.ids),)),
        "starts": (batch.starts, (len(batch.contexts) + 1,)),
        "tables": (batch.tables, (len(batch.contexts), batch.tables.shape[-1])),
        "parents": (batch.parents, (len(batch.ids),)),
        "adapters": (batch.adapters, (len(batch.ids),)),
        "contexts": (batch.contexts, (len(batch.contexts),)),
    }
    for name, (array, shape) in arrays.items():
        if array is not None and (array.dtype != np.int32 or array.shape != shape or not array.flags.c_contiguous):
            raise UsageError(
                f"The batch's {name} is {array.dtype} {list(array.shape)}, not contiguous int32 {list(shape)}"
            )


def _beside(whole: Matrix, values: np.ndarray, group: int, memory: Memory) -> Matrix:
    """One half of a low-rank product in the form that suits the matrix it stands beside."""
    rows, cols = values.shape
    if whole.format == "fp32":
        return make("fp32", rows, cols, np.ascontiguousarray(values, np.float32))
    codes, scales = to_int8(values, group)
    return make("int8", rows, cols, codes, group=group, scales=scales, memory=memory)


def _int32(values: Any) -> np.ndarray:
    return np.ascontiguousarray(values, dtype=np.int32)
