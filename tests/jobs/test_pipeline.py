from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shoestring.core.errors import UsageError
from shoestring.core.ledger import Ledger
from shoestring.core.step import Step, Work
from shoestring.jobs import pipeline as job
from shoestring.jobs.pipeline import execute, read_pipeline

PACK = {"group_size": 64, "embeddings": 8}
TRAIN, MERGE, PACKED = Step("train", "lora", {"r": 4}), Step("merge"), Step("compress", "int8", PACK)


class Broken(Exception):
    pass


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Steps write a note instead of a model; the list says which were done. A step called `breaks` raises half-way."""
    steps: list[str] = []

    def one(step: Step, source: Path, out: Path, work: Work) -> dict[str, Any]:
        steps.append(str(step))
        if step.options.get("breaks"):
            raise Broken
        out.mkdir(parents=True)
        before = (source / "trace").read_text() if (source / "trace").is_file() else ""
        (out / "trace").write_text(f"{before}/{step}")
        return {"at": str(work.folder)}

    monkeypatch.setattr(job, "_one", one)
    return steps


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Any]:
    (tmp_path / "source").mkdir()

    def go(*steps: Step) -> tuple[Path, list[dict[str, Any]]]:
        with Ledger() as ledger:
            return execute(steps, tmp_path / "source", Work(ledger, tmp_path / "work"))

    return go


def test_pipelines_that_begin_alike_share_what_they_made(done: list[str], run: Callable[..., Any]) -> None:
    four, eight = Step("compress", "int4", PACK), PACKED
    one, facts = run(TRAIN, MERGE, four)
    two, again = run(TRAIN, MERGE, eight)
    assert len(done) == 4 and done.count(str(TRAIN)) == 1 and done.count("merge") == 1
    assert one != two and (one / "trace").read_text() == f"/{TRAIN}/merge/{four}"
    assert (two / "trace").read_text() == f"/{TRAIN}/merge/{eight}"
    assert again[:2] == facts[:2] and len({f["at"] for f in facts}) == 3, "checkpoints of steps stand apart"


def test_other_options_are_another_result(done: list[str], run: Callable[..., Any]) -> None:
    folders = {run(Step("compress", "int8", {"group_size": size}))[0] for size in (32, 64, 128)}
    assert len(folders) == 3 and len(done) == 3
    assert run(Step("compress", "int8", {"group_size": 32}))[0] in folders and len(done) == 3


def test_lists_and_nothing_are_options_too(done: list[str], run: Callable[..., Any]) -> None:
    made = {
        run(Step("compress", "int8", {**PACK, **more}))[0].name
        for more in ({}, {"embeddings": None}, *({"modules_to_not_convert": names} for names in (["q"], ["k"], [])))
    }
    assert len(done) == len(made) == 5


def test_no_step_is_the_source(tmp_path: Path, run: Callable[..., Any]) -> None:
    assert run() == (tmp_path / "source", [])


def test_it_goes_on_after_the_last_whole_step(done: list[str], run: Callable[..., Any]) -> None:
    with pytest.raises(Broken):
        run(TRAIN, MERGE, Step("compress", "int8", {"breaks": 1}))
    folder, facts = run(TRAIN, MERGE, PACKED)
    assert [done.count(str(s)) for s in (TRAIN, MERGE, PACKED)] == [1, 1, 1] and len(facts) == 3
    note = next(folder.parent.glob(f"{folder.name}.json"))
    assert json.loads(note.read_text()) == facts[2]


def test_real_steps_that_died_between_result_and_note(tiny: Path, tmp_path: Path) -> None:
    with Ledger() as ledger:
        work = Work(ledger, tmp_path / "work")
        folder, _ = execute([PACKED], tiny, work)
        weights = (folder / "model.safetensors").read_bytes()
        folder.with_name(folder.name + ".json").unlink()
        again, facts = execute([PACKED], tiny, work)
    assert again == folder and len(facts) == 1 and (folder / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (Step("compres", "int8"), "unknown verb compres. Did you mean compress"),
        (Step("compress", "lora"), "lora does not compress. Its verb is train"),
        (Step("train", "int8"), "int8 does not train. Its verb is compress"),
        (Step("compress", "int9"), "unknown method int9"),
        (Step("compress"), "unknown method"),
    ],
)
def test_every_step_is_checked_before_the_first_is_done(
    step: Step, words: str, done: list[str], run: Callable[..., Any]
) -> None:
    with pytest.raises(UsageError, match=words):
        run(PACKED, step)
    assert done == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: x\n\tsteps: []\n", "is not YAML"),
        ("a: &x [1]\nb: *x\n", "uses YAML aliases"),
        ("- verb: merge\n", "is not a mapping"),
        ("", "is not a mapping"),
        ("a: !!python/object/apply:os.system [true]\n", "is not YAML"),
        ("# " + "x" * 1_000_000, "larger than 1 MB"),
    ],
)
def test_files_that_are_no_pipeline(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=words):
        read_pipeline(file)


def test_a_pipeline_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no pipeline"):
        read_pipeline(tmp_path / "none.yaml")
    (tmp_path / "p.yaml").write_text("model: x\nsteps: [{verb: merge}]\n")
    assert read_pipeline(tmp_path / "p.yaml") == {"model": "x", "steps": [{"verb": "merge"}]}
