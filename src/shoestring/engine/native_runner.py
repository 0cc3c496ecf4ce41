"""The runner of Llama-like models on the native kernels: weights as they are stored, no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from shoestring.core.errors import DoesNotFit, UsageError, nearest
from shoestring.core.text import show_bytes
from shoestring.engine.memory import free_memory
from shoestring.engine.runner import BLOCK, AttentionWorker, Batch, Facts, keeps_pages, within
from shoestring.kernels.layout import ITEM, Layout, parse
from shoestring.kernels.llama import CACHE_TYPES, Adapter, Attend, Block, Cache, Expert, Latent, Llama, Mixture, Queries
from shoestring.kernels.matrix import Matrix, Memory, Packing, make
from shoestring.models.folder import end_tokens
from shoestring.models.llama_like import PROJECTIONS, LlamaLike, describe, packing
from shoestring.models.mixtures import CORRECTION
from shoestring.models.stated import NoKernels, NotNative
from shoestring.models.tensors import Source, Stored, aligned, bfloat16, floats, open_source

_DTYPES = {"auto": "", "bf16": "bf16", "bfloat16": "bf16", "fp32": "fp32", "float32": "fp32"}
_GGUF_FORMATS = {"Q8_0": "q8_0", "Q4_0": "q4_0", "Q4_1": "q4_1"}
_TOGETHER = 16 << 20  # bytes that are packed in one call: for so long they are there twice
_FIRST_POSITIONS = 4096  # rotary tables begin with so many and grow when a sequence does


class NativeRunner:
    """Runs a folder or a GGUF file of the families of `models.llama_like` on the CPU. See `Runner` for the methods.

    float32 and bfloat16 matrices are read from the mapped file; float16 ones become float32, which holds them exactly.
    Packed ones (GGUF's Q8_0, Q4_0, Q4_1; 8 and 4 bits in groups) are laid out for the kernels once and stay packed.

    Args:
        model: a model folder, a GGUF file, or either as `open_source` gives it.
        dtype: "auto" computes on float matrices as they are stored; "bf16" or "fp32" changes them first.
        threads: at most; None is one for each core that this process may use.
        span: the layers first..last-1 to load (None: to the end), where the others run elsewhere.

    Raises:
        NotNative: a family, a setting or a weight format that the kernels do not compute.
        UsageError: a file that is not sound, or weights that do not belong to the configuration.
        DoesNotFit: no memory for the weights.
    """

    attention: AttentionWorker | None = None

    def __init__(
        self,
        model: str | Path | Source,
        *,
        dtype: str = "auto",
        cache_dtype: str = "bf16",
        threads: int | None = None,
        trust_remote_code: bool = False,
        span: tuple[int, int | None] | None = None,
    ) -> None:
        if dtype not in _DTYPES:
            raise NotNative(f"The native runner does not compute in {dtype}", f"it knows {', '.join(_DTYPES)}")
        if cache_dtype not in CACHE_TYPES:
            raise UsageError(f"Unknown cache type {cache_dtype!r}", remedy=nearest(cache_dtype, CACHE_TYPES))
        source = model if isinstance(model, Source) else open_source(Path(model), trust_remote_code=trust_remote_code)
        self.threads = threads or _cores()
        self.model = shape = describe(source, mixtures=True)
        self._partial = span is not None
        loader = _Loader(source, shape, _DTYPES[dtype], self.threads, within(span or (0, None), shape.layers))
        self._llama = loader.load()
        self._cache_type = cache_dtype
        self._cache: Cache | None = None
        self._head: Llama | None = None
        self._adapters: list[Adapter | None] = []
        self.facts = Facts(
            family=shape.family,
            layers=loader.span[1] - loader.span[0],
            hidden=shape.hidden,
            vocab=shape.vocab,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            context=shape.context,
            weight_bytes=loader.bytes,
            block_bytes=sum(self._llama.page_bytes(cache_dtype)),
            precision=" + ".join(loader.formats),
            backend="native",
            eos=_ends(source),
            extra={"cache": cache_dtype, "threads": self.threads},
        )

    def reserve(self, blocks: int) -> None:
        if keeps_pages(self.attention):
            return self.attention.reserve(blocks)  # type: ignore[union-attr]
        size, free = blocks * self.facts.block_bytes, free_memory()
        if size > free:
            raise DoesNotFit(
                f"{show_bytes(size)} for keys and values are not to be had",
                f"{show_bytes(free)} of memory are free",
                "Give less memory to the cache, or a shorter context",
            )
        self._cache = self._llama.cache(blocks, self._cache_type)

    def run(self, batch: Batch, first: int = 0, last: int | None = None, hidden: Any = None) -> np.ndarray:
        if batch.tokens:
            self._reach(int(batch.positions.max()) + 1)
        attend, queries = self._elsewhere(batch) if self.attention else (None, None)
        return self._llama.run(
            self._cache, batch, first=first, last=last, hidden=hidden, adapters=self._adapters, attend=attend,
            queries=queries, threads=self.threads,
        )  # fmt: skip

    @property
    def weights(self) -> Llama:
        """The matrices as the kernels read them, for those who compute with the same memory otherwise.

        Raises:
            AttributeError: layers share attention weights, or have experts: that is more than their matrices say.
        """
        if self.model.shares or self.model.mixture:
            raise AttributeError("weights")
        return self._llama

    def logits(self, hidden: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return self._llama.logits(hidden, rows, self.threads)

    def normed(self, hidden: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return self._llama.normed(hidden, rows, self.threads)

    def head(self, normed: np.ndarray) -> np.ndarray:
        # The kernel norms and multiplies in one; under a weight of ones the norm is undone by its own factor.
        if self._head is None or self._head.blocks is not self._llama.blocks:
            self._head = replace(self._llama, final_norm=np.ones_like(self._llama.final_norm))
        normed = np.ascontiguousarray(normed, np.float32)
        factor = np.sqrt(np.square(normed).mean(-1, keepdims=True) + self.model.epsilon)
        return self._head.logits(normed, np.arange(len(normed), dtype=np.int32), self.threads) * factor

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        if keeps_pages(self.attention):
            return self.attention.copy_blocks(pairs)  # type: ignore[union-attr]
        self._pages().copy(pairs)

    def move_slots(self, table: Sequence[int], moves: Sequence[tuple[int, int]]) -> None:
        if keeps_pages(self.attention):
            return self.attention.move_slots(table, moves)  # type: ignore[union-attr]
        self._llama.move(self._pages(), table, moves)

    def add_adapter(self, folder: str) -> int:
        if self._partial:
            raise UsageError(f"{folder} cannot be used here", "some layers of the model run elsewhere")
        from shoestring.engine.adapter_forms import plain
        from shoestring.engine.low_rank import read_adapter

        with plain(Path(folder)) as found:
            adapter = self._llama.adapter(read_adapter(found, self.model))
        number = self._adapters.index(None) if None in self._adapters else len(self._adapters)
        self._adapters[number : number + 1] = [adapter]
        return number

    def drop_adapter(self, number: int) -> None:
        if not 0 <= number < len(self._adapters) or self._adapters[number] is None:
            raise UsageError(f"There is no adapter with the number {number}", remedy="Add it first")
        self._adapters[number] = None

    def to_host(self, hidden: np.ndarray) -> np.ndarray:
        return hidden

    def from_host(self, hidden: np.ndarray) -> np.ndarray:
        return np.array(hidden, np.float32, order="C")  # a copy: `run` writes into what it is given

    def close(self) -> None:
        self._cache = None
        self._adapters, self._head = [], None
        del self._llama

    def _pages(self) -> Cache:
        if self._cache is None:
            raise UsageError("The runner has no cache yet", remedy="Call reserve(blocks) first")
        return self._cache

    def _reach(self, positions: int) -> None:
        """Make the rotary tables hold so many positions, up to the model's context."""
        have = len(self._llama.cosines)
        if have < positions <= self.model.context:
            cosines, sines = self.model.tables(min(max(positions, 2 * have), self.model.context))
            self._llama = replace(self._llama, cosines=cosines, sines=sines)

    def _elsewhere(self, batch: Batch) -> tuple[Attend, Queries | None]:
        worker = self.attention
        assert worker is not None
        if self.model.layer_kv_heads:
            raise UsageError(
                "Attention cannot be computed elsewhere for a model whose layers have unequally many heads",
                "a worker is not told how many it gets",
            )
        if self.model.shares:
            raise UsageError(
                "Attention cannot be computed elsewhere for a model whose layers share attention weights",
                "a worker keeps none for other layers",
            )
        if any(self.model.windows):
            raise UsageError(
                "Attention cannot be computed elsewhere for a model with sliding windows",
                "a worker is not told how far back a layer sees",
            )
        # Workers divide scores by the root of head_dim, as most models do; what a model does otherwise goes into q.
        factor = np.float32(self.model.attention_scale * self.model.head_dim**0.5)
        begin = getattr(worker, "begin", None)

        def scaled(q: np.ndarray) -> np.ndarray:
            return q if factor == 1 else q * factor

        return (
            lambda layer, q, k, v: worker(layer, scaled(q), k, v, batch),
            (lambda layer, q: begin(layer, scaled(q), batch)) if begin else None,
        )


class _Loader:
    """Turns stored tensors into what the kernels read, some at a time, so that no more than those are there twice."""

    def __init__(self, source: Source, model: LlamaLike, dtype: str, threads: int, span: tuple[int, int]) -> None:
        self.source, self.tensors, self.model = source, source.tensors, model
        self.dtype, self.threads, self.span = dtype, threads, span
        self.memory, self.packing = Memory(), Packing(threads)
        self.read: list[str] = []  # tensors whose pages are given back when they are packed
        self.bytes = 0
        self.formats: dict[str, None] = {}
        self.packing_of = packing(source)

    def load(self) -> Llama:
        model = self.model
        away = {layer for layer in range(model.layers) if not self.span[0] <= layer < self.span[1]}
        skipped = {model.name(role, layer) for layer in away for role in PROJECTIONS}
        if model.mixture:
            for layer in away:
                place = model.name("experts", layer)
                skipped |= {f"{place}.{name}".removesuffix(".weight") for name in model.mixture.names(layer)}
        # What is read once from end to end; a cold disk is slow to notice that by itself.
        self.tensors.ahead(
            f"{name}.weight"
            for name, spec in self.packing_of.items()
            if name not in skipped
            and not parse(spec.partition("+")[0]).used_as_stored
            and f"{name}.weight" in self.tensors
        )
        embedding = self.matrix("embedding")
        head = embedding if model.tied else self.matrix("head")
        blocks = tuple(self.block(layer) for layer in range(*self.span))
        cosines, sines = model.tables(min(model.context, _FIRST_POSITIONS))
        self.pack()
        return Llama(
            blocks=blocks,
            embedding=embedding,
            head=head,
            final_norm=self.norm("final_norm"),
            cosines=cosines,
            sines=sines,
            heads=model.heads,
            kv_heads=model.kv_heads,
            epsilon=model.epsilon,
            activation=model.activation,
            attention_scale=model.attention_scale,
            embedding_scale=model.embedding_scale,
            residual_scale=model.residual_scale,
            logit_scale=model.logit_scale,
        )

    def pack(self) -> None:
        self.packing.run()
        for name in self.read:
            self.tensors.release(name)
        self.read = []

    def block(self, layer: int) -> Block:
        model = self.model
        parts: dict[str, Any] = dict.fromkeys(PROJECTIONS)
        for role in model.block_roles(layer):
            if role in PROJECTIONS:
                parts[role] = self.matrix(role, layer)
            elif role.endswith("norm"):
                parts[role] = self.norm(role, layer)
        if model.mixes(layer):
            parts["mixture"] = self.mixture(layer)
        leader = None if model.leads(layer) else model.leaders[layer] - self.span[0]
        if leader is not None and leader < 0:
            raise UsageError(
                f"Layer {layer} has no attention weights to take",
                f"those of layer {model.leaders[layer]} are computed elsewhere",
                "Begin the span at a layer with attention weights of its own",
            )
        return Block(**parts, rotate=model.rotates[layer], window=model.windows[layer], leader=leader)

    def norm(self, role: str, layer: int = 0) -> np.ndarray:
        values = self.finite(self.model.name(role, layer) + ".weight", self.model.shape_of(role, layer))
        self.bytes += values.nbytes
        return values

    def finite(self, name: str, dims: tuple[int, ...]) -> np.ndarray:
        """A tensor of few numbers, float32."""
        stored = self.tensors[name]
        self.check(stored, dims)
        values = floats(stored).copy()
        if not np.isfinite(values).all():
            raise UsageError(f"{stored.name} of {self.source.path} is not finite", remedy="Get an intact model")
        return values

    def mixture(self, layer: int) -> Mixture:
        model, router = self.model, self.model.name("router", layer)
        what = model.mixture
        assert what is not None
        if router not in self.packing_of:
            # Else it would choose experts that no number speaks for.
            self.finite(f"{router}.weight", model.shape_of("router", layer))
        correction = None
        if what.corrected:
            correction = self.finite(f"{router}.{CORRECTION}", (len(what.targets[layer]),))
            self.bytes += correction.nbytes
        shared = [self.matrix(f"shared_{role}", layer) for role in ("gate", "up", "down") if what.shared]
        experts, latents = self.latent(layer) if what.latent else (tuple(self.experts(layer)), ())
        return Mixture(
            self.matrix("router", layer),
            experts,
            what.chosen,
            what.targets[layer],
            what.scores,
            what.normalized,
            what.scale,
            correction,
            Expert(*shared) if shared else None,
            self.matrix("weigher", layer) if what.weighed else None,
            latents,
        )

    def latent(self, layer: int) -> tuple[tuple[Expert, ...], tuple[Latent, ...]]:
        """The experts of a layer, and the spaces that they share."""
        what = self.model.mixture
        assert what is not None and what.latent is not None
        place, count = self.model.name("experts", layer), what.count(layer)
        found: dict[str, list[Iterator[Matrix]]] = {"expert": [], "latent": []}
        for role, name in what.latent.names.items():
            kind = role.partition("_")[0]
            many = count if kind == "expert" else count // what.latent.group
            found[kind].append(self.stacked(f"{place}.{name}", many, *self.model.shape_of(role, layer)))
        experts = tuple(Expert(*matrices) for matrices in zip(*found["expert"], strict=True))
        return experts, tuple(Latent(*matrices) for matrices in zip(*found["latent"], strict=True))

    def experts(self, layer: int) -> Iterator[Expert]:
        model, place = self.model, self.model.name("experts", layer)
        what = model.mixture
        assert what is not None
        parts, count = what.parts[layer], what.count(layer)
        if len(parts) == 3:
            shapes = [model.shape_of(f"expert_{role}", layer) for role in ("gate", "up", "down")]
            for number in range(count):
                names = (f"{place}.{number}.{part}" for part in parts)
                yield Expert(*(self.made(name, shape) for name, shape in zip(names, shapes, strict=True)))
            return
        (gate_up, down), wide = (f"{place}.{part}" for part in parts), model.shape_of("expert_gate_up", layer)
        read = self.together if what.packed(layer) else self.stacked
        downs = read(down, count, *model.shape_of("expert_down", layer))
        if what.packed(layer) and not self.layout_of(gate_up).says_its_size:
            # The kernels' tiles of rows need not begin where those of up do.
            halves = self.together(gate_up, 2 * count, wide[0] // 2, wide[1])
            yield from (Expert(gate, up, down) for gate, up, down in zip(halves, halves, downs, strict=True))
        else:
            both = zip(read(gate_up, count, *wide), downs, strict=True)
            yield from (Expert(gate_up, None, down) for gate_up, down in both)

    def stacked(self, name: str, count: int, rows: int, cols: int) -> Iterator[Matrix]:
        """Matrices of one float tensor."""
        whole = self.tensors[name]
        self.check(whole, (count, rows, cols))
        size = len(whole.data) // count
        for number in range(count):
            part = whole.data[number * size : (number + 1) * size]
            yield self.counted(self.plain(Stored(name, whole.dtype, (rows, cols), part), rows, cols, None, None))

    def together(self, name: str, count: int, rows: int, cols: int) -> Iterator[Matrix]:
        """Matrices of one packed module: below each other, or end to end where the format says its size."""
        layout = self.layout_of(name)
        given: dict[str, Any] = {"memory": self.memory, "packing": self.packing, "threads": self.threads}
        if layout.says_its_size:
            yield from (self.counted(layout.matrix(part, rows, cols, **given)) for part in self.end_to_end(name, count))
            return
        arrays = self.arrays(name, layout, count * rows, cols)
        each = {leaf: array.reshape(count, -1) for leaf, array in arrays.items()}
        for number in range(count):
            one = {leaf: array[number] for leaf, array in each.items()}
            yield self.counted(layout.matrix(one, rows, cols, **given))
        self.read += [f"{name}.{leaf}" for leaf in arrays]

    def end_to_end(self, name: str, count: int) -> Iterator[dict[str, np.ndarray]]:
        """The bytes of each matrix; `starts` says where it begins."""
        whole, starts = self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.starts")
        layout = self.layout_of(name)
        if starts is None or starts.dtype != "I64" or whole.dtype != "U8":
            found = f"starts of {starts.dtype}" if starts else "no starts"
            raise UsageError(f"{name} of {self.source.path} is stored as {whole.dtype} with {found}")
        self.check(starts, (count + 1,))
        ends = aligned(starts.data, 8).view(np.int64)
        if ends[0] != 0 or ends[-1] != len(whole.data) or (np.diff(ends) < 0).any():
            raise UsageError(
                f"{starts.name} of {self.source.path} does not divide {len(whole.data)} bytes of {layout}",
                remedy="Check that configuration and weights belong together",
            )
        self.bytes += starts.data.nbytes
        yield from ({"weight": whole.data[begin:end]} for begin, end in zip(ends, ends[1:]))
        if not layout.used_as_stored:
            self.read.append(whole.name)

    def matrix(self, role: str, layer: int = 0) -> Matrix:
        name = self.model.name(role, layer)
        return self.made(name, self.model.shape_of(role, layer), self.order(role), role in self.model.biased)

    def made(self, name: str, shape: tuple[int, ...], order: np.ndarray | None = None, biased: bool = False) -> Matrix:
        """The matrix of a module."""
        (rows, cols), bias = shape, None
        if biased or f"{name}.bias" in self.tensors:
            stored = self.tensors[name + ".bias"]
            self.check(stored, (rows,))
            bias = floats(stored)
            bias = bias if order is None else bias[order]
        stored = self.tensors[name + ".weight"]
        if name in self.packing_of:
            made = self.packed(name, rows, cols, bias)
        else:
            self.check(stored, (rows, cols))
            made = self.plain(stored, rows, cols, order, bias)
        return self.counted(made)

    def counted(self, made: Matrix) -> Matrix:
        self.bytes += made.size
        self.formats[made.format] = None
        if self.packing.bytes > _TOGETHER:
            self.pack()
        return made

    def plain(self, stored: Stored, rows: int, cols: int, order: np.ndarray | None, bias: np.ndarray | None) -> Matrix:
        given: dict[str, Any] = {"order": order, "bias": bias, "memory": self.memory, "packing": self.packing}
        if stored.dtype in _GGUF_FORMATS:
            made = make(_GGUF_FORMATS[stored.dtype], rows, cols, stored.data, **given)
        elif stored.dtype in ("F32", "F16", "BF16"):
            # float16 has no kernels: as float32 it loses nothing.
            wanted = self.dtype or ("bf16" if stored.dtype == "BF16" else "fp32")
            if wanted == "fp32":
                values = floats(stored)
            elif stored.dtype == "BF16":
                values = aligned(stored.data, 2)
            else:
                values = bfloat16(floats(stored))
            made = make(wanted, rows, cols, values, **given)
            if not np.shares_memory(made.data, stored.data):
                self.tensors.release(stored.name)
            return made
        else:
            raise NoKernels(f"The native runner has no kernels for {stored.dtype}, as {stored.name} is stored")
        self.read.append(stored.name)
        return made

    def packed(self, name: str, rows: int, cols: int, bias: np.ndarray | None) -> Matrix:
        """A matrix of one of the formats of `kernels.layout`, as `docs/quantized-format.md` has them."""
        layout = self.layout_of(name)
        arrays = self.arrays(name, layout, rows, cols)
        if not layout.used_as_stored:
            self.read += [f"{name}.{part}" for part in arrays]
        return layout.matrix(arrays, rows, cols, bias, memory=self.memory, packing=self.packing, threads=self.threads)

    def layout_of(self, name: str) -> Layout:
        """How a packed module lies in the file."""
        return parse(self.packing_of.get(name, "").partition("+")[0])

    def arrays(self, name: str, layout: Layout, rows: int, cols: int) -> dict[str, np.ndarray]:
        """The bytes of each tensor of a packed module that is [rows, cols]."""
        arrays = {}
        for part, (dtype, dims) in layout.tensors(rows, cols).items():
            stored = self.tensors.get(f"{name}.{part}")
            if stored is None or stored.dtype != dtype or stored.dims != dims:
                found = "is missing" if stored is None else f"is {stored.dtype} {stored.dims}"
                raise UsageError(
                    f"{name}.{part} of {self.source.path} {found}",
                    f"{layout} of a weight of {rows} x {cols} has {dtype} {dims} there",
                    "Check that configuration and weights belong together",
                )
            arrays[part] = aligned(stored.data, ITEM[dtype])
        return arrays

    def order(self, role: str) -> np.ndarray | None:
        """Stored row of each row: GGUF interleaves the two halves of a head that rotate together."""
        if not self.model.interleaved or role not in ("q", "k"):
            return None
        rows = self.model.shape_of(role)[0]
        return np.arange(rows).reshape(-1, self.model.head_dim // 2, 2).swapaxes(1, 2).reshape(-1)

    def check(self, stored: Stored, dims: tuple[int, ...]) -> None:
        if stored.dims != dims:
            raise UsageError(
                f"{stored.name} of {self.source.path} has the dimensions {stored.dims}",
                f"its configuration says {dims}",
                "Check that configuration and weights belong together",
            )


def _ends(source: Source) -> tuple[int, ...]:
    if not source.gguf:
        return end_tokens(source.path)
    from shoestring.models.gguf_tokenizer import end_tokens as gguf_ends

    return gguf_ends(source.values)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


assert BLOCK == 16, "the kernels' pages have 16 tokens"
