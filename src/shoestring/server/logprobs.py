"""Log-probabilities in the two shapes of OpenAI's interface, and in that of vLLM for prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shoestring.engine.request import TokenLogprob
from shoestring.engine.tokenizer import TextStream, Tokenizer

_LOWEST = -9999.0  # JSON has no minus infinity


def token_name(tokenizer: Tokenizer, token: int) -> str:
    """A token's text; one that is no whole characters is written by its bytes, as OpenAI does."""
    data = tokenizer.token_bytes(token)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def of_chat(tokenizer: Tokenizer, found: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    def one(token: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token)
        return {"token": token_name(tokenizer, token), "bytes": list(data), "logprob": max(logprob, _LOWEST)}

    return [one(f.token, f.logprob) | {"top_logprobs": [one(*pair) for pair in f.top]} for f in found]


class Offsets:
    """Where tokens begin in their text, in characters. All tokens of one character begin where it does.

    Args:
        stream: what makes text of the tokens.
        begin: where the first of them begins.
    """

    def __init__(self, stream: TextStream, begin: int = 0) -> None:
        self._stream, self._at = stream, begin

    def of(self, tokens: Sequence[int]) -> list[int]:
        """Those of the next tokens."""
        found = []
        for token in tokens:
            found.append(self._at)
            self._at += len(self._stream.push([token]))
        return found


def of_completion(
    tokenizer: Tokenizer,
    tokens: Sequence[int],
    found: Sequence[TokenLogprob | None],
    alternatives: int,
    offsets: Sequence[int],
) -> dict[str, Any]:
    """Tokens with None have no probability: the first of a prompt. Beside its alternatives each token stands itself."""
    names, values = [], []
    tops: list[dict[str, float] | None] = []
    for token, judged in zip(tokens, found):
        name = token_name(tokenizer, token)
        names.append(name)
        values.append(None if judged is None else max(judged.logprob, _LOWEST))
        if judged is None:
            tops.append(None)
            continue
        top = {token_name(tokenizer, other): max(value, _LOWEST) for other, value in judged.top[:alternatives]}
        tops.append(top | {name: max(judged.logprob, _LOWEST)})
    return {"tokens": names, "token_logprobs": values, "top_logprobs": tops, "text_offset": list(offsets)}


def of_prompt(
    tokenizer: Tokenizer, found: Sequence[TokenLogprob | None], alternatives: int
) -> list[dict[str, dict[str, Any]] | None]:
    """As vLLM has it: for each token of a prompt a table by token id, which has its alternatives too."""

    def one(token: int, logprob: float, rank: int) -> dict[str, Any]:
        return {"logprob": max(logprob, _LOWEST), "rank": rank, "decoded_token": token_name(tokenizer, token)}

    tables: list[dict[str, dict[str, Any]] | None] = []
    for f in found:
        if f is None:
            tables.append(None)
            continue
        table = {str(f.token): one(f.token, f.logprob, f.rank)}
        for rank, (token, logprob) in enumerate(f.top[:alternatives], 1):
            table.setdefault(str(token), one(token, logprob, rank))
        tables.append(table)
    return tables
