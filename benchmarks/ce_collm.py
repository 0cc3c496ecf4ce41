"""An edge and a cloud beside the cloud alone: tokens asked for, bytes up, the cloud's passes, agreement, time a token.

    python benchmarks/ce_collm.py [--heads FOLDER] [--rate 10e6] [--delay 0.04] [--prompts 4] [--rounds 3] [--json FILE]

FOLDER holds two trained exit heads (`shoestring train smollm2 --method exit_heads --data ... --out ...`); without one
they are trained on the default model's own answers and kept: the first time takes some minutes more, the next none.
Edge and cloud talk over a cable of this many bits a second and this delay each way. Every threshold is an arm; that of
1 is the cloud alone, "again" what sending all states for each token would cost, "edge alone" has no cloud. Agreement is
with what the whole model says after the same text.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from _peers import arguments, circumstances, keep, shown, spread, turns
from shoestring.core import catalog
from shoestring.engine.engine import Engine
from shoestring.engine.exits import gates_in
from shoestring.engine.request import Sampling
from shoestring.lab.exits import trained
from shoestring.lab.split import SlowLink, cloud

METHOD = catalog.module("ce_collm")
ASKED = (
    "Write a short story about a lighthouse.", "Explain rain to a child.", "Give three facts about bees.",
    "Describe a market in the morning.", "What do people like about chess?", "Write a short poem on rivers.",
    "How is paper made?", "Name some kinds of clouds.",
)  # fmt: skip


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--heads")
    parser.add_argument("--rate", type=float, default=10e6)
    parser.add_argument("--delay", type=float, default=0.04)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--thresholds", default="1,0.8,0.5,0.3")
    parser.add_argument("--transfer", default="fp16")
    given = parser.parse_args()
    given.heads = given.heads or trained("exit_heads", {"gates": [10, 20], "r": 256}, 200, 0)
    arms = [*map(float, given.thresholds.split(",")), "edge alone"]
    report: dict[str, Any] = {"circumstances": circumstances(given.threads), "arms": {}}
    found: dict[str, list[dict[str, float]]] = {str(arm): [] for arm in arms}
    with Engine(given.model, threads=given.threads) as judge:
        prompts = [judge.prompt_ids([{"role": "user", "content": text}]) for text in ASKED[: given.prompts]]
        for number, arm in turns(arms, given.rounds):  # type: ignore[arg-type]
            found[str(arm)].append(measured(arm, judge, prompts, given))
            took = found[str(arm)][-1]["ms_per_token"]
            print(f"round {number + 1}: {arm}, {took:.1f} ms a token", file=sys.stderr, flush=True)
        hidden = 2 * judge.facts.hidden
    again = sum(len(p) + i for p in prompts for i in range(given.tokens)) * hidden / (len(prompts) * given.tokens)
    names = ("agreement", "edge", "cloud", "bytes_up", "bytes_down", "cloud_passes", "ms_per_token")
    print(f"{'threshold':>10} " + " ".join(f"{name:>22}" for name in names))
    for arm, rounds in found.items():
        report["arms"][arm] = {name: spread([one[name] for one in rounds]) for name in names}
        cells = [shown(report["arms"][arm][name], ".3f" if name in names[:3] else ".1f") for name in names]
        print(f"{arm:>10} " + " ".join(f"{cell:>22}" for cell in cells))
    report["bytes_up_again"] = again
    print(f"sending all states for each token: {again:.0f} bytes up a token")
    keep(given.json, report)
    return 0


def measured(arm: Any, judge: Engine, prompts: list[list[int]], given: Any) -> dict[str, float]:
    alone = arm == "edge alone"
    config = METHOD.CeCollmConfig(after=gates_in_folder(given.heads))
    sampling = Sampling(max_tokens=given.tokens, ignore_eos=True)
    with cloud(given.model, METHOD.front, config, dtype="auto", kv_dtype="bf16", threads=given.threads) as url:
        wire = SlowLink(url, given.rate, given.delay)
        words = f"ce_collm,heads={given.heads},threshold={0.8 if alone else arm},transfer={given.transfer},patience=30"
        words += "" if alone else f",cloud={wire.url}"
        with Engine(given.model, threads=given.threads, plugs=[words]) as edge:
            began = time.perf_counter()
            answers = [list(edge.generate([prompt], sampling)[0][0].tokens) for prompt in prompts]
            seconds = time.perf_counter() - began
            counts, link = edge.hooks.exit.counts, edge.hooks.exit.link  # type: ignore[union-attr]
            total = sum(counts.values())
            size = {"up": 0, "down": 0} if link is None else {
                way: sum(n for kind, n in link.bytes.items() if kind.startswith(way)) for way in ("up", "down")
            }  # fmt: skip
        passes = cloud.latest.upper.counts["infer"]  # type: ignore[attr-defined]
        wire.close()
    return {
        "agreement": agreement(judge, prompts, answers),
        "edge": (counts["exit 1"] + counts["exit 2"]) / total,
        "cloud": counts["cloud"] / total,
        "bytes_up": size["up"] / total,
        "bytes_down": size["down"] / total,
        "cloud_passes": passes / total,
        "ms_per_token": 1e3 * seconds / total,
    }


def gates_in_folder(folder: str) -> int:
    from pathlib import Path

    return gates_in(Path(folder))[0]


def agreement(judge: Engine, prompts: list[list[int]], answers: list[list[int]]) -> float:
    """Share of tokens that are the whole model's first choice after all before them."""
    texts = [prompt + answer for prompt, answer in zip(prompts, answers)]
    same = []
    for prompt, text, (one,) in zip(prompts, texts, judge.generate(texts, Sampling(max_tokens=1, prompt_logprobs=1))):
        told = list(zip(text, one.prompt_logprobs))[len(prompt) :]
        same += [logprob is not None and logprob.top[0][0] == token for token, logprob in told]
    return sum(same) / len(same)


if __name__ == "__main__":
    sys.exit(main())
