"""What is saved is whole, loads anywhere, and never mixes with what was there."""

from __future__ import annotations

import copy
import json
import os
import resource
from pathlib import Path

import pytest
import torch
from families import tiny
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from shoestring.core.errors import ShoestringError, UsageError
from shoestring.models import load, save
from shoestring.models.saving import copy_tokenizer


def test_saved_model_loads_in_transformers_and_here(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny("llama")
    folder = save(model, tokenizer, tmp_path / "out", card="# A small model\n")
    assert (folder / "README.md").read_text() == "# A small model\n" and os.listdir(tmp_path) == ["out"]
    mask = os.umask(0o022)
    os.umask(mask)
    assert all(file.stat().st_mode & 0o777 == 0o666 & ~mask for file in folder.iterdir())
    ids = torch.full((1, 6), 5)
    with torch.no_grad():
        wanted = model(ids).logits
        assert torch.equal(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits, wanted)
        assert torch.equal(load(folder).model(ids).logits, wanted)
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == tokenizer.get_vocab()


def test_occupied_folder(tmp_path: Path) -> None:
    model = tiny("llama")
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UsageError, match="not empty"):
        save(model, None, tmp_path)
    assert os.listdir(tmp_path) == ["mine.txt"]


def test_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """A real refusal by the operating system: files may not grow past 20 kB."""
    model = tiny("llama")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(ShoestringError, match="too large.*Free some space"):
            save(model, None, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == []


def test_a_tokenizer_is_copied_as_it_is_or_else_read_and_saved(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    source, copied, saved = tmp_path / "source", tmp_path / "copied", tmp_path / "saved"
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    save(tiny("llama"), tokenizer, source)
    for place in (copied, saved):
        place.mkdir()
    copy_tokenizer(source, copied)
    assert AutoTokenizer.from_pretrained(copied).chat_template == tokenizer.chat_template
    names = {file.name for file in copied.iterdir() if file.is_file()}
    assert names >= {"tokenizer.json", "tokenizer_config.json"} and "config.json" not in names
    assert all((source / name).read_bytes() == (copied / name).read_bytes() for name in names)
    config = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps({**config, "auto_map": {}, "pad_token": "[PAD]"}))
    (source / "tokenizer.json").rename(source / "kept")
    with pytest.raises(UsageError, match="tokenizer in .* cannot be loaded"):
        copy_tokenizer(source, saved)
    (source / "tokenizer_config.json").unlink()
    copy_tokenizer(source, saved)
    assert not list(saved.iterdir()), "there is none"
