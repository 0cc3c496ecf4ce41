"""The door of the quantizers room: transformers' `quantization_config`, and the checks every format passes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)

from shoestring import models
from shoestring.core import catalog
from shoestring.core.errors import UsageError
from shoestring.core.files import atomic_folder
from shoestring.core.step import Step, Work
from shoestring.lab import tiny
from shoestring.methods.quantizers import _shared

VERB = "compress"
WORDS = ("settings", "price")


def adopt(module: ModuleType) -> None:
    """Make transformers know the format, under the `quant_method` its config writes."""
    name = module.example().quant_method
    if name not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(name)(type(module.example()))
        register_quantizer(name)(getattr(module, "QUANTIZER", _shared.GroupQuantizer))


def config(module: ModuleType, options: dict[str, Any]) -> Any:
    """The method's config.

    Raises:
        UsageError: an option the method does not have, or a value it refuses.
    """
    return type(module.example())(**options)


def apply(module: ModuleType, step: Step, source: Path, out: Path, work: Work) -> dict[str, Any]:
    """Quantize the folder `source` into `out`, one tensor at a time."""
    made = config(module, dict(step.options))
    loaded = models.load(str(source), quantization_config=made, trust_remote_code=work.trust_remote_code)
    with atomic_folder(out) as folder:
        loaded.model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
        _shared.seal(folder)
    return {"parameters": models.shape_of(loaded.path).parameters}


# --- the checks ---------------------------------------------------------------------------------------------------


def check_loads_what_it_saved_bit_for_bit(module: ModuleType) -> None:
    with tempfile.TemporaryDirectory() as base:
        model, folder = _quantized(module, Path(base))
        again = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(tiny.logits(again), tiny.logits(model)), "reloaded logits differ"
        assert next(again.parameters()).device.type == "cpu"


def check_refuses_a_reader_that_does_not_know_it(module: ModuleType) -> None:
    with tempfile.TemporaryDirectory() as base:
        _, folder = _quantized(module, Path(base))
        name = module.example().quant_method
        hidden = AUTO_QUANTIZATION_CONFIG_MAPPING.pop(name)
        try:
            AutoModelForCausalLM.from_pretrained(folder)
        except Exception as error:
            assert "shoestring.methods.quantizers" in str(error), f"the error does not name the remedy: {error}"
        else:
            raise AssertionError("loaded without the format being known")
        finally:
            AUTO_QUANTIZATION_CONFIG_MAPPING[name] = hidden


def check_bytes_are_as_promised(module: ModuleType) -> None:
    for settings in module.settings():
        with tempfile.TemporaryDirectory() as base:
            model, folder = _quantized(module, Path(base), settings)
            original = models.shape_of(Path(base) / "float")
            promised = module.price(original, settings).shape
            stored = sum(
                p.numel() * p.element_size() for p in {p.data_ptr(): p for p in model.state_dict().values()}.values()
            )
            weights = sum(w.stored for w in promised.weights if not w.tied)
            assert stored == weights, f"{settings}: price says {weights} bytes, the model holds {stored}"
            disk = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
            assert 0 <= disk - weights < 40_000, f"{settings}: {disk} bytes on disk for {weights} of weights"


def check_error_bound(module: ModuleType) -> None:
    """Every weight comes back within the bound that its packed module states."""
    with tempfile.TemporaryDirectory() as base:
        model, _ = _quantized(module, Path(base))
        original = tiny.model()
        for name, packed in _shared.packed_modules(model):
            weight: Any = original.get_submodule(name).weight
            worst = ((packed.unpacked() - weight.detach()).abs() - packed.bound()).max()
            assert worst <= 0, f"{name} is off by {worst:.2e} more than its bound"


def check_stays_close_to_the_original(module: ModuleType) -> None:
    with tempfile.TemporaryDirectory() as base:
        model, _ = _quantized(module, Path(base))
        reference, got = tiny.logits(tiny.model()), tiny.logits(model)
        error = (got - reference).norm() / reference.norm()
        assert error < 0.5, f"logits are off by {error:.2f} of their norm"


def check_one_token_equals_many(module: ModuleType) -> None:
    with tempfile.TemporaryDirectory() as base:
        model, _ = _quantized(module, Path(base))
        ids = tiny.batch(1, 8)
        with torch.no_grad():
            whole = model(ids).logits
            first = model(ids[:, :7], use_cache=True)
            last = model(ids[:, 7:], past_key_values=first.past_key_values).logits
        assert torch.allclose(whole[:, 7:], last, atol=1e-4), f"{(whole[:, 7:] - last).abs().max():.2e}"


def check_tied_weights_stay_tied(module: ModuleType) -> None:
    with tempfile.TemporaryDirectory() as base:
        model, folder = _quantized(module, Path(base))
        head, table = model.get_output_embeddings(), model.get_input_embeddings()
        assert head.weight is table.weight, "the head no longer shares the embedding's weights"
        again = AutoModelForCausalLM.from_pretrained(folder)
        assert again.get_output_embeddings().weight is again.get_input_embeddings().weight


def check_listed_modules_are_left_alone(module: ModuleType) -> None:
    with tempfile.TemporaryDirectory() as base:
        model, _ = _quantized(module, Path(base), {"modules_to_not_convert": ["layers.0"]})
        left = dict(model.named_modules())["model.layers.0.self_attn.q_proj"]
        assert type(left) is nn.Linear and left.weight.is_floating_point()


def check_a_frozen_base_can_be_trained_upon(module: ModuleType) -> None:
    with tempfile.TemporaryDirectory() as base:
        model, _ = _quantized(module, Path(base))
        hidden = torch.randn(2, 5, 64, requires_grad=True)
        layer = next(
            m for _, m in _shared.packed_modules(model) if isinstance(m, _shared.PackedLinear) and m.in_features == 64
        )
        layer(hidden).sum().backward()
        assert hidden.grad is not None and hidden.grad.abs().sum() > 0


def check_dequantize_gives_a_plain_model(module: ModuleType) -> None:
    with tempfile.TemporaryDirectory() as base:
        model, _ = _quantized(module, Path(base))
        before = tiny.logits(model)
        plain = model.dequantize()
        assert not list(_shared.packed_modules(plain)), "packed modules are left"
        # Only the rounding of activations is gone.
        error = (tiny.logits(plain) - before).norm() / before.norm()
        assert error < 0.05, f"logits moved by {error:.3f} of their norm"


def check_bfloat16(module: ModuleType) -> None:
    with tempfile.TemporaryDirectory() as base:
        model, _ = _quantized(module, Path(base), dtype=torch.bfloat16)
        out = tiny.logits(model)
        assert torch.isfinite(out).all()
        assert all(p.dtype == _shared.SCALE for n, p in model.state_dict().items() if n.endswith("scales"))


def check_odd_shapes_zero_rows_and_outliers(module: ModuleType) -> None:
    model = tiny.model(hidden_size=44, intermediate_size=70, num_attention_heads=2, num_key_value_heads=1, head_dim=22)
    q = model.model.layers[0].self_attn.q_proj.weight.data
    q[0] = 0
    q[1] = 0.5
    q[2, 3] = 1e3
    with tempfile.TemporaryDirectory() as base:
        quantized, _ = _quantized(module, Path(base), model=model)
        assert torch.isfinite(tiny.logits(quantized)).all()


def check_not_a_number_is_refused_by_name(module: ModuleType) -> None:
    model = tiny.model()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    with tempfile.TemporaryDirectory() as base:
        try:
            _quantized(module, Path(base), model=model)
        except Exception as error:
            assert "layers.1.mlp.up_proj" in str(error), f"the error does not name the tensor: {error}"
        else:
            raise AssertionError("a NaN weight was packed")


def check_repeatable(module: ModuleType) -> None:
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        a, b = _quantized(module, Path(one))[1], _quantized(module, Path(two))[1]
        assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()


def check_unsupported_model_is_a_clear_error(module: ModuleType) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    model = MixtralForCausalLM(
        MixtralConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    )
    with tempfile.TemporaryDirectory() as base:
        try:
            quantized, _ = _quantized(module, Path(base), model=model)
        except UsageError as error:
            assert "MixtralForCausalLM" in str(error)
        else:
            floats = [
                n
                for n, p in quantized.named_parameters()
                if p.dim() > 1 and p.is_floating_point() and "scales" not in n
            ]
            assert not floats, f"left as floats in silence: {floats[:2]}"


def check_bad_argument_is_a_clear_error(module: ModuleType) -> None:
    try:
        config(module, {"no_such_option": 1})
    except UsageError as error:
        assert "no_such_option" in str(error), error
    else:
        raise AssertionError("an unknown option was accepted")


def check_other_families_or_a_clear_error(module: ModuleType) -> None:
    for family in ("gpt2", "qwen3"):
        model = tiny.model(family)
        with tempfile.TemporaryDirectory() as base:
            quantized, folder = _quantized(module, Path(base), model=model)
            again = AutoModelForCausalLM.from_pretrained(folder)
            assert torch.equal(tiny.logits(again), tiny.logits(quantized)), family


CHECKS = [check for name, check in list(globals().items()) if name.startswith("check_")]


def _quantized(
    module: ModuleType,
    base: Path,
    options: dict[str, Any] | None = None,
    *,
    model: PreTrainedModel | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[PreTrainedModel, Path]:
    """A tiny float model saved at base/float, its quantized form, and the sealed folder of that."""
    catalog.contract("quantizers").adopt(module)
    source = base / "float"
    (model or tiny.model()).to(dtype).save_pretrained(source)  # type: ignore[arg-type]
    made = config(module, {**module.settings()[0], **(options or {})})
    quantized = AutoModelForCausalLM.from_pretrained(source, quantization_config=made, dtype=dtype).eval()
    quantized.save_pretrained(base / "packed")
    _shared.seal(base / "packed")
    return quantized, base / "packed"
