"""Adapter folders that are no plain LoRA: written as one by their method, merged into the base, or run as peft does."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch
from runner_cases import Part, logits, make, pages, text
from test_tokenizer import byte_level
from torch import nn

from shoestring.core import catalog
from shoestring.core.errors import UsageError
from shoestring.engine.adapter_forms import NotBeside
from shoestring.engine.engine import Engine
from shoestring.engine.open import open_model
from shoestring.engine.request import Sampling
from shoestring.kernels.loader import load

BEST = "torch" if load().library is None else "native"
PROJECTIONS = ["q_proj", "v_proj"]
MERGED = {
    "IA3": peft.IA3Config(target_modules=[*PROJECTIONS, "down_proj"], feedforward_modules=["down_proj"]),
    "VERA": peft.VeraConfig(r=4, target_modules=["q_proj", "o_proj"]),
    "LOHA": peft.LoHaConfig(r=4, target_modules=PROJECTIONS),
    "DoRA": peft.LoraConfig(r=4, target_modules=PROJECTIONS, use_dora=True),
    "LoRA on the head": peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"]),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOESTRING_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    make("llama").save_pretrained(folder)
    byte_level().save(str(folder / "tokenizer.json"))
    return folder


def adapted(base: Path, out: Path, config: peft.PeftConfig) -> tuple[Path, np.ndarray]:
    """An adapter folder with random numbers, and peft's own logits [tokens, vocab] of `text(20)`."""
    torch.manual_seed(1)
    config = replace(config, task_type="CAUSAL_LM")
    model = peft.get_peft_model(make("llama"), config)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value += 0.3 * torch.randn_like(value)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(str(out))
    with torch.no_grad():
        return out, model(torch.tensor([text(20)])).logits[0].numpy()


def answer(opened: Any) -> np.ndarray:
    opened.runner.reserve(4)
    found = logits(opened.runner, Part(text(20), pages(20), adapter=opened.adapter))
    opened.runner.close()
    return found


@pytest.mark.parametrize("name", MERGED)
def test_what_merges_is_served_merged(base: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, want = adapted(base, tmp_path / "adapter", MERGED[name])
    opened = open_model(folder, cache_dtype="fp32")
    assert opened.runner.facts.backend == BEST
    assert opened.name == "adapter" and opened.path == folder and opened.adapter == -1
    assert opened.note.startswith("The adapter is merged into its base, since ")
    plain = answer(open_model(base, cache_dtype="fp32"))
    assert np.abs(plain - want).max() > 0.1 * np.abs(want).max()
    np.testing.assert_allclose(answer(opened), want, rtol=0, atol=1e-3 * np.abs(want).max())
    # A second time nothing is merged; another adapter of the same shape is not taken for it.
    from shoestring.models import merging

    monkeypatch.setattr(merging, "merge_into", lambda *_: pytest.fail("merged again"))
    np.testing.assert_allclose(answer(open_model(folder, cache_dtype="fp32")), want, rtol=0, atol=1e-3)
    changed = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**changed, "inference_mode": False}))
    with pytest.raises(pytest.fail.Exception, match="merged again"):
        open_model(folder)


def test_beside_a_base_it_is_refused_and_told_what_to_do(base: Path, tmp_path: Path) -> None:
    folder, _ = adapted(base, tmp_path / "adapter", MERGED["IA3"])
    for runner in ("auto", "torch"):
        with Engine(base, runner=runner) as engine, pytest.raises(NotBeside, match="IA3.*`shoestring merge`"):
            engine.add_adapter("it", folder)


def test_what_its_method_writes_as_lora_runs_beside(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora, want = adapted(base, tmp_path / "lora", peft.LoraConfig(r=4, target_modules=PROJECTIONS))
    folder = shutil.copytree(lora, tmp_path / "other")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "STRANGE"}))
    asked = []

    def as_lora(source: Path, out: Path) -> None:
        asked.append(source)
        assert not any(out.iterdir())
        shutil.copytree(lora, out, dirs_exist_ok=True)

    known = catalog.methods()
    strange = replace(known["lora"], name="strange", words=("as_lora",))
    monkeypatch.setattr(catalog, "methods", lambda: {**known, "strange": strange})
    monkeypatch.setattr(catalog, "module", lambda name: SimpleNamespace(as_lora=as_lora) if name == "strange" else None)
    for runner in ("auto", "torch"):
        opened = open_model(folder, runner=runner, cache_dtype="fp32", dtype="float32")
        assert opened.adapter >= 0 and opened.note == ""
        np.testing.assert_allclose(answer(opened), want, rtol=0, atol=1e-3 * np.abs(want).max())
    with Engine(base) as engine:
        engine.add_adapter("it", folder)
        engine.generate([text(5)], Sampling(max_tokens=3), adapter="it")
    assert asked == [folder] * 3


def test_what_neither_merges_nor_is_lora_runs_as_peft_does(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.ia3 import IA3Model

    def refuses(*_: Any, **__: Any) -> nn.Module:
        raise NotImplementedError("this kind cannot be merged")

    folder, want = adapted(base, tmp_path / "adapter", MERGED["IA3"])
    monkeypatch.setattr(IA3Model, "merge_and_unload", refuses)
    opened = open_model(folder, cache_dtype="fp32", dtype="float32")
    assert opened.runner.facts.backend == "torch" and opened.note.endswith("the torch runner runs it as peft does")
    np.testing.assert_allclose(answer(opened), want, rtol=0, atol=1e-4 * np.abs(want).max())
    with pytest.raises(UsageError, match="native runner cannot run the adapter"):
        open_model(folder, runner="native")


def test_what_changes_the_prompt_is_refused(base: Path, tmp_path: Path) -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    folder, _ = adapted(base, tmp_path / "adapter", config)
    with pytest.raises(UsageError, match="virtual tokens"):
        open_model(folder)
