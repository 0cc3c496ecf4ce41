"""Log-probabilities in the two shapes of OpenAI's interface."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shoestring.engine.request import TokenLogprob
from shoestring.engine.tokenizer import Tokenizer

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


def of_completion(
    tokenizer: Tokenizer, tokens: Sequence[int], found: Sequence[TokenLogprob | None], alternatives: int, offset: int
) -> dict[str, Any]:
    """Tokens with None have no probability: the first of a prompt. `offset`: where the text begins, in characters."""
    names, values, offsets = [], [], []
    tops: list[dict[str, float] | None] = []
    for token, judged in zip(tokens, found):
        name = token_name(tokenizer, token)
        names.append(name)
        offsets.append(offset)
        offset += len(name)
        values.append(None if judged is None else max(judged.logprob, _LOWEST))
        if judged is None:
            tops.append(None)
            continue
        top = {token_name(tokenizer, other): max(value, _LOWEST) for other, value in judged.top}
        tops.append(top | {name: max(judged.logprob, _LOWEST)})
    return {
        "tokens": names,
        "token_logprobs": values,
        "top_logprobs": tops if alternatives else None,
        "text_offset": offsets,
    }
