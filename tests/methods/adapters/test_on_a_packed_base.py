from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from shoestring.core import catalog
from shoestring.lab import tiny
from shoestring.methods.quantizers import _shared


@pytest.mark.parametrize("name", ["int4", "int8"])
def test_lora_learns_on_frozen_integers(name: str, tmp_path: Path) -> None:
    tiny.model().save_pretrained(tmp_path / "float")
    config = catalog.load(name)(group_size=32)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    adapted = [n for n, m in model.named_modules() if isinstance(getattr(m, "base_layer", None), _shared.PackedLinear)]
    assert len(adapted) == 14, "every linear layer of both blocks"
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in n for n in trained)
    frozen = {n: v.clone() for n, v in model.state_dict().items() if n not in trained}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    model.train()
    for _ in range(25):
        loss = model(**tiny.inputs(model)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses
    after = model.state_dict()
    assert all(torch.equal(after[n], v) for n, v in frozen.items()), "the base moved"
    model.eval().save_pretrained(tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    assert torch.equal(tiny.logits(PeftModel.from_pretrained(again, tmp_path / "adapter").eval()), tiny.logits(model))
