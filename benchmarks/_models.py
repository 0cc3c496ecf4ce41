"""The files that the engine's benchmarks compare on: the default model in other formats, random models, one of 1B."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np

# A Llama of 1.07 billion parameters; the token table is the head too.
BIG = dict(hidden=2048, layers=22, heads=32, kv_heads=4, intermediate=5632, context=2048)
# GGUF's types -> columns of a block, its bytes, and where in it float16 scales stand.
_BLOCKS = {
    "Q4_0": (32, 18, (0,)), "Q2_K": (256, 84, (80, 82)), "Q3_K": (256, 110, (108,)), "Q4_K": (256, 144, (0, 2)),
    "TQ2_0": (256, 66, (64,)), "BF16": (1, 2, ()),
}  # fmt: skip
_REQUANTIZE = """
import sys, llama_cpp as llama
params = llama.llama_model_quantize_default_params()
params.allow_requantize, params.nthread = True, int(sys.argv[3])
params.ftype = getattr(llama, "LLAMA_FTYPE_MOSTLY_" + sys.argv[4])
sys.exit(llama.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), params))
"""


def requantized(python: str, source: Path, out: Path, threads: int, kind: str = "BF16") -> Path:
    """The GGUF file `source` in another type, written by llama.cpp itself."""
    words = [python, "-c", _REQUANTIZE, str(source), str(out), str(threads), kind]
    subprocess.run(words, check=True, capture_output=True)
    return out


def big_gguf(like: Path, out: Path, kind: str = "Q4_0") -> Path:
    """The random model of 1B with every matrix in one type, with the tokenizer of the GGUF file `like`."""
    import gguf

    reader, sizes = gguf.GGUFReader(like), BIG
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_context_length(sizes["context"])
    writer.add_embedding_length(sizes["hidden"])
    writer.add_block_count(sizes["layers"])
    writer.add_feed_forward_length(sizes["intermediate"])
    writer.add_head_count(sizes["heads"])
    writer.add_head_count_kv(sizes["kv_heads"])
    writer.add_rope_dimension_count(sizes["hidden"] // sizes["heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    for field in reader.fields.values():
        if field.name.startswith("tokenizer.") or field.name == "llama.vocab_size":
            inner = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    vocab = len(reader.fields["tokenizer.ggml.tokens"].data)
    rng = np.random.default_rng(0)
    width, size, places = _BLOCKS[kind]
    for name, (rows, cols) in _matrices(vocab, "blk.{}.{}", _GGUF_NAMES, sizes):
        if kind == "BF16":
            numbers = rng.standard_normal((rows, cols), np.float32) * np.float32(0.02)
            blocks = (numbers.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        else:
            blocks = rng.integers(0, 256, (rows, cols // width, size), np.uint8)
            for at in places:
                blocks[..., at : at + 2] = np.array([0.004], np.float16).view(np.uint8)  # weights of about 0.02
        writer.add_tensor(name, blocks.reshape(rows, -1), raw_dtype=gguf.GGMLQuantizationType[kind])
    for name, shape in _shapes(vocab, "blk.{}.{}", _GGUF_NAMES, sizes):
        if len(shape) == 1:
            writer.add_tensor(name, np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def packed(like: Path, out: Path, spec: str, table: str, sizes: dict[str, int] = BIG) -> Path:
    """A random model with its layers in the format `spec` and its token table in `table`; the rest is that of `like`.

    Codes are random; a format that only a weight's own numbers make is made of random ones.
    """
    from safetensors.torch import save_file
    from torch import bfloat16, ones

    out.mkdir()
    for file in like.glob("token*"):
        shutil.copy(file, out)
    config = json.loads((like / "config.json").read_text())
    vocab = config["vocab_size"]
    config |= {
        "hidden_size": sizes["hidden"], "num_hidden_layers": sizes["layers"], "num_attention_heads": sizes["heads"],
        "num_key_value_heads": sizes["kv_heads"], "intermediate_size": sizes["intermediate"],
        "head_dim": sizes["hidden"] // sizes["heads"], "max_position_embeddings": sizes["context"],
    }  # fmt: skip
    tensors, packing, seen = {}, {}, {}
    for name, shape in _shapes(vocab, "model.layers.{}.{}", _FOLDER_NAMES, sizes):
        if len(shape) == 1:
            tensors[f"{name}.weight"] = ones(shape, dtype=bfloat16)
            continue
        key = (table if name == _FOLDER_NAMES["embedding"] else spec, shape)
        if key not in seen:
            seen[key] = _random_codes(*key)
        packing[name], found = seen[key]
        tensors |= {f"{name}.{part}": tensor.clone() for part, tensor in found.items()}
    packing["lm_head"] = packing[_FOLDER_NAMES["embedding"]]
    config["quantization_config"] = {"quant_method": "shoestring_packed", "packing": packing}
    (out / "config.json").write_text(json.dumps(config))
    save_file(tensors, out / "model.safetensors")
    return out


def coded(source: Path, place: Path, coding: str) -> Path:
    """The bfloat16 model at `source` without losing a bit; the file `seconds` in it says how long that took."""
    from shoestring.core import catalog
    from shoestring.core.ledger import Ledger
    from shoestring.core.step import Step, Work

    begin = time.perf_counter()
    step = Step("compress", "dfloat11", {"coding": coding})
    module, room = catalog.module("dfloat11"), catalog.contract("quantizers")
    room.apply(module, step, source, place / coding, Work(Ledger(), place))
    (place / coding / "seconds").write_text(str(time.perf_counter() - begin))
    return place / coding


def sizes_of(folder: Path) -> dict[str, int]:
    """The sizes of the model in a folder, as `BIG` has them."""
    config = json.loads((folder / "config.json").read_text())
    return dict(
        hidden=config["hidden_size"], layers=config["num_hidden_layers"], heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"], intermediate=config["intermediate_size"], context=2048,
    )  # fmt: skip


def _random_codes(spec: str, shape: tuple[int, int]) -> tuple[str, dict[str, Any]]:
    """A format's full name, and its tensors."""
    import torch

    from shoestring.kernels import formats, layout
    from shoestring.kernels.formats._format import DTYPES

    made, rng = layout.parse(spec), np.random.default_rng(0)
    if made.says_its_size:
        numbers = torch.from_numpy(rng.standard_normal(shape, np.float32) * np.float32(0.02)).bfloat16()
        found = formats.of(made).pack(numbers)
        return f"{made.kind}/{found['weight'].numel()}", found
    tensors = {}
    for name, (dtype, dims) in made.tensors(*shape).items():
        if name == "scales":
            tensors[name] = torch.full(dims, 0.004, dtype=DTYPES[dtype])
            continue
        codes = rng.integers(0, 256, dims, np.uint8)
        if made.kind in ("ternary", "tritplanes"):
            codes &= ~((codes & codes >> 1 & 0x55) << 1)  # no trit has the code 3
        tensors[name] = torch.from_numpy(codes).view(DTYPES[dtype])
    return spec, tensors


_ROLES = ("embedding", "final_norm", "norm", "q", "k", "v", "o", "mlp_norm", "gate", "up", "down")
_GGUF_NAMES = dict(zip(_ROLES, (
    "token_embd.weight", "output_norm.weight", "attn_norm.weight", "attn_q.weight", "attn_k.weight", "attn_v.weight",
    "attn_output.weight", "ffn_norm.weight", "ffn_gate.weight", "ffn_up.weight", "ffn_down.weight",
)))  # fmt: skip
_FOLDER_NAMES = dict(zip(_ROLES, (
    "model.embed_tokens", "model.norm", "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
    "self_attn.o_proj", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)))  # fmt: skip


def _matrices(vocab: int, layer_name: str, names: dict[str, str], sizes: dict[str, int]) -> list[tuple[str, Any]]:
    return [(name, shape) for name, shape in _shapes(vocab, layer_name, names, sizes) if len(shape) == 2]


def _shapes(vocab: int, layer_name: str, names: dict[str, str], sizes: dict[str, int]) -> list[tuple[str, Any]]:
    """(name, dimensions) of all tensors."""
    hidden, inner = sizes["hidden"], sizes["intermediate"]
    keys = hidden // sizes["heads"] * sizes["kv_heads"]
    shapes = {
        "norm": (hidden,), "q": (hidden, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, hidden),
        "mlp_norm": (hidden,), "gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner),
    }  # fmt: skip
    found: list[tuple[str, Any]] = [(names["embedding"], (vocab, hidden)), (names["final_norm"], (hidden,))]
    for layer in range(sizes["layers"]):
        found += [(layer_name.format(layer, names[role]), shape) for role, shape in shapes.items()]
    return found
