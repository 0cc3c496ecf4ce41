"""The door of the pruners room: a smaller transformers model comes out, and the checks that hold it to that."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import lru_cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from shoestring import data, models
from shoestring.core.errors import UsageError
from shoestring.core.files import atomic_folder
from shoestring.core.ledger import Ledger
from shoestring.core.shape import PROJECTIONS
from shoestring.core.step import Step, Work
from shoestring.lab import tiny
from shoestring.methods.pruners import _shared
from shoestring.models import uneven
from shoestring.models.load import UNEVEN, quiet, stored_dtype

VERB = "compress"
CATEGORY = "pruning"
WORDS = ("prune", "settings", "price")
# What these and `METHOD.provides` are:
#   provides: a frozen dataclass of options, a subclass of `_shared.PrunerOptions`. Its `sparsity` (a field, or worked
#       out from others) is the budget that the result is held against.
#   example() -> such options, those that the checks prune with; so they must suit a model of two layers.
#   settings() -> options worth trying, the gentlest first.
#   price(shape, options) -> core.method.Price; options that are not given are those of the first settings.
#   prune(loaded: models.Loaded, options, rows, valid, work) -> _shared.Pruned: a new, smaller model, or `loaded.model`
#       changed in place. `rows` and `valid` are encoded text, empty when none was given. `work.training` has the
#       settings of the training loop, `work.folder` is for its checkpoints. Raises UsageError that names the class of
#       a model it cannot prune.
# A method may also define
#   NEEDS_DATA = True: there is no pruning without `rows`.
#   TRAINING: settings of the training loop that suit it; what the user says comes first.
#   base(**changes) -> PreTrainedModel: the tiny model that the checks run on, where Llama is not what it is for; such a
#       method refuses a model that lacks what it prunes, and names its class.
#   ROLES: of which weights `sparsity` is a share, those of the blocks' matrices where it is not said.
#   encode(corpus, tokenizer, max_length, *, options, on_long) -> data.Encoded: rows of another form than `data.encode`.
OF_ENCODING = ("max_length", "on_long")
USUAL_LENGTH = 512


def adopt(module: ModuleType) -> None:
    """Nothing is left to make known: transformers knows what comes out by the room's own imports."""


def config(module: ModuleType, options: Mapping[str, Any]) -> Any:
    """The method's options, those of the first settings where nothing else is said.

    Raises:
        UsageError: an option the method does not have, or a value it refuses.
    """
    made = type(module.example())
    stray = set(options) - set(made.__dataclass_fields__)
    if stray:
        known = ", ".join(sorted(made.__dataclass_fields__))
        raise UsageError(f"{made.__name__} has no option {', '.join(sorted(stray))}", remedy=f"Known: {known}")
    return made(**{**module.settings()[0], **options})


def families(module: ModuleType) -> tuple[str, ...] | None:
    """Model types that can be pruned; None where that is a question of what a model has."""
    cut = tuple(prefix + family for prefix in ("", UNEVEN) for family in uneven.FAMILIES)
    return None if hasattr(module, "base") else cut


def apply(module: ModuleType, step: Step, source: Path, out: Path, work: Work) -> dict[str, Any]:
    """Prune the model of the folder `source` with the help of `work.train`, and write `out` whole or not at all."""
    options = config(module, step.options)
    if getattr(module, "NEEDS_DATA", False) and not work.train:
        raise UsageError(f"the step {step} learns from text, and no data was given", remedy="Add --data FILE")
    loaded = models.load(str(source), trust_remote_code=work.trust_remote_code)
    before = models.shape_of(loaded.model).parameters
    settings = {**getattr(module, "TRAINING", {}), **work.training}
    rows, valid = (_encoded(module, options, loaded, part, settings) for part in (work.train, work.valid))
    left = {name: value for name, value in settings.items() if name not in OF_ENCODING}
    pruned = run(module, loaded, options, rows, valid, replace(work, training=left))
    pruned.model.to(stored_dtype(loaded.path))  # type: ignore[arg-type]
    with atomic_folder(out) as folder:
        save(pruned.model, folder)
        if loaded.tokenizer is not None:
            loaded.tokenizer.save_pretrained(folder)
        name = module.__name__.rpartition(".")[2]
        (folder / "README.md").write_text(_card(name, Path(loaded.ref).name, options, pruned.model), encoding="utf-8")
    after = sum(p.numel() for p in pruned.model.parameters())
    return {"parameters_before": before, "parameters": after, **pruned.facts}


def run(
    module: ModuleType, loaded: models.Loaded, options: Any, rows: _shared.Rows, valid: _shared.Rows, work: Work
) -> _shared.Pruned:
    """The method's `prune` with its seed set; the model comes out in eval mode."""
    torch.manual_seed(work.seed)
    pruned: _shared.Pruned = module.prune(loaded, options, rows, valid, work)
    pruned.model.eval()
    return pruned


def save(model: PreTrainedModel, folder: Path) -> None:
    """Write configuration and weights."""
    with quiet():
        model.save_pretrained(folder)


def _encoded(
    module: ModuleType, options: Any, loaded: models.Loaded, corpus: Any, settings: Mapping[str, Any]
) -> _shared.Rows:
    if not corpus:
        return []
    encode = partial(module.encode, options=options) if hasattr(module, "encode") else data.encode
    context = models.shape_of(loaded.model).context or 2**31
    length = min(int(settings.get("max_length") or USUAL_LENGTH), context)
    rows: _shared.Rows = encode(corpus, loaded.tokenizer, length, on_long=str(settings.get("on_long", "truncate"))).rows
    return rows


def _card(name: str, base: str, options: Any, model: PreTrainedModel) -> str:
    said = "\n".join(f"- {key}: {value}" for key, value in asdict(options).items())
    home = type(model).__module__
    needs = not home.startswith("transformers.")
    why = (
        "Its layers differ, which transformers knows after one line:"
        if needs
        else f"It is a plain `{type(model).__name__}`:"
    )
    return (
        f"---\nbase_model: {base}\nlibrary_name: transformers\n---\n\n# {name}\n\n"
        f"Pruned from {base} with shoestring's method {name}:\n\n{said}\n\n{why}\n\n"
        f"```python\n{f'import {home}' + chr(10) if needs else ''}"
        "from transformers import AutoModelForCausalLM\n\n"
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")\n```\n'
    )


# --- the checks ---------------------------------------------------------------------------------------------------


def check_reaches_the_budget(module: ModuleType) -> None:
    for sparsity in (None, *({0.15, 0.4} if "sparsity" in _fields(module) else ())):
        options = _options(module, {} if sparsity is None else {"sparsity": sparsity})
        model = _pruned(module, options)
        gone = 1 - _weights(module, model) / _weights(module, _base(module))
        assert abs(gone - options.sparsity) <= 0.01, f"{gone:.3f} of the weights are gone, not {options.sparsity}"


def check_what_is_removed_is_gone(module: ModuleType) -> None:
    model, base = _pruned(module), _base(module)
    count = sum(p.numel() for p in model.parameters())
    removed = _options(module).sparsity * _weights(module, base)
    expected = sum(p.numel() for p in base.parameters()) - removed
    assert abs(count - expected) <= 0.01 * expected, f"{count} parameters are in memory, {expected:.0f} were promised"
    hooks = [n for n, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m)]
    assert not hooks, f"{hooks[:3]} still compute with something beside their weights"
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder))
        disk = (Path(folder) / "model.safetensors").stat().st_size
        assert 0 <= disk - 4 * count < 40_000, f"{disk} bytes on disk for {count} parameters of 4 bytes"


def check_loads_what_it_saved_bit_for_bit(module: ModuleType) -> None:
    model = _pruned(module)
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder))
        again = _load(folder)
        assert type(again) is type(model) and torch.equal(tiny.logits(again), tiny.logits(model))
        save(again, Path(folder))
        assert torch.equal(tiny.logits(_load(folder)), tiny.logits(model)), "what was saved again differs"
        loaded = models.load(folder)
        assert torch.equal(tiny.logits(loaded.model), tiny.logits(model)), "shoestring loads something else"


def check_plain_or_refused_by_strangers(module: ModuleType) -> None:
    """A plain class of transformers is what comes out, or one that a reader without shoestring stops at."""
    model = _pruned(module)
    if type(model).__module__.startswith("transformers."):
        return
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder))
        kind = model.config.model_type
        hidden = CONFIG_MAPPING._extra_content.pop(kind)
        try:
            for reader in (AutoModelForCausalLM, type(_base(module))):
                try:
                    reader.from_pretrained(folder)
                except Exception as error:
                    assert "shoestring" in str(error), f"the error does not say what is needed: {error}"
                else:
                    raise AssertionError(f"{reader.__name__} loads it without knowing it")
        finally:
            CONFIG_MAPPING._extra_content[kind] = hidden


def check_generates(module: ModuleType) -> None:
    model: Any = _pruned(module)
    ids = tiny.batch(2, 6)
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out.shape == (2, 10)


def check_one_token_equals_many(module: ModuleType) -> None:
    model, ids = _pruned(module), tiny.batch(1, 8)
    with torch.no_grad():
        whole, first = model(ids).logits, model(ids[:, :5], use_cache=True)
        left = [first.logits[:, -1]]
        for at in range(5, 8):
            first = model(ids[:, at : at + 1], past_key_values=first.past_key_values)
            left.append(first.logits[:, -1])
    error = (torch.stack(left, 1) - whole[:, 4:]).abs().max()
    assert error < 1e-4, f"with a cache logits are off by {error:.2e}"


def check_ties_are_kept(module: ModuleType) -> None:
    model = _pruned(module)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    untied = _prune(module, _options(module), _base(module, tie_word_embeddings=False))
    assert untied.get_output_embeddings().weight is not untied.get_input_embeddings().weight


def check_groups_of_heads_stay_whole(module: ModuleType) -> None:
    if hasattr(module, "base"):  # what is not Llama-like loses no heads
        whole, left = models.shape_of(_base(module)), models.shape_of(_pruned(module))
        assert (left.head_dim, left.heads, left.kv_heads) == (whole.head_dim, whole.heads, whole.kv_heads)
        return
    before, after = uneven.sizes(tiny.model()), uneven.sizes(_pruned(module))
    assert (after.head_dim, after.group_heads) == (before.head_dim, before.group_heads)


def check_seeded_twice_is_the_same(module: ModuleType) -> None:
    again = _prune(module, _options(module), _base(module))
    assert torch.equal(tiny.logits(again), tiny.logits(_pruned(module)))


def check_the_price_is_what_comes_out(module: ModuleType) -> None:
    options = _options(module)
    model = _pruned(module)
    promised = module.price(models.shape_of(_base(module)), asdict(options)).shape
    counted = models.shape_of(model)
    assert abs(promised.parameters / counted.parameters - 1) <= 0.01, (promised.parameters, counted.parameters)
    assert abs(promised.resident / counted.resident - 1) <= 0.01, (promised.resident, counted.resident)


def check_bfloat16(module: ModuleType) -> None:
    model = _prune(module, _options(module), _base(module).to(torch.bfloat16))  # type: ignore[arg-type]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.isfinite(tiny.logits(model)).all()


def check_trained_models_stay_trainable(module: ModuleType) -> None:
    model = _prune(module, _options(module), _base(module)).train()
    ids = tiny.batch()
    model(ids, labels=ids).loss.backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without and any(p.requires_grad for p in model.parameters()), f"no gradient reaches {without[:3]}"


def check_the_folder_is_whole(module: ModuleType) -> None:
    """`apply` from folder to folder: the smaller model, its card, and a model that runs in shoestring."""
    if getattr(module, "NEEDS_DATA", False):
        with tempfile.TemporaryDirectory() as base:
            try:
                apply(module, _step(module), _source(module, base), Path(base) / "out", _work(base))
            except UsageError as error:
                assert "data" in str(error), error
            else:
                raise AssertionError("it pruned without the data it needs")
            assert not (Path(base) / "out").exists()
        return
    with tempfile.TemporaryDirectory() as base:
        out = Path(base) / "out"
        facts = apply(module, _step(module), _source(module, base), out, _work(base))
        counted = models.shape_of(out).parameters
        assert facts["parameters"] == counted, f"{facts['parameters']} reported, {counted} in the folder"
        assert "AutoModelForCausalLM" in (out / "README.md").read_text(encoding="utf-8")


def check_other_families_or_a_clear_error(module: ModuleType) -> None:
    for family in ("gpt2", "qwen3"):
        model = tiny.model(family)
        try:
            pruned = _prune(module, _options(module), model)
        except UsageError as error:
            assert type(model).__name__ in str(error), error
            continue
        with tempfile.TemporaryDirectory() as folder:
            save(pruned, Path(folder))
            assert torch.equal(tiny.logits(_load(folder)), tiny.logits(pruned)), family


def check_unsupported_model_is_a_clear_error(module: ModuleType) -> None:
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    other = tiny.model() if hasattr(module, "base") else MixtralForCausalLM(MixtralConfig(**sizes))  # type: ignore[arg-type]
    try:
        _prune(module, _options(module), other)
    except UsageError as error:
        assert type(other).__name__ in str(error), error
    else:
        raise AssertionError(f"a {type(other).__name__} was pruned as if it were what this method is for")


def check_bad_arguments_are_clear_errors(module: ModuleType) -> None:
    bad: list[dict[str, Any]] = [{"no_such_option": 1}]
    bad += [{"sparsity": value} for value in (0, 1, -0.2, "half", True)] if "sparsity" in _fields(module) else []
    for options in bad:
        try:
            config(module, options)
        except UsageError as error:
            assert next(iter(options)) in str(error), error
        else:
            raise AssertionError(f"{options} was accepted")


CHECKS = [check for name, check in list(globals().items()) if name.startswith("check_")]


def _fields(module: ModuleType) -> set[str]:
    return set(type(module.example()).__dataclass_fields__)


def _options(module: ModuleType, changes: Mapping[str, Any] | None = None) -> Any:
    return type(module.example())(**{**asdict(module.example()), **(changes or {})})


def _step(module: ModuleType) -> Step:
    return Step("compress", module.__name__.rpartition(".")[2], asdict(module.example()))


def _base(module: ModuleType, **changes: Any) -> PreTrainedModel:
    made: PreTrainedModel = getattr(module, "base", tiny.model)(**changes)
    return made


def _source(module: ModuleType, base: str) -> Path:
    save(_base(module), Path(base) / "source")
    return Path(base) / "source"


def _work(base: str, training: Mapping[str, Any] | None = None) -> Work:
    return Work(Ledger(), Path(base) / "work", training=training or {})


@lru_cache(maxsize=8)
def _once(module: ModuleType, options: Any) -> PreTrainedModel:
    return _prune(module, options, _base(module))


def _pruned(module: ModuleType, options: Any = None) -> PreTrainedModel:
    """A tiny model pruned by the method; the same one for the same options, so no check may change it."""
    return _once(module, _options(module) if options is None else options)


def _prune(module: ModuleType, options: Any, model: PreTrainedModel) -> PreTrainedModel:
    rows = [{"input_ids": row, "labels": row} for row in tiny.batch(16, 24).tolist()]
    settings = {**getattr(module, "TRAINING", {}), "max_steps": 8, "per_device_train_batch_size": 2}
    left = {name: value for name, value in settings.items() if name not in OF_ENCODING}
    with tempfile.TemporaryDirectory() as base:
        loaded = models.Loaded(model, None, Path(base), "tiny", "causal")
        return run(module, loaded, options, rows, [], _work(base, left)).model


def _weights(module: ModuleType, model: PreTrainedModel) -> int:
    """The weights that `sparsity` is a share of."""
    roles = getattr(module, "ROLES", PROJECTIONS)
    return sum(weight.count for weight in models.shape_of(model).of(*roles))


def _load(folder: str) -> Any:
    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder)
