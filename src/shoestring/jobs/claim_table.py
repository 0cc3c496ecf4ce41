"""Claims and their figures as rows."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from shoestring.core import claim
from shoestring.core.claim import Claim, ClaimFile, Measured

HEADER = ("claim", "what", "expected", "measured", "verdict", "the paper says")


def rows(claim_files: Iterable[ClaimFile] | None = None) -> list[dict[str, Any]]:
    """Every claim of these files, or of all there are, as `row`."""
    found = []
    for claim_file in claim.files().values() if claim_files is None else claim_files:
        record = claim.read_record(claim_file)
        known = {said.name: (said, measured) for said, measured in record.claims} if record else {}
        for said in claim_file.claims:  # those that came after the record have none
            standing = record.standing if record and said.name in known else claim.NO_RECORD
            found.append(row(claim_file, *known.get(said.name, (said, Measured())), standing))
    return found


def row(claim_file: ClaimFile, statement: Claim, measured: Measured, standing: str) -> dict[str, Any]:
    """One claim as plain data: what is compared, its bound, the medians, and the verdict.

    Args:
        standing: fresh, stale, edited, quick (measured once, no verdict) or no record.
    """
    paired = measured.paired(statement)
    return {
        "slug": claim_file.slug,
        "claim": statement.name,
        "methods": list(claim_file.methods),
        "paper": statement.paper,
        "here": statement.here,
        "cannot": statement.cannot,
        "measure": statement.measure,
        "by": statement.by,
        "arms": [statement.arm, statement.against],
        "expect": statement.expect,
        "unit": measured.unit,
        "arm": list(measured.arm),
        "baseline": list(measured.baseline),
        "value": statistics.median(paired) if paired else None,
        "range": [min(paired), max(paired)] if paired else None,
        "reason": measured.reason,
        "verdict": standing if standing in (claim.NO_RECORD, "quick") else measured.verdict(statement),
        "standing": standing,
    }


def cells(found: dict[str, Any]) -> tuple[str, ...]:
    """A row for people, in the order of `HEADER`."""
    sign = " / " if found["by"] == "ratio" else " - "
    value, low_high = found["value"], found["range"]
    spread = f"{value:.4g} ({low_high[0]:.4g} to {low_high[1]:.4g})" if value is not None else "-"
    state = found["verdict"] + (f" ({found['standing']})" if found["standing"] in ("stale", "edited") else "")
    what = f"{found['measure']}: {sign.join(found['arms'])}" if found["expect"] else found["cannot"]
    return (f"{found['slug']} {found['claim']}", what, found["expect"] or "-", spread, state, found["paper"])
