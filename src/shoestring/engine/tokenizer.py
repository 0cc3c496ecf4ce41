"""Text to token ids and back, with the model's chat template: on the `tokenizers` library alone, no torch.

Special tokens count only where the caller or the template wrote them: their text inside what a user says is plain text.
"""

from __future__ import annotations

import codecs
import json
import re
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoestring.core.errors import UsageError
from shoestring.engine.request import RequestError
from shoestring.engine.tool_text import with_tools_as_text
from shoestring.models.folder import end_tokens, read_json
from shoestring.models.gguf_tokenizer import build, byte_alphabet, number_of
from shoestring.models.gguf_tokenizer import end_tokens as gguf_ends

if TYPE_CHECKING:
    import tokenizers

    from shoestring.engine.chat_template import Template

_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_REASONING = ("reasoning_content", "thinking", "reasoning")
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_PROBE = {"type": "function", "function": {"name": "probe", "description": "", "parameters": {"type": "object"}}}
_CONTEXT = 8  # tokens before a text that decide how it begins
_PRIVATE = 0x10F000  # characters that stand in for others begin here, in a plane nobody uses


class Tokenizer:
    """A tokenizer with its templates. Safe to use from several threads.

    Args:
        inner: of the `tokenizers` library; padding and truncation are switched off.
        templates: name -> chat template; "default" is the usual one, "tool_use" is taken when there are tools.
        named: text of the tokens that templates know by name, such as bos_token.
        eos: ids that end an answer.
    """

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        *,
        templates: Mapping[str, str] | None = None,
        named: Mapping[str, str] | None = None,
        eos: Collection[int] = (),
    ) -> None:
        inner.no_padding()
        inner.no_truncation()
        self._inner, self._lock = inner, threading.Lock()
        self._templates, self._named = dict(templates or {}), dict(named or {})
        self._compiled: dict[str, Template] = {}
        self.vocab: int = inner.get_vocab_size(with_added_tokens=True)
        self.eos = tuple(dict.fromkeys(eos))
        added = inner.get_added_tokens_decoder()
        self._special = {token.content: number for number, token in added.items() if token.special and token.content}
        self._special_ids = frozenset(self._special.values())
        self._sides = {token.content: (token.lstrip, token.rstrip) for token in added.values()}
        self._fuzzy = [token.content for token in added.values() if token.special and token.normalized]

    # ---- text to ids ----

    def encode(self, text: str, *, special: bool = False, whole: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
            special: text that spells a special token becomes that token; otherwise it is plain text.
            whole: put the tokens around it that this tokenizer begins (and ends) every text with.

        Raises:
            RequestError: half of a surrogate pair in the text, which no encoding has.
        """
        _check_text(text, "prompt")
        return self._ids(text, special, whole)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **template_variables: Any,
    ) -> list[int]:
        """Token ids of a conversation through the model's chat template, or a plain one when it has none.

        A template that knows no tools is told of them, of calls and of results in the text of messages.

        Args:
            add_generation_prompt: end with what begins an answer.
            continue_final_message: end with the last letter of the last message, so that what follows goes on with it.

        Raises:
            RequestError: the template refuses the conversation, or its text cannot be encoded.
            UsageError: the template is at fault: not sound, or over the limits of `chat_template`.
        """
        return self._template_ids(
            *self._rendered(messages, tools, add_generation_prompt, continue_final_message, template_variables)
        )

    def chat_text(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **template_variables: Any,
    ) -> str:
        """What `chat` encodes, as text to look at. Raises as `chat`."""
        text, hidden = self._rendered(
            messages, tools, add_generation_prompt, continue_final_message, template_variables
        )
        return text.translate({ord(sign): letter for sign, letter in hidden.items()})

    # ---- ids to text ----

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD. Unknown ids have no text."""
        stream = self.stream(skip_special)
        return stream.push(ids) + stream.finish()

    def stream(self, skip_special: bool = True, *, after: Sequence[int] = ()) -> TextStream:
        """A decoder that takes ids as they come.

        Args:
            after: ids that those to come follow in the same text. Words are written otherwise at its beginning.
        """
        return TextStream(self, skip_special, after)

    def token_text(self, token: int) -> str:
        """The text of one token by itself; U+FFFD stands for a part of a character."""
        return self.token_bytes(token).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one token stands for, in the middle of a text; none for an unknown id."""
        word = self._inner.id_to_token(token) if 0 <= token < 1 << 32 else None
        if word is None:
            return b""
        if self._kind.alphabet:
            alphabet = byte_alphabet()
            try:
                return bytes([alphabet[letter] for letter in word])
            except KeyError:  # an added token is written as it reads
                return word.encode("utf-8", "replace")
        byte = _BYTE.fullmatch(word) if self._kind.fallback else None
        if byte:
            return bytes([int(byte[1], 16)])
        return (word.replace("\u2581", " ") if self._kind.underscores else word).encode("utf-8", "replace")

    def warm(self) -> None:
        """Do now what the first conversation would wait for: compile the template."""
        try:
            if self.has_template:
                self._template("default")
        except UsageError:
            pass  # one that is not sound matters to conversations alone, and they will say so

    @property
    def has_template(self) -> bool:
        return bool(self._templates)

    @property
    def template(self) -> str:
        """The chat template's text; empty without one."""
        return self._templates.get("default") or next(iter(self._templates.values()), "")

    @cached_property
    def json(self) -> str:
        """The tokenizer as the `tokenizers` library writes it."""
        return str(self._inner.to_str())

    # ---- inside ----

    @cached_property
    def _kind(self) -> _Kind:
        decoder = self._inner.decoder
        state: Any = json.loads(decoder.__getstate__()) if decoder is not None else {"type": "None"}
        parts: Any = state["decoders"] if state.get("type") == "Sequence" else [state]
        kinds = [str(part.get("type")) for part in parts]
        plain = all(
            part["type"] in ("ByteFallback", "Fuse")
            or (part["type"] == "Replace" and part["pattern"] == {"String": "\u2581"} and part["content"] == " ")
            or (part["type"] == "Strip" and part["content"] == " " and part["stop"] == 0)
            for part in parts
        )
        return _Kind(
            alphabet=kinds == ["ByteLevel"],
            fallback="ByteFallback" in kinds,
            underscores="Metaspace" in kinds or "Replace" in kinds,
            bytes=kinds == ["ByteLevel"] or (plain and "ByteFallback" in kinds),
            strip=sum(int(part["start"]) for part in parts if part["type"] == "Strip"),
        )

    def _ids(self, text: str, special: bool, whole: bool) -> list[int]:
        # The library keeps this setting in the tokenizer itself.
        with self._lock:
            self._inner.encode_special_tokens = not special
            return list(self._inner.encode(text, add_special_tokens=whole).ids)

    def _rendered(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Any,
        prompt: bool,
        continued: bool,
        variables: Mapping[str, Any],
    ) -> tuple[str, dict[str, str]]:
        given = _plain({"messages": messages, "tools": tools or None, "variables": variables})
        called = any(message.get("tool_calls") or message.get("role") == "tool" for message in given["messages"])
        if (tools or called) and not self._knows_tools:
            given["messages"], given["tools"] = with_tools_as_text(given["messages"], given["tools"] or ()), None
        texts = list(_texts(given))
        for text in texts:
            _check_text(text, "messages")
        hidden: dict[str, str] = {}
        disarmed = self._disarmed(given, "".join(texts), hidden)
        said = [_with_reasoning(message) for message in disarmed["messages"]]
        end = self._unused("".join(texts), hidden) if continued else ""
        if continued:
            said[-1:] = [_ended(said[-1] if said else {}, end)]
        text = self._written(said, disarmed["tools"], prompt, disarmed["variables"])
        return _cut(text, end) if continued else text, hidden

    def _written(self, messages: Any, tools: Any, prompt: bool, variables: Mapping[str, Any]) -> str:
        """What the template makes of a conversation."""
        from shoestring.engine.chat_template import TemplateRefused

        names = {name: text for name, text in self._named.items() if text}
        given = {"messages": messages, "tools": tools, "add_generation_prompt": prompt}
        try:
            return self._template("tool_use" if tools else "default").render(
                {**names, "documents": None, **variables, **given}
            )
        except TemplateRefused as error:
            raise RequestError(error.what, error.why, param="messages", code="invalid_messages") from None

    @cached_property
    def _knows_tools(self) -> bool:
        """Whether what the template writes depends on the tools it is given."""
        hello = [{"role": "user", "content": "x"}]
        try:
            return self._written(hello, [_PROBE], True, {}) != self._written(hello, None, True, {})
        except (RequestError, UsageError):
            return False

    def _template(self, name: str) -> Template:
        from shoestring.engine.chat_template import Template

        name = name if name in self._templates else "default" if "default" in self._templates else ""
        if name not in self._compiled:
            text = self._templates[name] if name else self.template
            if not text:
                # Models without one are trained with this, so they must be asked with it too.
                from shoestring.data.template import PLAIN_TEMPLATE as text
            self._compiled[name] = Template(text)
        return self._compiled[name]

    def _disarmed(self, value: Any, whole: str, hidden: dict[str, str]) -> Any:
        """`value` with a private character for each letter at which a special token could begin.

        `hidden` gets private character -> letter. A token that begins in the last letters of one string and ends in
        the next is found too, since the letters that begin it are enough.
        """
        if isinstance(value, dict):
            return {
                self._disarmed(key, whole, hidden): self._disarmed(item, whole, hidden) for key, item in value.items()
            }
        if isinstance(value, list):
            return [self._disarmed(item, whole, hidden) for item in value]
        if not isinstance(value, str) or self._starts is None or not self._starts.search(value):
            return value

        def stand_in(match: re.Match[str]) -> str:
            known = {letter: sign for sign, letter in hidden.items()}
            if match[0] not in known:
                known[match[0]] = self._unused(whole, hidden)
                hidden[known[match[0]]] = match[0]
            return known[match[0]]

        return self._starts.sub(stand_in, value)

    def _unused(self, whole: str, hidden: Mapping[str, str]) -> str:
        """A private character that nobody has used."""
        code = _PRIVATE
        while chr(code) in hidden or chr(code) in whole or chr(code) in self.template:
            code += 1
        return chr(code)

    @cached_property
    def _starts(self) -> re.Pattern[str] | None:
        """Matches a letter where a special token is spelled, or where the end of the text may be its beginning."""
        ways: dict[str, set[str]] = {}
        for name in self._special:
            rest = name[1:]
            begun = [re.escape(rest[:size]) + r"\Z" for size in range(len(rest))]
            ways.setdefault(name[0], set()).update([re.escape(rest), *begun])
        if not ways:
            return None
        found = (
            f"{re.escape(letter)}(?={'|'.join(sorted(rests, key=lambda r: (-len(r), r)))})"
            for letter, rests in sorted(ways.items())
        )
        return re.compile("|".join(found))

    @cached_property
    def _whole(self) -> re.Pattern[str] | None:
        """Matches special tokens, with the white space that those swallow which are so inclined."""
        if not self._special:
            return None
        ways = []
        for name in sorted(self._special, key=lambda name: (-len(name), name)):
            left, right = self._sides.get(name, (False, False))
            ways.append(rf"{r's*' if left else ''}{re.escape(name)}{r's*' if right else ''}".replace("s*", r"\s*"))
        return re.compile("(" + "|".join(ways) + ")")

    def _template_ids(self, text: str, hidden: dict[str, str]) -> list[int]:
        if not hidden and not self._forged_by_normalizing(text):
            return self._ids(text, special=True, whole=False)
        ids: list[int] = []
        letters = {ord(sign): letter for sign, letter in hidden.items()}
        for number, piece in enumerate(self._whole.split(text) if self._whole else [text]):
            if number % 2:
                ids.append(self._special.get(piece, self._special.get(piece.strip(), -1)))
            elif piece:
                ids += self._ids(piece.translate(letters), special=False, whole=False)
        return ids

    def _forged_by_normalizing(self, text: str) -> bool:
        """Whether normalizing makes a special token of text that does not spell one."""
        normalizer = self._inner.normalizer
        if not self._fuzzy or normalizer is None:
            return False
        normal = normalizer.normalize_str(text)
        return any(normal.count(name) > text.count(name) for name in self._fuzzy)


@dataclass(frozen=True)
class _Kind:
    """How a tokenizer writes texts, as its decoder tells.

    Attributes:
        alphabet: a letter for each byte. fallback: tokens `<0xNN>` for bytes. underscores: U+2581 for spaces.
        bytes: a text is the bytes of its tokens one after another, but for `strip` spaces at its beginning.
    """

    alphabet: bool
    fallback: bool
    underscores: bool
    bytes: bool
    strip: int


class TextStream:
    """Decodes ids as they come; what is given out together with `finish()` is the text of all of them."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True, after: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer._special_ids if skip_special else frozenset()
        kind = tokenizer._kind
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace") if kind.bytes else None
        before = [token for token in after[-_CONTEXT:] if token not in tokenizer._special_ids]
        self._strip = 0 if before else kind.strip
        self._ids: list[int] = before  # of other kinds: those whose text may still depend on each other
        self._read = len(before)  # how many of them have been given out

    def push(self, ids: Sequence[int]) -> str:
        """The text that is settled by these ids: a character whose bytes are not all there waits."""
        kept = [token for token in ids if token not in self._skipped]
        if self._bytes is not None:
            return self._stripped(self._bytes.decode(b"".join(map(self._tokenizer.token_bytes, kept))))
        self._ids += kept
        before, now = self._text(self._ids[: self._read]), self._text(self._ids)
        if len(now) <= len(before) or now.endswith("\ufffd"):
            return ""
        # The latest ids stay as context: the first of a text may be written otherwise than those that follow.
        self._ids = self._ids[self._read :]
        self._read = len(self._ids)
        return now[len(before) :]

    def finish(self) -> str:
        """What waited for more."""
        if self._bytes is not None:
            return self._stripped(self._bytes.decode(b"", final=True))
        before, now = self._text(self._ids[: self._read]), self._text(self._ids)
        self._read = len(self._ids)
        return now[len(before) :]

    def _stripped(self, text: str) -> str:
        """Without the spaces that the tokenizer put before the text."""
        while text and self._strip:
            if text[0] != " ":
                self._strip = 0
                break
            text, self._strip = text[1:], self._strip - 1
        return text

    def _text(self, ids: list[int]) -> str:
        inner: Any = self._tokenizer._inner
        return str(inner.decode(ids, skip_special_tokens=False)) if ids else ""


# ---- where a tokenizer comes from ----


def from_folder(folder: Path, *, base: Tokenizer | None = None) -> Tokenizer:
    """The tokenizer of a model folder. Without a tokenizer.json transformers is asked to make one.

    Args:
        base: what an adapter's folder that brings none falls back to.

    Raises:
        UsageError: there is none, or its files are not sound.
    """
    import tokenizers

    file = folder / "tokenizer.json"
    if file.is_file():
        try:
            inner = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library has no class of its own for this
            raise UsageError(f"{file} is not sound", str(error)[:300], "Get an intact copy of the model") from None
    elif base is not None:
        return base
    else:
        inner = _converted(folder)
    config = _json(folder / "tokenizer_config.json")
    named = {name: _content(config.get(name)) for name in _NAMED}
    named |= {name: _content(text) for name, text in _mapping(_json(folder / "special_tokens_map.json")).items()
              if name in _NAMED and not named[name]}  # fmt: skip
    own = inner.token_to_id(named["eos_token"]) if named["eos_token"] else None
    eos = [*end_tokens(folder), *([] if own is None else [own])]
    templates = _templates(folder, config)
    return _checked(Tokenizer(inner, templates=templates, named=named, eos=eos))


def from_gguf(values: Mapping[str, Any]) -> Tokenizer | None:
    """The tokenizer in a GGUF file's metadata; None when it is of a kind that only transformers can convert.

    Raises:
        UsageError: it cannot be right.
    """
    inner = build(values)
    if inner is None:
        return None
    tokens: list[str] = values["tokenizer.ggml.tokens"]

    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    numbers = {name: number_of(values, key) for name, key in roles.items()}
    named = {name: tokens[number] for name, number in numbers.items() if number is not None}
    templates = {
        "default" if key == "tokenizer.chat_template" else key.removeprefix("tokenizer.chat_template."): text
        for key, text in values.items()
        if key.startswith("tokenizer.chat_template") and isinstance(text, str)
    }
    return _checked(Tokenizer(inner, templates=templates, named=named, eos=gguf_ends(values)))


def _checked(made: Tokenizer) -> Tokenizer:
    if any(number >= 1 << 24 for number in made._special_ids):
        raise UsageError("The tokenizer has a token with an impossible number", remedy="Get an intact model")
    return made


def _converted(folder: Path) -> tokenizers.Tokenizer:
    from transformers import AutoTokenizer

    from shoestring.models.load import quiet

    try:
        with quiet():
            made = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return made.backend_tokenizer
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        raise UsageError(
            f"{folder} has no tokenizer that can be read", str(error)[:300], "Add the model's tokenizer.json to it"
        ) from error


def _templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    given = config.get("chat_template")
    found: dict[str, str] = {}
    if isinstance(given, str):
        found["default"] = given
    elif isinstance(given, list):
        found = {str(t.get("name")): str(t.get("template")) for t in given if isinstance(t, dict)}
    file = folder / "chat_template.jinja"
    if file.is_file():
        found["default"] = file.read_text(encoding="utf-8", errors="replace")
    for extra in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        found[extra.stem] = extra.read_text(encoding="utf-8", errors="replace")
    return {name: text for name, text in found.items() if text}


def _json(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _content(token: Any) -> str:
    """The text of a token that is given as text or as a table with its text."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


# ---- what a conversation may hold ----


def _plain(value: Any) -> Any:
    """Plain JSON types all the way down: a template must meet no object with methods of its own."""
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    raise RequestError(
        f"A conversation cannot hold a {type(value).__name__}", remedy="Give texts, numbers, lists and tables",
        param="messages", code="invalid_type",
    )  # fmt: skip


def _texts(value: Any) -> Any:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _with_reasoning(message: Any) -> Any:
    """The message with its reasoning under the names that templates look for."""
    if not isinstance(message, dict):
        return message
    said = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    return message if said is None else {"thinking": said, **message, "reasoning_content": said}


def _ended(message: Any, end: str) -> dict[str, Any]:
    """The message with `end` after its text. The space behind shows whether the template trims what messages say."""
    text = message.get("content") if isinstance(message, dict) else None
    if not isinstance(text, str):
        raise RequestError("The final message has no text to go on with", param="messages", code="invalid_messages")
    return {**message, "content": f"{text}{end} "}


def _cut(text: str, end: str) -> str:
    """The text up to `end`; white space before it goes where the template has taken it off after it."""
    before, found, after = text.rpartition(end)
    if not found:
        raise RequestError(
            "The chat template leaves out the end of the final message",
            remedy="Let the conversation end with a user's message",
            param="messages",
            code="invalid_messages",
        )
    return before if after.startswith(" ") else before.rstrip()


def _check_text(text: str, param: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            f"The text has half of a surrogate pair at character {error.start}",
            "no encoding has it",
            "Replace it, for instance by U+FFFD",
            param=param,
            code="invalid_text",
        ) from None
