from __future__ import annotations

import json
from pathlib import Path

import pytest

from shoestring import cli
from shoestring.core.errors import UsageError
from shoestring.jobs.mapping import MapRequest, map_model, mappers
from shoestring.lab import tiny


@pytest.fixture
def model(tmp_path: Path) -> str:
    made = tiny.model(num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256)
    made.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_every_figure_is_modelled_and_goes_into_a_ledger(model: str, tmp_path: Path) -> None:
    found = map_model(MapRequest(model, target="vhk158", prompt=20, tokens=10), out=tmp_path / "run")
    assert found["status"] == "modelled" and found["method"] == mappers()[0] and found["assumptions"]
    assert {row["status"] for row in found["ledger"]} == {"modelled"}
    stages = {row["stage"] for row in found["ledger"]}
    assert stages == {"vhk158/prefill", "vhk158/decode"}
    kept = json.loads((tmp_path / "run" / "run" / "result.json").read_text())
    assert kept["steps"] == found["steps"] and (tmp_path / "run" / "run" / "ledger.json").is_file()


def test_options_reach_the_method(model: str) -> None:
    plain, apart = (
        map_model(MapRequest(model, prompt=20, tokens=10, options=options)) for options in ({}, {"on_chip": False})
    )
    moved = [found["steps"][1]["moved"]["activations"] for found in (plain, apart)]
    assert moved[0] < moved[1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target": "u28"}, "Did you mean u280"), ({"method": "no-such"}, "unknown method no_such"),
        ({"method": "lora"}, "lora maps nothing"), ({"tokens": 300}, "tokens are more than 256"),
        ({"options": {"colour": 1}}, "no option colour"),
    ],
)  # fmt: skip
def test_bad_requests_are_clear_errors(model: str, change: dict, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        map_model(MapRequest(**{"model": model, "prompt": 20, "tokens": 10, **change}))


def test_the_command_says_what_is_modelled(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.exit_code(["map", model, "--target", "u280", "--prompt", "20", "--tokens", "10"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for word in ("time", "tokens/s", "cycles", "energy", "to and from memory", "where the time goes", "units at work"):
        assert any(line.startswith(f"{word}, modelled") for line in lines), word
    assert any("nothing was measured" in line for line in lines)
    assert cli.exit_code(["map", model, "--prompt", "20", "--tokens", "10", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "modelled"
    assert cli.exit_code(["map", model, "--target", "u281"]) == 2
    assert "no accelerator is called u281. Did you mean u280?" in capsys.readouterr().err
