"""The door of the decoding room: hooks of the engine, transformers' `custom_generate`, and the checks of both."""

from __future__ import annotations

from types import ModuleType
from typing import Any

VERB = "serve"
CATEGORY = "dynamic network"
WORDS = ("plug",)
TRAITS = ("plugs",)
# Every file defines
#   plug(config, opened: engine.open.Opened) -> engine.hooks.Hooks: what it plugs into an engine that has just been
#       opened. Its `traits["plugs"]` names the fields of Hooks that it fills, with commas.
# A method may also define
#   generate(model, input_ids, logits_processor, stopping_criteria, generation_config, **more) -> LongTensor: what
#       transformers' `generate(custom_generate=...)` calls.
#   stage(model: Path) -> context manager of an Engine: for the checks, where its name alone is not enough to plug in.
#   PLUG: the class of its serving configuration, where `example()` is for something else.


def adopt(module: ModuleType) -> None:
    """Nothing to make known: `generate` is handed over as a function."""


def config(module: ModuleType, options: dict[str, Any]) -> Any:
    """The method's serving configuration.

    Raises:
        UsageError: an option the method does not have, or a value it refuses.
    """
    from shoestring.engine.plug import configured

    return configured(module.__name__.rpartition(".")[2], options)


# --- the checks ---------------------------------------------------------------------------------------------------


def check_greedy_answers_are_those_of_plain_decoding(module: ModuleType) -> None:
    from shoestring.lab import answering

    answering.same_answers(module, answering.GREEDY)


def check_drawn_answers_are_those_of_plain_decoding(module: ModuleType) -> None:
    from shoestring.lab import answering

    answering.same_answers(module, answering.DRAWN)


def check_ends_where_it_is_told_and_frees_its_pages(module: ModuleType) -> None:
    from shoestring.lab import answering

    answering.ends(module)


def check_everybody_is_served_under_pressure(module: ModuleType) -> None:
    from shoestring.lab import answering

    answering.under_pressure(module)


def check_counts_what_it_does(module: ModuleType) -> None:
    from shoestring.lab import answering

    answering.counted(module)


def check_refuses_unknown_options(module: ModuleType) -> None:
    from shoestring.lab import answering

    answering.refuses(module)


def check_transformers_generates_the_same(module: ModuleType) -> None:
    """`generate(custom_generate=...)` gives what plain `generate` gives, where the method has it."""
    if not hasattr(module, "generate"):
        return
    import torch

    from shoestring.lab import tiny

    model: Any = tiny.model()
    for row in tiny.batch(3, 14):
        given: dict[str, Any] = dict(max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
        plain = model.generate(row[None], **given)
        other = model.generate(row[None], custom_generate=module.generate, **given)
        assert torch.equal(plain, other), f"plain {plain.tolist()}, custom_generate {other.tolist()}"


CHECKS = [
    check_greedy_answers_are_those_of_plain_decoding,
    check_drawn_answers_are_those_of_plain_decoding,
    check_ends_where_it_is_told_and_frees_its_pages,
    check_everybody_is_served_under_pressure,
    check_counts_what_it_does,
    check_refuses_unknown_options,
    check_transformers_generates_the_same,
]
