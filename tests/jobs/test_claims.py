from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoestring.core import claim
from shoestring.core.errors import UsageError
from shoestring.jobs import claims as job

TOY = '''"""Halving halves."""
from shoestring.core.claim import Claim

METHODS = ()
CLAIMS = (
    Claim("half", paper="one half", here="arithmetic", measure="size", arm="half", against="whole", expect="<= 0.5"),
    Claim("gap", paper="5 less", here="arithmetic", measure="size", arm="half", against="whole", expect="<= -5",
          by="difference"),
    Claim("rest", paper="175B", here="arithmetic", measure="size", cannot="the size"),
)


def not_called():
    from shoestring.claims import _shared
    from shoestring.lab import arms


def run(arms):
    for name, size in (("whole", 10.0 + arms.seed), ("half", (10.0 + arms.seed) / 2)):
        with arms.arm(name) as stage:
            stage.record("size", size, "B", "counted")
'''


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The only claim there is, in a house of its own."""
    folder = tmp_path / "house" / "claims"
    folder.mkdir(parents=True)
    (folder.parent / "lab").mkdir()
    (folder.parent / "lab" / "arms.py").write_text("# how it is measured\n")
    (folder / "_shared.py").write_text("# what claims share\n")
    (folder / "toy.py").write_text(TOY)
    monkeypatch.setattr(claim, "FOLDER", folder)
    claim.files.cache_clear()
    yield folder / "toy.py"
    claim.files.cache_clear()


def standing() -> str:
    claim.files.cache_clear()
    record = claim.read_record(claim.get("toy"))
    assert record is not None
    return record.standing


def quiet(line: str) -> None: ...


def test_a_run_writes_what_it_measured(toy: Path) -> None:
    said: list[str] = []
    outcome = job.run("toy", say=said.append)
    assert said == ["toy: seed 0", "toy: seed 1", "toy: seed 2"]
    data = json.loads((toy.parent / "records" / "toy.json").read_text())
    assert [row["verdict"] for row in data["claims"]] == ["shown", "shown", "cannot be shown here"]
    assert data["claims"][0]["arm"] == [5.0, 5.5, 6.0] and data["claims"][0]["baseline"] == [10.0, 11.0, 12.0]
    assert data["claims"][1]["summary"]["difference"] == {"median": -5.5, "low": -6.0, "high": -5.0}
    assert data["command"] == "shoestring claims run toy --seeds 0,1,2" and data["seeds"] == [0, 1, 2]
    assert data["commit"] and data["machine"] and data["date"] and data["claims"][0]["unit"] == "B"
    assert outcome.record is not None and outcome.record.standing == "fresh"
    assert outcome.record.verdicts == ["shown", "shown", "cannot be shown here"]
    assert not list((toy.parent / "records").glob("*.partial"))


def test_the_quick_size_records_nothing(toy: Path) -> None:
    outcome = job.run("toy", quick=True, seeds=(0,), say=quiet)
    assert outcome.record is None and not (toy.parent / "records").exists()
    assert outcome.measured[0][1].arm == (5.0,)


@pytest.mark.parametrize("seeds", [(), (0,), (0, 1), (0, 0, 0)])
def test_too_few_seeds_give_no_verdict(seeds: tuple[int, ...], toy: Path) -> None:
    with pytest.raises(UsageError, match="seeds give no verdict"):
        job.run("toy", seeds=seeds, say=quiet)
    assert not (toy.parent / "records").exists()


def test_one_seed_that_falls_short_decides(toy: Path) -> None:
    toy.write_text(TOY.replace("(10.0 + arms.seed) / 2)", "(10.0 + arms.seed) / 2 + 0.1 * (arms.seed == 2))"))
    claim.files.cache_clear()
    outcome = job.run("toy", say=quiet)
    assert [m.verdict(c) for c, m in outcome.measured] == ["not shown", "shown", "cannot be shown here"]
    assert outcome.record is not None and outcome.record.verdicts == ["not shown", "shown", "cannot be shown here"]


def test_an_arm_that_measured_nothing(toy: Path) -> None:
    toy.write_text(TOY.replace('stage.record("size"', 'name == "whole" and stage.record("size"'))
    claim.files.cache_clear()
    outcome = job.run("toy", say=quiet)
    assert outcome.measured[0][1].reason == "size was not measured in every arm"
    assert outcome.measured[0][1].verdict(outcome.measured[0][0]) == "not shown"


def test_a_claim_that_cannot_be_shown_runs_nothing(toy: Path) -> None:
    text = TOY.replace('expect="<= 0.5"', 'cannot="a"').replace('expect="<= -5",', 'cannot="b",')
    toy.write_text(text.replace("def run(arms):\n", "def run(arms):\n    raise AssertionError\n"))
    claim.files.cache_clear()
    outcome = job.run("toy", say=quiet)
    assert outcome.record is not None and set(outcome.record.verdicts) == {"cannot be shown here"}


def test_a_record_written_by_hand_says_so(toy: Path) -> None:
    job.run("toy", say=quiet)
    assert standing() == "fresh"
    record = toy.parent / "records" / "toy.json"
    record.write_text(record.read_text().replace("5.5", "5.4"))
    assert standing() == "edited"


@pytest.mark.parametrize("changed", ["toy.py", "_shared.py", "../lab/arms.py"])
def test_a_record_of_older_code_says_so(changed: str, toy: Path) -> None:
    job.run("toy", say=quiet)
    file = toy.parent / changed
    before = file.read_text()
    file.write_text(before + "# changed\n")
    assert standing() == "stale"
    file.write_text(before)
    assert standing() == "fresh"


def test_code_that_changes_while_it_runs_gives_no_record(toy: Path) -> None:
    toy.write_text(TOY + "    open(__file__, 'a').write('# changed')\n")
    claim.files.cache_clear()
    with pytest.raises(UsageError, match="changed while it ran"):
        job.run("toy", say=quiet)
    assert not (toy.parent / "records").exists()


def test_what_is_drawn_before_the_first_arm_repeats(toy: Path) -> None:
    drawn = "def run(arms):\n    import random, numpy, torch\n    " + (
        "draw = float(torch.rand(())) + float(numpy.random.rand()) + random.random()\n"
    )
    toy.write_text(TOY.replace("def run(arms):\n", drawn).replace("(10.0 + arms.seed) / 2)", "draw)"))
    claim.files.cache_clear()
    one, two = (job.run("toy", say=quiet).measured[0][1].arm for _ in range(2))
    assert one == two and len(set(one)) == 3


def test_a_place_without_room_for_a_record_is_found_before_the_work(toy: Path) -> None:
    (toy.parent / "records").write_text("no folder")
    toy.write_text(TOY.replace("def run(arms):\n", "def run(arms):\n    raise AssertionError\n"))
    claim.files.cache_clear()
    with pytest.raises(UsageError, match="no record can be written"):
        job.run("toy", say=quiet)


def test_the_commit_of_another_repository_is_not_ours(toy: Path) -> None:
    def git(*words: str) -> str:
        command = ["git", "-C", str(toy.parent), "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q", str(toy.parents[2]))
    (toy.parents[2] / ".gitignore").write_text("__pycache__\n")
    git("commit", "-q", "--allow-empty", "-m", "theirs")
    assert job.run("toy", say=quiet).record.about["commit"] == "unknown"  # type: ignore[union-attr]
    git("add", "toy.py")
    git("commit", "-q", "-m", "ours")
    assert job.run("toy", say=quiet).record.about["commit"] == git("rev-parse", "HEAD") + "+changes"  # type: ignore[union-attr]
    git("add", "..")
    git("commit", "-q", "-m", "all of it")
    assert job.run("toy", say=quiet).record.about["commit"] == git("rev-parse", "HEAD")  # type: ignore[union-attr]


def test_no_git_is_no_reason_to_lose_what_was_measured(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    outcome = job.run("toy", say=quiet)
    assert outcome.record is not None and outcome.record.about["commit"] == "unknown"
