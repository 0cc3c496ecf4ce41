"""Drafts by a model's own lower layers: a fast stream and a plain head behind the same layer, beside plain decoding.

    python benchmarks/self_speculation.py [--streams FOLDER] [--heads FOLDER] [--prompts 3] [--rounds 3] [--json FILE]

Without folders both are trained on the default model's own answers and kept: the first time takes ten minutes more,
the next none. Given ones are those that
`shoestring train` makes with --method m2r2 and --method exit_heads, trained alike, with the same first gate. Accepted
tokens are counted on the same prompts and the torch runner; times are of whole answers, one at a time. The head is also
run on the native runner, beside plain decoding there.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from _peers import arguments, circumstances, keep, ratios, shown, spread, turns
from shoestring.engine.engine import Engine
from shoestring.engine.request import Sampling
from shoestring.lab.exits import trained

ASKED = (
    "Write a short story about a lighthouse.", "Explain rain to a child.", "Give three facts about bees.",
    "Describe a market in the morning.", "What do people like about chess?", "Write a short poem on rivers.",
)  # fmt: skip


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--streams")
    parser.add_argument("--heads")
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--length", type=int, default=4)
    parser.add_argument("--sure", type=float, default=0.4)
    given = parser.parse_args()
    given.streams = given.streams or trained("m2r2", {"gates": [10], "r": 48}, 200, 0)
    given.heads = given.heads or trained("exit_heads", {"gates": [10, 20], "r": 256}, 200, 0)
    more = f"exact=true,length={given.length},sure={given.sure}"
    arms: dict[str, tuple[str, list[str]]] = {
        "torch, plain": ("torch", []),
        "torch, fast stream": ("torch", [f"m2r2,streams={given.streams},{more}"]),
        "torch, plain head": ("torch", [f"exit_heads,heads={given.heads},{more}"]),
        "native, plain": ("native", []),
        "native, plain head": ("native", [f"exit_heads,heads={given.heads},{more}"]),
    }
    times: dict[str, list[float]] = {name: [] for name in arms}
    drafts: dict[str, Any] = {}
    for number, arm in turns(list(arms), given.rounds):
        runner, plugs = arms[arm]
        chosen = {} if plugs and plugs[0].startswith("m2r2") else {"runner": runner}
        with Engine(given.model, threads=given.threads, plugs=plugs, **chosen) as engine:  # type: ignore[arg-type]
            prompts = [engine.prompt_ids([{"role": "user", "content": text}]) for text in ASKED[: given.prompts]]
            engine.generate([prompts[0]], Sampling(max_tokens=4, ignore_eos=True))
            before, began = engine.counts(), time.perf_counter()
            for prompt in prompts:
                engine.generate([prompt], Sampling(max_tokens=given.tokens, ignore_eos=True))
            after = engine.counts()
            times[arm].append((time.perf_counter() - began) / (given.tokens * len(prompts)))
        drafted = after.draft_tokens - before.draft_tokens
        accepted = after.accepted_draft_tokens - before.accepted_draft_tokens
        steps = after.steps - before.steps
        tokens = after.generation_tokens - before.generation_tokens
        drafts[arm] = {"accepted": accepted / drafted if drafted else 0.0, "tokens_per_step": tokens / steps}
        print(f"round {number + 1}: {arm}, {1e3 * times[arm][-1]:.1f} ms a token", file=sys.stderr, flush=True)
    report: dict[str, Any] = {"circumstances": circumstances(given.threads), "arms": {}}
    for arm, each in times.items():
        plain = times[f"{arm.split(',')[0]}, plain"]
        figures = {"ms_per_token": spread([1e3 * t for t in each]), "speed_up": ratios(plain, each), **drafts[arm]}
        report["arms"][arm] = figures
        print(
            f"{arm:>20}  {shown(figures['ms_per_token'])} ms a token, {shown(figures['speed_up'], '.2f')} of plain, "
            f"{figures['accepted']:.2f} of the drafts accepted, {figures['tokens_per_step']:.2f} tokens a step"
        )
    keep(given.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
