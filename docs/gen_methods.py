"""Makes a page for every room and method from its own file and the records of its claims, while the site is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mkdocs_gen_files

from shoestring.core import catalog
from shoestring.jobs import claim_table, pipeline
from shoestring.jobs.explain import explain
from shoestring.planner.plan import by_verb


def method_page(found: dict[str, Any]) -> str:
    paper, method = found["paper"], catalog.get(found["name"])
    source = paper["title"]
    if paper["arxiv"]:
        source = f"[{source}](https://arxiv.org/abs/{paper['arxiv']})"
    code = f", authors' code [{paper['code']}](https://github.com/{paper['code']})" if paper["code"] else ""
    lines = [
        f"# {found['name']}",
        method.summary[:1].upper() + method.summary[1:],
        f"*{source}* ({paper['date']}){code}",
        "## How it works",
        method.section("How it works"),
        "## Where it bends",
        method.section("Where it bends"),
        "## Use",
        f"    shoestring explain {found['name']} --price",
        f'From Python, `catalog.load("{found["name"]}")` gives `{found["provides"]}`. The example that the checks run:',
        f"```python\n{found['example']}\n```" if found["example"] else "",
        "## What it saves",
        ", ".join(found["saves"]),
        "\n".join(f"- {trait.replace('_', ' ')}: {text}" for trait, text in found["traits"].items()),
        combines(found["combines"], found["expects"]),
        "## Claims",
        claims(found["claims"]),
        "## Its file",
        f"```python\n{Path(found['file']).read_text(encoding='utf-8').rstrip()}\n```",
    ]
    return "\n\n".join(filter(None, lines)) + "\n"


def combines(with_what: dict[str, str], expects: dict[str, str]) -> str:
    rows = [f"- with {other}: {reason}" for other, reason in with_what.items()]
    rows += [f"- the check `{check}` cannot hold: {reason}" for check, reason in expects.items()]
    return "\n".join(rows)


def claims(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "None."
    lines = ["| claim | the paper says | here | expected | measured | verdict |", "| --- " * 6 + "|"]
    for row in rows:
        name, what, expect, value, verdict, paper = claim_table.cells(row)
        here = row["here"] + (f" (not here: {row['cannot']})" if row["cannot"] else "")
        cells = (name, paper, here, f"{what} {expect}", value, verdict)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def room_section(name: str) -> str:
    found = explain(name)
    body = found["about"].partition("\n")[2].strip()
    methods = [catalog.get(m) for m in found["methods"]]
    traits = list(dict.fromkeys(trait for m in methods for trait in m.traits))
    header = ["method", "what it does", *(trait.replace("_", " ") for trait in traits)]
    rows = [[f"[{m.name}]({m.name}.md)", m.summary, *(m.traits.get(t, "") for t in traits)] for m in methods]
    table = [header, ["---"] * len(header), *rows]
    checks = ", ".join(check.removeprefix("check_").replace("_", " ") for check in found["checks"])
    return "\n\n".join(
        [
            f"## {name}",
            found["about"].partition("\n")[0],
            body,
            "\n".join("| " + " | ".join(cells) + " |" for cells in table),
            f"Every method of this room must pass: {checks}.",
        ]
    )


def stacks() -> str:
    """Which methods that compress go one after another: what they say of each other, and what the tests run."""
    names = [m.name for m in by_verb("compress")]
    lines = ["| first \\ then | " + " | ".join(f"`{name}`" for name in names) + " |", "| --- " * (len(names) + 1) + "|"]
    reasons: dict[str, str] = {}
    for first in names:
        cells = []
        for second in names:
            said = pipeline.combines(first, second) if first != second else ""
            packed = getattr(catalog.contract(catalog.get(first).room), "PACKS", False)
            if packed:
                cells.append("no")
            elif said == "yes":
                cells.append("tested")
            else:
                if said:
                    reasons[f"`{first}` and `{second}`"] = said
                cells.append("no" if said else "")
        lines.append(f"| `{first}` | " + " | ".join(cells) + " |")
    why = "".join(f"- {pair}: {reason}\n" for pair, reason in reasons.items())
    return (
        "## Stacks\n\n`shoestring compress MODEL --method first,then` runs methods one after another; methods that "
        "train adapters may stand among them and are folded in. *tested*: a test runs the pair and reads the result "
        "back with plain transformers. *no*: refused before any work, with the reason; after packed weights nothing "
        "can follow. "
        "An empty cell was not tried.\n\n" + "\n".join(lines) + "\n\n" + why
    )


INTRO = """# Methods

The list of methods is the folder listing of `src/shoestring/methods`; these pages are made from the files.
"""
index = INTRO
for room in catalog.rooms():
    index += "\n" + room_section(room) + "\n"
index += "\n" + stacks()
with mkdocs_gen_files.open("methods/index.md", "w") as page:
    page.write(index)
for name in catalog.methods():
    with mkdocs_gen_files.open(f"methods/{name}.md", "w") as page:
        page.write(method_page(explain(name)))
