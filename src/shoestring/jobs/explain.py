"""What a method, a room or a claim is, from its own file and record; only a price imports it."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shoestring.core import catalog, claim, options, survey, text
from shoestring.core.claim import ClaimFile
from shoestring.core.errors import UsageError, nearest
from shoestring.core.method import Method
from shoestring.jobs import claim_table


def explain(name: str) -> dict[str, Any]:
    """Everything known of the method, room or claim called `name`, as plain data with its `kind`.

    Raises:
        UsageError: nothing has that name; the nearest ones are suggested.
    """
    if name in catalog.methods():
        return _method(catalog.get(name))
    if name in catalog.rooms():
        return _room(name)
    slug = name.replace("_", "-")
    if slug in claim.files():
        return _claim(slug)
    known = {*catalog.methods(), *catalog.rooms(), *claim.files()}
    raise UsageError(
        f"nothing is called {name}", remedy=nearest(name, known) + " `shoestring methods` lists the methods."
    )


def price(name: str, model: str) -> dict[str, Any]:
    """What the method makes of `model`, by arithmetic over its shapes, and the options the method takes.

    Raises:
        UsageError: no such method or model, or a method without a price.
    """
    from shoestring import models

    module = catalog.module(name)
    if not hasattr(module, "price"):
        raise UsageError(f"{name} has no price", "it changes neither storage nor memory")
    shape = models.shape_of(models.resolve(model))
    rows = []
    for settings in module.settings():
        made = module.price(shape, settings)
        rows.append(
            {
                "options": settings,
                "storage": made.shape.storage,
                "resident": made.shape.resident,
                "trainable": made.trainable,
                "train_flops": made.train_flops,
            }
        )
    known = {
        p.name: None if p.default is p.empty else p.default
        for p in inspect.signature(type(module.example())).parameters.values()
        if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    }
    return {"model": model, "storage": shape.storage, "resident": shape.resident, "settings": rows, "options": known}


def to_text(found: Mapping[str, Any]) -> str:
    """What `explain` returned, for people."""
    return {"method": _method_text, "room": _room_text, "claim": _claim_text}[found["kind"]](found)


def _method(method: Method) -> dict[str, Any]:
    source = Path(method.file).read_text(encoding="utf-8")
    functions = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    files = [f for f in claim.files().values() if method.name in f.methods]
    own = {f.slug: {c.name for c in f.of(method.name)} for f in files}
    return {
        "kind": "method",
        "name": method.name,
        "room": method.room,
        "summary": method.summary,
        "about": method.about,
        "paper": {name: getattr(method.paper, name) for name in method.paper.__dataclass_fields__},
        "provides": f"{method.module}.{method.provides}",
        "saves": list(method.saves),
        **survey.row(method),
        "traits": dict(method.traits),
        "combines": dict(method.combines),
        "expects": dict(method.expects),
        "options": _options(method, functions.get("example")),
        "settings": _returned(functions.get("settings")),
        "example": _returned(functions.get("example")),
        "file": method.file,
        "claims": [row for row in claim_table.rows(files) if row["claim"] in own[row["slug"]]],
        "claim": claim.state_of(method.name),
        "records": [_record(f) for f in files],
    }


def _room(name: str) -> dict[str, Any]:
    folder = Path(catalog.__file__).parents[1] / "methods" / name
    contract = ast.parse((folder / "_contract.py").read_text(encoding="utf-8"))
    literals = {
        node.targets[0].id: node.value
        for node in contract.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    words = ast.literal_eval(literals["WORDS"]) if "WORDS" in literals else ()
    return {
        "kind": "room",
        "name": name,
        "about": ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or "",
        "verb": ast.literal_eval(literals["VERB"]) if "VERB" in literals else "",
        "words": ["METHOD", "example", *words],
        "checks": [n.name for n in contract.body if isinstance(n, ast.FunctionDef) and n.name.startswith("check_")],
        "methods": {m: catalog.get(m).summary for m in catalog.in_room(name)},
    }


def _claim(slug: str) -> dict[str, Any]:
    found = claim.get(slug)
    return {
        "kind": "claim",
        "name": slug,
        "about": found.about,
        "file": str(found.file),
        "claims": claim_table.rows([found]),
        "record": _record(found),
    }


def _record(claim_file: ClaimFile) -> dict[str, Any]:
    """How a record came about, and where it is; empty without one."""
    record = claim.read_record(claim_file)
    if record is None:
        return {}
    known = {k: record.about.get(k) for k in ("command", "seeds", "date", "commit", "seconds", "machine")}
    return {**known, "file": str(claim_file.record)}


def _returned(function: ast.FunctionDef | None) -> str:
    """What a function returns, as its source says it."""
    last = function.body[-1] if function else None
    return ast.unparse(last.value) if isinstance(last, ast.Return) and last.value else ""


def _options(method: Method, example: ast.FunctionDef | None) -> list[dict[str, str]]:
    """Name, default and meaning of what may be said to a method; empty for a class of another package."""
    made = ast.parse(_returned(example) or "None", mode="eval").body
    taken = made.func.id if isinstance(made, ast.Call) and isinstance(made.func, ast.Name) else method.provides
    found = options.fields(Path(method.file), taken)
    return [{"name": field.name, "default": field.written, "meaning": field.help} for field in found]


def _method_text(found: Mapping[str, Any]) -> str:
    paper = found["paper"]
    where = [f"arXiv:{paper['arxiv']}" if paper["arxiv"] else "", f"code {paper['code']}" if paper["code"] else ""]
    lines = [found["about"], "", f"Paper     {paper['title']} ({', '.join(filter(None, [paper['date'], *where]))})"]
    lines += [f"Room      {found['room']}", f"Category  {found['category']}", f"Saves     {', '.join(found['saves'])}"]
    lines += [f"Needs     {found['needs']}", f"Gives     {found['provides']}"]
    lines += [f"Quality   {found['quality']['said']} ({found['quality']['verdict']})"] if found["quality"] else []
    lines += [f"{trait.replace('_', ' ').capitalize():9} {text}" for trait, text in found["traits"].items()]
    lines += [f"With      {other}: {reason}" for other, reason in found["combines"].items()]
    lines += [f"Expected  {check} cannot hold: {reason}" for check, reason in found["expects"].items()]
    said = [f"{o['name']}{' = ' * bool(o['default'])}{o['default']}  {o['meaning']}".rstrip() for o in found["options"]]
    lines += [f"{'' if row else 'Options':9} {line}" for row, line in enumerate(said)]
    lines += [f"Settings  {found['settings']}"] if found["settings"] and not said else []
    lines += [f"Example   {found['example']}"] if found["example"] else []
    lines += [f"File      {found['file']}", f"Claim     {found['claim']}", *_claims_text(found["claims"])]
    return "\n".join([*lines, *(line for record in found["records"] for line in _record_text(record))])


def _room_text(found: Mapping[str, Any]) -> str:
    lines = [found["about"], "", f"Verb      {found['verb']}", f"Words     {', '.join(found['words'])}", "", "Methods"]
    lines += [f"    {name}: {summary}" for name, summary in found["methods"].items()]
    return "\n".join([*lines, "", "Checks", *(f"    {check}" for check in found["checks"])])


def _claim_text(found: Mapping[str, Any]) -> str:
    lines = [found["about"], "", *_claims_text(found["claims"]), *_record_text(found["record"])]
    return "\n".join([*lines, f"File {found['file']}"])


def _record_text(record: Mapping[str, Any]) -> list[str]:
    if not record:
        return []
    machine = (record["machine"] or {}).get("machine", {})
    where = f"{machine.get('processor', '')}, {machine.get('cores', '?')} cores"
    return [
        f"Measured {record['date']} on {where} in {text.show(record['seconds'], 's')}:",
        *(f"    {line}" for line in (record["command"], f"commit {record['commit']}", f"record {record['file']}")),
    ]


def _claims_text(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for row in rows:
        _, what, expect, value, verdict, paper = claim_table.cells(row)
        lines += [
            f"    {row['claim']}: {verdict}",
            f"        the paper says  {paper}",
            f"        here            {row['here']}",
        ]
        lines += [f"        measured        {what} = {value}, expected {expect}"] if row["expect"] else []
        lines += [f"        no verdict      {row['reason']}"] if row["expect"] and row["reason"] else []
        lines += [f"        not here        {row['cannot']}"] if row["cannot"] else []
    return lines


def price_text(found: Mapping[str, Any], name: str) -> str:
    """What `price` returned, for people."""
    sizes = f"{text.show(found['storage'], 'B')} of files, {text.show(found['resident'], 'B')} of weights in memory"
    lines = [f"On {found['model']}: {sizes}"]
    for row in found["settings"]:
        trained = f", trains {row['trainable']:,} parameters" if row["trainable"] else ""
        options = ", ".join(f"{k}={v}" for k, v in row["options"].items())
        sizes = f"{text.show(row['storage'], 'B')} of files, {text.show(row['resident'], 'B')} in memory"
        lines.append(f"    {name} ({options}): {sizes}{trained}")
    return "\n".join([*lines, "Options   " + ", ".join(f"{k}={v!r}" for k, v in found["options"].items())])
