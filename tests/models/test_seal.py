"""Folders that say what must be imported before they can be read."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from shoestring.core.errors import UsageError
from shoestring.models.seal import fulfil, needs, seal, seal_of, unseal


def config(folder: Path) -> dict[str, object]:
    return dict(json.loads((folder / "config.json").read_text()))


def test_a_sealed_folder_names_all_it_needs(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    seal(tmp_path, "shoestring.models.uneven")
    seal(tmp_path, "shoestring.methods.quantizers")
    found = config(tmp_path)
    assert found["model_type"] == "llama" and found["transformers_weights"] == seal_of("shoestring.methods.quantizers")
    assert needs(found) == ["shoestring.methods.quantizers", "shoestring.models.uneven"]
    fulfil(found)


def test_only_who_sealed_it_takes_the_seal_away() -> None:
    read = SimpleNamespace(transformers_weights=seal_of("shoestring.methods.quantizers"))
    unseal(read, "shoestring.models.uneven")
    assert hasattr(read, "transformers_weights")
    unseal(read, "shoestring.methods.quantizers")
    assert not hasattr(read, "transformers_weights")


@pytest.mark.parametrize("name", ["os", "shoestring.methods.quantizers.int4", "shoestring.models.x; import os", 3])
def test_nothing_foreign_is_imported(name: object) -> None:
    assert needs({"shoestring_needs": [name]}) == []
    assert needs({"shoestring_needs": name}) == []


def test_a_folder_of_a_newer_version() -> None:
    with pytest.raises(UsageError, match="shoestring.methods.conjurers.*Update shoestring"):
        fulfil({"shoestring_needs": ["shoestring.methods.conjurers"]})
