"""Stored weights of every kind give the logits of transformers, and what is not sound is refused by name.

What all runners share is in `test_runners.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from peft import LoraConfig, get_peft_model
from runner_cases import VOCAB, Part, logits, make, off, own, pages, text
from safetensors.torch import load_file, save_file

from shoestring.core.errors import DoesNotFit, UsageError
from shoestring.engine.native_runner import NativeRunner
from shoestring.models.llama_like import NotNative
from shoestring.models.load import DEFAULT, locate, resolve

NEAR = 0.03  # keys and values are bfloat16


def opened(folder: Path, **options: Any) -> NativeRunner:
    runner = NativeRunner(folder, threads=1, **options)
    runner.reserve(8)
    return runner


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    def save(family: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
        make(family, **changes).to(dtype).save_pretrained(tmp_path / family)
        return tmp_path / family

    return save


SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "biases": ("llama", dict(attention_bias=True, mlp_bias=True)),
    "tied": ("llama", dict(tie_word_embeddings=True)),
    "gelu": ("llama", dict(hidden_act="gelu_pytorch_tanh")),
    "all heads": ("llama", dict(num_key_value_heads=4)),
    "wide heads": ("llama", dict(head_dim=48)),
    "linear": ("llama", dict(rope_parameters=dict(rope_type="linear", factor=3.0, rope_theta=1e4))),
    "llama3": ("llama", dict(rope_parameters=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0,
                             high_freq_factor=4.0, original_max_position_embeddings=32, rope_theta=1e4))),
    "yarn": ("qwen3", dict(rope_parameters=dict(rope_type="yarn", factor=4.0, rope_theta=1e4,
                           original_max_position_embeddings=32))),
    "windows of some layers": ("qwen2", dict(use_sliding_window=True, sliding_window=5, max_window_layers=1)),
    "windows without rotation": ("smollm3", dict(use_sliding_window=True, sliding_window=5)),
    "granite": ("granite", dict(embedding_multiplier=3.0)),
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(saved: Callable[..., Path], name: str) -> None:
    family, changes = SETTINGS[name]
    model = make(family, **changes)
    if name == "biases":  # transformers begins with zeros
        for key, value in model.named_parameters():
            if key.endswith("bias"):
                torch.nn.init.normal_(value)
    folder = saved(family)
    model.save_pretrained(folder)
    ids = text(60)
    assert off(logits(opened(folder), Part(ids, pages(60))), own(model, ids)) < NEAR


@pytest.mark.parametrize(
    ("stored", "dtype", "format", "error"),
    [
        (torch.float32, "auto", "fp32", 0.01), (torch.bfloat16, "auto", "bf16", 0.03),
        (torch.float16, "auto", "fp32", 0.01), (torch.bfloat16, "fp32", "fp32", 0.01),
        (torch.float32, "bf16", "bf16", 0.03),
    ],
)  # fmt: skip
def test_number_types(saved: Callable[..., Path], stored: torch.dtype, dtype: str, format: str, error: float) -> None:
    folder = saved("llama", stored)
    runner = opened(folder, dtype=dtype)
    model = make("llama").to(stored).float()
    assert runner.facts.precision == format
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    norms = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    assert runner.facts.weight_bytes == matrices * (4 if format == "fp32" else 2) + norms * 4
    ids = text(40)
    assert off(logits(runner, Part(ids, pages(40))), own(model, ids)) < error


@pytest.mark.parametrize("bits", [8, 4])
def test_packed_folders(saved: Callable[..., Path], tmp_path: Path, bits: int) -> None:
    """What the quantizers write, the token table included, is run as it is."""
    from transformers import AutoModelForCausalLM

    import shoestring.methods.quantizers  # noqa: F401
    from shoestring.core import catalog

    config = catalog.load(f"int{bits}")(group_size=32, embeddings=8)
    packed = AutoModelForCausalLM.from_pretrained(
        saved("llama", tie_word_embeddings=True), quantization_config=config, dtype=torch.float32
    )
    packed.save_pretrained(tmp_path / "packed")
    runner = opened(tmp_path / "packed")
    assert set(runner.facts.precision.split(" + ")) == {"int8", f"int{bits}"}
    ids = text(40)
    # Both round activations to eight bits, and keys a little apart may round to other neighbours.
    assert off(logits(runner, Part(ids, pages(40))), own(packed, ids)) < 2 * NEAR
    tensors = load_file(tmp_path / "packed" / "model.safetensors")
    stored = sum(t.numel() * t.element_size() * (2 if "norm" not in n and t.dtype == torch.float32 else 1)
                 for n, t in tensors.items())  # fmt: skip
    assert runner.facts.weight_bytes >= stored
    name = next(n for n in tensors if n.endswith("q_proj.scales"))
    save_file({n: t for n, t in tensors.items() if n != name}, tmp_path / "packed" / "model.safetensors")
    with pytest.raises(UsageError, match="q_proj.scales .* is missing"):
        opened(tmp_path / "packed")
    save_file({**tensors, name: tensors[name][:, :1].contiguous()}, tmp_path / "packed" / "model.safetensors")
    with pytest.raises(UsageError, match="q_proj.scales"):
        opened(tmp_path / "packed")


# ---- GGUF ----

_NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
          "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
          "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
          "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}  # fmt: skip
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(path: Path, model: Any, kind: str, freqs: bool = False) -> dict[str, np.ndarray]:
    """Write a tiny model as GGUF the way converters do; its weights after the round trip, by transformers' names."""
    from gguf import GGMLQuantizationType, GGUFWriter, dequantize, quantize

    config = model.config
    family = config.model_type
    writer = GGUFWriter(path, family)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(dim)
    writer.add_value_length(dim)
    back: dict[str, np.ndarray] = {}
    for name, tensor in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        values = tensor.detach().numpy()
        interleaved = family in ("llama", "smollm3") and owner.endswith(("q_proj", "k_proj"))
        if interleaved:
            values = values.reshape(-1, 2, dim // 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        if owner in _TOP:
            stored = f"{_TOP[owner]}.{leaf}"
        else:
            _, _, layer, part = owner.split(".", 3)
            stored = f"blk.{layer}.{_NAMES[part]}.{leaf}"
        quantized = GGMLQuantizationType[kind if tensor.ndim == 2 else "F32"]
        raw = quantize(np.ascontiguousarray(values), quantized)
        writer.add_tensor(stored, raw, raw_dtype=quantized)
        rounded = dequantize(raw, quantized).reshape(values.shape)
        if interleaved:
            rounded = rounded.reshape(-1, dim // 2, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        back[name] = rounded
    if freqs:
        writer.add_tensor("rope_freqs.weight", np.linspace(1, 4, dim // 2, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return back


@pytest.mark.parametrize(
    ("family", "kind"),
    [("llama", k) for k in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")]
    + [("qwen2", "Q4_0"), ("qwen3", "Q8_0"), ("smollm3", "F32")],
)
def test_gguf(tmp_path: Path, family: str, kind: str) -> None:
    changes: dict[str, Any] = {"no_rope_layers": [1, 1, 1]} if family == "smollm3" else {}
    model = make(family, **changes)
    for key, value in model.named_parameters():
        if key.endswith("bias"):
            torch.nn.init.normal_(value)
    back = write_gguf(tmp_path / "tiny.gguf", model, kind)
    model.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in back.items()}, strict=False)
    runner = opened(tmp_path / "tiny.gguf")
    assert runner.facts.precision == {"F16": "fp32", "F32": "fp32"}.get(kind, kind.lower())
    ids = text(40)
    # Formats in blocks round the activations to eight bits as well.
    assert off(logits(runner, Part(ids, pages(40))), own(model, ids)) < (0.15 if kind.startswith("Q") else NEAR)


def test_gguf_frequencies(tmp_path: Path) -> None:
    model = make("llama")
    write_gguf(tmp_path / "tiny.gguf", model, "F32", freqs=True)
    model.model.rotary_emb.inv_freq /= torch.linspace(1, 4, 8)
    ids = text(40)
    assert off(logits(opened(tmp_path / "tiny.gguf"), Part(ids, pages(40))), own(model, ids)) < NEAR


def test_gguf_of_another_type(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", make("llama"), "Q5_0")
    with pytest.raises(NotNative, match="no kernels for Q5_0, as token_embd.weight is stored.*torch runner"):
        opened(tmp_path / "tiny.gguf")


# ---- refusals ----


def test_weights_that_do_not_belong(saved: Callable[..., Path]) -> None:
    folder = saved()
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    for change, said in (
        ({name: tensors[name][:-1].contiguous()}, rf"{name} .*\(95, 64\).*\(96, 64\)"),
        ({"model.norm.weight": torch.full((64,), torch.nan)}, "model.norm.weight .*not finite"),
        ({name: tensors[name].int()}, "no kernels for I32"),
        ({"model.layers.0.odd.weight": torch.ones(2)}, "what model.layers.0.odd.weight is for"),
    ):
        save_file({**tensors, **change}, file)
        with pytest.raises(UsageError, match=said):
            opened(folder)
    save_file({n: t for n, t in tensors.items() if n != name}, file)
    with pytest.raises(UsageError, match=f"lack 1 tensors.*{name}"):
        opened(folder)


def test_packed_by_others(saved: Callable[..., Path]) -> None:
    folder = saved()
    config = json.loads((folder / "config.json").read_text())
    for method in ({"quant_method": "gptq", "bits": 4}, {"quant_method": None}, ["x"]):
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": method}))
        with pytest.raises(NotNative, match="packed with"):
            opened(folder)


def test_options(saved: Callable[..., Path]) -> None:
    folder = saved()
    with pytest.raises(NotNative, match="float16"):
        opened(folder, dtype="float16")
    with pytest.raises(UsageError, match="cache type"):
        opened(folder, cache_dtype="int4")


def test_memory_for_the_cache(saved: Callable[..., Path]) -> None:
    runner = NativeRunner(saved(), threads=1)
    for blocks in (1 << 34, 1 << 60):
        with pytest.raises(DoesNotFit, match="keys and values are not to be had"):
            runner.reserve(blocks)
    with pytest.raises(UsageError, match="no cache"):
        runner.copy_blocks([(0, 1)])
    runner.reserve(2)
    runner.close()


def test_long_positions(saved: Callable[..., Path]) -> None:
    """Rotary tables grow with what is asked, up to the context."""
    folder = saved("llama", max_position_embeddings=9000)
    runner, ids = opened(folder), text(12)
    far = list(range(8900, 8912))
    found = logits(runner, Part(ids, pages(12), positions=far))
    with torch.no_grad():
        wanted = make("llama", max_position_embeddings=9000)(
            torch.tensor([ids]), position_ids=torch.tensor([far])
        ).logits[0].numpy()  # fmt: skip
    assert off(found, wanted) < NEAR
    with pytest.raises(UsageError):
        logits(runner, Part(ids, pages(12), positions=[p + 100 for p in far]))


# ---- adapters ----


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    get_peft_model(make("llama"), config).save_pretrained(tmp_path / "lora")
    return tmp_path / "lora"


def test_ranks_and_scales_by_pattern(saved: Callable[..., Path], tmp_path: Path) -> None:
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"], init_lora_weights=False,
        rank_pattern={"q_proj": 2, "layers.1.mlp.down_proj": 6},
        alpha_pattern={r"^model.layers.0.self_attn.v_proj": 32},
        use_rslora=True,
    )  # fmt: skip
    adapted = get_peft_model(make("llama"), config)
    adapted.save_pretrained(tmp_path / "lora")
    runner, ids = opened(saved()), text(20)
    number = runner.add_adapter(str(tmp_path / "lora"))
    found = logits(runner, Part(ids, pages(20), adapter=number))
    assert off(found, own(adapted, ids)) < NEAR < off(found, own(make("llama"), ids))


MORE: dict[str, dict[str, Any]] = {
    "use_dora": {"use_dora": True}, "bias": {"bias": "all"}, "modules_to_save": {"modules_to_save": ["lm_head"]},
    "layer_replication": {"layer_replication": [[0, 2]]}, "init_lora_weights": {"init_lora_weights": "pissa"},
    "lora_bias": {"lora_bias": True}, "peft_type": {"peft_type": "IA3"},
    "alora_invocation_tokens": {"alora_invocation_tokens": [1]}, "some_new_field": {"some_new_field": 3},
    "r=": {"r": 5}, "lora_alpha": {"lora_alpha": "x"}, "rank_pattern": {"rank_pattern": {"(a+)+": 3}},
    "alpha_pattern": {"alpha_pattern": {"(": 3}},
}  # fmt: skip


@pytest.mark.parametrize("name", MORE)
def test_more_than_low_rank(saved: Callable[..., Path], lora: Path, name: str) -> None:
    runner = opened(saved())
    file = lora / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, **MORE[name]}))
    said = {"peft_type": "IA3", "r=": "says 5"}.get(name, name)
    with pytest.raises(UsageError, match=said):
        runner.add_adapter(str(lora))
    file.write_text(json.dumps(config))
    assert runner.add_adapter(str(lora)) == 0, "a good adapter loads right after"


def test_adapter_tensors_that_do_not_belong(saved: Callable[..., Path], lora: Path) -> None:
    runner, file = opened(saved()), lora / "adapter_model.safetensors"
    sound = load_file(file)
    a = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    b = a.replace("lora_A", "lora_B")
    other = "base_model.model.model.layers.0.self_attn.{}.weight"
    cases: list[tuple[dict[str, torch.Tensor], str]] = [
        ({**sound, a: torch.ones(4, 63)}, "lora_A.*64 x 64"),
        ({**sound, b: torch.ones(63, 4)}, "lora_B.*64 x 64"),
        ({**sound, a: torch.full((4, 64), torch.nan)}, "lora_A.* not finite"),
        ({**sound, a: torch.ones(4, 64, dtype=torch.int32)}, "I32"),
        ({**sound, a: torch.ones(3, 64)}, "ranks 3 and 4"),
        ({n: t for n, t in sound.items() if n != b}, "only lora_A"),
        ({**sound, other.format("q_proj.lora_magnitude_vector"): torch.ones(2)}, "lora_magnitude_vector"),
        ({**sound, "base_model.model.lm_head.lora_A.weight": torch.ones(4, 64)}, "lm_head"),
        ({**sound, a.replace("layers.0", "layers.9"): torch.ones(4, 64)}, "layers.9"),
        ({"x": torch.ones(1)}, "holds x"),
    ]
    for tensors, said in cases:
        save_file(tensors, file)
        with pytest.raises(UsageError, match=said):
            runner.add_adapter(str(lora))
    save_file(sound, file)
    assert runner.add_adapter(str(lora)) == 0 and runner.add_adapter(str(lora)) == 1
    runner.drop_adapter(0)
    assert runner.add_adapter(str(lora)) == 0
    for number in (2, -1):
        with pytest.raises(UsageError, match="no adapter"):
            runner.drop_adapter(number)


# ---- the default model ----

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time, in a",
    "Water boils at a temperature of",
]


def greedy(runner: NativeRunner, ids: list[int], count: int) -> list[int]:
    found, at = [], 0
    step = ids
    for _ in range(count):
        best = int(logits(runner, Part(step, list(range(8)), at))[-1].argmax())
        at += len(step)
        found.append(best)
        step = [best]
    return found


@pytest.mark.real
def test_greedy_tokens_of_the_default_model() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = resolve(DEFAULT)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        AutoTokenizer.from_pretrained(folder),
    )
    runner = opened(folder)
    assert runner.facts.precision == "bf16" and runner.facts.weight_bytes == 2 * 134_515_008 + 2 * 61 * 576
    for prompt in PROMPTS:
        ids = tokenizer(prompt).input_ids
        out = model.generate(torch.tensor([ids]), max_new_tokens=20, min_new_tokens=20, do_sample=False)
        assert greedy(runner, ids, 20) == out[0, len(ids) :].tolist(), prompt


@pytest.mark.real
def test_the_gguf_file_is_near_its_conversion() -> None:
    packed, plain = opened(locate(DEFAULT)), opened(resolve(DEFAULT), dtype="fp32")
    encoded = tokenizers.Tokenizer.from_file(str(resolve(DEFAULT) / "tokenizer.json")).encode(" ".join(PROMPTS * 2))
    ids = encoded.ids
    found, wanted = logits(packed, Part(ids, pages(80))), logits(plain, Part(ids, pages(80)))
    # The same numbers; the difference is that activations are rounded to eight bits.
    assert off(found, wanted) < 0.06
    assert (found.argmax(1) == wanted.argmax(1)).mean() > 0.9
    assert packed.facts.precision == "q8_0 + q4_1" and packed.facts.eos == plain.facts.eos == (2,)
    assert packed.facts.weight_bytes < 98_400_000 < plain.facts.weight_bytes // 5


assert VOCAB == 96


@pytest.mark.parametrize("cache", ["bf16", "int8", "fp32"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_nodes_of_a_tree_get_the_bits_of_plain_decoding(saved: Callable[..., Path], family: str, cache: str) -> None:
    """Whatever stands between a node and its ancestors, also where the tree crosses the end of a span of 256 slots."""
    runner = opened(saved(family, max_position_embeddings=1024), cache_dtype=cache)
    runner.reserve(128)
    rng = np.random.default_rng(3)
    for held in (5, 31, 200, 245, 250, 255, 256, 500, 511):
        prompt, size = text(held, seed=held), 24
        tokens = text(size, seed=1)
        parents = [-1, *(int(rng.integers(max(i - 4, 0), i)) for i in range(1, size))]
        depths = [0] * size
        for i, parent in enumerate(parents):
            depths[i] = depths[parent] + 1 if parent >= 0 else 0
        table, other = pages(held + size), pages(held + size, 64)
        logits(runner, Part(prompt, table))
        tree = logits(runner, Part(tokens, table, held, parents, [held + d for d in depths]))
        for node in (size - 1, size - 2, size // 2):
            line = [node]
            while parents[line[0]] >= 0:
                line.insert(0, parents[line[0]])
            logits(runner, Part(prompt, other))
            alone = [logits(runner, Part([tokens[n]], other, held + d))[0] for d, n in enumerate(line)]
            for n, row in zip(line, alone):
                assert np.array_equal(tree[n], row), (held, n, line)
    runner.close()
