"""Token trees under transformers' `generate`: any drafter of the engine, one forward pass for all of its guesses."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from shoestring.core.errors import UsageError
from shoestring.engine.hooks import Draft, Drafter, Verified
from shoestring.engine.request import Request, Sampling
from shoestring.engine.sequence import Sequence as Answer


@torch.no_grad()
def generate(
    drafter: Drafter,
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """What `model.generate(input_ids, custom_generate=...)` returns; the tokens are those of plain decoding.

    A token is drawn at each node that is reached, from the model's scores after all processors have seen that node's
    own prefix, with as many random numbers as plain decoding takes.

    Args:
        input_ids: [1, tokens].

    Raises:
        UsageError: a batch, padding, beams, output that is not kept, or a model whose cache cannot give up rows.
    """
    cache = _checked(model, input_ids, generation_config, model_kwargs)
    drawn = bool(generation_config.do_sample)
    prompt: list[int] = input_ids[0].tolist()
    sampling = Sampling(temperature=float(generation_config.temperature or 1.0) if drawn else 0.0)
    answer = Answer(Request(prompt, sampling), 0, list(prompt), len(prompt))
    longest = int(generation_config.max_length)

    def choose(scores: Tensor) -> tuple[int, bool]:
        """The token that follows `input_ids`, and whether it is the last one."""
        nonlocal input_ids
        scores = logits_processor(input_ids, scores[None].to(torch.float32, copy=True))
        token = torch.multinomial(scores.softmax(-1), 1) if drawn else scores.argmax(-1, keepdim=True)
        input_ids = torch.cat([input_ids, token], 1)
        if streamer is not None:
            streamer.put(token.cpu())
        answer.tokens.append(int(token))
        return int(token), bool(stopping_criteria(input_ids, None).all())

    known = cache.get_seq_length()
    began = time.perf_counter()
    out = model(
        input_ids=input_ids[:, known:],
        position_ids=torch.arange(known, len(prompt), device=input_ids.device)[None],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    token, ended = choose(out.logits[0, -1])
    drafter.observe([Verified(answer, Draft(), ())], len(prompt) - known, time.perf_counter() - began)
    while not ended:
        draft = drafter.propose(answer, longest - len(answer.tokens) - 1)
        began, held = time.perf_counter(), cache.get_seq_length()
        logits = _passed(model, cache, token, draft).logits[0]
        path: list[int] = []
        node = -1
        while True:
            token, ended = choose(logits[node + 1])
            node = _child(draft, node, token)
            if ended or node < 0:
                break
            path.append(node)
        _keep(cache, held, path)
        accepted = tuple(draft.tokens[n] for n in path)
        drafter.observe([Verified(answer, draft, accepted)], 1 + len(draft.tokens), time.perf_counter() - began)
    if streamer is not None:
        streamer.end()
    if generation_config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(sequences=input_ids, past_key_values=cache)  # type: ignore[arg-type]
    return input_ids


def _checked(model: Any, input_ids: Tensor, config: Any, given: dict[str, Any]) -> Cache:
    """The cache of a generation that can draft."""

    def refuse(what: str, why: str = "", remedy: str = "Generate without drafts") -> None:
        raise UsageError(what, why, remedy)

    if model.config.is_encoder_decoder:
        refuse("Drafts are for models with a decoder alone")
    if config.num_beams > 1 or (config.guidance_scale or 1) != 1:
        refuse("Drafts cannot be combined with beams or guidance")
    if input_ids.shape[0] != 1:
        refuse(f"Drafts are for one sequence, not {input_ids.shape[0]}", remedy="Generate one after another")
    if config.output_scores or config.output_logits or config.output_attentions or config.output_hidden_states:
        refuse("Scores, attentions and hidden states are not kept while drafting")
    mask = given.get("attention_mask")
    if mask is not None and not bool(mask.all()):
        refuse("Drafts cannot be combined with padding", "a node's position would be wrong", "Leave the padding out")
    cache = given.get("past_key_values")
    layers = getattr(cache, "layers", [])
    if not layers or not all(type(layer) is DynamicLayer for layer in layers):
        kinds = ", ".join(sorted({type(layer).__name__ for layer in layers})) or type(cache).__name__
        refuse(
            "This model's cache cannot give up the rows of rejected guesses",
            f"it has {kinds}; sliding windows and recurrent states only move on",
        )
    if model.config._attn_implementation not in ("eager", "sdpa"):
        refuse(
            f"{model.config._attn_implementation} attention takes no mask of a tree",
            remedy='Load the model with attn_implementation="sdpa"',
        )
    assert isinstance(cache, Cache)
    return cache


def _passed(model: Any, cache: Cache, token: int, draft: Draft) -> Any:
    """One pass over the newest token and the tree behind it."""
    held, size = cache.get_seq_length(), 1 + len(draft.tokens)
    depths = [0]
    sees = torch.eye(size, dtype=torch.bool)
    for i, parent in enumerate(draft.parents, 1):
        depths.append(depths[parent + 1] + 1)
        sees[i] |= sees[parent + 1]
    mask = torch.zeros(1, 1, size, held + size, dtype=model.dtype)
    mask[0, 0, :, held:].masked_fill_(~sees, torch.finfo(model.dtype).min)
    return model(
        input_ids=torch.tensor([[token, *draft.tokens]], device=model.device),
        position_ids=(held + torch.tensor([depths])).to(model.device),
        attention_mask=mask.to(model.device),
        past_key_values=cache,
        use_cache=True,
    )


def _child(draft: Draft, node: int, token: int) -> int:
    return next((j for j, t in enumerate(draft.tokens) if t == token and draft.parents[j] == node), -1)


def _keep(cache: Cache, held: int, path: list[int]) -> None:
    """Of the rows from `held` on keep the first and those of the path."""
    rows, kept = [held + 1 + node for node in path], held + 1 + len(path)
    for layer in cache.layers:
        assert isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None
        for part in (layer.keys, layer.values):
            if rows != [*range(held + 1, kept)]:
                part[:, :, held + 1 : kept] = part[:, :, torch.tensor(rows, device=part.device)]
        layer.keys, layer.values = layer.keys[:, :, :kept], layer.values[:, :, :kept]
