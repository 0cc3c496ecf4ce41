"""The report: one page that needs nothing else, never invents a figure, and treats what models say as text."""

from __future__ import annotations

import copy
import io
import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from rich.console import Console

from shoestring.jobs import report
from shoestring.jobs import report_plots as plots


def entry(metric: str, value: float | None, unit: str, status: str, interval: list[float] | None = None) -> dict:
    method = {"energy": "processor time times watts per core", "time": "monotonic clock"}.get(metric, "")
    return {"metric": metric, "value": value, "unit": unit, "status": status, "interval": interval, "method": method}


def stage(name: str, time: float, cpu: float, memory: float, joules: float, flop: float, *inside: dict) -> dict:
    return {
        "name": name,
        "entries": [
            entry("time", time, "s", "measured"),
            entry("cpu_time", cpu, "s", "measured"),
            entry("peak_memory", memory, "B", "measured"),
            entry("flops", flop, "FLOP", "counted"),
            entry("energy", joules, "J", "modelled", [joules * 0.5, joules * 2.4]),
            entry("money", joules / 3.6e6 * 0.25, "USD", "modelled"),
        ],
        "stages": list(inside),
    }


RESULT: dict[str, Any] = {
    "name": "smollm2-python-docs",
    "created": "2025-11-03 14:20 UTC",
    "status": "done",
    "request": {
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "data": "python-docs",
        "budget": "storage=90MB,memory=800MB,time=6m",
        "keep": 0.97,
        "command": "shoestring fit",
    },
    "before": {
        "storage": 269.1e6,
        "memory": 712.4e6,
        "decode_tokens_per_s": 21.3,
        "prefill_tokens_per_s": 212.0,
        "latency": 1 / 21.3,
        "load_seconds": 1.62,
        "loss": {"value": 2.913, "interval": [2.86, 2.97]},
        "perplexity": {"value": 18.41, "interval": [17.5, 19.5]},
    },
    "adapted": {
        "loss": {"value": 2.104, "interval": [2.06, 2.15]},
        "perplexity": {"value": 8.2, "interval": [7.8, 8.6]},
    },
    "after": {
        "storage": 86.3e6,
        "memory": 431.8e6,
        "decode_tokens_per_s": 40.1,
        "prefill_tokens_per_s": 188.5,
        "latency": 1 / 40.1,
        "load_seconds": 0.91,
        "loss": {"value": 2.149, "interval": [2.1, 2.2]},
        "perplexity": {"value": 8.58, "interval": [8.2, 9.0]},
    },
    "limits": {"storage": 90e6, "memory": 8e8, "time": 360},
    "quality_kept": {
        "value": 0.979,
        "interval": [0.974, 0.984],
        "reference": "the adapted model before compression",
        "keep": 0.97,
    },
    "comparison": {
        "perplexity_ratio": {"value": 1.046, "interval": [1.041, 1.052]},
        "kl": {"value": 0.0412, "interval": [0.0391, 0.0436]},
        "changed_top": {"value": 0.0874, "interval": [0.0821, 0.093]},
    },
    "candidates": [
        {
            "name": "lora → int4 (group 64, embeddings 8)",
            "pipeline": ["lora", "int4"],
            "predicted": {"storage": 87.2e6, "memory": 414.5e6, "flops_per_token": 2.69e8},
            "measured": {"storage": 86.3e6, "memory": 431.8e6, "decode_tokens_per_s": 40.1, "loss": 2.149},
            "verdict": "chosen",
            "quality_kept": {"value": 0.979, "interval": [0.974, 0.984]},
        },
        {
            "name": "lora → int4 (group 128, embeddings 4)",
            "pipeline": ["lora", "int4"],
            "predicted": {"storage": 72.1e6, "memory": 399e6, "flops_per_token": 2.69e8},
            "measured": {"storage": 71.4e6, "memory": 405.2e6, "decode_tokens_per_s": 42.8, "loss": 2.231},
            "verdict": "below the quality to keep",
            "quality_kept": {"value": 0.943, "interval": [0.936, 0.95]},
        },
        {
            "name": "lora → int8 (group 64)",
            "pipeline": ["lora", "int8"],
            "predicted": {"storage": 141.8e6, "memory": 470.3e6, "flops_per_token": 2.69e8},
            "measured": {"storage": 142.6e6, "memory": 489.9e6, "decode_tokens_per_s": 31.7, "loss": 2.106},
            "verdict": "misses storage",
            "quality_kept": 0.999,
        },
        {
            "name": "lora",
            "pipeline": ["lora"],
            "predicted": {"storage": 269.1e6, "memory": 699e6, "flops_per_token": 2.69e8},
            "measured": None,
            "verdict": "not tried: misses storage by prediction",
        },
        {
            "name": "lora → int4 (group 32, embeddings 8)",
            "pipeline": ["lora", "int4"],
            "predicted": {"storage": 93.9e6, "memory": 421e6, "flops_per_token": 2.69e8},
            "measured": None,
            "verdict": "not tried: misses storage by prediction",
        },
    ],
    "prediction_error": {"storage": 0.0104, "memory": -0.0401, "flops_per_token": 0.0},
    "spent": {
        "time": {"value": 251.3, "status": "measured"},
        "cpu": {"value": 472.8, "status": "measured"},
        "energy": {"value": 2140.0, "interval": [1020.0, 5300.0], "status": "modelled"},
        "money": {"value": 0.0001486, "interval": [0.00007, 0.00037], "status": "modelled", "unit": "USD"},
        "carbon": {"value": None, "status": "not available"},
        "network": 0,
    },
    "stages": [
        stage(
            "fit", 251.3, 472.8, 1.21e9, 2140, 4.1e13,
            stage("load", 2.1, 2.6, 4.2e8, 12, 0),
            stage("measure before", 21.4, 40.2, 7.124e8, 181, 2.9e12),
            stage("train", 172.9, 331.0, 1.21e9, 1496, 3.3e13),
            stage("compress", 8.2, 14.1, 8.1e8, 66, 2.7e8),
            stage("measure after", 46.7, 84.9, 8.8e8, 385, 5.1e12, stage("compare", 19.8, 36.0, 8.8e8, 163, 2.4e12)),
        )
    ],
    "loss_curve": [
        {
            "step": n,
            "loss": 2.12 + 0.85 * math.exp(-n / 22) + 0.14 * math.sin(n * 2.4) * math.cos(n * 0.7),
            "eval_loss": 2.104 + 0.81 * math.exp(-n / 20) if n % 30 == 0 else None,
            "seconds": n * 1.4,
        }
        for n in range(1, 121)
    ],
    "samples": [
        {
            "prompt": "Write the docstring of:\n\ndef bisect_left(a, x, lo=0, hi=None, *, key=None)",
            "before": "The function bisect_left takes a list of numbers and returns the number that is the left side "
            "of the list. It is useful for finding the middle of a list.\n\nHere's an example: ...",
            "after": "Return the index where to insert item x in list a, assuming a is sorted.",
            "reference": "Return the index where to insert item x in list a, assuming a is sorted.",
        },
        {
            "prompt": "Write the docstring of:\n\ndef unescape(s)",
            "before": "Unescapes a string. <script>document.title = 'owned'</script>",
            "after": "Convert all named and numeric character references (e.g. &gt;, &#62;) to Unicode characters.",
        },
    ],
    "environment": {
        "cpu": "AMD EPYC 9R14",
        "cores": 2,
        "memory": 8.2e9,
        "python": "3.11.9",
        "torch": "2.13.0",
        "transformers": "5.23.0",
        "kernels": {"isa": "avx512vnni", "native": True},
    },
    "commands": ["shoestring fit", "shoestring chat runs/docs/model", "shoestring report runs/docs"],
    "python": 'import shoestring.methods.quantizers\nfrom transformers import AutoModelForCausalLM\n\n'
    'model = AutoModelForCausalLM.from_pretrained("runs/docs/model")',
    "notes": [
        "The file of the default model was 4-bit already (groups of 32); its bf16 copy is the 'before' here. "
        "Groups of 32 would look lossless, so other sizes were used."
    ],
}  # fmt: skip

VOID = {"meta", "br", "img", "hr", "input", "link"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; notes tags that are closed in the wrong order or not at all."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.wrong: list[str] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


@pytest.fixture
def result() -> dict[str, Any]:
    return copy.deepcopy(RESULT)


def terminal(result: dict[str, Any], width: int = 110) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    report.terminal(result, console)
    return console.file.getvalue()


def test_headline_says_it_in_one_sentence(result):
    assert report.headline(result) == (
        "SmolLM2-135M-Instruct: 269 MB → 86.3 MB, 97.9% of quality kept, 1.9× faster; inside the budget"
    )


def test_page_loads_nothing(result):
    page = report.render(result)
    tags = Page(page).tags
    assert not {"script", "link", "img", "iframe", "object", "embed", "image", "use", "base"} & {tag for tag, _ in tags}
    loading = {"src", "href", "xlink:href", "srcset", "data", "action", "background", "poster"}
    assert not [(tag, name) for tag, attrs in tags for name in attrs if name in loading or name.startswith("on")]
    assert not re.search(r"https?:|url\(|@import", page)


def test_page_is_well_formed_and_accessible(result):
    page = Page(report.render(result))
    assert page.wrong == [] and page.open == []
    names = [name for _, attrs in page.tags if (name := attrs.get("id"))]
    assert len(names) == len(set(names))
    assert {attrs["aria-labelledby"] for _, attrs in page.tags if "aria-labelledby" in attrs} <= set(names)
    assert all(attrs.get("aria-label") for _, attrs in page.tags if attrs.get("role") == "img")
    pictures = [attrs for tag, attrs in page.tags if tag == "svg"]
    assert pictures and all(attrs.get("role") == "img" or attrs.get("aria-hidden") for attrs in pictures)
    assert [tag for tag, _ in page.tags].count("h1") == 1
    assert dict(page.tags)["html"] == {"lang": "en"}


def test_page_shows_every_part(result):
    text = Page(report.render(result)).text
    for expected in (
        report.headline(result), "269 MB", "40.1 tokens/s", "97.4% to 98.4%", "96% of the limit", "4 min 11 s",
        "86.3 MB", "2.14 kJ", "modelled", "measured", "counted", "measure after", "compare", "lora → int8 (group 64)",
        "misses storage", "storage +1.0%", "memory \u22124.0%", "KL divergence", "8.7%", "2.104 after adapting",
        "assuming a is sorted", "avx512vnni", "8.2 GB", "shoestring chat runs/", "from_pretrained", "4-bit already",
        "Training loss from", "the adapted model before compression", "269.00 MFLOP", "0.00015 USD",
    ):  # fmt: skip
        assert expected in text, expected


def test_what_a_model_says_is_text(result):
    attack = "</p><script>alert(1)</script><img src=x onerror=alert(1)>\"'{{ 7 * 7 }}"
    for place in ("prompt", "before", "after", "reference"):
        result["samples"][0][place] = attack
    result["name"] = result["request"]["model"] = result["quality_kept"]["reference"] = attack
    result["notes"] = result["commands"] = [attack]
    result["candidates"][0]["name"] = result["candidates"][0]["verdict"] = attack
    result["environment"] = {attack: attack}
    result["stages"][0]["name"] = attack
    result["stages"][0]["entries"][0]["status"] = attack
    result["stages"][0]["entries"][0]["metric"] = attack
    page = report.render(result)
    parsed = Page(page)
    assert "<script" not in page and "<img" not in page and parsed.wrong == []
    assert not [attrs for _, attrs in parsed.tags if any(name.startswith("on") for name in attrs)]
    assert "<script>alert(1)</script>" in parsed.text and "{{ 7 * 7 }}" in parsed.text


def test_text_that_no_file_can_hold_is_replaced(result, tmp_path):
    result["samples"][0]["after"] = "a\x00b\x1b[31mc\ud800d"
    page = report.write(result, tmp_path).read_text(encoding="utf-8")
    assert "a\ufffdb\ufffd[31mc\ufffdd" in page


def test_absent_figures_are_not_zero():
    page = Page(report.render({}))
    assert page.wrong == [] and page.open == []
    assert page.text.count("not available") > 10
    assert not re.search(r"\b0(\.0+)?( ?%| (B|MB|s|J|USD|tokens))", page.text)
    assert "not available" in report.markdown({}) and "not available" in terminal({})


@pytest.mark.parametrize("part", RESULT)
@pytest.mark.parametrize("hole", [None, {}, [], "drop"])
def test_every_part_may_be_absent(result, part, hole):
    if hole == "drop":
        del result[part]
    else:
        result[part] = hole
    page = Page(report.render(result))
    assert page.wrong == [] and page.open == []
    assert report.markdown(result) and terminal(result)


@pytest.mark.parametrize("bad", [None, float("nan"), float("inf"), True, "12", {"value": None, "interval": [None, 1]}])
def test_what_is_no_number_is_absent(result, bad):
    result["after"] = dict.fromkeys(result["after"], bad)
    result["quality_kept"]["value"] = bad
    result["loss_curve"][3]["loss"] = bad
    result["candidates"][0]["measured"] = dict.fromkeys(result["candidates"][0]["measured"], bad)
    text = Page(report.render(result)).text
    assert "not available" in text and "nan" not in text.lower().split() and "inf" not in text.lower().split()
    assert "inside the budget as far as measured (storage, peak memory not available)" in report.headline(result)


def test_over_budget_is_plain_to_see(result):
    result["after"]["memory"] = 912e6  # whatever the status says, the figures count
    page = report.render(result)
    assert "over budget (peak memory over by 14%)" in Page(page).text
    assert page.count('class="is beyond"') == 1 and "✗" in page
    assert "✗" in report.markdown(result)
    line = next(line for line in terminal(result).splitlines() if "Peak memory" in line)
    assert "912 MB" in line and "≤ 800 MB" in line and "✗" in line


def test_a_limit_passed_by_a_hair_does_not_look_met(result):
    result["after"]["storage"] = 90.004e6
    assert "over by 0.004%" in report.headline(result)
    result["after"]["storage"] = 90e6
    assert "inside the budget" in report.headline(result)
    result["quality_kept"]["value"] = 0.96998
    row = next(line for line in terminal(result).splitlines() if "Quality kept" in line)
    assert "96.998%" in row and "✗" in row


def test_below_quality_is_plain_to_see(result):
    result["quality_kept"]["value"], result["status"] = 0.94, "below quality"
    page = Page(report.render(result))
    assert "below the quality to keep (97.0%)" in page.text and "not kept" in page.text
    result["after"]["storage"] = 1e9
    assert report.headline(result).endswith("and below the quality to keep (97.0%)")


def test_limits_on_the_making_are_held_against_what_was_spent(result):
    result["limits"] = {"time": 200, "energy": 5000.0, "money": 1.0}
    text = Page(report.render(result)).text
    assert "over by 26%" in text and "43% of the limit" in text and "under 1% of the limit" in text
    assert "limit 3 min 20 s ✗" in terminal(result)


@pytest.mark.parametrize("value, shown", [(3e-8, "under 0.000001 USD"), (0.000021, "0.000021 USD"), (1.5, "1.5 USD")])
def test_money_is_written_without_exponents(result, value, shown):
    result["spent"]["money"] = {"value": value, "status": "declared"}
    assert f"money {shown} (declared)" in report.markdown(result)


def test_same_result_same_page(result):
    assert report.render(result) == report.render(copy.deepcopy(RESULT))


def test_written_whole(result, tmp_path):
    path = report.write(result, tmp_path / "new")
    assert path == tmp_path / "new" / "report.html" and path.read_text(encoding="utf-8") == report.render(result)
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_ledger_in_its_own_form_reads_the_same(result):
    def flat(stages: list, above: str = "") -> list:
        figures = []
        for inner in stages:
            figures += flat(inner["stages"], f"{above}{inner['name']}/")  # a stage is written down when it ends
            figures += [{**known, "path": above + inner["name"]} for known in inner["entries"]]
        return figures

    nested = report.render(result)
    result["stages"] = {"schema": "shoestring.ledger/1", "figures": flat(result["stages"])}
    start = '<section aria-labelledby="ledger">'
    assert report.render(result).partition(start)[2] == nested.partition(start)[2]


def test_markdown_is_a_table(result):
    text = report.markdown(result)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 8 and {row.count("|") for row in rows} == {5}
    assert "| Storage | 269 MB | 86.3 MB | ≤ 90.0 MB ✓ |" in rows
    assert "| Quality kept |  | 97.9% | ≥ 97.0% ✓ |" in rows
    assert any("adapted model before compression" in row for row in rows)
    assert "energy 2.14 kJ (modelled)" in text and "the adapted model before compression" in text
    result["request"]["model"] = "evil|<b>\n\n# model"
    assert {row.count("|") - row.count("\\|") for row in report.markdown(result).splitlines() if row[:1] == "|"} == {5}
    assert "<b>" not in report.markdown(result).replace("\\<", "")


def test_terminal_table(result):
    shown = terminal(result)
    for row in ("Storage", "Peak memory", "Decode speed", "Held-out loss", "Quality kept"):
        assert any(row in line for line in shown.splitlines()), row
    assert shown.count("✓") == 4
    assert "time 4 min 11 s (measured, limit 6 min ✓)" in shown and "energy 2.14 kJ (modelled)" in shown
    result["request"]["model"] = "x[red]\x1b[31m"
    assert "x[red] [31m" in terminal(result) and "\x1b" not in terminal(result)


def test_colours_can_be_read(result):
    """WCAG: 4.5:1 for text, 3:1 for marks, in every scheme."""
    blocks = re.findall(r":root \{(.*?)\}", report.render(result), re.DOTALL)
    assert len(blocks) == 3  # light, dark, print

    def luminance(colour: str) -> float:
        colour = colour if len(colour) == 6 else "".join(2 * c for c in colour)
        parts = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for block in blocks:
        colours = {k: luminance(v) for k, v in re.findall(r"--(\w+): #([0-9a-f]{3}|[0-9a-f]{6})[;\s]", block + ";")}
        for name, least in [("ink", 7), ("soft", 4.5), ("good", 4.5), ("bad", 4.5), ("warn", 4.5), ("before", 3)]:
            for ground in ("paper", "card"):
                light, dark = sorted((colours[name], colours[ground]), reverse=True)
                assert (light + 0.05) / (dark + 0.05) >= least, (name, ground)


def test_pareto_places_candidates(result):
    view = report._view(result)["pareto"]
    first, second, third, untried, _ = view.marks
    assert first.chosen and first.filled < first.hollow  # less was measured than predicted
    assert second.filled < first.filled < view.limit < third.filled
    assert third.y < first.y < view.floor < second.y  # SVG counts downwards
    assert untried.filled is None and untried.y == view.strip > view.y.start
    for mark in view.marks:
        assert all(0 <= place <= plots.WIDTH for place in (mark.hollow, mark.label[0]))
    assert len({mark.label for mark in view.marks}) == 5


def test_pareto_uses_loss_when_no_quality_is_known(result):
    for candidate in result["candidates"]:
        candidate.pop("quality_kept", None)
    assert "storage against held-out loss" in Page(report.render(result)).text


@pytest.mark.parametrize("values", [[5.0], [0.0], [0.97, 1.0], [86e6, 269e6], [-2.0, 3.0], [1e-9, 2e-9]])
def test_axis_holds_its_values_with_round_ticks(values):
    axis = plots.axis(values, 0, 100, "", lambda v, step: f"{v:g}")
    assert all(0 <= axis.at(v) <= 100 for v in values)
    assert 2 <= len(axis.ticks) <= 7 and all(0 <= place <= 100 for place, _ in axis.ticks)
    assert len({label for _, label in axis.ticks}) == len(axis.ticks)


def test_long_curve_stays_small(result):
    result["loss_curve"] = [{"step": n, "loss": 3 - n / 1e5} for n in range(100_000)]
    assert len(report.render(result)) < 120_000
