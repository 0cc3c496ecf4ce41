"""The byte-level tokenizer that a GGUF file's metadata describes, built without torch or transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from shoestring.core.errors import UsageError

_CONTROL, _USER_DEFINED = 3, 4  # kinds of tokens; others are plain
# How a text is cut before merges apply. GGUF gives only the name of the cut.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2_NAMES = ("default", "gpt-2", "gpt2", "phi-2", "mpt", "olmo", "jais")
_DIGIT_NAMES = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
_LLAMA3_NAMES = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2")


def build(values: Mapping[str, Any]) -> Tokenizer | None:
    """The tokenizer of a GGUF file's metadata; None when it is of a kind, or cuts texts in a way, not known here.

    Raises:
        UsageError: the vocabulary or the merges cannot be right.
    """
    kind, cut = str(values.get("tokenizer.ggml.model", "")), str(values.get("tokenizer.ggml.pre", "default"))
    if kind != "gpt2" or cut not in (*_GPT2_NAMES, *_DIGIT_NAMES, *_LLAMA3_NAMES, "qwen2", "tekken"):
        return None
    tokens, merges = values.get("tokenizer.ggml.tokens"), values.get("tokenizer.ggml.merges")
    kinds = values.get("tokenizer.ggml.token_type") or ()
    if not _texts(tokens) or not _texts(merges) or len(kinds) not in (0, len(tokens or ())):
        raise _broken("its tokens, their kinds and its merges do not belong together")
    assert tokens is not None and merges is not None
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise _broken("one of its tokens stands twice")
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    try:
        # Llama 3 and Tekken take a word that is a token as it is, whatever its merges would give.
        made = Tokenizer(BPE(vocabulary, pairs, ignore_merges=cut in (*_LLAMA3_NAMES, "tekken")))
    except Exception as error:  # the library has no class of its own for this
        raise _broken(str(error)[:200]) from None
    made.pre_tokenizer = _cut(cut)
    if cut == "qwen2":
        made.normalizer = normalizers.NFC()
    made.decoder = decoders.ByteLevel()
    added = [
        AddedToken(token, special=kind == _CONTROL, normalized=False)
        for token, kind in zip(tokens, kinds)
        if kind in (_CONTROL, _USER_DEFINED) and token
    ]
    made.add_tokens(added)
    _frame(made, values)
    return made


def cut_of(tokenizer: Mapping[str, Any]) -> str | None:
    """GGUF's name of the cut that a `tokenizer.json` asks for; None when it has none that is known here."""
    wanted = _form(tokenizer.get("pre_tokenizer"))
    taken = bool((tokenizer.get("model") or {}).get("ignore_merges"))
    for name in ("gpt-2", "smollm", "qwen2", "tekken", "llama-bpe"):
        made = Tokenizer(BPE())
        made.pre_tokenizer = _cut(name)
        if _form(json.loads(made.to_str())["pre_tokenizer"]) == wanted and taken == (name in ("llama-bpe", "tekken")):
            return name
    return None


def _form(cut: Any) -> Any:
    """A cut without what changes no token: where offsets begin."""
    if isinstance(cut, dict):
        return {key: _form(value) for key, value in cut.items() if key != "trim_offsets"}
    return [_form(item) for item in cut] if isinstance(cut, list) else cut


def number_of(values: Mapping[str, Any], key: str) -> int | None:
    """The id of the token that a GGUF file calls bos, eos, eot, eom, unknown or padding."""
    number = values.get(f"tokenizer.ggml.{key}_token_id")
    count = len(values.get("tokenizer.ggml.tokens") or ())
    return number if type(number) is int and 0 <= number < count else None


def end_tokens(values: Mapping[str, Any]) -> tuple[int, ...]:
    """Ids that end an answer."""
    found = (number_of(values, key) for key in ("eos", "eot", "eom"))
    return tuple(dict.fromkeys(number for number in found if number is not None))


def _cut(name: str) -> Any:
    if name in _GPT2_NAMES:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name in _DIGIT_NAMES:
        return pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    pattern = _QWEN2 if name == "qwen2" else _TEKKEN if name == "tekken" else _LLAMA3
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _frame(made: Tokenizer, values: Mapping[str, Any]) -> None:
    """Tokens that stand before and after every text."""
    cut = str(values.get("tokenizer.ggml.pre", "default"))
    starts = values.get("tokenizer.ggml.add_bos_token", cut in (*_LLAMA3_NAMES, "tekken"))
    ways = (("bos", starts), ("eos", values.get("tokenizer.ggml.add_eos_token")))
    numbers = {key: number_of(values, key) for key, on in ways if on}
    found = {key: number for key, number in numbers.items() if number is not None}
    if found:
        single = [*(["bos"] if "bos" in found else []), "$A", *(["eos"] if "eos" in found else [])]
        made.post_processor = processors.TemplateProcessing(single=single, special_tokens=list(found.items()))


@cache
def byte_alphabet() -> dict[str, int]:
    """The character that byte-level vocabularies write for each byte, with the byte."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], str)


def _broken(reason: str) -> UsageError:
    return UsageError("The GGUF file's tokenizer cannot be read", reason, "Get an intact file")
