"""A model folder as one GGUF file, where GGUF has types that carry its weights exactly. No torch.

Integers in groups become GGUF's blocks of 32 with the scale of their group: 4 bits are Q4_0, 8 bits Q8_0. Floats stay
what they are. Everything else has no exact type there and is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shoestring.core.errors import UsageError
from shoestring.core.files import atomic_file
from shoestring.kernels.layout import Layout, parse
from shoestring.models.folder import end_tokens
from shoestring.models.gguf_tokenizer import cut_of
from shoestring.models.llama_like import (
    GGUF_FAMILIES,
    GGUF_NAMES,
    PROJECTIONS,
    LlamaLike,
    NotNative,
    describe,
    packing,
    usual_rotation,
)
from shoestring.models.tensors import Source, Stored, aligned, floats, open_source

# What transformers calls the family -> what GGUF does.
_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "smollm3": "smollm3"}
_PLAIN, _CONTROL, _USER_DEFINED = 1, 3, 4  # kinds of tokens
_BLOCK = 32
_PLAINLY = "`shoestring export` writes plain weights first"


def write_gguf(folder: Path, out: Path, *, trust_remote_code: bool = False) -> Path:
    """Write the model in `folder` as the file `out`, whole or not at all; returns it.

    Raises:
        UsageError: a family, a tokenizer, a weight format or a number that GGUF does not carry exactly.
    """
    import gguf

    source = open_source(folder, trust_remote_code=trust_remote_code)
    try:
        model = describe(source)
    except NotNative as error:  # whose remedy is another runner
        raise UsageError(
            f"{folder} has no exact form in GGUF",
            error.what,
            f"Families: {', '.join(_ARCHITECTURES)}; without --format gguf plain weights of any are written",
        ) from None
    architecture = _ARCHITECTURES.get(model.family)
    if (
        architecture is None
        or any(model.windows)
        or model.rotates != usual_rotation(model.family, model.layers)
        or model.rotary.factor != 1
        or model.activation != "silu"
        or model.layer_kv_heads
        or model.layer_intermediate
        or model.shares
    ):
        raise UsageError(
            f"{folder} has no exact form in GGUF",
            f"not for a {model.family} model with these layers, windows, rotary positions and activation",
            f"Families: {', '.join(_ARCHITECTURES)}",
        )
    tensors = list(_tensors(source, model))
    values = dict(_tokenizer(folder, model.vocab))
    with atomic_file(out) as temp:
        writer = gguf.GGUFWriter(str(temp), architecture)
        _describe(writer, source, model)
        for key, value in values.items():
            _add(writer, key, value)
        for name, kind, data in tensors:
            writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return out


def _describe(writer: Any, source: Source, model: LlamaLike) -> None:
    writer.add_context_length(model.context)
    writer.add_embedding_length(model.hidden)
    writer.add_block_count(model.layers)
    writer.add_feed_forward_length(model.intermediate)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_layer_norm_rms_eps(model.epsilon)
    writer.add_rope_dimension_count(2 * len(model.rotary.inverse))
    writer.add_rope_freq_base(_theta(source.values))
    writer.add_vocab_size(model.vocab)


def _theta(config: Mapping[str, Any]) -> float:
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return float(given.get("rope_theta", config.get("rope_theta", 10_000.0)))


def _tensors(source: Source, model: LlamaLike) -> Iterator[tuple[str, str, np.ndarray]]:
    """Name, type and bytes [rows, bytes of a row] of every tensor."""
    packed = packing(source)
    places = [("embedding", 0), ("final_norm", 0), *([] if model.tied else [("head", 0)])]
    norms = ("attention_norm", "mlp_norm", *(("q_norm", "k_norm") if model.head_norms else ()))
    places += [(role, layer) for layer in range(model.layers) for role in (*PROJECTIONS, *norms)]
    for role, layer in places:
        own, name = model.name(role, layer), GGUF_NAMES[role].format(layer)
        stored, order = source.tensors[f"{own}.weight"], _order(model, role)
        if own in packed:
            rows, cols = model.shape_of(role, layer)
            scales = source.tensors.get(f"{own}.scales")
            kind, data = _blocks(own, parse(packed[own].partition("+")[0]), rows, cols, stored, scales)
        elif role.endswith("norm"):
            kind, data = "F32", floats(stored).view(np.uint8)
        else:
            kind, data = stored.dtype, stored.data.reshape(len(stored.data) and stored.dims[0], -1)
        yield f"{name}.weight", kind, data if order is None else data[order]
        if f"{own}.bias" in source.tensors and role in PROJECTIONS:
            bias = floats(source.tensors[f"{own}.bias"])
            yield f"{name}.bias", "F32", (bias if order is None else bias[order]).copy().view(np.uint8)
    plain = np.float32(1) / np.power(
        np.float32(_theta(source.values)),
        np.arange(0, 2 * len(model.rotary.inverse), 2, dtype=np.float32) / np.float32(2 * len(model.rotary.inverse)),
    )
    if not np.array_equal(plain, model.rotary.inverse):
        yield "rope_freqs.weight", "F32", (plain / model.rotary.inverse).astype(np.float32).view(np.uint8)


def _order(model: LlamaLike, role: str) -> np.ndarray | None:
    """Some families have the rows of a head that rotate together side by side in GGUF."""
    if role not in ("q", "k") or not GGUF_FAMILIES[_ARCHITECTURES[model.family]]:
        return None
    rows = model.shape_of(role)[0]
    return np.arange(rows).reshape(-1, 2, model.head_dim // 2).swapaxes(1, 2).reshape(-1)


def _blocks(
    name: str, layout: Layout, rows: int, cols: int, stored: Stored, scales: Stored | None
) -> tuple[str, np.ndarray]:
    """The type and the blocks of a packed matrix, [rows, bytes]."""
    if layout.kind != "int" or scales is None:
        raise UsageError(f"GGUF has no type that carries {layout} exactly, as {name} is packed", remedy=_PLAINLY)
    if cols % _BLOCK:
        raise UsageError(f"{name} has {cols} columns, and GGUF's blocks have {_BLOCK}", remedy=_PLAINLY)
    groups, group = layout.groups(cols), layout.group
    wide = (aligned(scales.data, 2).view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(rows, groups)
    with np.errstate(over="ignore"):
        halves = wide.astype(np.float16)
    if not np.array_equal(halves.astype(np.float32), wide):
        raise UsageError(f"{name} has scales that GGUF's float16 does not hold", remedy=_PLAINLY)
    codes = stored.data.reshape(rows, groups, -1)
    if layout.planes == 4:
        codes = np.concatenate([codes & 15, codes >> 4], 2)
    blocks = codes.reshape(rows, -1)[:, :cols].reshape(rows, -1, _BLOCK)
    if layout.planes == 4:
        blocks = blocks[..., : _BLOCK // 2] | blocks[..., _BLOCK // 2 :] << 4
    each = np.repeat(halves, group // _BLOCK, 1)[:, : cols // _BLOCK, None]
    data = np.concatenate([each.view(np.uint8), blocks], 2).reshape(rows, -1)
    return ("Q4_0" if layout.planes == 4 else "Q8_0"), data


def _tokenizer(folder: Path, vocab: int) -> Iterator[tuple[str, Any]]:
    """The metadata of the folder's byte-level tokenizer."""
    import tokenizers

    file = folder / "tokenizer.json"
    if not file.is_file():
        raise UsageError(f"{folder} has no tokenizer.json, which GGUF needs in the file", remedy="Add its tokenizer")
    written = json.loads(file.read_text(encoding="utf-8"))
    model, added = written.get("model", {}), written.get("added_tokens", [])
    cut = cut_of(written)
    if model.get("type") != "BPE" or cut is None:
        raise UsageError(
            f"The tokenizer of {folder} cuts texts in a way that has no name in GGUF known here",
            remedy="Use a model with a byte-level tokenizer such as those of SmolLM, Llama 3 and Qwen",
        )
    tokens = {number: token for token, number in model["vocab"].items()}
    kinds = dict.fromkeys(tokens, _PLAIN)
    for token in added:
        tokens[token["id"]] = token["content"]
        kinds[token["id"]] = _CONTROL if token.get("special") else _USER_DEFINED
    if max(tokens) >= vocab:
        raise UsageError(f"The tokenizer of {folder} has {max(tokens) + 1} tokens, and the model {vocab} rows for them")
    yield "tokenizer.ggml.model", "gpt2"
    yield "tokenizer.ggml.pre", cut
    yield "tokenizer.ggml.tokens", [tokens.get(number, f"[PAD{number}]") for number in range(vocab)]
    yield "tokenizer.ggml.token_type", [kinds.get(number, 5) for number in range(vocab)]
    yield "tokenizer.ggml.merges", [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    numbers = {token: number for number, token in tokens.items()}
    said = folder / "tokenizer_config.json"
    config = json.loads(said.read_text(encoding="utf-8")) if said.is_file() else {}
    for key in ("bos", "eos", "unk", "pad"):
        token = _text(config.get(f"{key}_token"))
        if token in numbers:
            yield f"tokenizer.ggml.{ {'unk': 'unknown', 'pad': 'padding'}.get(key, key) }_token_id", numbers[token]
    ends = [number for number in end_tokens(folder) if number != numbers.get(_text(config.get("eos_token")))]
    for key, number in zip(("eot", "eom"), ends):
        yield f"tokenizer.ggml.{key}_token_id", number
    around = tokenizers.Tokenizer.from_file(str(file)).encode("").ids
    for key in ("bos", "eos"):
        own = numbers.get(_text(config.get(f"{key}_token")))
        yield f"tokenizer.ggml.add_{key}_token", own in around or bool(config.get(f"add_{key}_token"))
    template = folder / "chat_template.jinja"
    text = template.read_text(encoding="utf-8") if template.is_file() else config.get("chat_template")
    if isinstance(text, str):
        yield "tokenizer.chat_template", text


def _text(token: Any) -> str:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    else:
        writer.add_string(key, value)
