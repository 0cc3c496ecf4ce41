"""Which runner opens what, under which name, and what is said about it; the default model opens without torch."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import LoraConfig, get_peft_model
from runner_cases import Part, logits, make, pages, text
from test_native_runner import write_gguf
from test_tokenizer import byte_level

from shoestring.core.errors import ShoestringError, UsageError
from shoestring.engine import open as opening
from shoestring.engine.engine import Engine
from shoestring.engine.open import open_model
from shoestring.engine.request import Sampling
from shoestring.kernels import matrix
from shoestring.models.llama_like import NotNative
from shoestring.models.load import DEFAULT, locate


@pytest.fixture(autouse=True)
def own_cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "real" not in request.keywords:
        monkeypatch.setenv("SHOESTRING_CACHE", str(tmp_path / "cache"))


def save(folder: Path, family: str = "llama", **changes: Any) -> Path:
    make(family, **changes).save_pretrained(folder)
    byte_level().save(str(folder / "tokenizer.json"))
    return folder


def test_a_folder_is_opened_natively(tmp_path: Path) -> None:
    opened = open_model(save(tmp_path / "mine"), threads=1)
    assert opened.runner.facts.backend == "native" and opened.note == "" and opened.adapter == -1
    assert opened.name == "mine" and opened.path == tmp_path / "mine"
    assert opened.runner.facts.eos == opened.tokenizer.eos == (2,)
    opened.runner.close()


def test_others_run_on_torch_and_it_says_why(tmp_path: Path) -> None:
    folder = save(tmp_path / "mine", "gpt2")
    opened = open_model(folder, threads=1)
    assert opened.runner.facts.backend == "torch"
    assert "GPT2LMHeadModel" in opened.note and "torch runner" in opened.note
    opened.runner.close()
    with pytest.raises(NotNative, match="GPT2LMHeadModel"):
        open_model(folder, runner="native")


def test_the_runner_can_be_chosen(tmp_path: Path) -> None:
    folder = save(tmp_path / "mine")
    opened = open_model(folder, runner="torch", threads=1)
    assert opened.runner.facts.backend == "torch" and opened.note == ""
    opened.runner.close()
    with pytest.raises(UsageError, match="Unknown runner 'fast'"):
        open_model(folder, runner="fast")


def test_broken_files_are_no_reason_to_try_torch(tmp_path: Path) -> None:
    folder = save(tmp_path / "mine")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-10])
    with pytest.raises(UsageError, match="model.safetensors is corrupt"):
        open_model(folder)
    (folder / "model.safetensors").write_bytes(whole)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UsageError, match="tokenizer.json is not sound"):
        open_model(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": "x.y"}}))
    with pytest.raises(UsageError, match="auto_map"):
        open_model(folder)


def test_garbage_is_collected_again(tmp_path: Path) -> None:
    save(tmp_path)
    open_model(tmp_path, threads=1).runner.close()
    assert gc.isenabled()
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UsageError, match=r"tokenizer\.json"):
        open_model(tmp_path, threads=1)
    assert gc.isenabled()


def test_without_kernels_torch_runs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise ShoestringError("The native kernels are not available", "no compiler")

    monkeypatch.setattr(matrix, "library", absent)
    folder = save(tmp_path / "mine")
    opened = open_model(folder, threads=1)
    assert opened.runner.facts.backend == "torch" and "no compiler" in opened.note
    opened.runner.close()
    with pytest.raises(ShoestringError, match="no compiler"):
        open_model(folder, runner="native")


def test_an_adapter_folder_is_base_and_adapter(tmp_path: Path) -> None:
    base = save(tmp_path / "base")
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    adapted = get_peft_model(make("llama"), config)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(tmp_path / "tuned")
    opened = open_model(tmp_path / "tuned", threads=1)
    assert opened.name == "tuned" and opened.adapter == 0 and opened.tokenizer.eos == (2,)
    opened.runner.reserve(4)
    ids = text(10)
    with_it, without = (logits(opened.runner, Part(ids, pages(10), adapter=number)) for number in (opened.adapter, -1))
    assert np.abs(with_it - without).max() > 0.1
    opened.runner.close()
    with Engine(tmp_path / "tuned", threads=1) as engine:
        found = engine.generate([ids], Sampling(max_tokens=1, ignore_eos=True))
        assert engine.name == "tuned" and found[0][0].tokens == (int(with_it[-1].argmax()),)
    file = tmp_path / "tuned" / "adapter_config.json"
    for bad in (None, "", 3, str(tmp_path / "tuned"), str(tmp_path / "absent")):
        file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": bad}))
        with pytest.raises(UsageError):
            open_model(tmp_path / "tuned")


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no model at"):
        open_model(tmp_path / "absent")
    with pytest.raises(UsageError, match="network is switched off"):
        open_model("nobody/nothing", offline=True)


def test_a_gguf_without_a_known_tokenizer_says_so(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", make("llama"), "Q8_0")
    with pytest.raises(UsageError, match="tiny.gguf cannot be converted"):
        open_model(tmp_path / "tiny.gguf")


def test_a_gguf_of_types_without_kernels_runs_natively_as_floats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tmp_path / "converted", hidden_size=64, intermediate_size=128)
    file = tmp_path / "tiny.gguf"
    write_gguf(file, make("llama", hidden_size=64, intermediate_size=128), "Q5_0")
    monkeypatch.setattr(opening, "resolve", lambda path, offline=None: folder)
    opened = open_model(file, threads=1)
    assert opened.runner.facts.backend == "native" and opened.name == "tiny.gguf" and opened.path == folder
    assert "no kernels for Q5_0" in opened.note and "bfloat16" in opened.note
    opened.runner.close()


# ---- the default model ----

FIRST = """
import sys
from shoestring.engine.engine import Engine
from shoestring.engine.open import open_model
from shoestring.engine.request import Sampling
import numpy as np
from shoestring.engine.runner import Batch
opened = open_model("smollm2")
opened.runner.reserve(8)
ids = opened.tokenizer.chat([{"role": "user", "content": "Say hi."}])
array = lambda x: np.array(x, np.int32)
batch = Batch(array(ids), array(range(len(ids))), array([0, len(ids)]), array([0]), array([range(8)]))
found = opened.runner.logits(opened.runner.run(batch), array([len(ids) - 1]))
print(opened.name, opened.runner.facts.precision, found.shape, repr(opened.tokenizer.decode([int(found.argmax())])))
slow = {"torch", "transformers", "peft", "gguf", "safetensors", "huggingface_hub", "importlib.metadata"}
slow &= set(sys.modules)
assert not slow, slow
"""


@pytest.mark.real
def test_the_default_model_opens_alone(tmp_path: Path) -> None:
    """Without torch, and without the cache of converted models."""
    env = {**os.environ, "SHOESTRING_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", FIRST], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("smollm2 q8_0 + q4_1 (1, 49152) ")
    assert not (tmp_path / "cache").exists()


@pytest.mark.real
def test_the_default_model_in_another_type_is_the_converted_one() -> None:
    opened = open_model(DEFAULT, dtype="bf16", threads=1)
    assert opened.runner.facts.precision == "bf16" and opened.name == DEFAULT and opened.path.is_dir()
    opened.runner.close()


@pytest.mark.real
def test_a_gguf_file_anywhere_is_called_by_its_name(tmp_path: Path) -> None:
    file = tmp_path / "some model.gguf"
    shutil.copy(locate(DEFAULT), file)
    opened = open_model(file, threads=1)
    assert opened.name == "some model.gguf" and opened.runner.facts.backend == "native"
    opened.runner.close()
