"""The door of the adapters room: peft's own interface, and the checks every adapter passes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainingArguments

from shoestring import data, models
from shoestring.core import catalog
from shoestring.core.errors import UsageError
from shoestring.core.files import atomic_folder
from shoestring.core.step import Step, Work
from shoestring.lab import tiny
from shoestring.methods.adapters._peft import NEEDS
from shoestring.models.flops import training_flops
from shoestring.models.folder import ADAPTER_WEIGHTS
from shoestring.models.load import refuse_strays

VERB = "train"
CATEGORY = "parameter-efficient tuning"
WORDS = ("settings", "price")
TRAITS = ("family", "acts_on", "merges", "parameters")
FAMILIES = ("additive", "selective", "reparameterised", "hybrid", "prompt")
PLACES = ("weight", "activation", "input", "key/value")
OF_ENCODING = ("max_length", "on_long")
TASKS = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "masked": None}
# A method may also define
#   TRAINING: the settings of the training loop that suit it; what the user says comes first.
#   NEEDS_FLOAT = True: it computes with the base's own weights, so packed integers will not do.
#   fitted(shape: Shape) -> dict[str, Any]: options that depend on the model, where neither settings nor user name them.
#   encode(corpus, tokenizer, max_length, *, options, on_long) -> data.Encoded: rows of another form than `data.encode`
#       makes, such as with a `context` that is read before the question.
#   plug(config, opened) -> engine.hooks.Hooks: what a trained adapter plugs into an engine; `config` is of the class
#       PLUG, and `traits["plugs"]` names the fields of Hooks that it fills, with commas.
#   pruned(scores, ...) -> Tensor: which weights it makes zero for good; then it is a way of pruning.
#   measure(source: Path, options: Mapping[str, Any], work: Work) -> dict[str, Any]: then it is a meter, which
#       `shoestring measure NAME` runs. `source` is the folder of the model, loaded with `models.load(str(source))` as
#       often as needed; `options` are the user's, and it refuses those it does not know with a UsageError; `work.train`
#       and `work.valid` are examples, which `encoded(loaded, work)` turns into rows; `work.folder` outlives a crash.
#       It returns plain data: figures by name, lists of mappings for tables, and under "advice" a sentence on what
#       follows from them.


def adopt(module: ModuleType) -> None:
    """Make peft know the method. A config of peft itself is known already; another brings its own `register`."""
    if hasattr(module, "register"):
        module.register()


def config(module: ModuleType, options: dict[str, Any], kind: str = "causal") -> peft.PeftConfig:
    """The method's config from its first settings overlaid with `options`.

    Raises:
        UsageError: an option the method does not have, or a value it refuses.
    """
    made = type(module.example())
    known = set(made.__dataclass_fields__)
    stray = set(options) - known
    if stray:
        raise UsageError(
            f"{made.__name__} has no option {', '.join(sorted(stray))}", remedy="Known: " + ", ".join(sorted(known))
        )
    try:
        return made(task_type=TASKS.get(kind), **{**module.settings()[0], **options})
    except (ValueError, TypeError) as error:
        raise UsageError(f"{made.__name__} refuses its options", str(error)) from None


def wrap(module: ModuleType, model: nn.Module, options: dict[str, Any], kind: str = "causal") -> PeftModel:
    """`get_peft_model`, with peft's complaints about a model that does not fit turned into a UsageError."""
    name = type(config(module, options, kind)).__name__
    if getattr(module, "NEEDS_FLOAT", False) and any(hasattr(part, "unpacked") for part in model.modules()):
        raise UsageError(
            f"{name} does not fit {type(model).__name__} with packed weights",
            "it computes with the weights themselves, and these are integers",
            "Train on the model they were packed from and compress afterwards, or take another method",
        )
    try:
        made = config(module, {**_fitted(module, model), **options}, kind)
        if isinstance(made, peft.PromptLearningConfig) and made.num_virtual_tokens < 1:
            raise ValueError("num_virtual_tokens must be at least 1")
        wrapped = get_peft_model(model, made)  # type: ignore[arg-type]
        _freeze_what_stands_beside(wrapped)
        if not any(p.requires_grad and p.numel() for p in wrapped.parameters()):
            raise ValueError("it would train nothing")
    except (ValueError, TypeError, KeyError, RuntimeError, ArithmeticError) as error:
        said = ", ".join(f"{key}={value!r}" for key, value in options.items())
        why = f"{error} ({said})" if said else str(error)
        raise UsageError(
            f"{name} does not fit {type(model).__name__}", why, "Name other target_modules, or other options"
        ) from None
    return wrapped  # type: ignore[return-value]


def _freeze_what_stands_beside(model: nn.Module) -> None:
    """Numbers that a tuner's layers keep beside their adapters; peft sets them free when it makes them float32."""
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            for kept in (getattr(layer, name, None) for name in layer.other_param_names):
                if isinstance(kept, nn.ParameterDict):
                    kept.requires_grad_(False)


def _fitted(module: ModuleType, model: nn.Module) -> dict[str, Any]:
    return dict(module.fitted(models.shape_of(model))) if hasattr(module, "fitted") else {}


def others() -> list[dict[str, str]]:
    """Types that peft has and no method of this room carries: name, config class, and why they have no file here."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    carried = {catalog.module(name).example().peft_type for name in catalog.in_room("adapters")}
    left = {str(kind.value): made for kind, made in PEFT_TYPE_TO_CONFIG_MAPPING.items() if kind not in carried}
    return [
        {
            "name": kind.lower(),
            "provides": f"{made.__module__}.{made.__name__}",
            "why": f"it needs {NEEDS[kind]}" if kind in NEEDS else "no file yet",
        }
        for kind, made in sorted(left.items())
    ]


def apply(module: ModuleType, step: Step, source: Path, out: Path, work: Work) -> dict[str, Any]:
    """Train the adapter on `work.train` and save it in peft's layout at `out`."""
    from shoestring import training

    if not work.train:
        raise UsageError(f"the step {step} trains, and no data was given", remedy="Add --data FILE")
    loaded = models.load(str(source), trust_remote_code=work.trust_remote_code)
    torch.manual_seed(work.seed)
    model = wrap(module, loaded.model, dict(step.options), loaded.kind)
    settings = {**getattr(module, "TRAINING", {}), **work.training}
    rows, valid = encoded(loaded, replace(work, training=settings), encoder(module, step.options))
    settings = {name: value for name, value in settings.items() if name not in OF_ENCODING}
    result = training.train(
        model,
        rows.rows,
        valid.rows if valid else [],
        training.TrainOptions(**{"seed": work.seed, **settings}),
        work.folder,
        tokenizer=loaded.tokenizer,
        ledger=work.ledger,
        resume=work.resume,
    )
    with atomic_folder(out) as folder:
        model.peft_config["default"].base_model_name_or_path = str(source)
        model.save_pretrained(str(folder))
        loaded.tokenizer.save_pretrained(folder)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    length = sum(len(row["input_ids"]) for row in rows.rows) // len(rows.rows)
    flops = training_flops(
        models.shape_of(loaded.path, trust_remote_code=work.trust_remote_code),
        result.tokens,
        length,
        base_trained=False,
    )
    work.ledger.record("flops", flops, "FLOP", "modelled", "2 N D forward, as much backward, and attention", "model")
    return {"log": result.log, "steps": result.steps, "tokens": result.tokens, "trainable": trained,
            "truncated": rows.truncated, "stopped_because": result.stopped_because}  # fmt: skip


def encoder(module: ModuleType, options: Mapping[str, Any]) -> Callable[..., data.Encoded]:
    """What turns a corpus into the method's rows, with the arguments of `data.encode`."""
    return partial(module.encode, options=dict(options)) if hasattr(module, "encode") else data.encode


def encoded(
    loaded: models.Loaded, work: Work, encode: Callable[..., data.Encoded] = data.encode
) -> tuple[data.Encoded, data.Encoded | None]:
    """Rows of `work.train` and `work.valid` for the model, cut as `max_length` and `on_long` in `work.training` say.

    Raises:
        UsageError: an example longer than the model's context, and nothing said of what to do with it.
    """
    context = models.shape_of(loaded.model).context
    length = work.training.get("max_length") or context or 2048
    length, on_long = min(length, context or length), work.training.get("on_long", "error")
    train, valid = (
        encode(part, loaded.tokenizer, length, on_long=on_long) if part else None for part in (work.train, work.valid)
    )
    if train is None:
        raise UsageError("there is nothing to train on", remedy="Add --data FILE")
    return train, valid


# --- the checks ---------------------------------------------------------------------------------------------------


def check_starts_as_the_base_model(module: ModuleType) -> None:
    _same(tiny.logits(_wrapped(module)), tiny.logits(tiny.model()))


def check_only_the_adapter_trains(module: ModuleType) -> None:
    model = _wrapped(module)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert 0 < trained < sum(p.numel() for p in frozen.values()), f"{trained} parameters train"
    _fit(model, 3)
    moved = [n for n, p in model.named_parameters() if n in frozen and not torch.equal(p, frozen[n])]
    assert not moved, f"frozen parameters moved: {moved[:3]}"


def check_every_trainable_gets_a_gradient(module: ModuleType) -> None:
    model = _wrapped(module)
    _fit(model, 3)
    dead = [
        n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.abs().sum() > 0)
    ]
    assert not dead, f"no gradient reaches {dead[:3]}"


def check_learns(module: ModuleType) -> None:
    for rate in (1e-2, 1e-1):  # few parameters may want large steps
        losses = _fit(_wrapped(module), 30, rate)
        if losses[-1] < losses[0] - 0.05:
            return
    raise AssertionError(f"{losses[0]:.3f} -> {losses[-1]:.3f}")


def check_same_seed_same_adapter(module: ModuleType) -> None:
    one, two = _wrapped(module), _wrapped(module)
    _fit(one, 3)
    torch.manual_seed(0)
    _fit(two, 3)
    assert torch.equal(tiny.logits(one), tiny.logits(two))


def check_save_load(module: ModuleType) -> None:
    model = _stir(_wrapped(module))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(tiny.model(), folder).eval()
        assert torch.equal(tiny.logits(again), tiny.logits(model)), "reloaded logits differ"


def check_merge(module: ModuleType) -> None:
    model = _stir(_wrapped(module))
    out = tiny.logits(model)
    _same(tiny.logits(model.merge_and_unload()), out, 2e-4)


def check_unload_restores_the_base(module: ModuleType) -> None:
    assert torch.equal(tiny.logits(_stir(_wrapped(module)).unload()), tiny.logits(tiny.model()))


def check_disable(module: ModuleType) -> None:
    model = _stir(_wrapped(module))
    with model.disable_adapter():
        _same(tiny.logits(model), tiny.logits(tiny.model()))


def check_unmerge_restores_the_base(module: ModuleType) -> None:
    model = _stir(_wrapped(module))
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    out = tiny.logits(model)
    model.merge_adapter()
    _same(tiny.logits(model), out, 2e-4)
    model.unmerge_adapter()
    now = dict(model.named_parameters())
    moved = [n for n, p in frozen.items() if not torch.equal(p, now[n])]
    assert not moved, f"not restored bit for bit: {moved[:3]}"
    assert torch.equal(tiny.logits(model), out), "after unmerging the adapter answers differently"


def check_generates_with_a_cache(module: ModuleType) -> None:
    model, prompt = _stir(_wrapped(module)), tiny.batch(2, 6)
    settings = dict(input_ids=prompt, max_new_tokens=8, do_sample=False, min_new_tokens=8)
    with torch.no_grad():
        plain = model.generate(**settings, use_cache=False)  # type: ignore[operator]
        cached = model.generate(**settings, use_cache=True)  # type: ignore[operator]
    assert torch.equal(plain, cached), "with a cache other tokens come out"


def check_transformers_trainer(module: ModuleType) -> None:
    model: Any = _wrapped(module)
    rows = [{name: value[i] for name, value in tiny.inputs(model).items()} for i in range(2)]
    before = tiny.logits(model)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, max_steps=3, learning_rate=1e-2, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
            per_device_train_batch_size=2, logging_strategy="no", remove_unused_columns=False,
        )  # fmt: skip
        trained = Trainer(model, settings, train_dataset=rows).train()  # type: ignore[arg-type]
    assert torch.isfinite(torch.tensor(trained.training_loss))
    assert not torch.equal(tiny.logits(model.eval()), before), "transformers' Trainer changes nothing"


def check_two_adapters(module: ModuleType) -> None:
    model = _stir(_wrapped(module))
    one = tiny.logits(model)
    model.add_adapter("two", config(module, _fitted(module, tiny.model())))
    model.set_adapter("two")
    _stir(model, 2)
    two = tiny.logits(model)
    model.set_adapter("default")
    _same(tiny.logits(model), one)
    assert not torch.allclose(one, two), "the second adapter changes nothing"
    model.set_adapter("two")
    _fit(model, 3)
    model.set_adapter("default")
    _same(tiny.logits(model), one)
    model.delete_adapter("two")
    _same(tiny.logits(model), one)


def check_bfloat16(module: ModuleType) -> None:
    model = wrap(module, tiny.model(dtype=torch.bfloat16), {})
    losses = _fit(model, 3)
    assert all(torch.isfinite(torch.tensor(losses))), losses


def check_gradient_checkpointing(module: ModuleType) -> None:
    plain, saving = _stir(_wrapped(module)), _stir(_wrapped(module))
    saving.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    for model in (plain, saving):
        model.train()
        model(**tiny.inputs(model)).loss.backward()
    for (name, a), (_, b) in zip(plain.named_parameters(), saving.named_parameters()):
        if a.requires_grad:
            assert a.grad is not None and b.grad is not None and torch.allclose(a.grad, b.grad, atol=1e-6), name


def check_other_families_or_a_clear_error(module: ModuleType) -> None:
    for family, kind in (("gpt2", "causal"), ("bert", "masked"), ("t5", "seq2seq")):
        try:
            model = wrap(module, tiny.model(family), {}, kind)
        except UsageError as error:
            assert type(tiny.model(family)).__name__ in str(error), f"{family}: {error}"
            continue
        if "check_starts_as_the_base_model" in module.METHOD.expects:
            assert torch.isfinite(tiny.logits(model.eval())).all(), f"{family}: answers are not finite"
        else:
            _same(tiny.logits(model.eval()), tiny.logits(tiny.model(family)))


def check_wrong_target_is_a_clear_error(module: ModuleType) -> None:
    aims = "target_modules" in type(module.example()).__dataclass_fields__
    name = "no_such_layer" if aims else "target_modules"
    _refused(lambda: wrap(module, tiny.model(), {"target_modules": ["no_such_layer"]}), name)


def check_bad_values_are_clear_errors(module: ModuleType) -> None:
    fields, used = type(module.example()).__dataclass_fields__, module.settings()[0]
    bad = [(name, value) for name in ("r", "rank", "num_virtual_tokens") if name in used for value in (0, -1)]
    for name, value in [*bad, *([("target_modules", [])] if "target_modules" in fields else [])]:
        try:
            wrap(module, tiny.model(), {name: value})
        except UsageError:
            continue
        raise AssertionError(f"{name}={value!r} was accepted")


def check_files_of_strangers_are_refused(module: ModuleType) -> None:
    for change in ("add", "drop", "base"):
        with tempfile.TemporaryDirectory() as folder:
            _wrapped(module).save_pretrained(folder)
            file = Path(folder) / ADAPTER_WEIGHTS
            tensors = load_file(file)
            if change == "drop":
                tensors.popitem()
            else:
                stray = "stray" if change == "add" else "model.layers.0.mlp.up_proj.base_layer.weight"
                tensors[f"base_model.model.{stray}"] = torch.zeros(2)
            save_file(tensors, file)
            try:
                refuse_strays(PeftModel.from_pretrained(tiny.model(), folder), Path(folder))
            except (ValueError, RuntimeError, KeyError):
                continue
            raise AssertionError(f"a file with a tensor {'too many' if change != 'drop' else 'too few'} was accepted")


def check_unknown_option_is_a_clear_error(module: ModuleType) -> None:
    _refused(lambda: config(module, {"no_such_option": 1}), "no_such_option")


def check_price(module: ModuleType) -> None:
    model = _wrapped(module)
    counted = sum(p.numel() for p in model.parameters() if p.requires_grad)
    promised = module.price(models.shape_of(tiny.model()), {}).trainable
    assert counted == promised, f"price says {promised} trainable parameters, the model has {counted}"


def check_traits(module: ModuleType) -> None:
    traits = module.METHOD.traits
    assert set(traits) - {"plugs"} == set(TRAITS), f"traits are {', '.join(sorted(traits))}, not {', '.join(TRAITS)}"
    assert traits["family"] in FAMILIES and traits["acts_on"] in PLACES, f"{traits['family']} on {traits['acts_on']}"
    model = _stir(_wrapped(module))
    out = tiny.logits(model)
    try:
        same = torch.allclose(tiny.logits(model.merge_and_unload()), out, atol=2e-4, rtol=1e-4)
        merges = "yes" if same else "with loss"
    except (AttributeError, NotImplementedError):
        merges = "no"
    assert traits["merges"] == merges, f"METHOD says it merges: {traits['merges']}; in truth: {merges}"


CHECKS = [check for name, check in list(globals().items()) if name.startswith("check_")]


def _wrapped(module: ModuleType) -> PeftModel:
    torch.manual_seed(0)
    return wrap(module, tiny.model(), {}).eval()  # type: ignore[return-value]


def _same(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert torch.allclose(a, b, atol=tolerance, rtol=1e-4), f"largest difference {(a - b).abs().max():.2e}"


def _stir(model: Any, seed: int = 1) -> Any:
    torch.manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(0.05 * torch.randn_like(p))
    return model


def _fit(model: Any, steps: int, rate: float = 1e-2) -> list[float]:
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], rate)
    losses = []
    for _ in range(steps):
        loss = model(**tiny.inputs(model)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def _refused(run: Any, word: str) -> None:
    try:
        run()
    except UsageError as error:
        assert word in str(error), f"the error does not name {word}: {error}"
    else:
        raise AssertionError(f"{word} was accepted")
