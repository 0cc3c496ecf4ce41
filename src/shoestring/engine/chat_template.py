"""Chat templates of strangers, rendered as transformers does it, sandboxed, with limits of time, memory and output."""

from __future__ import annotations

import ctypes
import json
import re
import threading
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from shoestring.core.errors import UsageError

SECONDS, CHARACTERS = 2.0, 4_000_000
_MEMORY = 512 << 20  # bytes that this process may grow by while it renders
_LARGEST = 1_000_000  # of a number that a template hands to a function, and of a repetition
_BITS = 4096  # of an integer
_WIDTH = re.compile(r"\d{6,}")
_LOOK = 0.02  # seconds between two looks at a template that takes long


class TemplateRefused(UsageError):
    """The template itself refuses the conversation, with its own words."""


class Template:
    """A compiled chat template.

    Raises:
        UsageError: it is no sound template.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        try:
            self._compiled = _environment().from_string(text)
        except (TemplateError, RecursionError, ValueError) as error:
            raise UsageError("The model's chat template is not sound", str(error)[:300]) from None

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text of a conversation.

        Raises:
            TemplateRefused: the template raised an error of its own.
            UsageError: it does what the sandbox forbids, or passes a limit.
        """
        parts: list[str] = []
        length, most = 0, CHARACTERS + _characters(variables)
        try:
            with _Limit():
                for part in self._compiled.generate(dict(variables)):
                    length += len(part)
                    if length > most:
                        raise _Stopped(f"it wrote more than {CHARACTERS} characters beyond what it was given")
                    parts.append(part)
        except _Stopped as stopped:
            raise UsageError("The model's chat template was stopped", str(stopped)) from None
        except SecurityError as error:
            raise UsageError("The model's chat template does what is forbidden", str(error)[:300]) from None
        except MemoryError:
            raise UsageError("The model's chat template was stopped", "it wanted too much memory") from None
        except Exception as error:  # templates raise whatever Python does
            raise TemplateRefused("The chat template refuses the conversation", str(error)[:300]) from None
        return "".join(parts)


def _characters(value: Any) -> int:
    """Of all texts in it: a long conversation is no fault of the template."""
    if isinstance(value, Mapping):
        return sum(map(_characters, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(_characters, value))
    return len(value) if isinstance(value, str) else 0


class _Stopped(BaseException):
    """Not an Exception: nothing that a template calls may catch it."""


class _Limit:
    """Stops the thread that enters it when it takes too long or too much memory.

    Rendering is Python code that checks for nothing by itself, so another thread raises inside it. A signal would
    work in the main thread only.
    """

    def __enter__(self) -> None:
        self._thread, self._done, self._lock = threading.get_ident(), threading.Event(), threading.Lock()
        self._raised = False
        threading.Thread(target=self._watch, daemon=True).start()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._done.set()
            if self._raised:  # it may not have arrived yet, and must not arrive later
                _raise_in(self._thread, None)

    def _watch(self) -> None:
        end, first = time.monotonic() + SECONDS, 0
        while not self._done.wait(_LOOK):
            now = _resident()
            first = first or now
            if time.monotonic() > end or now - first > _MEMORY:
                with self._lock:
                    if not self._done.is_set():
                        self._raised = True
                        _raise_in(self._thread, _TooLong if now - first <= _MEMORY else _TooMuch)
                return


class _TooLong(_Stopped):
    def __str__(self) -> str:
        return f"it took longer than {SECONDS:g} s"


class _TooMuch(_Stopped):
    def __str__(self) -> str:
        return "it wanted too much memory"


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(error) if error else None)


def _resident() -> int:
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * 4096
    except (OSError, ValueError):
        return 0


class _Generation(Extension):
    """`{% generation %}` marks what the assistant says; here it changes nothing."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_whole"), [], [], body).set_lineno(line)

    def _whole(self, caller: Callable[[], str]) -> str:
        return caller()


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox of jinja2, without the ways to ask for gigabytes in one expression."""

    intercepted_binops = frozenset(("*", "**", "%"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" or (operator == "*" and not _numbers(left, right)):
            _small(left, right)
            size = len(left) if hasattr(left, "__len__") else len(right) if hasattr(right, "__len__") else 1
            count = right if isinstance(right, int) else left if isinstance(left, int) else 1
            if size * abs(count) > CHARACTERS:
                raise SecurityError("a repetition is too long")
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * (right if operator == "**" else 1) + right.bit_length()
            if bits > _BITS:
                raise SecurityError("a number is too large")
        if operator == "%" and isinstance(left, str) and _WIDTH.search(left):
            raise SecurityError("a format is too wide")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        _small(*args, *kwargs.values())
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, str) and _WIDTH.search(owner) and getattr(obj, "__name__", "") in ("format", "format_map"):
            raise SecurityError("a format is too wide")
        return super().call(context, obj, *args, **kwargs)


class _Space(Namespace):
    """`namespace(...)`: attributes that begin with an underscore would reach into Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *given = args
        for name in dict(*given, **kwargs):
            _plain_name(name)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _plain_name(name)
        super().__setitem__(name, value)


class _Table:
    """`dict(...)` without the attributes of the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _environment() -> _Environment:
    made = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    for name, function in list(made.filters.items()):
        made.filters[name] = _guarded(function)
    made.filters["tojson"] = _to_json
    made.globals |= {"raise_exception": _refuse, "strftime_now": _now, "dict": _Table(), "namespace": _Space}
    return made


def _guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        _small(*args[1:], *kwargs.values())
        return function(*args, **kwargs)

    call.__dict__.update(getattr(function, "__dict__", {}))  # jinja2 marks there what it hands over first
    return call


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    _small(indent)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _plain_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace holds no {name!r}")


def _numbers(*values: Any) -> bool:
    return all(isinstance(value, int | float) for value in values)


def _small(*values: Any) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > _LARGEST:
            raise SecurityError(f"the number {value} is too large")
