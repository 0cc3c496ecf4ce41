"""Bad input met at the command line: one line that says what is wrong and what to do, and nothing written."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path

import pytest
from saying import Said, Shoestring, snapshot

from shoestring.core import catalog
from shoestring.planner import machine
from shoestring.planner.plan import by_verb

PACKER = next(m.name for m in by_verb("compress") if m.default)


@pytest.fixture(autouse=True)
def known_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's memory is a figure here: measuring it takes a process of its own."""
    monkeypatch.setattr(machine, "_floor", lambda: 500_000_000)


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def refused(said: Said, *words: str, code: int = 2) -> None:
    assert said.code == code, said.err
    assert said.out == ""
    for word in words:
        assert word in said.error, said.error


def nothing_made(folder: Path) -> None:
    left = {path for path in snapshot(folder) if path.startswith("out")}
    assert not left, left


# ---------------------------------------------------------------- words


def test_unknown_method(tiny: Path, data: Path, tmp_path: Path, shoestring: Shoestring) -> None:
    some = next(iter(catalog.methods()))
    typo = some[:-1] + "x"
    for words in (
        ["compress", tiny, "--method", typo, "--data", data, "--out", "out"],
        ["train", tiny, "--method", typo, "--data", data, "--out", "out"],
        ["fit", tiny, "--compress", typo, "--data", data, "--out", "out"],
        ["fit", tiny, "--adapt", typo, "--data", data, "--out", "out"],
        ["plan", tiny, "--compress", typo],
        ["check", typo],
    ):
        refused(shoestring(*words), f"unknown method {typo}", "Did you mean", some)
    refused(shoestring("explain", typo), typo, "Did you mean", some)
    nothing_made(tmp_path)


def test_a_method_with_another_verb(tiny: Path, data: Path, tmp_path: Path, shoestring: Shoestring) -> None:
    trains = next(catalog.in_room("adapters"))
    packs = PACKER
    refused(
        shoestring("compress", tiny, "--method", trains, "--data", data, "--out", "out"), trains, "does not compress"
    )
    refused(shoestring("train", tiny, "--method", packs, "--data", data, "--out", "out"), packs, "does not train")
    nothing_made(tmp_path)


def test_no_method(tiny: Path, shoestring: Shoestring) -> None:
    refused(shoestring("compress", tiny), "no method is given", *catalog.in_room("quantizers"))


def test_unknown_option_of_a_method(tiny: Path, data: Path, tmp_path: Path, shoestring: Shoestring) -> None:
    for verb, room in (("compress", "quantizers"), ("train", "adapters")):
        name = next(catalog.in_room(room))
        words = [verb, tiny, "--method", name, "--data", data, "--out", "out", "--option", "no_such_option=1"]
        refused(shoestring(*words), "no_such_option")
        assert not (tmp_path / "out" / "model").exists()
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ("storag=90MB", ("unknown resource storag", "Did you mean storage?")),
        ("colour=3MB", ("unknown resource colour", "Known:", "storage")),
        ("storage=90Mb", ("storage=90Mb", "unknown unit Mb", "MB")),
        ("storage=90", ("storage=90 has no unit",)),
        ("ram=4", ("memory=4 has no unit",)),
        ("storage=", ("storage has no limit",)),
        ("storage=-3MB", ("storage=-3MB",)),
        ("storage=0MB", ("storage=0MB is not above zero",)),
        ("time=6m,time=7m", ("limits time twice",)),
    ],
)
@pytest.mark.parametrize("verb", ["fit", "plan"])
def test_budgets(
    verb: str, budget: str, words: tuple[str, ...], tiny: Path, tmp_path: Path, shoestring: Shoestring
) -> None:
    refused(shoestring(verb, tiny, "--budget", budget), *words)
    nothing_made(tmp_path)


def test_an_impossible_budget_is_code_3(tiny: Path, data: Path, tmp_path: Path, shoestring: Shoestring) -> None:
    said = shoestring("fit", tiny, "--data", data, "--budget", "storage=1kB", "--out", "out")
    refused(said, "nothing fits storage=1kB", "Relax storage", code=3)
    nothing_made(tmp_path)
    said = shoestring("plan", tiny, "--budget", "storage=1kB", "--adapt", "none")
    assert said.code == 3
    assert "misses storage" in said.out and "Relax" in said.error


def test_keep_is_a_share(tiny: Path, data: Path, shoestring: Shoestring) -> None:
    refused(shoestring("fit", tiny, "--data", data, "--keep", "97"), "keep is 97")


# ---------------------------------------------------------------- models


def test_a_folder_without_a_config(tmp_path: Path, data: Path, shoestring: Shoestring) -> None:
    (tmp_path / "empty").mkdir()
    for words in (["plan", "empty"], ["generate", "empty", "hello"], ["eval", "empty", "--no-work", "--data", data]):
        refused(shoestring(*words), "empty", "config.json")


def test_corrupt_safetensors(model: Path, data: Path, shoestring: Shoestring) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    refused(shoestring("generate", model, "w5"), "model.safetensors")
    refused(
        shoestring("compress", model, "--method", PACKER, "--data", data),
        "model.safetensors",
    )


def test_pickle_only_weights(model: Path, shoestring: Shoestring) -> None:
    import torch

    torch.save({}, model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    refused(shoestring("generate", model, "w5"), "pytorch_model.bin", "pickle")


def test_no_network_for_a_hub_id(shoestring: Shoestring) -> None:
    for words in (["plan", "nobody/no-such-model"], ["generate", "nobody/no-such-model", "hi"]):
        refused(shoestring(*words), "nobody/no-such-model")


def test_a_path_that_is_not_there(shoestring: Shoestring) -> None:
    refused(shoestring("plan", "./no-such-folder"), "no-such-folder")


def test_a_method_that_does_not_fit_the_architecture(
    tmp_path: Path, tiny: Path, data: Path, shoestring: Shoestring
) -> None:
    from shoestring.lab import tiny as lab

    folder = tmp_path / "masked"
    lab.model("bert").save_pretrained(folder)
    for file in tiny.glob("token*"):
        shutil.copy(file, folder)
    refused(shoestring("chat", folder), "masked")
    words = ["train", tiny, "--method", next(catalog.in_room("adapters")), "--data", data, "--out", "out"]
    refused(shoestring(*words, "--option", 'target_modules=["no_such_layer"]'), "no_such_layer", "LlamaForCausalLM")
    assert not (tmp_path / "out" / "model").exists()


# ---------------------------------------------------------------- data


def test_an_empty_data_file(tiny: Path, tmp_path: Path, shoestring: Shoestring) -> None:
    (tmp_path / "empty.jsonl").touch()
    for verb in ("fit", "train"):
        refused(shoestring(verb, tiny, "--data", "empty.jsonl", "--out", "out"), "empty.jsonl", "empty")
    nothing_made(tmp_path)


def test_wrong_json_names_the_line(tiny: Path, data: Path, tmp_path: Path, shoestring: Shoestring) -> None:
    lines = data.read_text().splitlines()
    lines[41] = '{"prompt": '
    data.write_text("\n".join(lines))
    refused(shoestring("train", tiny, "--data", data, "--out", "out"), "data.jsonl:42:", "--skip-bad")
    nothing_made(tmp_path)


def test_a_data_file_that_is_not_there(tiny: Path, data: Path, shoestring: Shoestring) -> None:
    refused(shoestring("train", tiny, "--data", "dta.jsonl"), "dta.jsonl", "Did you mean", "data.jsonl")


def test_text_longer_than_the_context(tiny: Path, data: Path, tmp_path: Path, shoestring: Shoestring) -> None:
    refused(shoestring("generate", tiny, "w5 " * 300), "context is 256")
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for row in rows:
        row["completion"] = "w7 " * 300
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    refused(shoestring("train", tiny, "--data", data, "--out", "out"), "256")
    assert not (tmp_path / "out" / "model").exists()


# ---------------------------------------------------------------- folders and disks


def test_a_folder_that_holds_another_run(tiny: Path, data: Path, tmp_path: Path, shoestring: Shoestring) -> None:
    other = tmp_path / "out"
    (other / "run").mkdir(parents=True)
    (other / "run" / "manifest.json").write_text('{"kind": "train", "status": "done"}')
    before = snapshot(other)
    words = ["--data", data, "--out", other]
    packs = PACKER
    for verb in (["compress", tiny, "--method", packs], ["train", tiny], ["fit", tiny, "--budget", "storage=1GB"]):
        refused(shoestring(*verb, *words), "already holds a run", "--resume")
    assert snapshot(other) == before


def test_a_folder_that_holds_something_else(tiny: Path, data: Path, tmp_path: Path, shoestring: Shoestring) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "diary.txt").touch()
    refused(shoestring("train", tiny, "--data", data, "--out", "out"), "not empty")
    refused(shoestring("export", tiny, "--out", "out"), "not empty")
    assert snapshot(tmp_path / "out") == {"diary.txt"}


def test_nothing_to_resume(tiny: Path, data: Path, shoestring: Shoestring) -> None:
    refused(shoestring("train", tiny, "--data", data, "--out", "nowhere", "--resume"), "no run to resume")


def test_a_full_disk_leaves_nothing_half_written(
    tiny: Path, data: Path, tmp_path: Path, shoestring: Shoestring
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        said = shoestring(
            "compress",
            tiny,
            "--method",
            PACKER,
            "--data",
            data,
            "--out",
            "out",
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    refused(said, "Writing", "too large", code=1)
    left = snapshot(tmp_path / "out")
    assert not any(path.startswith("model") or "safetensors" in path or "partial" in path for path in left), left
    assert json.loads((tmp_path / "out" / "run" / "manifest.json").read_text())["status"] == "failed"


# ---------------------------------------------------------------- pipelines


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("verb: fit\nbudget: storage=1MB\nkep: 0.9\n", ("unknown key kep", "Did you mean keep")),
        ("verb: fitt\n", ("unknown verb fitt", "Did you mean fit")),
        ("model: x\n\tdata: y\n", ("is not YAML",)),
        ("a: &a [x, x]\nb: [*a, *a]\n", ("aliases",)),
        ("- 1\n", ("is not a mapping",)),
        ("model: m\n", ("there are no steps",)),
        ("verb: train\ntraining: {learning_rat: 1}\n", ("unknown training setting learning_rat", "learning_rate")),
        ("verb: train\ntraining: 3\n", ("training is 3",)),
        ("steps: [{verb: trai}]\n", ("unknown verb trai", "train")),
        ("steps: [3]\n", ("3 is not a step",)),
        ("verb: fit\nbudget: ram=4\n", ("memory=4 has no unit",)),
    ],
)
@pytest.mark.parametrize("verb", ["run", "validate"])
def test_pipeline_files(
    verb: str, content: str, words: tuple[str, ...], tmp_path: Path, shoestring: Shoestring
) -> None:
    (tmp_path / "p.yaml").write_text(content)
    said = shoestring(verb, "p.yaml")
    assert said.code == 2
    for word in words:
        assert word in said.err, said.err
    assert "Traceback" not in said.err
    assert snapshot(tmp_path) == {"p.yaml"}


def test_pipeline_files_that_are_none(tmp_path: Path, shoestring: Shoestring) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "huge.yaml").write_text("a: " + "x" * 1_100_000)
    (tmp_path / "latin.yaml").write_bytes("model: caf\u00e9".encode("latin-1"))
    (tmp_path / "deep.yaml").write_text("[" * 1500)
    for verb in ("run", "validate"):
        for name, word in (("none.yaml", "no pipeline"), ("folder", "is a folder"), ("huge.yaml", "larger than 1 MB"),
                           ("latin.yaml", "not UTF-8"), ("deep.yaml", "deep")):  # fmt: skip
            refused(shoestring(verb, name), name, word)
