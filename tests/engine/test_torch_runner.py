"""What is particular to the runner on torch: which models it takes, and how it leaves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import transformers
from peft import IA3Config, LoraConfig, get_peft_model
from runner_cases import CONFIGS, Part, batch, logits, make, pages, text
from safetensors.torch import load_file, save_file

from shoestring.core.errors import DoesNotFit, ShoestringError, UsageError
from shoestring.engine.torch_runner import TorchRunner
from shoestring.lab import tiny
from shoestring.models.load import Loaded

REFUSED: dict[str, dict[str, Any]] = {
    "bloom": dict(hidden_size=32, n_layer=2, n_head=4, vocab_size=96),
    "falcon": dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=96),
    "gptj": dict(n_embd=32, n_layer=2, n_head=4, rotary_dim=4, vocab_size=96),
    "jamba": dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False, vocab_size=96, num_experts=2,
    ),
}  # fmt: skip


def loaded(model: Any, kind: str = "causal") -> Loaded:
    return Loaded(model, None, Path("."), "tiny", kind)


def outputs(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


@pytest.fixture(scope="module")
def llama() -> transformers.PreTrainedModel:
    return make("llama")


@pytest.fixture
def runner(llama: transformers.PreTrainedModel) -> Any:
    opened = TorchRunner(loaded(llama), cache_dtype="fp32")
    opened.reserve(8)
    yield opened
    opened.close()


# ---- which models ----


@pytest.mark.parametrize("family", REFUSED)
def test_other_attention_is_refused_by_name(family: str) -> None:
    config = transformers.AutoConfig.for_model(family, **REFUSED[family])
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    before = outputs(model, [5, 6, 7])
    with pytest.raises(UsageError, match=type(model).__name__):
        TorchRunner(loaded(model))
    assert torch.equal(outputs(model, [5, 6, 7]), before)


_DECODER = dict(
    d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48, vocab_size=96, init_std=0.2
)
OTHERWISE: dict[str, tuple[str, dict[str, Any]]] = {
    "bart": ("counts positions by itself", dict(_DECODER, max_position_embeddings=64)),
    "bert": ("attention to later tokens", {}),
    "diffllama": ("a second attention", dict(num_key_value_heads=2)),
    "minimax": ("cannot be called", dict(num_key_value_heads=2, head_dim=8, num_local_experts=2)),
}


@pytest.mark.parametrize("family", OTHERWISE)
def test_what_would_be_computed_otherwise_is_refused(family: str) -> None:
    """Their attention comes here, and pages would still give other tokens than the model does."""
    said, more = OTHERWISE[family]
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=96)
    config = transformers.AutoConfig.for_model(family, **(more if "d_model" in more else {**sizes, **more}))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    before = outputs(model, [5, 6, 7])
    with pytest.raises(UsageError, match=said):
        TorchRunner(loaded(model))
    assert torch.equal(outputs(model, [5, 6, 7]), before)


@pytest.mark.parametrize(("family", "kind"), [("bert", "masked"), ("t5", "seq2seq")])
def test_only_models_that_continue_text(family: str, kind: str) -> None:
    with pytest.raises(UsageError, match=kind):
        TorchRunner(loaded(tiny.model(family), kind))


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_exact_without_rounding(family: str) -> None:
    """With a cache in float32 nothing is lost: the logits are those of the model itself."""
    model, ids = make(family), text(40)
    wanted = outputs(model, ids).numpy()
    runner = TorchRunner(loaded(model), cache_dtype="auto")
    runner.reserve(4)
    runner.run(batch(Part(ids[:23], pages(40))))
    found = logits(runner, Part(ids[23:], pages(40), 23))
    np.testing.assert_allclose(found, wanted[23:], rtol=1e-3, atol=1e-3)
    runner.close()


def test_a_mixture_that_was_saved_as_it_trains() -> None:
    model, ids = make("mixtral", output_router_logits=True), text(12)
    wanted = outputs(model, ids).numpy()
    runner = TorchRunner(loaded(model), cache_dtype="fp32")
    runner.reserve(4)
    np.testing.assert_allclose(logits(runner, Part(ids, pages(12))), wanted, rtol=1e-3, atol=1e-3)
    runner.close()
    assert model.config.output_router_logits


def test_bfloat16() -> None:
    model, ids = make("llama").to(torch.bfloat16), text(40)
    wanted = outputs(model, ids).float().numpy()
    runner = TorchRunner(loaded(model))
    runner.reserve(4)
    found = logits(runner, Part(ids, pages(40)))
    assert found.dtype == np.float32 and runner.facts.precision == "bfloat16"
    assert np.sqrt(((found - wanted) ** 2).mean()) < 0.05 * wanted.std()
    half = runner.run(batch(Part(ids, pages(40))), 0, 1)
    assert half.dtype == torch.bfloat16 and torch.equal(runner.from_host(runner.to_host(half)), half)
    runner.close()


@pytest.mark.parametrize("bits", ["int4", "int8"])
def test_packed_weights(bits: str, tmp_path: Path) -> None:
    """A folder that a quantizer packed runs as it is, and one token of it costs what its own forward costs."""
    from shoestring.core import catalog
    from shoestring.models import load

    config = catalog.load(bits)()
    make("llama").save_pretrained(tmp_path / "plain")
    model = load(tmp_path / "plain", quantization_config=config).model
    model.save_pretrained(tmp_path / "packed")
    runner, ids = TorchRunner(tmp_path / "packed", cache_dtype="fp32"), text(20)
    runner.reserve(2)
    assert runner.facts.precision.startswith(bits)
    np.testing.assert_allclose(
        logits(runner, Part(ids, pages(20))), outputs(model, ids).float().numpy(), rtol=2e-2, atol=2e-2
    )
    runner.close()


def test_longer_than_learned_rotations() -> None:
    """A model whose rotations change beyond a length is served up to that length."""
    factors = dict(short_factor=[1.0] * 8, long_factor=[2.0] * 8, rope_type="longrope", rope_theta=10000.0)
    config = transformers.AutoConfig.for_model(
        "phi3", **{**CONFIGS["mistral"], "sliding_window": None}, original_max_position_embeddings=32,
        rope_parameters=dict(factors, original_max_position_embeddings=32),
    )  # fmt: skip
    runner = TorchRunner(loaded(transformers.AutoModelForCausalLM.from_config(config).eval()))
    assert runner.facts.context == 32
    runner.close()


# ---- how it leaves them ----


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_close_gives_the_model_back(family: str, tmp_path: Path) -> None:
    model, ids = make(family), text(12)
    before, attention, forwards = outputs(model, ids), model.config._attn_implementation, _own_forwards(model)
    runner = TorchRunner(loaded(model))
    runner.reserve(2)
    targets = ["c_attn"] if family == "gpt2" else ["q_proj"]
    get_peft_model(make(family), LoraConfig(target_modules=targets)).save_pretrained(tmp_path)
    runner.add_adapter(str(tmp_path))
    with pytest.raises(ShoestringError, match="engine"):
        model(torch.tensor([ids]))
    runner.close()
    assert torch.equal(outputs(model, ids), before)
    assert model.config._attn_implementation == attention and _own_forwards(model) == forwards
    assert not any(module._forward_hooks for name, module in model.named_modules() if name.endswith("proj"))
    runner.close()  # twice is once


def _own_forwards(model: torch.nn.Module) -> int:
    return sum("forward" in vars(module) for module in model.modules())


def test_reserve_comes_first(llama: Any) -> None:
    runner = TorchRunner(loaded(llama))
    with pytest.raises(ShoestringError, match="reserve"):
        runner.run(batch(Part([5], [0])))
    runner.close()


def test_cache_that_does_not_fit(llama: Any) -> None:
    runner = TorchRunner(loaded(llama))
    for blocks in (1 << 40, 2 * psutil.virtual_memory().total // runner.facts.block_bytes):
        with pytest.raises(DoesNotFit, match="memory"):
            runner.reserve(blocks)
    runner.close()


def test_unknown_cache_type(llama: Any) -> None:
    with pytest.raises(UsageError, match="int7"):
        TorchRunner(loaded(llama), cache_dtype="int7")


# ---- adapters ----


def adapter(folder: Path, **options: Any) -> Path:
    config = LoraConfig(**{**dict(r=4, target_modules=["q_proj"], init_lora_weights=False), **options})
    get_peft_model(make("llama"), config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "options",
    [
        dict(use_dora=True),
        dict(bias="lora_only"),
        dict(modules_to_save=["lm_head"]),
        dict(target_modules=["lm_head"]),
        dict(target_modules=["embed_tokens"]),
        dict(trainable_token_indices=[1]),
    ],
    ids=lambda options: "-".join(options),
)
def test_more_than_products_is_refused(runner: TorchRunner, tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        runner.add_adapter(str(adapter(tmp_path, **options)))
    assert runner.add_adapter(str(adapter(tmp_path / "good"))) >= 0


def test_other_tuners_are_refused(runner: TorchRunner, tmp_path: Path) -> None:
    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    get_peft_model(make("llama"), config).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="IA3"):
        runner.add_adapter(str(tmp_path))


def test_damaged_adapters_are_refused(runner: TorchRunner, tmp_path: Path) -> None:
    folder = adapter(tmp_path)
    file, tensors = folder / "adapter_model.safetensors", load_file(folder / "adapter_model.safetensors")
    first = next(iter(tensors))
    for broken in (
        {**tensors, first: tensors[first] * float("nan")},
        {key: tensor for key, tensor in tensors.items() if key != first},
        {**tensors, first: tensors[first][:, :-1].contiguous()},
        {**tensors, "base_model.model.other.weight": tensors[first].clone()},
    ):
        save_file(broken, file)
        with pytest.raises(UsageError):
            runner.add_adapter(str(folder))
    assert not runner._adapters.numbers
    save_file(tensors, file)
    runner.drop_adapter(runner.add_adapter(str(folder)))


def test_patterns_of_rank_and_alpha(runner: TorchRunner, llama: Any, tmp_path: Path) -> None:
    from peft import PeftModel

    folder = adapter(
        tmp_path, target_modules=["q_proj", "v_proj"], lora_alpha=3, rank_pattern={"layers.1.self_attn.q_proj": 2},
        alpha_pattern={"v_proj": 9},
    )  # fmt: skip
    number, ids = runner.add_adapter(str(folder)), text(20)
    wanted = outputs(PeftModel.from_pretrained(make("llama"), folder).merge_and_unload(), ids).numpy()
    found = logits(runner, Part(ids, pages(20), adapter=number))
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3)
    assert json.loads((folder / "adapter_config.json").read_text())["alpha_pattern"]
