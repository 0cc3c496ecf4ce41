"""/v1/embeddings: the mean of a text's hidden states, scaled to length 1."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np

from shoestring.engine.aio import AsyncEngine
from shoestring.engine.request import Request
from shoestring.server.completions import ids_of
from shoestring.server.errors import bad
from shoestring.server.schema import EmbeddingRequest
from shoestring.server.service import Service
from shoestring.server.work import Work


async def prepare(service: Service, engine: AsyncEngine, given: EmbeddingRequest) -> list[list[int]]:
    """Token ids of each input.

    Raises:
        ApiError: what cannot be served, with the field at fault.
    """
    inner, limits = engine.engine, service.settings
    if len(given.input) > limits.max_prompts:
        raise bad("input", f"There are {len(given.input)} inputs; at most {limits.max_prompts} are read")
    if given.dimensions not in (None, inner.facts.hidden):
        raise bad("dimensions", f"This model's embeddings have {inner.facts.hidden} dimensions and cannot be cut")
    prompts = await ids_of(inner.tokenizer, given.input)
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise bad("input" if len(prompts) == 1 else f"input[{i}]", "The input is empty")
    return prompts


def requests(prompts: Sequence[list[int]], adapter: str, client: str, isolation: str) -> list[Request]:
    return [Request(p, embed=True, adapter=adapter, client=client, isolation=isolation) for p in prompts]


async def vectors(work: Work) -> list[np.ndarray]:
    """float32 [hidden] for each input."""
    found: dict[int, np.ndarray] = {}
    async with work.batches() as batches:
        async for batch in batches:
            for i, delta in batch:
                at = work.noted(i, delta)
                if delta.embedding is not None:
                    found[at] = delta.embedding
    return [found[at] for at in range(len(work.requests))]


def answer(given: EmbeddingRequest, found: Sequence[np.ndarray], work: Work) -> dict[str, Any]:
    tokens = sum(len(request.prompt) for request in work.requests)
    as_text = given.encoding_format == "base64"
    return {
        "object": "list",
        "model": given.model,
        "data": [
            {
                "object": "embedding",
                "index": i,
                "embedding": base64.b64encode(v.astype("<f4").tobytes()).decode() if as_text else v.tolist(),
            }
            for i, v in enumerate(found)
        ],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens, "shoestring": work.bill(tokens)},
    }
