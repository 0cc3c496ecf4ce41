"""What the commands do and print, on a tiny random model."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from saying import Shoestring, snapshot

from shoestring import cli
from shoestring.core import catalog, claim, survey
from shoestring.core.claim import ClaimFile
from shoestring.planner import machine
from shoestring.planner.plan import by_verb

ADAPTER = next(catalog.in_room("adapters"))
PACKER = next(m.name for m in by_verb("compress") if m.default)


# ---------------------------------------------------------------- the catalog


def test_methods_as_a_table_and_as_json(shoestring: Shoestring) -> None:
    said = shoestring("methods")
    lines = said.out.splitlines()
    assert said.code == 0 and lines[0].split() == ["name", "room", "saves", "paper", "claim", "summary"]
    assert [line.split()[0] for line in lines[1:]] == list(catalog.methods())
    rows = shoestring("methods", "--json").json
    assert [row["name"] for row in rows] == list(catalog.methods())
    known = {"name", "room", "saves", "category", "needs", "gains", "quality", "combines", "traits", "paper", "summary"}
    assert all(set(row) == known | {"claim"} for row in rows)


def test_a_terminal_without_the_letters_gets_them_spelled(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="latin-1"))
    assert cli.exit_code(["runs", "caf\u00e9 \u65e5 \udcff"]) == 0
    assert written.getvalue() == b"no runs below caf\xe9 \\u65e5 \\udcff\n"


def test_methods_of_a_room_with_their_traits_and_what_is_left_out(shoestring: Shoestring) -> None:
    lines = shoestring("methods", "--room", "adapters").out.splitlines()
    assert lines[0].split()[:6] == ["name", "family", "acts", "on", "merges", "parameters"]
    assert [line.split()[0] for line in lines[1:]] == list(catalog.in_room("adapters"))
    more = shoestring("methods", "--room", "adapters", "--all", "--json").json
    others = [row for row in more if "why" in row]
    assert others and not {row["name"] for row in others} & set(catalog.methods())
    assert all(row["provides"].startswith("peft.") and row["why"] for row in others)
    assert len(more) - len(others) == len(lines) - 1


def test_methods_filtered(shoestring: Shoestring) -> None:
    rows = shoestring("methods", "--room", "quantizers", "--saves", "latency", "--json").json
    assert {row["room"] for row in rows} == {"quantizers"} and all("latency" in row["saves"] for row in rows)
    assert shoestring("methods", "--room", "quantisers").error.partition("Did you mean quantizers")[1]
    assert "unknown resource" in shoestring("methods", "--saves", "colour").error


def test_methods_by_category_and_by_what_they_need(shoestring: Shoestring) -> None:
    lines = shoestring("methods", "--category", "quantization", "--needs", "calibration text").out.splitlines()
    assert lines[0].split()[:7] == ["name", "category", "needs", "at", "load", "at", "work"]
    words = ("--category", "quantization", "--json")
    rows = {need: shoestring("methods", "--needs", need, *words).json for need in survey.NEEDS}
    assert len(lines) - 1 == len(rows["calibration text"])
    counts = [len(rows[need]) for need in survey.NEEDS]
    assert counts == sorted(counts) and 0 < counts[0] < counts[-1] and {r["needs"] for r in rows["none"]} == {"none"}
    assert {row["category"] for row in rows["full pretraining"]} == {"quantization"}
    assert "Did you mean pruning" in shoestring("methods", "--category", "prunning").error
    assert "unknown need" in shoestring("methods", "--needs", "money").error


@pytest.mark.parametrize("name", list(catalog.methods()))
def test_explain_a_method(name: str, shoestring: Shoestring) -> None:
    method = catalog.get(name)
    said = shoestring("explain", name)
    assert said.code == 0 and method.about in said.out
    assert f"Category  {survey.category(method)}" in said.out and f"Needs     {survey.needs(method)}" in said.out
    for word in (method.paper.title, method.paper.date, method.room, method.file, f"Claim     {claim.state_of(name)}"):
        assert word in said.out
    found = shoestring("explain", name, "--json").json
    assert (found["kind"], found["name"], found["saves"]) == ("method", name, list(method.saves))


def test_explain_says_name_default_and_meaning_of_every_option(shoestring: Shoestring) -> None:
    said = shoestring("explain", "int8").out
    assert "Options   group_size = 32  weights that share scales, along the input dimension." in said
    assert "          embeddings = 8  bits of the embedding table" in said and "for group in" not in said
    for name in ("compresso", "mole", "paca", "aded", "graphhash", "ic_cache"):
        found = shoestring("explain", name, "--json").json["options"]
        assert found and all(option["meaning"] for option in found), name


def test_explain_with_a_price(tiny: Path, shoestring: Shoestring) -> None:
    found = shoestring("explain", PACKER, "--price", tiny, "--json").json["price"]
    assert all(0 < row["storage"] < found["storage"] for row in found["settings"])
    assert "group_size" in found["options"]
    assert "trains " in shoestring("explain", ADAPTER, "--price", tiny).out


def test_explain_rooms_and_claims(shoestring: Shoestring) -> None:
    said = shoestring("explain", "adapters")
    assert said.code == 0 and "check_merge" in said.out and ADAPTER in said.out and "settings, price" in said.out
    slug = (
        next(slug for slug in claim.files() if slug not in catalog.methods())
        if set(claim.files()) - set(catalog.methods())
        else None
    )
    if slug:
        assert claim.files()[slug].about in shoestring("explain", slug).out
    for name in {slug, next(name for name in claim.files() if name in catalog.methods())} - {None}:
        if record := claim.read_record(claim.get(str(name))):
            said = shoestring("explain", name)
            assert all(record.about[key] in said.out for key in ("command", "commit", "date"))


@pytest.mark.parametrize("words", [(), ("claims",)])
def test_a_word_that_needs_another_shows_which(words: tuple[str, ...], shoestring: Shoestring) -> None:
    said = shoestring(*words)
    assert said.code == 2 and said.out == ""
    assert said.err.startswith("Usage: shoestring") and "\nCommands:\n" in said.err


def test_claims_lists_and_table(shoestring: Shoestring) -> None:
    listed = shoestring("claims", "ls", "--json").json
    assert [row["slug"] for row in listed] == list(claim.files())
    rows = shoestring("claims", "table", "--json").json
    assert [(row["slug"], row["claim"]) for row in rows] == [
        (f.slug, c.name) for f in claim.files().values() for c in f.claims
    ]
    assert all(row["paper"] and row["here"] for row in rows)
    assert shoestring("claims", "table").out.splitlines()[0].startswith("claim ")


def test_claims_refuse_what_gives_no_verdict(shoestring: Shoestring) -> None:
    slug = next(iter(claim.files()))
    assert "2 seeds give no verdict" in shoestring("claims", "run", slug, "--seeds", "0,1").error
    assert "is not a list" in shoestring("claims", "run", slug, "--seeds", "a").error
    assert "no claim is called no-such-claim" in shoestring("claims", "run", "no-such-claim").error


@pytest.fixture
def toy_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ClaimFile:
    """A claim of our own whose experiment is arithmetic, with its record in `tmp_path`."""
    folder = tmp_path / "claims"
    folder.mkdir()
    (folder / "toy.py").write_text(
        '"""Halving halves."""\n'
        "from shoestring.core.claim import Claim\n"
        'METHODS = ()\nCLAIMS = (Claim("half", paper="one half", here="arithmetic", measure="size", arm="half", '
        'against="whole", expect="<= 0.5"),)\n'
        "def run(arms):\n"
        '    for name, size in (("whole", 10 + arms.seed), ("half", (10 + arms.seed) / 2)):\n'
        '        with arms.arm(name) as stage:\n            stage.record("size", size, "B", "counted")\n'
    )
    found = claim._read(folder / "toy.py")
    monkeypatch.setattr(claim, "files", lambda: {"toy": found})
    return found


def test_claims_run_writes_a_record_once_it_is_whole(toy_claim: ClaimFile, shoestring: Shoestring) -> None:
    quick = shoestring("claims", "run", "toy", "--quick", "--json").json
    assert quick[0]["verdict"] == "quick" and not toy_claim.record.exists()
    row = shoestring("claims", "run", "toy", "--json").json[0]
    assert (row["verdict"], row["value"], row["arm"], row["unit"]) == ("shown", 0.5, [5.0, 5.5, 6.0], "B")
    assert json.loads(toy_claim.record.read_text())["seeds"] == [0, 1, 2]
    said = shoestring("claims", "table")
    assert "0.5 (0.5 to 0.5)" in said.out and "shown" in said.out
    assert "shoestring claims run toy" in shoestring("explain", "toy").out
    toy_claim.file.write_text(toy_claim.file.read_text() + "# changed\n")
    assert shoestring("claims", "table", "--json").json[0]["standing"] == "stale"
    toy_claim.record.write_text(toy_claim.record.read_text().replace("5.5", "5.4"))
    assert "(edited)" in shoestring("claims", "table").out


# ---------------------------------------------------------------- check and new


def test_check_says_what_holds(shoestring: Shoestring) -> None:
    said = shoestring("check", PACKER, "--only", "bad_argument")
    assert (said.code, said.out) == (0, "2 of 2 checks hold\n")
    assert f"passed    {PACKER}  check_bad_argument" in said.err
    assert "name the methods" in shoestring("check").error
    assert shoestring("check", PACKER, "--all").code == 2


def test_check_fails_with_code_1(shoestring: Shoestring, monkeypatch: pytest.MonkeyPatch) -> None:
    def check_never(module: object) -> None:
        raise AssertionError("it never holds")

    monkeypatch.setattr(catalog.contract("quantizers"), "CHECKS", [check_never])
    said = shoestring("check", PACKER)
    assert said.code == 1 and "1 of 2 checks hold" in said.out
    assert "it never holds" in said.err and said.error.startswith(f"error: {PACKER} fails 1 of 2")


@pytest.mark.parametrize("room", list(catalog.rooms()))
def test_new_writes_stubs_that_load_and_fail_honestly(
    room: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shoestring: Shoestring
) -> None:
    name = f"new_{room}"
    said = shoestring("new", room, name, "--into", "package", "--json")
    package = tmp_path / "package"
    assert said.code == 0 and len(said.json) == 5
    project = (package / "pyproject.toml").read_text()
    assert f'[project.entry-points."shoestring.methods"]\nshoestring_{name} = "shoestring_{name}"' in project
    stated = claim._read(package / "src" / f"shoestring_{name}" / "claims" / f"{name}.py")
    assert (stated.slug, stated.claims[0].arm) == (f"new-{room}", name)
    monkeypatch.syspath_prepend(str(package / "src"))
    method = catalog.read(package / "src" / f"shoestring_{name}" / room / f"{name}.py", f"shoestring_{name}")
    own = {**catalog.methods(), name: method}
    monkeypatch.setattr(catalog, "methods", lambda: own)
    said = shoestring("check", name)
    assert f"passed    {name}  words" in said.err, said.err
    assert said.code == 1 and "is a stub" in said.err
    checks = len(catalog.contract(room).CHECKS)
    assert said.err.count("failed  ") >= checks - 2, "at most the checks of unknown options and targets can hold"


def test_new_refuses_names_and_places_that_are_taken(tmp_path: Path, shoestring: Shoestring) -> None:
    assert f"the name {ADAPTER} is taken" in shoestring("new", "adapters", ADAPTER).error
    assert "unknown room adaptors. Did you mean adapters" in shoestring("new", "adaptors", "x").error
    for name in ("Upper", "with-dash", "class", "9lives", "../x"):
        assert "not a name for a method" in shoestring("new", "adapters", name).error
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "diary.txt").touch()
    assert "not empty" in shoestring("new", "adapters", "fresh", "--into", "full").error
    assert snapshot(tmp_path / "full") == {"diary.txt"}


# ---------------------------------------------------------------- work on a model


def test_train_merge_compress_export_and_talk(tiny: Path, data: Path, tmp_path: Path, shoestring: Shoestring) -> None:
    words = [
        "--data",
        data,
        "--out",
        "adapted",
        "--max_steps",
        "2",
        "per_device_train_batch_size=4",
        "--eval-examples",
        "8",
    ]
    said = shoestring("train", tiny, *words, "--json")
    assert said.code == 0, said.err
    assert said.json["steps"] == 2 and Path(said.json["model"], "adapter_config.json").is_file()
    assert "training" in said.err and "shoestring merge" in said.err
    said = shoestring("merge", "adapted/model", "--out", "merged", "-q")
    assert (said.code, said.out, said.err) == (0, "merged\n", ""), said.err
    words = ["--method", PACKER, "--data", data, "--out", "packed", "--keep", "0.5"]
    said = shoestring("compress", "merged", *words, "--json")
    assert said.code == 0, said.err
    assert said.json["storage"] < said.json["storage_before"]
    said = shoestring("export", "packed/model", "--out", "plain", "--dtype", "float32")
    assert (said.code, said.out) == (0, "plain\n"), said.err
    assert not json.loads((tmp_path / "plain" / "config.json").read_text()).get("quantization_config")
    said = shoestring("generate", "-m", "packed/model", "w5 w6", "--max_new_tokens", "4", "--json")
    assert said.code == 0 and said.json["prompt"] == "w5 w6", said.err
    assert shoestring("generate", "plain", "-p", "w5 w6", "--max-new-tokens", "4").code == 0
    said = shoestring("eval", "packed/model", "--against", "plain", "--data", data, "--no-work", "--limit", "4")
    assert said.code == 0 and "perplexity ratio" in said.out and "held-out loss" in said.out, said.err
    said = shoestring("runs", tmp_path)
    assert said.code == 0 and {line.split()[-1] for line in said.out.splitlines()[1:]} == {
        str(tmp_path / "adapted"),
        str(tmp_path / "packed"),
    }
    assert shoestring("report", "packed").code == 0


def test_a_result_below_the_quality_asked_for_is_code_4(
    tiny: Path, data: Path, tmp_path: Path, shoestring: Shoestring, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shoestring.jobs import compress

    def worse(*args: Any) -> Any:
        found = compare(*args)
        return replace(found, perplexity_ratio=replace(found.perplexity_ratio, value=2.0))

    compare = compress.compare
    monkeypatch.setattr(compress, "compare", worse)
    said = shoestring("compress", tiny, "--method", PACKER, "--data", data, "--out", "out", "--keep", "0.9")
    assert said.code == 4 and said.out == "" and "keeps 50.0% of the quality, and --keep asks for 90.0%" in said.error
    assert not (tmp_path / "out" / "model").exists()
    assert json.loads((tmp_path / "out" / "run" / "manifest.json").read_text())["status"] != "done"


def test_chat_reads_lines(tiny: Path, shoestring: Shoestring, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("w5 w6\n/clear\nw7\n/exit\nnever\n"))
    said = shoestring("chat", tiny, "--max-new-tokens", "3", "--json")
    assert said.code == 0, said.err
    assert [m["role"] for m in said.json] == ["user", "assistant"] and said.json[0]["content"] == "w7"


def test_generate_reads_standard_input(tiny: Path, shoestring: Shoestring, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"w5\n")))
    assert shoestring("generate", tiny, "--max-new-tokens", "2", "--json").json["prompt"] == "w5"
    assert "more than one prompt" in shoestring("generate", tiny, "w5", "-p", "w6").error
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"w5\xff"), errors="surrogateescape"))
    said = shoestring("generate", tiny, "-")
    assert said.code == 2 and "not UTF-8 (byte 0xff at position 2)" in said.error


def test_recommend_lists_what_fits_and_how_fast(tiny: Path, shoestring: Shoestring) -> None:
    words = ("recommend", tiny, "--memory", "1GB", "--bandwidth", "1GB/s")
    said = shoestring(*words)
    lines = said.out.splitlines()
    assert said.code == 0 and lines[0].split()[:6] == ["method", "bits", "storage", "memory", "tokens/s", "fits"]
    assert any(line.startswith("as it is ") for line in lines) and any(line.startswith(PACKER) for line in lines)
    assert len(shoestring(*words, "--json").json["ways"]) == len(lines) - 1
    said = shoestring("recommend", tiny, "--memory", "1MB", "--bandwidth", "1GB/s")
    assert said.code == 3 and "nothing fits" in said.error


def test_plan_prints_candidates_and_writes_nothing(
    tiny: Path, tmp_path: Path, shoestring: Shoestring, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_floor", lambda: 500_000_000)
    said = shoestring("plan", tiny, "--budget", "storage=150kB,memory=1GB", "--adapt", "none")
    assert said.code == 0, said.err
    lines = said.out.splitlines()
    assert "fits" in lines[1] and "as it is" in said.out and PACKER in said.out
    found = shoestring("plan", tiny, "--budget", "storage=150kB,memory=1GB", "--json").json
    assert found["budget"] == "storage=150kB,memory=1GB" and not found["candidates"][0]["misses"]
    assert snapshot(tmp_path) == set()


# ---------------------------------------------------------------- runs, pipelines, environment


def test_no_runs(tmp_path: Path, shoestring: Shoestring) -> None:
    assert shoestring("runs").out == "no runs below runs\n"
    assert shoestring("runs", "--json").json == []
    (tmp_path / "file").touch()
    assert "is not a folder" in shoestring("runs", "file").error


def test_report_without_a_result(tmp_path: Path, shoestring: Shoestring) -> None:
    assert "holds no result" in shoestring("report", "nowhere").error
    (tmp_path / "run" / "run").mkdir(parents=True)
    (tmp_path / "run" / "run" / "result.json").write_text("{")
    assert "is damaged" in shoestring("report", "run").error


def test_validate(tiny: Path, data: Path, tmp_path: Path, shoestring: Shoestring) -> None:
    file = tmp_path / "p.yaml"
    steps = f"[{{verb: train, method: {ADAPTER}}}, {{verb: merge}}, {{verb: compress, method: {PACKER}}}]"
    file.write_text(f"model: {tiny}\ndata: {data}\nsteps: {steps}\ntraining: {{max_steps: 2, max_length: 64}}\n")
    said = shoestring("validate", file)
    assert (said.code, said.out) == (0, f"{file} is valid\n"), said.err
    assert shoestring("validate", file, "--json").json["problems"] == []
    pack = f"{{verb: compress, method: {PACKER}}}"
    bad = {
        f"model: {tiny}\nsteps: {steps}\n": "no data is named",
        f"model: {tiny}\ndata: none.jsonl\nsteps: {steps}\n": "none.jsonl",
        f"model: {tmp_path}/none\nsteps: [{{verb: compress, method: {PACKER}}}]\n": "none",
        f"model: {tiny}\nsteps: [{{verb: compress, method: {PACKER}, options: {{no_such: 1}}}}]\n": "no_such",
        f"model: {tiny}\nsteps: [{pack}, {pack}]\n": "cannot follow",
        f"model: {tiny}\nsteps: [{{verb: train, method: {ADAPTER}}}, {pack}]\n": "merge between",
        f"model: {tiny}\nsteps: [{{verb: merge}}, {{verb: merge}}]\n": "makes no adapter",
    }
    for content, word in bad.items():
        file.write_text(content)
        said = shoestring("validate", file)
        assert said.code == 2 and word in said.err, (content, said.err)


def test_run_a_pipeline_and_what_it_resolved_to(tiny: Path, data: Path, tmp_path: Path, shoestring: Shoestring) -> None:
    steps = f"[{{verb: train, method: {ADAPTER}}}, {{verb: merge}}, {{verb: compress, method: {PACKER}}}]"
    training = "{max_steps: 2, per_device_train_batch_size: 4}"
    (tmp_path / "p.yaml").write_text(f"model: {tiny}\ndata: {data}\nsteps: {steps}\ntraining: {training}\n")
    said = shoestring("run", "p.yaml", "--out", "one")
    assert (said.code, said.out) == (0, "one/model\n"), said.err
    said = shoestring("run", "one/run/config.resolved.yaml", "--out", "two", "--json")
    assert said.code == 0 and len(said.json["steps"]) == 3, said.err
    weights = [(tmp_path / run / "model" / "model.safetensors").read_bytes() for run in ("one", "two")]
    assert weights[0] == weights[1], "the same pipeline gives the same model"
    words = ["--method", PACKER, "--data", data, "--keep", "0.5", "--eval-examples", "4"]
    said = shoestring("compress", tiny, *words, "--out", "a third")
    assert said.code == 0 and "shoestring chat 'a third/model'" in said.err, "a hint can be pasted"
    assert shoestring("run", "a third/run/config.resolved.yaml", "--out", "four").code == 0
    kinds = {run["folder"].rsplit("/", 1)[-1]: run["kind"] for run in shoestring("runs", tmp_path, "--json").json}
    assert kinds == {"one": "run", "two": "run", "a third": "compress", "four": "compress"}


def test_env_masks_secrets(shoestring: Shoestring, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hunter2")
    monkeypatch.setenv("SHOESTRING_API_KEY", "hunter2")
    monkeypatch.setenv("HF_ENDPOINT", "https://me:hunter2@mirror.example/x")
    monkeypatch.setenv("UNRELATED", "hunter2")
    said = shoestring("env")
    assert said.code == 0 and "hunter2" not in said.out
    assert "HF_TOKEN=(set)" in said.out and "HF_ENDPOINT=https://***@mirror.example/x" in said.out
    found = shoestring("env", "--json").json
    assert found["software"]["torch"] and "isa" in found["kernels"] and found["machine"]["cores"] >= 1


# ---------------------------------------------------------------- a trial of methods


def test_a_trial_prints_its_table(tiny: Path, data: Path, tmp_path: Path, shoestring: Shoestring) -> None:
    words = ["--data", data, "--method", "lora", "--max_steps", "2", "--eval-examples", "4", "--out", "tried"]
    said = shoestring("train", tiny, "--trial", "--budget", "time=5m", *words)
    assert said.code == 0, said.err
    head, first, base = said.out.splitlines()
    assert "held-out loss" in head and first.split()[:2] == ["*", "lora"] and base.split()[0] == "untrained"
    assert "pareto.svg" in said.err
    said = shoestring("train", tiny, "--trial", "--budget", "time=5m", *words, "--resume", "--json")
    assert said.code == 0 and said.json["rows"][0]["steps"] == 2, said.err


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--method", "all"], "Add --trial"),
        (["--method", "lora,ia3"], "Add --trial"),
        (["--budget", "memory=2GB"], "belongs to a trial"),
        (["--trial", "--budget", "latency=2ms"], "does not measure latency"),
    ],
)
def test_trials_asked_for_in_part(words: list[str], error: str, tiny: Path, shoestring: Shoestring) -> None:
    said = shoestring("train", tiny, *words)
    assert said.code == 2 and error in said.error
