"""Prints the claims to measure again: no record, code that changed since, or a record that was edited."""

from __future__ import annotations

from shoestring.core import claim

for slug, claim_file in claim.files().items():
    record = claim.read_record(claim_file)
    if record is None or record.standing != "fresh":
        print(slug)
