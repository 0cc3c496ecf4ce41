"""The door of the mapping room: a model compiled for an accelerator that is described, and what that must hold to."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from shoestring.core.errors import UsageError

VERB = "map"
CATEGORY = "framework"
WORDS = ("targets", "mapped", "replayed")
# What these and `METHOD.provides` are:
#   provides: a frozen dataclass of options, all with defaults.
#   example() -> such options.
#   targets() -> {name: what it is}: the accelerators that it has numbers of.
#   mapped(source: Path, config, target, prompt, tokens) -> {"about", "steps", "assumptions"}: what answering with so
#       many tokens after a prompt of so many takes. Nothing is run: every figure is modelled. A step of "steps" is a
#       mapping with `step`, `seconds`, `cycles`, `joules`, `moved` {what: bytes}, `operators` {name: seconds} that add
#       up to its seconds, `busy` {unit: share}, `instructions` and `stored` (bytes).
#   replayed(source: Path, config, target, prompt, tokens, layers) -> pairs of arrays: what the compiled program gives
#       when it is executed on integers, beside the same computed plainly; for the prompt and for each token after it.


def adopt(module: ModuleType) -> None:
    """Nothing to make known: nobody else maps."""


def config(module: ModuleType, options: Mapping[str, Any]) -> Any:
    """The method's options.

    Raises:
        UsageError: an option the method does not have, or a value it refuses.
    """
    made = type(module.example())
    stray = set(options) - set(made.__dataclass_fields__)
    if stray:
        known = ", ".join(sorted(made.__dataclass_fields__))
        raise UsageError(f"{made.__name__} has no option {', '.join(sorted(stray))}", remedy=f"Known: {known}")
    return made(**options)


# --- the checks ---------------------------------------------------------------------------------------------------


def check_integers_are_those_of_plain_computation(module: ModuleType) -> None:
    with tempfile.TemporaryDirectory() as folder:
        _small(Path(folder))
        for target in module.targets():
            pairs = list(module.replayed(Path(folder), module.example(), target, list(range(3, 24)), [5, 9, 7], 2))
            assert len(pairs) == 4
            for got, expected in pairs:
                assert got.shape == expected.shape and (got == expected).all(), f"{target}: other integers"
                assert (got != got[0]).any(), "the numbers are all the same"


def check_where_the_time_goes_adds_up(module: ModuleType) -> None:
    with tempfile.TemporaryDirectory() as folder:
        _small(Path(folder))
        for target in module.targets():
            for step in module.mapped(Path(folder), module.example(), target, 40, 20)["steps"]:
                assert abs(sum(step["operators"].values()) / step["seconds"] - 1) < 0.01, step["step"]
                assert step["cycles"] > 0 and step["joules"] > 0 and sum(step["moved"].values()) > 0
                assert all(0 <= share <= 1.001 for share in step["busy"].values())


def check_more_work_takes_longer(module: ModuleType) -> None:
    with tempfile.TemporaryDirectory() as folder:
        _small(Path(folder))
        target = next(iter(module.targets()))
        short, long = (
            {s["step"]: s for s in module.mapped(Path(folder), module.example(), target, *sizes)["steps"]}
            for sizes in ((16, 8), (200, 40))
        )
        for step in short:
            assert long[step]["seconds"] > short[step]["seconds"], step


def check_assumptions_are_said(module: ModuleType) -> None:
    with tempfile.TemporaryDirectory() as folder:
        _small(Path(folder))
        target = next(iter(module.targets()))
        said = module.mapped(Path(folder), module.example(), target, 16, 8)
        assert said["about"] and said["assumptions"]


def check_unknown_target_is_a_clear_error(module: ModuleType) -> None:
    with tempfile.TemporaryDirectory() as folder:
        _small(Path(folder))
        try:
            module.mapped(Path(folder), module.example(), "no-such-board", 16, 8)
        except UsageError as error:
            assert "no-such-board" in str(error), error
            assert any(name in str(error) for name in module.targets()), f"the error names no target: {error}"
        else:
            raise AssertionError("an unknown target was accepted")


def check_bad_argument_is_a_clear_error(module: ModuleType) -> None:
    try:
        config(module, {"no_such_option": 1})
    except UsageError as error:
        assert "no_such_option" in str(error), error
    else:
        raise AssertionError("an unknown option was accepted")


def check_unsupported_model_is_a_clear_error(module: ModuleType) -> None:
    from shoestring.lab import tiny

    with tempfile.TemporaryDirectory() as folder:
        tiny.model("gpt2").save_pretrained(folder)
        try:
            module.mapped(Path(folder), module.example(), next(iter(module.targets())), 16, 8)
        except UsageError:
            pass
        else:
            raise AssertionError("a model of another family was mapped")


def _small(folder: Path) -> None:
    from shoestring.lab import tiny

    tiny.model(num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256).save_pretrained(folder)


CHECKS = [
    check_integers_are_those_of_plain_computation,
    check_where_the_time_goes_adds_up,
    check_more_work_takes_longer,
    check_assumptions_are_said,
    check_unknown_target_is_a_clear_error,
    check_bad_argument_is_a_clear_error,
    check_unsupported_model_is_a_clear_error,
]
