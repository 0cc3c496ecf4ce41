"""The door of the serving room: what plugs into the engine or the server, and the checks that it harms nobody."""

from __future__ import annotations

from types import ModuleType
from typing import Any

VERB = "serve"
CATEGORY = "framework"
WORDS = ()
TRAITS = ("plugs",)
# Every file defines at least one of
#   plug(config, opened: engine.open.Opened) -> engine.hooks.Hooks: what it plugs into an engine that has just been
#       opened. Its `traits["plugs"]` names the fields of Hooks that it fills, with commas.
#   front(config, settings: server.settings.Settings) -> ASGI application: answers in front of other servers, with no
#       engine of its own; `traits["plugs"]` is "front".
# A method that has part in a model which several processes serve says so in its `traits["roles"]`, as ROLE=WORD with
# commas: what `--role ROLE` calls, `plug`, `front` or `worker`.
# A method may also define
#   worker(config, settings, ready) -> exit code: is a process that works for the engines of others, without HTTP, at
#       settings.host and settings.port until a signal; `ready` is given its address.
#   routes(config, service) -> list of starlette Routes: beside those of the server.
#   load(config, folder: Path, *, dtype, trust_remote_code) -> models.Loaded: reads the model in its own way, before
#       `plug` is asked; the torch runner runs it. One that adds to another's model has a parameter `read`: how that is
#       read, as (folder, *, dtype, trust_remote_code) -> models.Loaded.
#   base(**changes) -> PreTrainedModel: the tiny model that the checks run on, where Llama is not what it is for.
#   span(config) -> (first, last) or None: the layers first..last-1 that it runs here, others being elsewhere.
#   stage(model: Path) -> context manager of an Engine: for the checks, where its name alone is not enough to plug in.
#   PLUG: the class of its serving configuration, where `example()` is for something else.


def adopt(module: ModuleType) -> None:
    """Nothing to make known: the engine and the server are told by name."""


def config(module: ModuleType, options: dict[str, Any]) -> Any:
    """The method's serving configuration.

    Raises:
        UsageError: an option the method does not have, or a value it refuses.
    """
    from shoestring.engine.plug import configured

    return configured(module.__name__.rpartition(".")[2], options)


# --- the checks ---------------------------------------------------------------------------------------------------


def check_plugs_in_somewhere(module: ModuleType) -> None:
    _plugs(module)


def check_greedy_answers_are_those_of_plain_serving(module: ModuleType) -> None:
    if _plugs(module):
        from shoestring.lab import answering

        answering.same_answers(module, answering.GREEDY)


def check_drawn_answers_are_those_of_plain_serving(module: ModuleType) -> None:
    if _plugs(module):
        from shoestring.lab import answering

        answering.same_answers(module, answering.DRAWN)


def check_ends_where_it_is_told_and_frees_its_pages(module: ModuleType) -> None:
    if _plugs(module):
        from shoestring.lab import answering

        answering.ends(module)


def check_everybody_is_served_under_pressure(module: ModuleType) -> None:
    if _plugs(module):
        from shoestring.lab import answering

        answering.under_pressure(module)


def check_refuses_unknown_options(module: ModuleType) -> None:
    from shoestring.lab import answering

    answering.refuses(module)


def _plugs(module: ModuleType) -> bool:
    """Whether it plugs into an engine; what stands in front of other servers is not asked what an engine is."""
    assert hasattr(module, "plug") or hasattr(module, "front"), "it defines neither plug nor front"
    return hasattr(module, "plug")


CHECKS = [
    check_plugs_in_somewhere,
    check_greedy_answers_are_those_of_plain_serving,
    check_drawn_answers_are_those_of_plain_serving,
    check_ends_where_it_is_told_and_frees_its_pages,
    check_everybody_is_served_under_pressure,
    check_refuses_unknown_options,
]
