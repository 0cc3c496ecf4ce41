"""Executes steps one after another, each result whole or absent, so that a killed pipeline goes on where it was."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from shoestring.core import catalog
from shoestring.core.errors import UsageError, nearest
from shoestring.core.step import Step, Work
from shoestring.jobs.merge import merge
from shoestring.jobs.runs import write_json

VERBS = ("train", "compress", "merge")
_LONGEST = 60  # characters of options in the name of a folder


def execute(steps: Sequence[Step], source: Path, work: Work) -> tuple[Path, list[dict[str, Any]]]:
    """Run `steps` from the model folder `source`; returns the last result's folder and what each step reported.

    Results stand in `work.folder` under names that say all steps so far, so pipelines that begin alike share them.

    Raises:
        UsageError: a step with an unknown verb, or a method that has another verb or does not fit the model.
    """
    for step in steps:
        check(step)
    facts = []
    done = ""
    for step in steps:
        done = f"{done}+{_label(step)}" if done else _label(step)
        out, note = work.folder / done, work.folder / f"{done}.json"
        if out.is_dir() and note.is_file():
            facts.append(json.loads(note.read_text(encoding="utf-8")))
        else:
            shutil.rmtree(out, ignore_errors=True)  # of a process that died before it could say what it had done
            with work.ledger.stage(step.method or step.verb, settle=True):
                fact = _one(step, source, out, replace(work, folder=work.folder / f"{done}.work"))
            write_json(note, fact)
            facts.append(fact)
        source = out
    return source, facts


def check(step: Step) -> None:
    """Raises UsageError unless the step's verb is known and its method has it."""
    if step.verb not in VERBS:
        if step.method and catalog.contract(catalog.get(step.method).room).VERB == step.verb:
            raise UsageError(f"{step.method} makes no model", f"its verb is {step.verb}")
        raise UsageError(f"unknown verb {step.verb}", remedy=nearest(step.verb, VERBS))
    if step.verb == "merge":
        return
    has = catalog.contract(catalog.get(step.method).room).VERB
    if has != step.verb:
        raise UsageError(f"{step.method} does not {step.verb}", remedy=f"Its verb is {has}")


def order(steps: Sequence[Step]) -> list[str]:
    """Why steps cannot follow each other: what their methods say, and adapters that are not folded in first."""
    problems = []
    for before, after in zip(steps, steps[1:]):
        if before.verb == "train" and after.verb == "compress":
            problems.append(
                f"{after.method} cannot compress the adapter that {before.method} makes. Put a merge between."
            )
        if after.verb == "merge" and before.verb != "train":
            problems.append(f"merge follows {before}, which makes no adapter. Put merge after a train step.")
    named = [step.method for step in steps if step.method]
    packed = ""
    for step in steps:
        if packed and step.verb == "merge":
            problems.append(f"An adapter cannot be folded into packed weights. Train it before {packed}.")
        elif packed and step.verb == "compress" and combines(step.method, packed) in ("", "yes"):
            problems.append(f"{step.method} cannot follow {packed}: it needs weights, and finds codes.")
        if step.method and getattr(catalog.contract(catalog.get(step.method).room), "PACKS", False):
            packed = step.method
    for i, later in enumerate(named):
        for earlier in named[:i]:
            reason = combines(later, earlier)
            if reason not in ("", "yes"):
                problems.append(f"{later} cannot follow {earlier}: {reason}.")
    return problems


def combines(one: str, other: str) -> str:
    """What two methods say of each other: "yes", the reason why they do not go together, or nothing."""
    said = []
    for a, b in ((one, other), (other, one)):
        says, about = catalog.get(a), catalog.get(b)
        said.append(says.combines.get(about.name) or says.combines.get(about.room) or "")
    return next((reason for reason in said if reason not in ("", "yes")), max(said))


def stack(methods: Sequence[str], options: Mapping[str, Any], limit: int | None = None) -> list[Step]:
    """The steps of compressing with several methods one after another; adapters are trained and folded in.

    Args:
        options: of the method, or with several `method.option`; a method without any takes the first of its own.
        limit: the most bytes of all tensors, for the last method that can keep to one; it is added where none can.

    Raises:
        UsageError: a method that is unknown, has another verb, or cannot follow those before it; options of none; a
            limit and an option that says another.
    """
    steps: list[Step] = []
    keeper = None
    if limit is not None:
        keepers = [method.name for method in catalog.that_define("within")]
        keeper = next((name for name in reversed(methods) if catalog.get(name).name in keepers), keepers[0])
        if not methods:
            methods = [keeper]
    own: dict[str, dict[str, Any]] = {name: {} for name in methods}
    for key, value in options.items():
        name, dot, option = key.rpartition(".")
        if not dot and len(methods) == 1:
            name = methods[0]
        if name not in own:
            raise UsageError(
                f"the option {key} belongs to no method of {', '.join(methods)}",
                remedy="With several methods write --option method.option=value",
            )
        own[name][option] = value
    for name in [*methods, *([keeper] if keeper and keeper not in methods else [])]:
        room = catalog.contract(catalog.get(name).room)
        check(Step(room.VERB, name))
        if name == keeper and limit is not None:
            chosen = catalog.module(name).within(limit)
            if twice := sorted(chosen.keys() & own.get(name, {})):
                raise UsageError(f"{name} is given {twice[0]} and a limit beside it", remedy="Give one of them")
            chosen |= own.get(name, {})
        else:
            chosen = own[name] or dict(catalog.module(name).settings()[0])
        steps.append(Step(room.VERB, name, chosen))
        if room.VERB == "train":
            steps.append(Step("merge"))
    if steps and all(step.verb != "compress" for step in steps):
        raise UsageError(f"{methods[-1]} does not compress", remedy=f"Its verb is {steps[0].verb}")
    for problem in order(steps):
        raise UsageError(problem)
    return steps


def read_pipeline(path: Path) -> dict[str, Any]:
    """A pipeline file: YAML with `verb: fit` and its request, or `model`, `data` and `steps`.

    Raises:
        UsageError: not a readable YAML mapping, too large, with aliases, or with unknown keys.
    """
    if not path.is_file():
        raise UsageError(f"there is no pipeline at {path}", remedy="Give a YAML file")
    if path.stat().st_size > 1_000_000:
        raise UsageError(f"{path} is larger than 1 MB", "no pipeline is")
    text = path.read_text(encoding="utf-8")
    try:
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise UsageError(f"{path} uses YAML aliases", "they can blow up while loading", "Write the values out")
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not YAML", str(error).replace("\n", " ")) from None
    if not isinstance(data, Mapping):
        raise UsageError(f"{path} is not a mapping", remedy="Write keys such as model, data and steps")
    return dict(data)


def _one(step: Step, source: Path, out: Path, work: Work) -> dict[str, Any]:
    if step.verb == "merge":
        return dict(merge(source, out, trust_remote_code=work.trust_remote_code) or {})
    module = catalog.module(step.method)
    return dict(catalog.contract(catalog.get(step.method).room).apply(module, step, source, out, work))


def _label(step: Step) -> str:
    options = "-".join(map(str, step.options.values()))
    said = all(isinstance(value, int | float | str) for value in step.options.values())
    if not said or len(options) > _LONGEST or "/" in options:  # a list or a path: folders have short names
        options = hashlib.sha256(options.encode()).hexdigest()[:12]  # and one step one name
    return "-".join(filter(None, (step.method or step.verb, options)))
