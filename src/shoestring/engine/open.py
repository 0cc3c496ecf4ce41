"""Open a model for the engine: the native runner where it can run it, else the torch runner, and say which and why."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from shoestring.core.errors import ShoestringError, UsageError, nearest
from shoestring.engine import tokenizer as tokenizers
from shoestring.engine.adapter_forms import NotBeside, make_known
from shoestring.engine.runner import Runner, within
from shoestring.engine.tokenizer import Tokenizer
from shoestring.models.folder import ADAPTER_CONFIG, check_adapter
from shoestring.models.load import DEFAULT, load, locate, resolve
from shoestring.models.stated import NoKernels, NotNative
from shoestring.models.tensors import open_source

RUNNERS = ("auto", "native", "torch")
T = TypeVar("T")


@dataclass(frozen=True)
class Opened:
    """A model ready to answer.

    Attributes:
        name: what clients call it; never a path.
        path: the folder or GGUF file that was opened.
        adapter: number of the adapter that `ref` named, which every request without another one uses; -1 for none.
        note: a sentence for the user on the choice of the runner; empty when there is nothing to say.
    """

    runner: Runner
    tokenizer: Tokenizer
    name: str
    path: Path
    adapter: int = -1
    note: str = ""


def open_model(
    ref: str | Path = DEFAULT,
    *,
    runner: str = "auto",
    dtype: str = "auto",
    cache_dtype: str = "bf16",
    threads: int | None = None,
    offline: bool | None = None,
    trust_remote_code: bool = False,
    loader: Callable[..., Any] | None = None,
    span: tuple[int, int | None] | None = None,
) -> Opened:
    """Open a hub id, a model folder, an adapter folder (with the base it names), a GGUF file, or `smollm2`.

    A GGUF file is run as it is, in its own formats, unless `dtype` or the runner asks for floats or no kernels know one
    of these formats; then it is converted once into the cache.

    Args:
        runner: "native", "torch", or "auto": native where family, settings and weight formats allow it.
        dtype: "auto" computes on the weights as they are stored.
        cache_dtype: of keys and values, "bf16", "int8" or "fp32".
        span: the layers first..last-1 to load (None: to the end), where the others run elsewhere; None is all.
        loader: (folder, dtype=, trust_remote_code=) -> models.Loaded: reads the model in its own way, for the torch
            runner.

    Raises:
        UsageError: nothing of that name, files that are not sound, or a runner that cannot take the model.
        DoesNotFit: no memory for the weights.
    """
    if runner not in RUNNERS:
        raise UsageError(f"Unknown runner {runner!r}", remedy=nearest(runner, RUNNERS))
    path = locate(ref, offline=offline)
    name = str(ref) if str(ref) == DEFAULT or not Path(ref).expanduser().exists() else path.resolve().name
    if (path / ADAPTER_CONFIG).is_file() and not (path / "config.json").is_file():
        return _with_adapter(
            path, name, runner=runner, dtype=dtype, cache_dtype=cache_dtype, threads=threads, offline=offline,
            trust_remote_code=trust_remote_code, loader=loader, span=span,
        )  # fmt: skip
    if path.is_file() and dtype != "auto":
        path = resolve(path, offline=offline)
    note = ""
    if loader and runner == "native":
        raise UsageError(
            "The native runner cannot run this model",
            "what is plugged in reads it in its own way",
            "Use the torch runner",
        )
    if runner != "torch" and not loader:
        try:
            try:
                made, tokens = _native(path, dtype, cache_dtype, threads, trust_remote_code, span)
            except NoKernels as error:
                if not path.is_file():
                    raise
                note = f"{error.what}: it runs as bfloat16"
                path = resolve(path, offline=offline)
                made, tokens = _native(path, dtype, cache_dtype, threads, trust_remote_code, span)
            return Opened(made, tokens, name, path, note=note)
        except NotNative as error:
            if runner == "native":
                raise
            note = f"{error.what}{f' ({error.why})' if error.why else ''}: the torch runner runs this model"
        except _NoLibrary as error:
            if runner == "native":
                raise
            note = f"{error}; the torch runner runs this model"
    folder = resolve(path, offline=offline)
    from shoestring.engine.torch_runner import TorchRunner

    read: Any = folder
    if loader or span:
        read = (loader or load)(folder, dtype=dtype, trust_remote_code=trust_remote_code)
    if span:
        _keep(read.model, span)
    slow = TorchRunner(
        read, dtype=dtype, cache_dtype=cache_dtype, threads=threads, trust_remote_code=trust_remote_code,
        offline=offline,
    )  # fmt: skip
    return Opened(slow, tokenizers.from_folder(folder), name, folder, note=note)


def _keep(model: Any, span: tuple[int, int | None]) -> None:
    """Drop the layers outside `span`, which run elsewhere."""
    from shoestring.models.surgery import block_lists, drop_blocks

    (blocks,) = block_lists(model).values()
    first, last = within(span, len(blocks))
    drop_blocks(model, [i for i in range(len(blocks)) if not first <= i < last])


class _NoLibrary(ShoestringError):
    """The native library is not there."""


def _native(
    path: Path,
    dtype: str,
    cache_dtype: str,
    threads: int | None,
    trust_remote_code: bool,
    span: tuple[int, int | None] | None,
) -> tuple[Runner, Tokenizer]:
    from shoestring.engine.native_runner import NativeRunner
    from shoestring.kernels.matrix import library

    try:
        library()
    except ShoestringError as error:
        raise _NoLibrary(error.what, error.why, error.remedy) from None
    with _uncollected():
        source = open_source(path, trust_remote_code=trust_remote_code)

        def tokens() -> Tokenizer:
            found = tokenizers.from_gguf(source.values) if source.gguf else tokenizers.from_folder(path)
            found = found or tokenizers.from_folder(resolve(path))
            found.warm()
            return found

        # The tokenizer is built while the weights are laid out, which leaves Python free; importing would not.
        waiting = _Beside(tokens)
        try:
            made = NativeRunner(source, dtype=dtype, cache_dtype=cache_dtype, threads=threads, span=span)
        finally:
            waiting.thread.join()
        tokenizer = waiting.result()
    made.facts = replace(made.facts, eos=tokenizer.eos)
    return made, tokenizer


@contextmanager
def _uncollected() -> Iterator[None]:
    """Opening makes some hundred thousand objects that all stay: to look through them for garbage takes a while."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


class _Beside(Generic[T]):
    """A function that runs in a thread of its own."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._found: list[T] = []
        self._error: BaseException | None = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            self._found.append(self._function())
        except BaseException as error:  # raised again where the result is wanted
            self._error = error

    def result(self) -> T:
        self.thread.join()
        if self._error:
            raise self._error
        return self._found[0]


def _with_adapter(path: Path, name: str, **options: Any) -> Opened:
    """Beside its base where its form allows that, else merged into it, else as peft runs it."""
    base_ref = check_adapter(path).get("base_model_name_or_path")
    if not isinstance(base_ref, str) or not base_ref or base_ref == str(path):
        raise UsageError(
            f"{path / ADAPTER_CONFIG} names no usable base model ({str(base_ref)[:80]!r})",
            remedy="Write the base's folder or hub id there",
        )
    if options.get("span"):
        raise UsageError(
            f"{path} is an adapter", "some layers of the model run elsewhere", "Merge it into its base first"
        )
    base = open_model(base_ref, **options)
    try:
        if base.adapter >= 0:
            raise UsageError(f"{path} adapts {base_ref}, which is an adapter itself", remedy="Merge that one first")
        tokens = tokenizers.from_folder(path, base=base.tokenizer)
        number = base.runner.add_adapter(str(path))
        return Opened(base.runner, tokens, name, path, number, base.note)
    except NotBeside as error:
        base.runner.close()
        why = error.why
    except BaseException:
        base.runner.close()
        raise
    make_known(path)
    from shoestring.models.merging import merged_once

    try:
        folder = merged_once(path, offline=options["offline"], trust_remote_code=options["trust_remote_code"])
    except ShoestringError as error:
        return _on_torch(path, name, tokens, error, **options)
    opened = open_model(folder, **options)
    note = f"The adapter is merged into its base, since {why}"
    return Opened(opened.runner, tokens, name, path, note=". ".join(part for part in (note, opened.note) if part))


def _on_torch(path: Path, name: str, tokens: Tokenizer, why: ShoestringError, **options: Any) -> Opened:
    """The base with the adapter's own modules in it."""
    from shoestring.engine.torch_runner import TorchRunner

    if options["runner"] == "native":
        raise NotNative(f"The native runner cannot run the adapter {path}", why.what)
    chosen = {key: options[key] for key in ("dtype", "cache_dtype", "threads", "trust_remote_code", "offline")}
    made = TorchRunner(path, **chosen)
    return Opened(made, tokens, name, path, note=f"{why.what}: the torch runner runs it as peft does")
