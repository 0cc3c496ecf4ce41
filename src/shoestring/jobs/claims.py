"""Runs a claim file seed by seed and, in the full size, writes its record."""

from __future__ import annotations

import importlib.util
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType

from transformers import set_seed

from shoestring.core import claim
from shoestring.core.claim import Claim, ClaimFile, Measured
from shoestring.core.errors import UsageError
from shoestring.core.ledger import Ledger
from shoestring.lab.arms import Arms


@dataclass(frozen=True)
class Outcome:
    """What one run of a claim file gave; `record` is None in the quick size."""

    claim_file: ClaimFile
    measured: tuple[tuple[Claim, Measured], ...]
    record: claim.Record | None


def run(
    slug: str, *, quick: bool = False, seeds: Sequence[int] = (0, 1, 2), say: Callable[[str], None] = print
) -> Outcome:
    """Measure every claim of a file over `seeds`, arms paired within a seed.

    Raises:
        UsageError: no such claim, fewer seeds than a verdict needs, or a place where no record can be written.
    """
    claim_file = claim.get(slug)
    seeds = tuple(dict.fromkeys(seeds))
    if not quick:
        if len(seeds) < claim.LEAST_SEEDS:
            raise UsageError(
                f"{len(seeds)} seeds give no verdict", remedy=f"Use at least {claim.LEAST_SEEDS}, or --quick"
            )
        _refuse_unwritable(claim_file.record)
    module = _load(claim_file)
    code, started = claim_file.code(), time.perf_counter()
    rounds: list[Arms] = []
    reason = ""
    if any(c.expect for c in claim_file.claims):
        with tempfile.TemporaryDirectory(prefix="claim-") as scratch:
            for seed in seeds:
                say(f"{claim_file.slug}: seed {seed}")
                arms = Arms(seed, quick, Path(scratch) / str(seed), Ledger())
                arms.folder.mkdir()
                set_seed(seed)  # for what an experiment draws before it opens its first arm
                module.run(arms)
                rounds.append(arms)
    measured = tuple(_gather(c, rounds, reason) for c in claim_file.claims)
    if quick:
        return Outcome(claim_file, tuple(zip(claim_file.claims, measured)), None)
    if claim_file.code() != code:
        raise UsageError(f"the code of {slug} changed while it ran", remedy="Run it again")
    fingerprint = dict(rounds[0].ledger.fingerprint) if rounds else dict(Ledger().fingerprint)
    record = claim.write_record(
        claim_file,
        measured,
        {
            "command": f"shoestring claims run {claim_file.slug} --seeds {','.join(map(str, seeds))}",
            "seeds": list(seeds),
            "machine": fingerprint,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": _commit(),
            "seconds": round(time.perf_counter() - started, 1),
        },
    )
    return Outcome(claim_file, tuple(zip(claim_file.claims, measured)), record)


def _refuse_unwritable(record: Path) -> None:
    """A measurement takes minutes to hours, so this is found out before it."""
    folder = record.parent if record.parent.exists() else record.parent.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(
            f"no record can be written to {folder}",
            error.strerror or str(error),
            "Measure in a clone of the sources that you may write to, or use --quick",
        ) from None


def _gather(statement: Claim, rounds: Sequence[Arms], reason: str) -> Measured:
    if not statement.expect:
        return Measured(reason=statement.cannot)
    pairs = [(r.value(statement.arm, statement.measure), r.value(statement.against, statement.measure)) for r in rounds]
    whole = [(a, b) for a, b in pairs if a is not None and b is not None]
    if len(whole) < len(pairs):
        reason = f"{statement.measure} was not measured in every arm"
    units = {u for a, b in whole for u in (a[1], b[1])}
    return Measured(tuple(a[0] for a, _ in whole), tuple(b[0] for _, b in whole), "/".join(sorted(units)), reason)


def _load(claim_file: ClaimFile) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"shoestring.claims.{claim_file.file.stem}", claim_file.file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _commit() -> str:
    """The commit that the sources are of, with a mark where they differ from it; unknown where git does not know."""
    if not _git("ls-files", "*.py"):  # installed somewhere below a repository of somebody else's
        return "unknown"
    # Records themselves may differ: writing them is what a run does.
    changed = _git("status", "--porcelain", "--", "..", ":(top)native", ":(exclude)records")
    return _git("rev-parse", "HEAD") + ("+changes" if changed else "")


def _git(*words: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(claim.FOLDER), *words], capture_output=True, text=True, check=False)
    except OSError:  # there is no git
        return ""
    return "" if done.returncode else done.stdout.strip()
