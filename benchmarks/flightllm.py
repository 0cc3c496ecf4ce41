"""Accelerators that are only described, beside this machine: what is modelled and what is measured, clearly apart.

    python benchmarks/flightllm.py [--model smollm2] [--rounds 3] [--threads N] [--json FILE]

Modelled: time and energy of decode on each accelerator from the clock over compiled instructions, at three lengths;
bytes and bandwidth with values on chip against operator by operator; instruction storage. Measured: decode of the same
model as it is on this processor, by transformers. No ratio between the two is worked out: one of them is a model.
"""

from __future__ import annotations

import sys
from typing import Any

from _peers import arguments, circumstances, keep, spread
from shoestring.core import catalog
from shoestring.jobs.at_work import at_work
from shoestring.methods.mapping._targets import TARGETS
from shoestring.methods.mapping._templates import APART, OURS
from shoestring.methods.mapping._timing import modelled
from shoestring.models import resolve

LENGTHS = (128, 512, 2048)


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=64)
    given = parser.parse_args()
    flightllm = catalog.module("flightllm")
    source, config = resolve(given.model), flightllm.example()
    network = flightllm.network(source)
    report: dict[str, Any] = {"circumstances": circumstances(given.threads), "modelled": [], "storage": {}}
    for name, board in TARGETS.items():
        for length in LENGTHS:
            row: dict[str, Any] = {"target": name, "length": length}
            for what, schedule in (("on chip", OURS), ("apart", APART)):
                m = modelled(network, board, "decode", length, config.matrices(network), schedule=schedule)
                row[what] = {
                    "tokens_per_s": 1 / m.seconds,
                    "tokens_per_joule": 1 / m.seconds / board.watts,
                    "activation_bytes": m.moved["activations"],
                    "loading": m.busy["LD"],
                }
            report["modelled"].append(row)
    found = flightllm.storage(network, config, TARGETS["u280"], max(LENGTHS))
    report["storage"] = {n: getattr(found, n) for n in ("every", "bucketed", "shared", "merged", "waste")}
    speeds = [
        at_work(source, prompt_tokens=LENGTHS[0], new_tokens=given.tokens, repeats=1, threads=given.threads)
        for _ in range(given.rounds)
    ]
    report["measured"] = spread([s["decode_tokens_per_s"]["median"] for s in speeds])
    print(_text(report))
    keep(given.json, report)
    return 0


def _text(report: dict[str, Any]) -> str:
    lines = ["decode, MODELLED   length   tokens/s   tokens/J   activations/token   loading   | operator by operator"]
    for row in report["modelled"]:
        ours, apart = row["on chip"], row["apart"]
        lines.append(
            f"{row['target']:<18} {row['length']:>6} {ours['tokens_per_s']:>10,.0f} {ours['tokens_per_joule']:>10.1f} "
            f"{ours['activation_bytes']:>17,.0f} B {ours['loading']:>8.1%}   | {apart['tokens_per_s']:,.0f} tokens/s, "
            f"{apart['activation_bytes']:,.0f} B, {apart['loading']:.1%}"
        )
    s = report["storage"]
    lines += [
        "",
        f"instructions of decode up to {max(LENGTHS):,} positions, COUNTED: {s['every']:,} B for every length, "
        f"{s['bucketed']:,} B in buckets, {s['shared']:,} B shared by the cores, {s['merged']:,} B with merged loads: "
        f"{s['every'] / s['merged']:.0f} times fewer, for {s['waste']:.2%} of decode's modelled time",
        "",
        f"this processor, MEASURED: {report['measured']['median']:,.1f} tokens/s of decode by transformers",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
