"""Answers that must match a JSON schema, a regular expression or a grammar: which tokens may come next."""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from typing import Any, Protocol

import numpy as np

from shoestring.core.errors import ShoestringError, nearest
from shoestring.engine.request import Constraint, RequestError

MAX_TEXT = 65_536  # characters of a schema, expression or grammar
MAX_DEPTH = 64  # of nested JSON in a schema
_REMEMBERED = 32
_GBNF = re.compile(r"^\s*root\s*::=", re.MULTILINE)
_MAX_RULES = 400  # of a grammar that is rewritten first, in time that grows with their square
_NO_MATCH = "NoExtensionBias"  # the library's word
# In the library's units of work. They keep the worst grammar of MAX_TEXT characters to some 0.3 s and 30 MB when it is
# compiled, and a mask to some milliseconds; with the library's own limits both can take a second and more than 1 GB.
_LIMITS: dict[str, Any] = dict(
    initial_lexer_fuel=200_000,
    step_lexer_fuel=50_000,
    step_max_items=20_000,
    max_lexer_states=20_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)
# A line break and its indentation. With more a small model may write line breaks for ever, all of them allowed.
_JSON_OPTIONS: Any = {"whitespace_pattern": r"\n? {0,39}"}


class Described(Protocol):
    """What is needed of a tokenizer."""

    @property
    def eos(self) -> Any: ...

    @property
    def json(self) -> str: ...


class Matcher:
    """How far one answer has come in its constraint. Made by `Constraints.matcher`."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def mask(self, row: np.ndarray) -> None:
        """Set the logits of all tokens that may not come next to -inf, in place. row: float32 [vocab].

        An end token may come only where the answer so far is a whole match.

        Raises:
            ShoestringError: the constraint became too complex to follow, or a token that it forbids was accepted.
        """
        np.copyto(row, -np.inf, where=self.blocked(len(row)))

    def blocked(self, vocab: int) -> np.ndarray:
        """bool [vocab], true where a token may not come next. Raises as `mask`."""
        inner, bits = self._inner, b""
        try:
            bits = inner.compute_bitmask()
            reason = inner.get_error()
        except ValueError as error:
            reason = str(error)
        if not reason and inner.is_stopped() and not inner.is_accepting():
            reason = _NO_MATCH
        if reason:
            raise ShoestringError("The constraint cannot be followed any further", _reason(reason))
        return np.unpackbits(np.frombuffer(bits, np.uint8), count=vocab, bitorder="little") == 0

    def accept(self, token: int) -> None:
        """Go on behind a token. After one that the constraint forbids, `mask` raises for good."""
        self._inner.consume_token(token)

    def rollback(self, count: int) -> None:
        """Take back the latest `count` tokens."""
        self._inner.rollback(count)

    @property
    def complete(self) -> bool:
        """Whether the answer so far is a whole match; it may end here."""
        return bool(self._inner.is_accepting())

    @property
    def finished(self) -> bool:
        """Whether nothing but an end token can follow."""
        return bool(self._inner.is_stopped())


class Constraints:
    """Compiles constraints for one tokenizer and remembers the latest. May be used from several threads.

    Args:
        tokenizer: its `json` (as the `tokenizers` library writes it) and its end tokens.
        vocab: width of the model's logits; ids that the tokenizer does not know are never allowed.
    """

    def __init__(self, tokenizer: Described, vocab: int) -> None:
        self._described, self._vocab = tokenizer, vocab
        self._tokenizer: Any = None
        self._compiled: OrderedDict[Constraint, Any] = OrderedDict()
        self._lock = threading.Lock()

    def prepare(self) -> None:
        """Build what the library needs of the tokenizer now: 0.3 s, once, in which no other thread runs.

        Raises:
            RequestError: this model's answers cannot be constrained.
        """
        with self._lock:
            self._opened()

    def matcher(self, constraint: Constraint) -> Matcher:
        """A matcher at its beginning. What was compiled before costs some microseconds.

        Raises:
            RequestError: the constraint is malformed, too large, not supported, or matches nothing.
        """
        with self._lock:
            if constraint not in self._compiled:
                self._compiled[constraint] = self._compile(constraint)
                if len(self._compiled) > _REMEMBERED:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(constraint)
            return Matcher(self._compiled[constraint].deep_copy())

    def _compile(self, constraint: Constraint) -> Any:
        from llguidance import LLMatcher, LLParserLimits

        try:
            grammar = _grammar(constraint)
        except ValueError as error:  # half a surrogate pair, or a number of more than 64 bits
            raise _refused(constraint, _reason(str(error))) from None
        inner = LLMatcher(self._opened(), grammar, log_level=0, limits=LLParserLimits(**_LIMITS))
        if inner.is_error():
            raise _refused(constraint, _reason(inner.get_error()))
        try:
            Matcher(inner).blocked(self._vocab)
        except ShoestringError as error:
            raise _refused(constraint, error.why) from None
        return inner

    def _opened(self) -> Any:
        if self._tokenizer is None:
            from llguidance import LLTokenizer

            eos = [token for token in self._described.eos if token < self._vocab]
            if not eos:
                raise RequestError(
                    "This model has no end token", "A constrained answer could not end", param="response_format"
                )
            try:
                self._tokenizer = LLTokenizer(self._described.json, n_vocab=self._vocab, eos_token=eos)
            except (ValueError, RuntimeError) as error:
                raise RequestError(
                    "This model's tokenizer cannot follow a constraint", _reason(str(error)), param="response_format"
                ) from None
        return self._tokenizer


def _grammar(constraint: Constraint) -> str:
    from llguidance import LLMatcher, regex_to_lark

    kind, text = constraint.kind, constraint.text
    if kind not in _NAMES:
        raise RequestError(f"Unknown constraint {kind}", remedy=nearest(kind, _NAMES), param="response_format")
    if len(text) > MAX_TEXT:
        raise _refused(constraint, f"It has {len(text)} characters; at most {MAX_TEXT} are allowed")
    grammar: str
    if kind == "regex":
        # Digits are 0 to 9, as in a schema's patterns; letters are those of all scripts.
        grammar = LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(text, 'd')}/")
    elif kind == "grammar":
        grammar = LLMatcher.grammar_from_lark(_lark(constraint) if _GBNF.search(text) else text)
    else:
        schema = _schema(constraint) if kind == "json_schema" else {"type": "object"}
        grammar = LLMatcher.grammar_from_json_schema(schema, overrides=_JSON_OPTIONS)
    return grammar


def _lark(constraint: Constraint) -> str:
    """A grammar as llama.cpp and vLLM write it, as Lark does."""
    from llguidance.gbnf_to_lark import gbnf_to_lark

    if constraint.text.count("::=") > _MAX_RULES:
        raise _refused(constraint, f"It has more than {_MAX_RULES} rules")
    try:
        return str(gbnf_to_lark(constraint.text))
    except RecursionError:
        raise _refused(constraint, "It is nested too deeply") from None
    except Exception as error:  # the library has no class for all of them
        raise _refused(constraint, str(error)[:400]) from None


def _schema(constraint: Constraint) -> dict[str, Any]:
    try:
        schema = json.loads(constraint.text)
    except (ValueError, RecursionError) as error:
        raise _refused(constraint, f"It is not JSON: {error}") from None
    if not isinstance(schema, dict):
        raise _refused(constraint, f"It is a JSON {type(schema).__name__}, not an object")
    level: list[Any] = [schema]
    for _ in range(MAX_DEPTH):
        level = [
            item
            for node in level
            if isinstance(node, dict | list)
            for item in (node.values() if isinstance(node, dict) else node)
        ]
        if not level:
            return schema
    raise _refused(constraint, f"It is nested deeper than {MAX_DEPTH} levels")


_NAMES = {
    "json_schema": "JSON schema",
    "json_object": "JSON object",
    "regex": "regular expression",
    "grammar": "grammar",
}


def _refused(constraint: Constraint, why: str) -> RequestError:
    return RequestError(
        f"The {_NAMES[constraint.kind]} cannot be used", why, param="response_format", code="invalid_constraint"
    )


def _reason(message: str) -> str:
    """The library's reason, without the state it dumps behind it."""
    message = message.split("<state>")[0].split("<non-verbose/>")[0].strip()[:400]
    return "Nothing matches it" if message == _NO_MATCH else message
