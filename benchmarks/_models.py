"""The files that the engine's benchmarks compare on: the default model in other formats, a random model of 1B."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np

# A Llama of 1.07 billion parameters; the token table is the head too.
BIG = dict(hidden=2048, layers=22, heads=32, kv_heads=4, intermediate=5632, context=2048)
_REQUANTIZE = """
import sys, llama_cpp as llama
params = llama.llama_model_quantize_default_params()
params.ftype, params.allow_requantize, params.nthread = llama.LLAMA_FTYPE_MOSTLY_BF16, True, int(sys.argv[3])
sys.exit(llama.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), params))
"""


def bfloat16_gguf(python: str, source: Path, out: Path, threads: int) -> Path:
    """The same numbers in bfloat16, written by llama.cpp itself."""
    words = [python, "-c", _REQUANTIZE, str(source), str(out), str(threads)]
    subprocess.run(words, check=True, capture_output=True)
    return out


def big_gguf(like: Path, out: Path) -> Path:
    """The random model in Q4_0, with the tokenizer of the GGUF file `like`."""
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
    shapes = [(name, shape) for name, shape in _shapes(vocab, "blk.{}.{}", _GGUF_NAMES) if len(shape) == 2]
    for name, (rows, cols) in shapes:
        blocks = rng.integers(0, 256, (rows, cols // 32, 18), np.uint8)
        blocks[..., :2] = np.array([0.004], np.float16).view(np.uint8)  # scales: weights of about 0.02
        writer.add_tensor(name, blocks.reshape(rows, -1), raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    for name, shape in _shapes(vocab, "blk.{}.{}", _GGUF_NAMES):
        if len(shape) == 1:
            writer.add_tensor(name, np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def big_int4(like: Path, out: Path) -> Path:
    """The random model as the quantizer int4 packs it, groups of 64, with the tokenizer of the folder `like`."""
    from safetensors.torch import save_file
    from torch import bfloat16, from_numpy, full, ones

    out.mkdir()
    for file in like.glob("token*"):
        shutil.copy(file, out)
    sizes, vocab = BIG, json.loads((like / "config.json").read_text())["vocab_size"]
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab, "dtype": "bfloat16",
        "hidden_size": sizes["hidden"], "num_hidden_layers": sizes["layers"], "num_attention_heads": sizes["heads"],
        "num_key_value_heads": sizes["kv_heads"], "intermediate_size": sizes["intermediate"], "rms_norm_eps": 1e-5,
        "max_position_embeddings": sizes["context"], "tie_word_embeddings": True, "rope_theta": 10000.0,
        "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "quantization_config": {"bits": 4, "embeddings": 4, "group_size": 64, "quant_method": "shoestring_int4"},
    }  # fmt: skip
    (out / "config.json").write_text(json.dumps(config))
    rng, tensors = np.random.default_rng(0), {}
    for name, shape in _shapes(vocab, "model.layers.{}.{}", _FOLDER_NAMES):
        if len(shape) == 1:
            tensors[f"{name}.weight"] = ones(shape, dtype=bfloat16)
        else:
            rows, cols = shape
            tensors[f"{name}.weight"] = from_numpy(rng.integers(0, 256, (rows, cols // 2), np.uint8))
            tensors[f"{name}.scales"] = full((rows, cols // 64), 0.004, dtype=bfloat16)
    save_file(tensors, out / "model.safetensors")
    return out


_ROLES = ("embedding", "final_norm", "norm", "q", "k", "v", "o", "mlp_norm", "gate", "up", "down")
_GGUF_NAMES = dict(zip(_ROLES, (
    "token_embd.weight", "output_norm.weight", "attn_norm.weight", "attn_q.weight", "attn_k.weight", "attn_v.weight",
    "attn_output.weight", "ffn_norm.weight", "ffn_gate.weight", "ffn_up.weight", "ffn_down.weight",
)))  # fmt: skip
_FOLDER_NAMES = dict(zip(_ROLES, (
    "model.embed_tokens", "model.norm", "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
    "self_attn.o_proj", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)))  # fmt: skip


def _shapes(vocab: int, layer_name: str, names: dict[str, str]) -> list[tuple[str, tuple[int, ...]]]:
    """(name, dimensions) of all tensors."""
    hidden, inner = BIG["hidden"], BIG["intermediate"]
    keys = hidden // BIG["heads"] * BIG["kv_heads"]
    shapes = {
        "norm": (hidden,), "q": (hidden, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, hidden),
        "mlp_norm": (hidden,), "gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner),
    }  # fmt: skip
    found: list[tuple[str, tuple[int, ...]]] = [
        (names["embedding"], (vocab, hidden)), (names["final_norm"], (hidden,))
    ]  # fmt: skip
    for layer in range(BIG["layers"]):
        found += [(layer_name.format(layer, names[role]), shape) for role, shape in shapes.items()]
    return found
