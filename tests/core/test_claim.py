from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from shoestring.core import claim
from shoestring.core.claim import CANNOT, NOT_SHOWN, SHOWN, Claim, ClaimFile, Measured
from shoestring.core.errors import ShoestringError, UsageError

HALF = Claim("half", paper="a half", here="arithmetic", measure="size", arm="a", against="b", expect="<= 0.5")
ABOUT = {"command": "x", "seeds": [0, 1, 2]}

FILE = '''"""What is compared."""
from shoestring.core.claim import Claim

METHODS = ()
_HERE = "a small machine"
CLAIMS = (
    Claim("half", paper="a half", here=_HERE + "; arithmetic", measure="size", arm="a", against="b", expect="<= 0.5"),
    Claim("rest", paper="175B", here=_HERE, measure="size", cannot="the size"),
)
'''


@pytest.fixture
def stated(tmp_path: Path) -> Callable[[str], ClaimFile]:
    def write(text: str = FILE) -> ClaimFile:
        file = tmp_path / "my_claim.py"
        file.write_text(text)
        return claim._read(file)

    return write


@pytest.mark.parametrize(
    ("expect", "value", "met"),
    [("<= 0.5", 0.5, True), ("<= 0.5", 0.51, False), ("< 0.5", 0.5, False), (">= 2", 2.0, True), ("> 2", 2.0, False),
     ("<= -1e-3", -0.1, True), (">=2.0", 3, True)],
)  # fmt: skip
def test_bounds(expect: str, value: float, met: bool) -> None:
    assert Claim("c", "p", "h", "m", expect=expect).met(value) is met


@pytest.mark.parametrize("expect", ["about 2", "== 1", "<= x", "0.5"])
def test_what_is_no_bound(expect: str) -> None:
    with pytest.raises(ShoestringError, match="expects"):
        Claim("c", "p", "h", "m", expect=expect).met(1)


@pytest.mark.parametrize(
    ("arm", "baseline", "verdict"),
    [
        ((1, 1, 1), (2, 2, 2), SHOWN),
        ((1, 1, 1.1), (2, 2, 2), NOT_SHOWN),  # every seed must meet the bound
        ((1, 1), (2, 2), NOT_SHOWN),  # too few seeds
        ((), (), NOT_SHOWN),
        ((1, 1, 1), (2, 2, 0), NOT_SHOWN),  # a baseline of zero gives no ratio
    ],
)
def test_verdicts(arm: tuple, baseline: tuple, verdict: str) -> None:
    assert Measured(arm, baseline).verdict(HALF) == verdict


def test_a_reason_against_or_an_empty_bound_gives_no_success() -> None:
    assert Measured((1, 1, 1), (2, 2, 2), reason="an arm is missing").verdict(HALF) == NOT_SHOWN
    assert Measured().verdict(Claim("c", "p", "h", "m", cannot="all")) == CANNOT


def test_differences() -> None:
    less = Claim("c", "p", "h", "m", arm="a", against="b", expect="<= 0.05", by="difference")
    assert Measured((1.04, 1, 0.9), (1, 1, 1)).verdict(less) == SHOWN
    assert Measured((1.06, 1, 0.9), (1, 1, 1)).verdict(less) == NOT_SHOWN


def test_a_file_is_read_without_being_imported(stated: Callable[..., ClaimFile]) -> None:
    found = stated("import no_such_package\n" + FILE.replace('"""What', '"""What', 1))
    assert found.slug == "my-claim" and found.methods == ()
    assert found.claims[0].here == "a small machine; arithmetic" and found.claims[1].cannot == "the size"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [("CLAIMS = ", "CLAIM = ", "states no CLAIMS"), ('"a half"', "half()", "not a literal"),
     ('"a half"', "_THERE", "not a literal"),
     ("measure=", "measured=", "not a literal"), ("CLAIMS = (", "CLAIMS = list((", "not a literal")],
)  # fmt: skip
def test_files_that_state_nothing(old: str, new: str, words: str, stated: Callable[..., ClaimFile]) -> None:
    text = FILE.replace(old, new) + (")" if "list((" in new else "")
    with pytest.raises(ShoestringError, match=words):
        stated(text)


def test_a_record_comes_back_as_it_was_written(stated: Callable[..., ClaimFile]) -> None:
    found = stated()
    assert claim.read_record(found) is None
    measured = [Measured((1, 1, 1), (2, 2, 2), "B"), Measured(reason="the size")]
    record = claim.write_record(found, measured, ABOUT)
    assert (record.standing, record.verdicts) == ("fresh", [SHOWN, CANNOT])
    assert record.claims == tuple(zip(found.claims, measured))
    data = json.loads(found.record.read_text())
    assert data["claims"][0]["summary"]["ratio"] == {"median": 0.5, "low": 0.5, "high": 0.5}
    assert data["command"] == "x" and data["code"] == found.code()


@pytest.mark.parametrize(
    ("old", "new"),
    [("2.0", "3.0"), ('"verdict": "shown"', '"verdict": "not shown"'), ('"command": "x"', '"command": "y"')],
)
def test_a_record_that_was_edited_says_so(old: str, new: str, stated: Callable[..., ClaimFile]) -> None:
    found = stated()
    claim.write_record(found, [Measured((1.0, 1.0, 1.0), (2.0, 2.0, 2.0), "B"), Measured()], ABOUT)
    text = found.record.read_text()
    assert old in text
    found.record.write_text(text.replace(old, new, 1))
    record = claim.read_record(found)
    assert record and record.standing == "edited"


def test_a_stored_verdict_is_never_believed(stated: Callable[..., ClaimFile]) -> None:
    found = stated()
    claim.write_record(found, [Measured((3.0, 3.0, 3.0), (2.0, 2.0, 2.0), "B"), Measured()], ABOUT)
    data = json.loads(found.record.read_text())
    data["claims"][0]["verdict"] = SHOWN
    data["digest"] = claim._digest(data)  # as a forger would
    found.record.write_text(json.dumps(data))
    record = claim.read_record(found)
    assert record and record.verdicts == [NOT_SHOWN, CANNOT]


def test_a_record_of_other_code_is_stale(stated: Callable[..., ClaimFile]) -> None:
    claim.write_record(stated(), [Measured((1, 1, 1), (2, 2, 2)), Measured()], ABOUT)
    for changed in (FILE + "# a comment\n", FILE.replace("<= 0.5", "<= 0.9")):
        record = claim.read_record(stated(changed))
        assert record and record.standing == "stale"
    record = claim.read_record(stated())
    assert record and record.standing == "fresh"


def test_a_record_depends_on_its_methods_and_the_measuring_code() -> None:
    for found in claim.files().values():
        before = found.code()
        assert before == found.code()
        assert not found.methods or before != ClaimFile(found.slug, found.file, "", found.claims, ()).code()


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with measuring code: `one` imports `two` within a function, and nobody imports `other`."""
    for name, text in (
        ("lab/arms.py", ""), ("lab/deep.py", ""), ("lab/stray.py", ""), ("claims/_other.py", "import math\n"),
        ("claims/_one.py", "def late():\n    from shoestring.claims import _two\n"),
        ("claims/_two.py", "from shoestring.lab.deep import x\nfrom shoestring.core import claim\n"),
        ("claims/my_claim.py", FILE + "import shoestring.claims._one\nfrom shoestring.lab import arms\n"),
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(claim, "FOLDER", tmp_path / "claims")
    return tmp_path


def test_only_what_the_claim_imports_makes_its_record_stale(house: Path) -> None:
    found = claim._read(house / "claims" / "my_claim.py")
    claim.write_record(found, [Measured((1, 1, 1), (2, 2, 2)), Measured()], ABOUT)
    (house / "claims" / "_new.py").write_text("")
    standings = {}
    for name in ("lab/stray.py", "claims/_other.py", "lab/arms.py", "lab/deep.py", "claims/_one.py", "claims/_two.py"):
        before = (house / name).read_text()
        (house / name).write_text(before + "# changed\n")
        record = claim.read_record(found)
        standings[name] = record and record.standing
        (house / name).write_text(before)
    counted = ("lab/arms.py", "lab/deep.py", "claims/_one.py", "claims/_two.py")
    assert standings == {name: "stale" if name in counted else "fresh" for name in standings}


def test_an_early_record_stays_good_while_nothing_it_counts_has_changed(house: Path) -> None:
    found = claim._read(house / "claims" / "my_claim.py")
    helpers = [house / "claims" / f"{name}.py" for name in ("_one", "_other", "_two")]
    early = claim._hash([found.file, house / "lab" / "arms.py", *helpers])
    assert early != found.code() and found.made(early)
    (house / "claims" / "_new.py").write_text("")
    assert found.made(early)
    (house / "claims" / "_two.py").write_text("# changed\n")
    assert not found.made(early)


def test_a_damaged_record_is_an_error_that_names_it(stated: Callable[..., ClaimFile]) -> None:
    found = stated()
    found.record.parent.mkdir()
    for text in ("", "{}", "[1", '{"claims": [{}]}'):
        found.record.write_text(text)
        with pytest.raises(ShoestringError, match="my-claim.json is not a record"):
            claim.read_record(found)


def test_an_unknown_claim_suggests_the_nearest() -> None:
    slug = next(iter(claim.files()))
    assert claim.get(slug.replace("-", "_")).slug == slug
    with pytest.raises(UsageError, match=f"Did you mean.*{slug}"):
        claim.get(slug + "x")


def test_the_state_of_a_method_counts_what_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for slug in ("one", "two"):
        folder = tmp_path / slug
        folder.mkdir()
        (folder / f"{slug}.py").write_text(FILE)
        plain = claim._read(folder / f"{slug}.py")
        found[slug] = ClaimFile(slug, plain.file, plain.about, plain.claims, ("toy",))
    monkeypatch.setattr(claim, "files", lambda: found)
    monkeypatch.setattr(ClaimFile, "_shared", lambda self: [])
    assert claim.state_of("toy") == "no record" and claim.state_of("other") == "no claim"
    claim.write_record(found["one"], [Measured((1, 1, 1), (2, 2, 2)), Measured()], ABOUT)
    assert claim.state_of("toy") == "no record"
    claim.write_record(found["two"], [Measured((1, 1, 1), (2, 2, 2)), Measured()], ABOUT)
    assert claim.state_of("toy") == SHOWN
    claim.write_record(found["two"], [Measured((3, 3, 3), (2, 2, 2)), Measured()], ABOUT)
    assert claim.state_of("toy") == "1 of 2 shown"
    (tmp_path / "two" / "two.py").write_text(FILE + "# changed\n")
    assert claim.state_of("toy") == "1 of 2 shown (stale)"
    for slug in found:
        claim.write_record(found[slug], [Measured((3, 3, 3), (2, 2, 2)), Measured()], ABOUT)
    assert claim.state_of("toy") == NOT_SHOWN
