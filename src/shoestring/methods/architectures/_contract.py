"""The door of the architectures room: transformers' Auto classes, and the checks every architecture passes."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from shoestring import data, models
from shoestring.core import catalog
from shoestring.core.errors import ShoestringError, UsageError
from shoestring.core.files import atomic_folder
from shoestring.core.ledger import Ledger
from shoestring.core.step import Step, Work
from shoestring.lab import tiny
from shoestring.methods.architectures import _shared

VERB = "compress"
CATEGORY = "compact architecture"
WORDS = ("FAMILIES", "MODELS", "NEUTRAL", "settings", "price", "convert")
# What these and `METHOD.provides` are:
#   provides: the transformers configuration of the architecture. Its `model_type` begins with `_shared.PREFIX`, its
#       first base is `_shared.Sealed`, and `AutoModelForCausalLM.from_config` builds a new model from it.
#   FAMILIES: model types that can be converted.
#   MODELS: (configuration class, model class) pairs, one for each of them.
#   example() -> a frozen dataclass of the options of a conversion, whose `__post_init__` raises UsageError; the options
#       that the checks convert with, so they must suit a model of six layers, or the method's own `base`.
#   NEUTRAL: options under which the converted model is the base itself.
#   settings() -> options worth trying, the gentlest first.
#   price(shape, options) -> core.method.Price; options that are not given are those of the first settings.
#   convert(model, options, rows) -> _shared.Converted: the architecture with copies of the weights of `model`, which
#       stays as it is and may be the teacher. `rows` are encoded texts to measure on, possibly none. Raises UsageError
#       that names the class of a model it does not know how to convert.
# A method may also define
#   heal(converted, base, options, rows, valid, work) -> dict: trains `converted.model` in place, with `base` as the
#       teacher, through `shoestring.training`, checkpoints in `work.folder`; returns facts. Called when there is text.
#   TRAINING: settings of the training loop that suit it; what the user says comes first.
#   base() -> PreTrainedModel: a tiny model of the kind it converts, where that is no Llama, such as one with experts.
#   NEUTRAL_ERROR: how far, of their norm, logits may be off under NEUTRAL, where the neutral weights are a product.
OF_ENCODING = ("max_length", "on_long")
MOST_VALID = 32  # texts that healing is watched on: it is seen there, not measured


def adopt(module: ModuleType) -> None:
    """Make transformers' Auto classes know the architecture."""
    for made, model in module.MODELS:
        if made.model_type not in CONFIG_MAPPING:
            AutoConfig.register(made.model_type, made)
            AutoModelForCausalLM.register(made, model)


def config(module: ModuleType, options: Mapping[str, Any]) -> Any:
    """The options of a conversion, those of the first settings where nothing else is said.

    Raises:
        UsageError: an option the method does not have, or a value it refuses.
    """
    made = type(module.example())
    stray = set(options) - set(made.__dataclass_fields__)
    if stray:
        known = ", ".join(sorted(made.__dataclass_fields__))
        raise UsageError(f"{made.__name__} has no option {', '.join(sorted(stray))}", remedy=f"Known: {known}")
    return made(**{**module.settings()[0], **options})


def families(module: ModuleType) -> tuple[str, ...]:
    """Model types that can be converted."""
    return tuple(module.FAMILIES)


def apply(module: ModuleType, step: Step, source: Path, out: Path, work: Work) -> dict[str, Any]:
    """Convert the folder `source`, heal on `work.train` if there is any, and write the folder `out`, whole or not at
    all. What was measured on the way is returned, and stands in `out` under the method's name."""
    options = config(module, step.options)
    loaded = models.load(str(source), trust_remote_code=work.trust_remote_code)
    torch.manual_seed(work.seed)
    settings = _training(module, work)
    rows, valid = _encoded(loaded, replace(work, training=settings))
    settings = {name: value for name, value in settings.items() if name not in OF_ENCODING}
    converted = build(module, loaded.model, options, rows, valid, replace(work, training=settings))
    name = module.__name__.rpartition(".")[2]
    with atomic_folder(out) as folder:
        converted.model.save_pretrained(folder)
        if loaded.tokenizer is not None:
            loaded.tokenizer.save_pretrained(folder)
        facts = json.dumps(converted.facts, indent=2)
        (folder / f"{name}.json").write_text(facts + "\n", encoding="utf-8")
        (folder / "README.md").write_text(_card(name, Path(loaded.ref).name, options), encoding="utf-8")
    return {"parameters": models.shape_of(converted.model).parameters, **converted.facts}


def build(
    module: ModuleType, model: PreTrainedModel, options: Any, rows: _shared.Rows, valid: _shared.Rows, work: Work
) -> _shared.Converted:
    """The architecture made from `model`, healed where the method can and there are rows; the model is in eval mode."""
    converted: _shared.Converted = module.convert(model, options, rows)
    facts = dict(converted.facts)
    if rows and hasattr(module, "heal"):
        facts["healing"] = module.heal(converted, model, options, rows, valid, work)
    converted.model.eval()
    return replace(converted, facts=facts)


def _training(module: ModuleType, work: Work) -> dict[str, Any]:
    own = dict(getattr(module, "TRAINING", {}))
    if {"num_train_epochs", "max_seconds"} & set(work.training):
        own.pop("max_steps", None)  # who says how long in another way means that
    return {**own, **work.training}


def _encoded(loaded: models.Loaded, work: Work) -> tuple[_shared.Rows, _shared.Rows]:
    context = models.shape_of(loaded.model).context
    length = min(work.training.get("max_length") or 512, context or 2**31)
    on_long = work.training.get("on_long", "truncate")
    parts = (work.train, work.valid)
    train, valid = (data.encode(p, loaded.tokenizer, length, on_long=on_long).rows if p else [] for p in parts)
    return train, valid[:MOST_VALID]


def _card(name: str, base: str, options: Any) -> str:
    said = "\n".join(f"- {key}: {value}" for key, value in asdict(options).items())
    return (
        f"---\nlibrary_name: transformers\n---\n\n# {name}\n\n"
        f"Made from {base} with shoestring's method {name}:\n\n{said}\n\n"
        "transformers knows this architecture after one line:\n\n"
        f"```python\n{_shared.LINE}\n"
        "from transformers import AutoModelForCausalLM\n\n"
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")\n```\n\n'
        f"`{name}.json` holds what was measured and chosen when it was made.\n"
    )


# --- the checks ---------------------------------------------------------------------------------------------------


def check_loads_what_it_saved_bit_for_bit(module: ModuleType) -> None:
    model = _converted(module)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = AutoModelForCausalLM.from_pretrained(folder)
        assert type(again) is type(model), type(again).__name__
        assert torch.equal(tiny.logits(again), tiny.logits(model)), "reloaded logits differ"
        again.save_pretrained(folder)
        twice = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(tiny.logits(twice), tiny.logits(model)), "what was loaded and saved again differs"


def check_refuses_a_reader_that_does_not_know_it(module: ModuleType) -> None:
    model = _converted(module)
    kind = model.config.model_type
    assert kind.startswith(_shared.PREFIX), f"model_type {kind} does not begin with {_shared.PREFIX}"
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        hidden = CONFIG_MAPPING._extra_content.pop(kind)
        try:
            AutoModelForCausalLM.from_pretrained(folder)
        except ValueError as error:
            assert kind in str(error), f"the error does not name the architecture: {error}"
        else:
            raise AssertionError("loaded without the architecture being known")
        finally:
            CONFIG_MAPPING._extra_content[kind] = hidden
        try:
            type(_base(module)).from_pretrained(folder)
        except Exception as error:
            assert "shoestring.methods.architectures" in str(error), f"the error does not name the remedy: {error}"
        else:
            raise AssertionError("the base's own class reads it and fills what it lacks with random weights")


def check_builds_from_its_configuration(module: ModuleType) -> None:
    model = _converted(module)
    made = AutoModelForCausalLM.from_config(type(model.config)(**model.config.to_dict()))
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert {name: p.shape for name, p in made.named_parameters()} == shapes, "other parameters than the converted one"
    assert torch.isfinite(tiny.logits(made.eval())).all()


def check_neutral_is_the_base(module: ModuleType) -> None:
    base = _base(module)
    before = tiny.logits(base)
    got = tiny.logits(_converted(module, {**module.NEUTRAL}, base=base))
    allowed = getattr(module, "NEUTRAL_ERROR", 0.0)
    error = ((got - before).norm() / before.norm()).item()
    assert error <= allowed, f"logits are off by {error:.2e} of their norm"
    assert torch.equal(tiny.logits(base), before), "the base was changed"


def check_the_base_stays_as_it_is(module: ModuleType) -> None:
    base = _base(module)
    before, weights = tiny.logits(base), {name: p.detach().clone() for name, p in base.named_parameters()}
    _fit(_converted(module, base=base), 2)
    moved = [name for name, p in base.named_parameters() if not torch.equal(p, weights[name])]
    assert not moved, f"training the converted model moved the base's {moved[:3]}"
    assert torch.equal(tiny.logits(base), before)


def check_parameters_and_bytes_are_as_promised(module: ModuleType) -> None:
    for settings in (asdict(module.example()), {**module.NEUTRAL}, *module.settings()):
        base = _base(module)
        try:
            model = _converted(module, settings, base=base)
        except UsageError:
            assert settings in module.settings(), "the example or the neutral setting is refused"
            continue  # a setting for larger models
        promised = module.price(models.shape_of(base), settings).shape
        count = sum(p.numel() for p in model.parameters())
        assert promised.parameters == count, f"{settings}: price says {promised.parameters}, the model has {count}"
        shape = models.shape_of(model)
        assert shape.parameters == count, f"{settings}: its shape counts {shape.parameters}, the model has {count}"
        assert shape.kv_bytes(7) == promised.kv_bytes(7), f"{settings}: price says another size of the cache"
        stored = sum(w.stored for w in promised.weights if not w.tied)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            disk = sum(f.stat().st_size for f in Path(folder).glob("*.safetensors"))
            assert 0 <= disk - stored < 40_000, f"{settings}: {disk} bytes on disk for {stored} of weights"
            assert models.shape_of(folder).parameters == count, "the folder tells another number of parameters"


def check_cached_equals_uncached(module: ModuleType) -> None:
    model: Any = _converted(module)
    ids = tiny.batch(2, 10)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        cache, steps = None, []
        for start, end in ((0, 4), *((i, i + 1) for i in range(4, 8)), (8, 10)):
            out = model(ids[:, start:end], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
        worst = (torch.cat(steps, 1) - whole).abs().max()
        assert worst < 1e-4, f"token by token the logits are off by {worst:.2e}"
        settings = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False)
        plain, cached = (model.generate(ids, use_cache=use, **settings) for use in (False, True))
        assert torch.equal(plain, cached), "with a cache other tokens come out"
        beams = [model.generate(ids, use_cache=use, num_beams=3, **settings) for use in (False, True)]
        assert torch.equal(*beams), "with a cache and beams other tokens come out"


def check_no_look_ahead(module: ModuleType) -> None:
    model = _converted(module)
    ids = tiny.batch(2, 12)
    other = ids.clone()
    other[:, 7:] = 3 + (other[:, 7:] * 5) % (tiny.VOCAB - 3)
    before, after = tiny.logits(model, ids)[:, :7], tiny.logits(model, other)[:, :7]
    assert torch.allclose(before, after, atol=1e-5), "later tokens change what stands before them"


def check_left_padding_does_not_matter(module: ModuleType) -> None:
    model = _converted(module)
    ids = tiny.batch(2, 8)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
    padded[1, :3] = ids[1, -3:]  # the second row is full: padding must differ row by row
    mask = torch.ones_like(padded)
    mask[0, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        got = model(padded, attention_mask=mask, position_ids=positions).logits
        alone = model(ids[:1]).logits[0]
        full = model(padded[1:]).logits[0]
    assert torch.allclose(got[0, 3:], alone, atol=1e-4), "what is padded on the left answers differently"
    assert torch.allclose(got[1], full, atol=1e-4), "the row beside a padded one answers differently"


def check_every_parameter_gets_a_gradient(module: ModuleType) -> None:
    model = _converted(module).train()
    ids = tiny.batch(8, 12)
    model(input_ids=ids, labels=ids).loss.backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not dead, f"no gradient reaches {dead[:3]}"


def check_overfits_one_batch(module: ModuleType) -> None:
    losses = _fit(_converted(module), 60)
    assert losses[-1] < 0.1 * losses[0], f"{losses[0]:.3f} -> {losses[-1]:.3f}"


def check_bfloat16(module: ModuleType) -> None:
    model = _converted(module, base=_base(module).to(torch.bfloat16))  # type: ignore[arg-type]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}, "not all parameters are bfloat16"
    wide, narrow = tiny.logits(_converted(module)), tiny.logits(model)
    error = (narrow - wide).norm() / wide.norm()
    assert error < 0.1, f"logits are off by {error:.3f} of their norm"


def check_repeatable(module: ModuleType) -> None:
    one, two = _converted(module), _converted(module)
    assert torch.equal(tiny.logits(one), tiny.logits(two)), "converting twice gives two models"
    assert _fit(one, 3) == _fit(two, 3), "training twice gives two models"


def check_tied_weights_stay_tied(module: ModuleType) -> None:
    base = _base(module)
    if base.get_output_embeddings().weight is not base.get_input_embeddings().weight:
        raise AssertionError("the base of the checks has no tied weights")
    model = _converted(module, base=base)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for found in (model, AutoModelForCausalLM.from_pretrained(folder)):
            assert found.get_output_embeddings().weight is found.get_input_embeddings().weight, "no longer tied"


def check_unsupported_model_is_a_clear_error(module: ModuleType) -> None:
    refused = 0
    for family in tiny.FAMILIES:
        base = tiny.model(family)
        try:
            model = _converted(module, base=base)
        except UsageError as error:
            assert type(base).__name__ in str(error), f"the error does not name the class: {error}"
            refused += 1
        else:
            assert torch.isfinite(tiny.logits(model)).all()
    assert refused, "every family is taken"


def check_bad_argument_is_a_clear_error(module: ModuleType) -> None:
    try:
        config(module, {"no_such_option": 1})
    except UsageError as error:
        assert "no_such_option" in str(error), error
    else:
        raise AssertionError("an unknown option was accepted")


def check_folder_is_whole_or_absent(module: ModuleType) -> None:
    with tempfile.TemporaryDirectory() as base, Ledger() as ledger:
        source, out = Path(base) / "base", Path(base) / "out"
        work = Work(ledger, Path(base) / "work")
        step = Step("compress", module.__name__.rpartition(".")[2], {**module.NEUTRAL})
        tiny.model("gpt2").save_pretrained(source)
        try:
            apply(module, step, source, out, work)
        except ShoestringError:
            assert not out.exists(), "a refused conversion left a folder"
        _base(module).save_pretrained(source)
        (out / "model").mkdir(parents=True)
        try:
            apply(module, step, source, out, work)
        except UsageError as error:
            assert "not empty" in str(error), error
        else:
            raise AssertionError("a folder that holds something was written over")
        (out / "model").rmdir()
        apply(module, step, source, out, work)
        card = (out / "README.md").read_text(encoding="utf-8")
        assert _shared.LINE in card, "the model card does not name the line it needs"
        found = models.load(out).model
        assert torch.equal(tiny.logits(found), tiny.logits(_converted(module, {**module.NEUTRAL})))


CHECKS = [check for name, check in list(globals().items()) if name.startswith("check_")]


def _base(module: ModuleType) -> PreTrainedModel:
    """A tiny model of the kind that the method converts, the same every time."""
    if hasattr(module, "base"):
        made: PreTrainedModel = module.base()
        return made.eval()
    return tiny.model(num_hidden_layers=6)


def _converted(
    module: ModuleType, options: Mapping[str, Any] | None = None, *, base: PreTrainedModel | None = None
) -> PreTrainedModel:
    """The tiny base converted with the example's options, or with others."""
    catalog.contract("architectures").adopt(module)
    chosen = module.example() if options is None else config(module, options)
    rows = [{"input_ids": row, "labels": row} for row in tiny.batch(4, 12).tolist()]
    converted: _shared.Converted = module.convert(base if base is not None else _base(module), chosen, rows)
    return converted.model.eval()


def _fit(model: PreTrainedModel, steps: int, rate: float = 3e-3) -> list[float]:
    """Train on one batch; the losses."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate)
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(**tiny.inputs(model)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses
