"""Claims: a paper's sentence, our smallest honest experiment, and a figure with its command.

`claims/<slug>.py` states them; `claims/records/<slug>.json` holds what was measured and is written only by
`shoestring claims run`. A verdict is never stored alone: it is worked out again from the stored figures whenever a
record is read, and a record whose digest or code hash does not match is shown as edited or stale.
"""

from __future__ import annotations

import ast
import hashlib
import json
import operator
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

from shoestring.core import catalog
from shoestring.core.errors import ShoestringError, UsageError, nearest

FOLDER = Path(__file__).parents[1] / "claims"
SHOWN, NOT_SHOWN, CANNOT = "shown", "not shown", "cannot be shown here"
NO_RECORD = "no record"
LEAST_SEEDS = 3

_COMPARISONS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
_EXPECT = re.compile(r"\s*(<=|>=|<|>)\s*(-?[0-9.]+(?:e-?[0-9]+)?)\s*")


@dataclass(frozen=True)
class Claim:
    """One statement, fixed before it is measured.

    Attributes:
        name: short, unique in its file.
        paper: the paper's figure exactly as it gives it.
        here: our experiment: model, data, sizes, precision.
        measure: the ledger metric that is compared.
        arm: the arm that carries the method.
        against: the arm it is compared with, the honest baseline.
        expect: a bound such as "<= 0.95" on arm / baseline, paired seed by seed; every seed must meet it.
        by: "ratio" (arm / baseline) or "difference" (arm - baseline).
        cannot: what of the paper cannot be shown on a small machine; with an empty `expect`, the whole claim.
    """

    name: str
    paper: str
    here: str
    measure: str
    arm: str = ""
    against: str = ""
    expect: str = ""
    by: str = "ratio"
    cannot: str = ""

    def met(self, value: float) -> bool:
        match = _EXPECT.fullmatch(self.expect)
        if not match:
            raise ShoestringError(f"claim {self.name} expects {self.expect!r}", remedy='Write it as "<= 0.95"')
        return bool(_COMPARISONS[match[1]](value, float(match[2])))


@dataclass(frozen=True)
class Measured:
    """What one claim's two arms gave, seed by seed; `verdict` and the rest follow from the lists."""

    arm: tuple[float, ...] = ()
    baseline: tuple[float, ...] = ()
    unit: str = ""
    reason: str = ""

    def paired(self, claim: Claim) -> list[float]:
        if claim.by == "difference":
            return [a - b for a, b in zip(self.arm, self.baseline)]
        return [a / b for a, b in zip(self.arm, self.baseline) if b]

    def verdict(self, claim: Claim) -> str:
        if not claim.expect:
            return CANNOT
        if self.reason or min(len(self.arm), len(self.baseline)) < LEAST_SEEDS:
            return NOT_SHOWN
        paired = self.paired(claim)
        return SHOWN if len(paired) == len(self.arm) and all(map(claim.met, paired)) else NOT_SHOWN


@dataclass(frozen=True)
class ClaimFile:
    """A claim file, read without importing it."""

    slug: str
    file: Path
    about: str
    claims: tuple[Claim, ...]
    methods: tuple[str, ...]

    @property
    def record(self) -> Path:
        return self.file.parent / "records" / f"{self.slug}.json"

    def of(self, method: str) -> tuple[Claim, ...]:
        """Where several methods share a file, the claims that name this one as an arm or as what is measured, or all if
        none does."""
        named = tuple(c for c in self.claims if method in (c.arm, c.against, c.measure))
        return named if named and len(self.methods) > 1 else self.claims

    def code(self) -> str:
        """Hash of everything that decides the figures: claim, what of lab and claims it imports, methods and what they
        share."""
        return _hash([self.file, *_imported(self.file), *self._shared()])

    def made(self, code: str) -> bool:
        """Whether the record whose hash is `code` was made by this code.

        Early records count helpers that others import too, and of lab only `arms.py`: they stay good while none of what
        they count has changed.
        """
        if code == self.code():
            return True
        arms, own, shared = FOLDER.parent / "lab" / "arms.py", _imported(self.file), self._shared()
        helpers = sorted(FOLDER.glob("_[!_]*.py"))
        rest = [file for file in helpers if file not in own]
        return any(
            code == _hash([self.file, arms, *(f for f in helpers if f in own or f in more), *shared])
            for count in range(len(rest) + 1)
            for more in combinations(rest, count)
        )

    def _shared(self) -> list[Path]:
        """The files of its methods, each with what it names of its room's private ones."""
        files = []
        for name in self.methods:
            method = Path(catalog.get(name).file)
            source = method.read_text(encoding="utf-8")
            beside = sorted(method.parent.glob("_[!_]*.py"))
            files += [method, *(p for p in beside if p.stem in source and re.search(rf"\b{p.stem}\b", source))]
        return files


@dataclass(frozen=True)
class Record:
    """A claim file's record as read from disk, with its present standing."""

    slug: str
    claims: tuple[tuple[Claim, Measured], ...]
    about: Mapping[str, Any] = field(default_factory=dict)
    standing: str = "fresh"

    @property
    def verdicts(self) -> list[str]:
        """Of each claim, worked out from the figures: what the file says of itself is not believed."""
        return [measured.verdict(claim) for claim, measured in self.claims]


@cache
def files() -> dict[str, ClaimFile]:
    """Every claim file by slug; methods of other packages keep theirs in `claims/` beside their rooms."""
    found = {}
    folders = [FOLDER] + [
        Path(m.file).parents[1] / "claims" for m in catalog.methods().values() if not m.module.startswith(catalog.ROOMS)
    ]
    for folder in dict.fromkeys(folders):
        for file in sorted(folder.glob("[!_]*.py")):
            claim_file = _read(file)
            found[claim_file.slug] = claim_file
    return found


def get(slug: str) -> ClaimFile:
    """The claim file of a paper or method.

    Raises:
        UsageError: there is none; the nearest names are suggested.
    """
    slug = slug.replace("_", "-")
    if slug not in files():
        raise UsageError(f"no claim is called {slug}", remedy=nearest(slug, files()))
    return files()[slug]


def read_record(claim_file: ClaimFile) -> Record | None:
    """The record of a claim file, None when it was never run.

    Its standing is "fresh", "stale" (the code or the statement changed since) or "edited" (its digest does not match).
    """
    if not claim_file.record.exists():
        return None
    try:
        data = json.loads(claim_file.record.read_text(encoding="utf-8"))
        pairs = tuple(
            (
                Claim(**row["claim"]),
                Measured(tuple(row["arm"]), tuple(row["baseline"]), row["unit"], row["reason"]),
            )
            for row in data["claims"]
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ShoestringError(
            f"{claim_file.record} is not a record", str(error), f"Run `shoestring claims run {claim_file.slug}`"
        ) from None
    standing = "fresh"
    if not claim_file.made(str(data.get("code"))) or tuple(claim for claim, _ in pairs) != claim_file.claims:
        standing = "stale"
    if data.get("digest") != _digest(data):
        standing = "edited"
    return Record(claim_file.slug, pairs, data, standing)


def write_record(claim_file: ClaimFile, measured: Sequence[Measured], about: Mapping[str, Any]) -> Record:
    """Store what was measured. `about` says command, seeds, machine, versions, date, commit, seconds."""
    rows = []
    for claim, m in zip(claim_file.claims, measured, strict=True):
        rows.append(
            {
                "claim": asdict(claim),
                "arm": list(m.arm),
                "baseline": list(m.baseline),
                "unit": m.unit,
                "reason": m.reason,
                "summary": {
                    "arm": _spread(m.arm),
                    "baseline": _spread(m.baseline),
                    claim.by: _spread(m.paired(claim)),
                },
                "verdict": m.verdict(claim),
            }
        )
    data = {
        "slug": claim_file.slug,
        "methods": list(claim_file.methods),
        "claims": rows,
        **about,
        "code": claim_file.code(),
    }
    data["digest"] = _digest(data)
    claim_file.record.parent.mkdir(exist_ok=True)
    aside = claim_file.record.with_suffix(".partial")
    aside.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    aside.replace(claim_file.record)
    record = read_record(claim_file)
    assert record is not None
    return record


def state_of(method: str) -> str:
    """How the claims of a method stand, over all files that carry it: "shown", "3 of 4 shown", "not shown" if none is.

    Marked when a record is stale or edited; "no record" when one is missing.
    """
    verdicts: list[str] = []
    unfit = ""
    for claim_file in files().values():
        if method not in claim_file.methods:
            continue
        record = read_record(claim_file)
        if record is None:
            return NO_RECORD
        own = claim_file.of(method)
        verdicts += [measured.verdict(said) for said, measured in record.claims if said in own]
        if record.standing != "fresh":
            unfit = f" ({record.standing})"
    if not verdicts:
        return "no claim"
    met, missed = verdicts.count(SHOWN), verdicts.count(NOT_SHOWN)
    if not met + missed:
        return CANNOT + unfit
    return (f"{met} of {met + missed} {SHOWN}" if met and missed else SHOWN if met else NOT_SHOWN) + unfit


def _read(file: Path) -> ClaimFile:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    slug = file.stem.replace("_", "-")
    literals: dict[str, ast.expr] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            literals[node.targets[0].id] = node.value
    if "CLAIMS" not in literals:
        raise ShoestringError(f"{file} states no CLAIMS", remedy="CLAIMS = (Claim(...), ...), all literals")
    try:
        rows = literals["CLAIMS"]
        assert isinstance(rows, ast.Tuple)
        claims = tuple(
            Claim(
                *(_value(a, literals) for a in row.args),
                **{k.arg: _value(k.value, literals) for k in row.keywords if k.arg},
            )
            for row in rows.elts
            if isinstance(row, ast.Call)
        )
        methods = ast.literal_eval(literals["METHODS"]) if "METHODS" in literals else (file.stem,)
    except (ValueError, TypeError, AssertionError) as error:
        raise ShoestringError(f"CLAIMS in {file} is not a literal", str(error), "CLAIMS = (Claim(...), ...)") from None
    return ClaimFile(slug, file, ast.get_docstring(tree) or "", claims, tuple(methods))


def _imported(file: Path) -> list[Path]:
    """Files of `lab` and helpers of claims that a claim file imports, also inside functions and through each other."""
    house, found, left = FOLDER.parent, set[Path](), [file]
    while left:
        for name in _imports(left.pop().read_text(encoding="utf-8")):
            package, _, rest = name.partition(".")
            place = house / package / f"{rest}.py"
            measures = package == "lab" or (package == "claims" and rest.startswith("_"))
            if measures and place.is_file() and place not in found:
                found.add(place)
                left.append(place)
    return sorted(found, key=lambda place: (place.parent != house / "lab", place.name))


@cache
def _imports(source: str) -> tuple[str, ...]:
    """What a source imports of this package, as it may be a module: dotted names without the first part."""
    names: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return tuple(name.removeprefix("shoestring.") for name in names if name.startswith("shoestring."))


def _hash(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _value(node: ast.expr, constants: Mapping[str, ast.expr]) -> Any:
    """A literal, a constant of the same file by its name, or texts joined by +."""
    if isinstance(node, ast.Name) and node.id in constants:
        return _value(constants[node.id], constants)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _value(node.left, constants) + _value(node.right, constants)
    return ast.literal_eval(node)


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def _digest(data: Mapping[str, Any]) -> str:
    rest = {k: v for k, v in data.items() if k != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
