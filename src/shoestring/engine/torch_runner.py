"""Any causal model of transformers as a runner: its own forward, with attention over pages, on CPU or CUDA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import psutil
import torch
from torch import nn

from shoestring.core.errors import DoesNotFit, ShoestringError, UsageError
from shoestring.core.shape import context_of
from shoestring.core.text import show_bytes
from shoestring.engine.runner import BLOCK, AttentionWorker, Batch, Facts, keeps_pages
from shoestring.engine.torch_adapters import Adapters
from shoestring.engine.torch_attention import NAME, Attention, Head, Store, Through, flat_slots
from shoestring.models.anatomy import attends, inspect, is_projection
from shoestring.models.folder import ADAPTER_CONFIG, check_adapter, read_json
from shoestring.models.load import Loaded, load, quiet, resolve
from shoestring.models.seal import fulfil
from shoestring.models.streams import side_by_side

_CACHE_TYPES = {
    "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "int8": torch.int8,
    "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32,
}  # fmt: skip


@dataclass
class _Span:
    """The blocks that compute during one call of the model, what enters the first of them, and what left the last."""

    first: int
    last: int
    entering: torch.Tensor | None = None  # [tokens, hidden]; None: what the embeddings give
    left: torch.Tensor | None = None


class TorchRunner:
    """See `Runner`. The model is used as it is, without copies, and given back by `close`.

    Args:
        model: what `models.load` takes, or what it returned.
        dtype, device, trust_remote_code, offline: as for `models.load`.
        cache_dtype: "bf16", "fp16", "fp32", "int8", or "auto" for the model's own.
        threads: of torch, for the whole process; None leaves them as they are.

    Raises:
        UsageError: as `models.load`; a model that is not causal, or whose attention does not pass through transformers'
            attention interface.
    """

    def __init__(
        self,
        model: str | Path | Loaded,
        *,
        dtype: str | torch.dtype = "auto",
        device: str = "cpu",
        cache_dtype: str = "bf16",
        threads: int | None = None,
        trust_remote_code: bool = False,
        offline: bool | None = None,
    ) -> None:
        if cache_dtype not in _CACHE_TYPES and cache_dtype != "auto":
            raise UsageError(f"Unknown cache type {cache_dtype!r}", remedy=f"Use auto, {', '.join(_CACHE_TYPES)}")
        if threads:
            torch.set_num_threads(threads)
        if isinstance(model, Loaded):
            loaded = model
        else:
            path = resolve(model, offline=offline)
            _know_format(path)
            loaded = load(path, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        if loaded.kind != "causal":
            raise UsageError(
                f"{loaded.ref} is a {loaded.kind} model", "the engine continues text", "Use a causal language model"
            )
        if getattr(getattr(loaded.model, "active_peft_config", None), "is_prompt_learning", False):
            raise UsageError(
                f"{loaded.ref} is an adapter that puts virtual tokens before the prompt",
                "the engine has no keys and values for them",
                "`shoestring generate` and `chat` answer with it, through transformers",
            )
        self.model = getattr(loaded.model, "get_base_model", lambda: loaded.model)()
        self._name = type(self.model).__name__
        anatomy = inspect(self.model)
        self._blocks = [block.module for block in anatomy.blocks]
        self._body = self.model.base_model
        self._device = next(self.model.parameters()).device
        self._dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)
        self._pages_dtype = _CACHE_TYPES.get(cache_dtype, self._dtype)
        self._identity: list[Callable[[torch.Tensor], Any]] = []
        self._span: _Span | None = None
        self._attention = Attention(
            {id(part): i for i, block in enumerate(self._blocks) for part in block.modules()}, []
        )
        projections = {
            name: self.model.get_submodule(name)
            for block in anatomy.blocks
            for key, name in block.projections.items()
            if key != "router" and not key.startswith("expert") and is_projection(self.model.get_submodule(name))
        }
        self._adapters = Adapters(projections, self._dtype, self._device)
        self._restore: list[Callable[[], Any]] = []
        try:
            self._take_over()
            heads = self._look()
        except BaseException:
            self.close()
            raise
        self._heads = heads
        self.facts = _facts(self.model, heads, self._pages_dtype, self._dtype, self._attention.windows)

    # ---- the runner ----

    @property
    def attention(self) -> AttentionWorker | None:
        return self._attention.worker

    @attention.setter
    def attention(self, worker: AttentionWorker | None) -> None:
        self._attention.worker = worker

    def reserve(self, blocks: int) -> None:
        if keeps_pages(self.attention):
            self._reserved = blocks
            return self.attention.reserve(blocks)  # type: ignore[union-attr]
        size, why = blocks * self.facts.block_bytes, ""
        if self._device.type == "cpu" and size > (free := psutil.virtual_memory().available):
            why = f"{show_bytes(free)} of memory are free"
        attention = self._attention
        make = partial(Store, blocks, dtype=self._pages_dtype, device=self._device)
        try:
            if not why:
                attention.stores = [(make(h.kv_heads, h.key_dim), make(h.kv_heads, h.value_dim)) for h in self._heads]
                if attention.windows:
                    attention.positions = torch.zeros(blocks, BLOCK, dtype=torch.int32, device=self._device)
        except (RuntimeError, MemoryError) as error:
            attention.stores = []
            why = str(error).splitlines()[0][:200]
        if why:
            raise DoesNotFit(
                f"{show_bytes(size)} for keys and values are not to be had",
                why,
                "Give less memory to the cache, or a shorter context",
            )
        self._reserved = blocks

    def run(self, batch: Batch, first: int = 0, last: int | None = None, hidden: Any = None) -> torch.Tensor:
        last = self.facts.layers if last is None else last
        self._check(batch, first, last, hidden)
        if hidden is not None and first == last:
            return hidden
        span = _Span(first, last, hidden)
        self._attention.begin(batch, self._device)
        self._adapters.use(batch)
        streams = 1 if hidden is None else max(1, len(hidden) // max(1, batch.tokens))
        ids, positions = (
            torch.from_numpy(np.tile(a, streams)).to(self._device, torch.long)[None]
            for a in (batch.ids, batch.positions)
        )
        with side_by_side(batch.tokens) if streams > 1 else nullcontext():
            self._call(self._body, ids, positions, span)
        assert span.left is not None
        return span.left

    def logits(self, hidden: Any, rows: np.ndarray) -> np.ndarray:
        # The whole model with every block passed over: its own code normalises, scales and caps.
        return self._after(self.model, hidden, rows).logits[0].float().cpu().numpy()

    def normed(self, hidden: Any, rows: np.ndarray) -> np.ndarray:
        return self._after(self._body, hidden, rows)[0][0].float().cpu().numpy()

    @torch.inference_mode()
    def head(self, normed: np.ndarray) -> np.ndarray:
        module = self.model.get_output_embeddings()
        like = next(module.parameters())
        some = torch.from_numpy(np.ascontiguousarray(normed, np.float32))
        dtype = like.dtype if like.is_floating_point() else torch.float32
        return module(some.to(self._device, dtype)).float().cpu().numpy()

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        self._check_blocks([block for pair in pairs for block in pair])
        if not pairs:
            return
        if keeps_pages(self.attention):
            return self.attention.copy_blocks(pairs)  # type: ignore[union-attr]
        source, target = torch.tensor(pairs, device=self._device).T
        for part in self._attention.parts():
            part[target] = part[source]

    def move_slots(self, table: Sequence[int], moves: Sequence[tuple[int, int]]) -> None:
        self._check_blocks(list(table))
        ends = [slot for move in moves for slot in move]
        if ends and not 0 <= min(ends) <= max(ends) < len(table) * BLOCK:
            raise UsageError(f"Slots {min(ends)} to {max(ends)} are outside a table of {len(table)} blocks")
        if keeps_pages(self.attention):
            return self.attention.move_slots(table, moves)  # type: ignore[union-attr]
        flat = flat_slots(table, ends)
        for source, target in zip(flat[::2], flat[1::2]):
            for part in self._attention.parts():
                part.flatten(0, 1)[target] = part.flatten(0, 1)[source]

    def add_adapter(self, folder: str) -> int:
        return self._adapters.add(Path(folder))

    def drop_adapter(self, number: int) -> None:
        self._adapters.drop(number)

    def to_host(self, hidden: Any) -> np.ndarray:
        return hidden.float().cpu().numpy()

    def from_host(self, hidden: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.array(hidden, np.float32)).to(self._device, self._dtype)

    def close(self) -> None:
        """Give the model back as it was: its attention, its blocks, no adapters."""
        self._adapters.close()
        self._attention.stores = []
        while self._restore:
            self._restore.pop()()

    # ---- the model's own forward, some blocks of it ----

    def _take_over(self) -> None:
        before = self.model.config._attn_implementation
        training = self.model.training
        self.model.eval()
        with quiet():
            self.model.set_attn_implementation(NAME)
        self._restore += [lambda: self.model.set_attn_implementation(before), lambda: self.model.train(training)]
        if self.model.config._attn_implementation != NAME:
            self._refuse("its attention does not pass through transformers' attention interface")
        if getattr(self.model.config, "output_router_logits", False):
            # They balance a mixture in training; here blocks may be left out, and there would be none.
            self.model.config.output_router_logits = False
            self._restore.append(lambda: setattr(self.model.config, "output_router_logits", True))
        for index, block in enumerate(self._blocks):
            own = vars(block).get("forward")
            block.forward = self._passing(index, block.forward)
            self._restore.append(partial(_put_back, block, own))

    def _passing(self, index: int, plain: Callable[..., Any]) -> Callable[..., Any]:
        """A block's forward that computes only when the span holds it, and hands the residual stream on otherwise."""

        def forward(*inputs: Any, **named: Any) -> Any:
            span = self._span
            if span is None:
                return plain(*inputs, **named)
            x = inputs[0] if inputs else named["hidden_states"]
            if span.entering is not None and index == min(span.first, len(self._blocks) - 1):
                # The stream enters here and not with the embeddings: some models add positions to those.
                x = span.entering[None]
                inputs, named = ((x, *inputs[1:]), named) if inputs else (inputs, {**named, "hidden_states": x})
            if span.last == 0 and index == 0:
                span.left = x[0]
            if not span.first <= index < span.last:
                return self._identity[index](x)
            out = plain(*inputs, **named)
            if index == span.last - 1:
                span.left = (out[0] if isinstance(out, tuple) else out)[0]
            if len(self._identity) == index:
                size = len(out) if isinstance(out, tuple) else 0
                self._identity.append((lambda x: (x, *[None] * (size - 1))) if size else lambda x: x)
            return out

        return forward

    def _call(self, part: nn.Module, ids: torch.Tensor, positions: torch.Tensor, span: _Span) -> Any:
        self._span = span
        try:
            with torch.inference_mode(), self._attention.at_work():
                return part(input_ids=ids, position_ids=positions, past_key_values=Through(), use_cache=False)
        finally:
            self._span = None

    def _after(self, part: nn.Module, hidden: torch.Tensor, rows: np.ndarray) -> Any:
        rows = np.asarray(rows, np.int64)
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(hidden):
            raise UsageError(f"Rows {rows.min()} to {rows.max()} are outside {len(hidden)} hidden states")
        some = hidden[torch.from_numpy(rows).to(self._device)]
        end = self.facts.layers
        zeros = torch.zeros(1, len(rows), dtype=torch.long, device=self._device)
        return self._call(part, zeros, zeros, _Span(end, end, some))

    def _look(self) -> list[Head]:
        """Pass one token twice at one position, to see that all attention comes here, how large keys and values are,
        and that nothing else tells the two apart."""
        zeros, span = torch.zeros(1, 2, dtype=torch.long, device=self._device), _Span(0, len(self._blocks))
        count = span.last
        self._attention.batch_pass = None
        try:
            self._call(self._body, zeros, zeros, span)
        except KeyError as error:
            self._refuse(f"it has attention outside its blocks ({error})")
        except ShoestringError:
            raise
        except Exception as error:  # whatever the model's own code does
            self._refuse(f"it cannot be called with positions and a cache ({str(error)[:200]})")
        left = span.left
        if left is None or left.ndim != 2 or len(self._identity) != count:
            self._refuse("its blocks do not hand one stream of hidden states on, each to the next")
        first, second = left.float()
        # Equal rows may be added up in another order; what a position does is far larger.
        if (first - second).abs().max() > torch.finfo(self._dtype).eps ** 0.5 * first.abs().max():
            self._refuse("it counts positions by itself, or mixes tokens outside its attention")
        # A block that was cut down to its feed-forward remembers nothing.
        seen = {i: Head(0, 0, 0) for i, block in enumerate(self._blocks) if not attends(block)} | self._attention.seen
        without = [i for i in range(count) if i not in seen]
        if without:
            self._refuse(f"layers {without[:5]} remember in another way than keys and values")
        return [seen[i] for i in range(count)]

    def _refuse(self, why: str) -> NoReturn:
        raise UsageError(f"{self._name} cannot run in the engine", why, "Use another model, or `transformers` itself")

    # ---- checks ----

    def _check(self, batch: Batch, first: int, last: int, hidden: torch.Tensor | None) -> None:
        if not (self._attention.stores or keeps_pages(self.attention)):
            raise ShoestringError("The cache has not been made", remedy="Call `reserve` first")
        facts = self.facts
        if not 0 <= first <= last <= facts.layers:
            raise UsageError(f"Layers {first} to {last} are outside the model's {facts.layers}")
        if hidden is None and first > 0:
            raise UsageError(f"Layer {first} needs the hidden states that enter it")
        if hidden is not None:
            streams = len(hidden) // max(1, batch.tokens)
            if tuple(hidden.shape) != (max(1, streams) * batch.tokens, facts.hidden):
                raise UsageError(f"hidden is {tuple(hidden.shape)}, the batch needs {(batch.tokens, facts.hidden)}")
            if streams > 1 and (self.attention or batch.adapters is not None):
                raise UsageError("Streams side by side go with neither attention elsewhere nor adapters in a batch")
        _check_batch(batch, self._reserved, facts, self._adapters.numbers)

    def _check_blocks(self, blocks: Sequence[int]) -> None:
        if blocks and not 0 <= min(blocks) <= max(blocks) < self._reserved:
            raise UsageError(f"Blocks {min(blocks)} to {max(blocks)} are outside the {self._reserved} of the cache")


def _check_batch(batch: Batch, blocks: int, facts: Facts, adapters: set[int]) -> None:
    """Raises UsageError for anything that would read or write where it must not."""
    counts, totals = np.diff(batch.starts), batch.contexts + np.diff(batch.starts)
    if (
        len(batch.starts) != batch.sequences + 1
        or len(batch.tables) != batch.sequences
        or len(batch.positions) != batch.tokens
        or batch.starts[0] != 0
        or batch.starts[-1] != batch.tokens
        or counts.min(initial=0) < 0
        or batch.contexts.min(initial=0) < 0
    ):
        raise UsageError("The arrays of the batch do not belong together")
    if not batch.tokens:
        raise UsageError("The batch has no tokens")
    _check_range("Token id", batch.ids, facts.vocab)
    _check_range("Position", batch.positions, facts.context)
    _check_range("Slot", totals, batch.tables.shape[1] * BLOCK + 1)
    for s in range(batch.sequences):
        _check_range("Block", batch.tables[s, : -(-int(totals[s]) // BLOCK)], blocks)
        if batch.parents is not None:
            mine = batch.parents[batch.starts[s] : batch.starts[s + 1]]
            if mine.size and (mine.min() < -1 or (mine >= np.arange(len(mine))).any()):
                raise UsageError("A token's parent must come before it in its own chunk")
    if batch.adapters is not None:
        unknown = set(batch.adapters.tolist()) - adapters - {-1}
        if unknown:
            raise UsageError(f"There is no adapter with the number {min(unknown)}", remedy="Add it first")


def _check_range(what: str, values: np.ndarray, end: int) -> None:
    if values.size and not 0 <= values.min() <= values.max() < end:
        wrong = values.min() if values.min() < 0 else values.max()
        raise UsageError(f"{what} {wrong} is outside 0 to {end - 1}")


def _know_format(path: Path) -> None:
    """Make transformers know the format and the architecture of a folder, or of its base, when they are ours."""
    if (path / ADAPTER_CONFIG).is_file() and not (path / "config.json").is_file():
        return _know_format(resolve(str(check_adapter(path).get("base_model_name_or_path") or "")))
    file = path / "config.json"
    if file.is_file():
        fulfil(read_json(file))


def _put_back(block: nn.Module, forward: Any) -> None:
    if forward is None:
        del block.forward
    else:
        block.forward = forward


def _facts(model: Any, heads: list[Head], pages: torch.dtype, dtype: torch.dtype, windows: bool) -> Facts:
    config = model.config.get_text_config(decoder=True)
    largest = max(heads, key=lambda head: head.kv_heads)
    scale = 4 if pages == torch.int8 else 0
    widths = [(h.kv_heads, dim) for h in heads for dim in (h.key_dim, h.value_dim) if dim]
    token = sum(count * (dim * pages.itemsize + scale) for count, dim in widths)
    token += 4 if windows else 0
    method = getattr(getattr(model.config, "quantization_config", None), "quant_method", None)
    packed = str(getattr(method, "value", method)).removeprefix("shoestring_") if method else ""
    name = str(dtype).removeprefix("torch.")
    generation = getattr(model, "generation_config", None)
    eos = getattr(generation, "eos_token_id", None)
    eos = getattr(config, "eos_token_id", None) if eos is None else eos
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(model)}
    embedding = model.get_input_embeddings()
    return Facts(
        family=str(config.model_type),
        layers=len(heads),
        hidden=int(getattr(config, "hidden_size", 0) or embedding.embedding_dim),
        vocab=int(getattr(config, "vocab_size", 0) or embedding.num_embeddings),
        heads=int(getattr(config, "num_attention_heads", 0) or largest.kv_heads),
        kv_heads=largest.kv_heads,
        head_dim=largest.key_dim,
        context=_context(config),
        weight_bytes=sum(storages.values()),
        block_bytes=BLOCK * token,
        precision=f"{packed} + {name}" if packed else name,
        backend="torch",
        extra={"cache": next(word for word, made in _CACHE_TYPES.items() if made == pages)},
        eos=() if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (int(eos),),
    )


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def _context(config: Any) -> int:
    length = context_of(config) or 1 << 20
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    for kind in kinds:
        if kind.get("rope_type") in ("dynamic", "longrope"):
            # Beyond its first length such a model turns all positions otherwise, those in the cache and those of other
            # requests included.
            length = min(length, kind.get("original_max_position_embeddings") or length)
    return int(length)
