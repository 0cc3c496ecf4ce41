"""The door of the quantizers room: transformers' `quantization_config`, and the checks every format passes."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from dataclasses import replace
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

from shoestring import data, models
from shoestring.core import catalog
from shoestring.core.errors import ShoestringError, UsageError
from shoestring.core.files import atomic_folder
from shoestring.core.ledger import Ledger
from shoestring.core.shape import Shape
from shoestring.core.step import Step, Work
from shoestring.lab import tiny, tiny_mixture
from shoestring.methods.quantizers import _shared
from shoestring.models.anatomy import stacked
from shoestring.models.load import load_tokenizer, stored_dtype
from shoestring.models.packed import MOST_LEFT, PARTS, ROOM, ExpertMatrices, does_not_fit, parameters_of
from shoestring.models.packed_folder import pack_folder
from shoestring.models.saving import copy_tokenizer
from shoestring.models.seal import seal

VERB = "compress"
CATEGORY = "quantization"
PACKS = True  # what comes out has no float weights that a later step could change
WORDS = ("settings", "price")
OF_ENCODING = ("max_length", "on_long")
# A method may also define
#   compress(model: PreTrainedModel, config, rows, work: Work) -> PreTrainedModel: for what needs the whole model, data
#       or training before it packs. It gets the float model and returns one of packed layers (`models.packed.mark`);
#       `rows` are those of `data.encode`, `work.training` settings of the loop; `work.folder` outlives a crash.
#   stream(source: Path, folder: Path, config, rows, work: Work) -> dict[str, Any]: the same for a model that need not
#       fit into memory. It reads the folder `source` piece by piece and writes the packed model to `folder`; `rows` are
#       those of `data.encode`. Returns facts.
#   facts() of its config: what is worth knowing of how it packed, after it did so while a model was read.
#   AS_STORED: whether `compress` gets the weights in the type that they are stored in, also where the machine does not
#       compute in it.
#   TRAINING: the settings of the training loop that suit it; what the user says comes first.
#   ENOUGH: tokens a parameter that its training takes to be of use, where that is as much as pretraining.
#   QUANTIZER: transformers' quantizer of a format that is not packed linear layers.
#   base(**changes) -> PreTrainedModel: the tiny model that the checks run on, where Llama is not what it is for;
#       `changes` override its config.


def adopt(module: ModuleType) -> None:
    """Make transformers know the format, under the `quant_method` its config writes."""
    name = module.example().quant_method
    if name not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(name)(type(module.example()))
        register_quantizer(name)(getattr(module, "QUANTIZER", _shared.PackedQuantizer))


def config(module: ModuleType, options: dict[str, Any]) -> Any:
    """The method's config.

    Raises:
        UsageError: an option the method does not have, or a value it refuses.
    """
    return type(module.example())(**options)


def refuse(module: ModuleType, options: Mapping[str, Any], before: Shape, after: Shape) -> None:
    """Refuse a model most of whose weights stand where the method does not pack them, by shape alone.

    Args:
        before, after: the model's shape, and what the method's price makes of it.

    Raises:
        UsageError: it names such tensors.
    """
    made = config(module, dict(options))
    now = {weight.name: weight.stored for weight in after.weights}
    same = {weight.name for weight in before.weights if now.get(weight.name) == weight.stored}
    left = [w for w in before.weights if len(w.dims) > 2 and w.name in same and not made.left_alone(w.name)]
    packed = sum(weight.count for weight in before.weights if not weight.tied and weight.name not in same)
    if sum(weight.count for weight in left) > MOST_LEFT * packed:
        raise does_not_fit(f"A {before.family} model", [weight.name for weight in left])


def apply(module: ModuleType, step: Step, source: Path, out: Path, work: Work) -> dict[str, Any]:
    """Quantize the folder `source` into `out`: one tensor at a time, or as the method's own word for it does."""
    made = config(module, dict(step.options))
    facts: dict[str, Any] = {}
    with atomic_folder(out) as folder:
        if hasattr(module, "stream"):
            tokenizer = load_tokenizer(source, trust_remote_code=work.trust_remote_code)
            facts = module.stream(source, folder, made, _rows(module, source, tokenizer, step, work), work)
            parameters = models.shape_of(source, trust_remote_code=work.trust_remote_code).parameters
        elif hasattr(module, "compress"):
            dtype = stored_dtype(source) if getattr(module, "AS_STORED", False) else "auto"
            loaded = models.load(str(source), dtype=dtype, trust_remote_code=work.trust_remote_code)
            parameters = parameters_of(loaded.model)
            torch.manual_seed(work.seed)
            rows = _rows(module, source, loaded.tokenizer, step, work)
            model = module.compress(loaded.model, made, rows, replace(work, training=_loop(module, work)))
            facts = _facts(model)
            model.save_pretrained(folder)
        else:
            given: dict[str, Any] = {"trust_remote_code": work.trust_remote_code}
            model = pack_folder(source, folder, made, **given)
            if model is None:
                model = models.load(str(source), quantization_config=made, tokenizer=False, **given).model
                model.save_pretrained(folder)
            parameters, facts = parameters_of(model), _facts(model)
        copy_tokenizer(source, folder, trust_remote_code=work.trust_remote_code)
        seal(folder, ROOM)
    return {"parameters": parameters, **facts}


def _facts(model: PreTrainedModel) -> dict[str, Any]:
    # Not of the configuration that was given, of which transformers takes a copy.
    found: dict[str, Any] = getattr(model.config.quantization_config, "facts", dict)()
    return found


def _rows(module: ModuleType, source: Path, tokenizer: Any, step: Step, work: Work) -> Any:
    if not work.train:
        raise UsageError(f"the step {step} looks at data, and none was given", remedy="Add --data FILE")
    context = models.shape_of(source, trust_remote_code=work.trust_remote_code).context
    settings = {"max_length": 512, "on_long": "truncate", **_settings(module, work)}
    length = min(settings["max_length"], context or settings["max_length"])
    return data.encode(work.train, tokenizer, length, on_long=settings["on_long"]).rows


def _settings(module: ModuleType, work: Work) -> dict[str, Any]:
    return {**getattr(module, "TRAINING", {}), **work.training}


def _loop(module: ModuleType, work: Work) -> dict[str, Any]:
    """The settings of the training loop: without those of encoding."""
    return {name: value for name, value in _settings(module, work).items() if name not in OF_ENCODING}


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
        original = _base(module)
        _within_bounds(model, original)


def check_experts_in_one_tensor_or_a_clear_error(module: ModuleType) -> None:
    """Mixtures as transformers builds them: what holds for linear layers holds for the matrices of each expert."""
    for tied in (True, False):
        model = tiny_mixture.model(tie_word_embeddings=tied)
        with tempfile.TemporaryDirectory() as base:
            try:
                quantized, folder = _quantized(module, Path(base), model=copy.deepcopy(model))
            except UsageError as error:
                assert type(model).__name__ in str(error), error
                _refused_by_its_price(module, Path(base) / "float")
                return
            kinds = [packed for _, packed in _shared.packed_modules(quantized) if isinstance(packed, ExpertMatrices)]
            assert len(kinds) == 2 * model.config.num_hidden_layers, "experts were left as they are"
            again = AutoModelForCausalLM.from_pretrained(folder)
            before = tiny.logits(quantized)
            assert torch.equal(tiny.logits(again), before), "reloaded logits differ"
            if "check_error_bound" not in module.METHOD.expects:
                _within_bounds(quantized, model)
            if "check_bytes_are_as_promised" not in module.METHOD.expects:
                promised = module.price(models.shape_of(Path(base) / "float"), module.settings()[0]).shape
                weights = sum(weight.stored for weight in promised.weights if not weight.tied)
                disk = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
                assert 0 <= disk - weights < 40_000, f"{disk} bytes on disk for {weights} of weights"
            again.dequantize().save_pretrained(Path(base) / "plain")
            plain = AutoModelForCausalLM.from_pretrained(Path(base) / "plain")
            moved = (tiny.logits(plain) - before).norm() / before.norm()
            assert moved < 0.05, f"logits moved by {moved:.3f} of their norm"


def check_stays_close_to_the_original(module: ModuleType) -> None:
    with tempfile.TemporaryDirectory() as base:
        model, _ = _quantized(module, Path(base))
        reference, got = tiny.logits(_base(module)), tiny.logits(model)
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
        packed = [name for name, _ in _shared.packed_modules(model)]
        assert packed and not [name for name in packed if "layers.0" in name], packed
        assert all(p.is_floating_point() for name, p in model.named_parameters() if "layers.0" in name)


def check_a_frozen_base_can_be_trained_upon(module: ModuleType) -> None:
    with tempfile.TemporaryDirectory() as base:
        model, _ = _quantized(module, Path(base))
        seen: list[torch.Tensor] = []

        def watch(_: nn.Module, args: tuple) -> tuple:
            seen.append(args[0].detach().requires_grad_())
            return (seen[-1], *args[1:])

        layer = next(m for _, m in _shared.packed_modules(model) if not isinstance(m, nn.Embedding))
        layer.register_forward_pre_hook(watch)
        model(tiny.batch()).logits.square().sum().backward()
        assert seen[0].grad is not None and seen[0].grad.abs().sum() > 0


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
        for name, packed in _shared.packed_modules(model):
            for part, wanted in packed.format.empty(packed.rows, packed.columns).items():
                assert getattr(packed, part).dtype == wanted.dtype, f"{name}.{part} changed its type"


def check_odd_shapes_zero_rows_and_outliers(module: ModuleType) -> None:
    model = _base(
        module, hidden_size=44, intermediate_size=70, num_attention_heads=2, num_key_value_heads=1, head_dim=22
    )
    for weight in [p.data.flatten(0, -2) for n, p in model.named_parameters() if "layers.0." in n and p.dim() > 1]:
        weight[0] = 0
        weight[1] = 0.5
        weight[2, 3] = 1e3
    with tempfile.TemporaryDirectory() as base:
        quantized, _ = _quantized(module, Path(base), model=model)
        assert torch.isfinite(tiny.logits(quantized)).all()


def check_not_a_number_is_refused_by_name(module: ModuleType) -> None:
    model = _base(module)
    name, weight = [(n, p) for n, p in model.named_parameters() if "layers.1." in n and p.dim() > 1][-1]
    weight.data[-1, 3, ...] = float("nan")
    with tempfile.TemporaryDirectory() as base:
        try:
            _quantized(module, Path(base), model=model)
        except Exception as error:
            assert name.removesuffix(".weight") in str(error), f"the error does not name the tensor: {error}"
        else:
            raise AssertionError("a NaN weight was packed")


def check_repeatable(module: ModuleType) -> None:
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        a, b = _quantized(module, Path(one))[1], _quantized(module, Path(two))[1]
        assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()


def check_unsupported_model_is_a_clear_error(module: ModuleType) -> None:
    from transformers import GptOssConfig, GptOssForCausalLM

    mixture = GptOssConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, vocab_size=64, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    # No format is made for experts that are transposed and have biases; what is for experts does not fit a dense model.
    model: Any = tiny.model() if hasattr(module, "base") else GptOssForCausalLM(mixture)
    with tempfile.TemporaryDirectory() as base:
        try:
            quantized, _ = _quantized(module, Path(base), model=model)
        except UsageError as error:
            assert type(model).__name__ in str(error)
            _refused_by_its_price(module, Path(base) / "float")
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
            try:
                quantized, folder = _quantized(module, Path(base), model=model)
            except UsageError as error:
                assert type(model).__name__ in str(error), error
                continue
            again = AutoModelForCausalLM.from_pretrained(folder)
            assert torch.equal(tiny.logits(again), tiny.logits(quantized)), family


CHECKS = [check for name, check in list(globals().items()) if name.startswith("check_")]


def _base(module: ModuleType, **changes: Any) -> PreTrainedModel:
    made: PreTrainedModel = getattr(module, "base", tiny.model)(**changes)
    return made


def _within_bounds(model: PreTrainedModel, original: PreTrainedModel) -> None:
    owners = {f"{name}.{part}": f"{name}.{own}" for name, _ in stacked(original) for own, part in PARTS.items()}
    for name, packed in _shared.packed_modules(model):
        weight = original.get_parameter(owners.get(name, f"{name}.weight")).detach()
        worst = ((packed.unpacked() - weight.flatten(0, -2)).abs() - packed.bound()).max()
        assert worst <= 0, f"{name} is off by {worst:.2e} more than its bound"


def _refused_by_its_price(module: ModuleType, folder: Path) -> None:
    """What packing refuses is refused before any work, from the shape alone."""
    shape, options = models.shape_of(folder), module.settings()[0]
    try:
        refuse(module, options, shape, module.price(shape, options).shape)
    except ShoestringError:
        return
    raise AssertionError("its price takes a model that it refuses")


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
    (model or _base(module)).to(dtype).save_pretrained(source)  # type: ignore[arg-type]
    made = config(module, {**module.settings()[0], **(options or {})})
    rows = [{"input_ids": ids, "labels": ids} for ids in tiny.batch(8, 12).tolist()]
    if hasattr(module, "stream"):
        (base / "packed").mkdir()
        module.stream(source, base / "packed", made, rows, Work(Ledger(), base))
        seal(base / "packed", ROOM)
        return AutoModelForCausalLM.from_pretrained(base / "packed").eval(), base / "packed"
    if hasattr(module, "compress"):
        plain = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval()
        torch.manual_seed(0)
        work = Work(Ledger(), base, training={"max_steps": 2})
        quantized = module.compress(plain, made, rows, replace(work, training=_loop(module, work))).eval()
    else:
        quantized = AutoModelForCausalLM.from_pretrained(source, quantization_config=made, dtype=dtype).eval()
    quantized.save_pretrained(base / "packed")
    seal(base / "packed", ROOM)
    return quantized, base / "packed"
