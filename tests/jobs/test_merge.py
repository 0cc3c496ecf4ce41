import json

import pytest
import torch
from job_cases import word_tokenizer
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from shoestring.core.errors import UsageError
from shoestring.jobs.merge import merge
from shoestring.lab import tiny
from shoestring.models import save

torch.set_num_threads(1)


def adapter(tmp_path, dtype=torch.float32, tied=False, config=None, **lora):
    """A base folder, an adapter folder whose every weight is random, and the logits of both together."""
    save(tiny.model(dtype=dtype, tie_word_embeddings=tied), word_tokenizer(), tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    model = get_peft_model(
        base, config or LoraConfig(**{"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **lora})
    )
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    model.eval().save_pretrained(tmp_path / "adapter")
    return tiny.logits(model)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "lora",
    [{}, {"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}, {"target_modules": ["embed_tokens"]}],
)
def test_the_merged_folder_answers_as_base_with_adapter(tmp_path, tied, lora):
    expected = adapter(tmp_path, tied=tied, **lora)
    found = merge(tmp_path / "adapter", tmp_path / "out")
    assert found["difference"] < 1e-5 and found["dtype"] == "float32"
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(tiny.logits(merged), expected, atol=1e-4)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert not torch.allclose(tiny.logits(base), expected, atol=1e-2)
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_the_type_of_the_base_is_kept_or_chosen(tmp_path):
    adapter(tmp_path, dtype=torch.bfloat16)
    assert merge(tmp_path / "adapter", tmp_path / "out")["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert merge(tmp_path / "adapter", tmp_path / "out2", dtype="float16")["dtype"] == "float16"


def test_a_packed_base_is_refused_with_the_remedy(tmp_path):
    adapter(tmp_path)
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": "some"}}))
    with pytest.raises(UsageError, match="packed integers.*--base"):
        merge(tmp_path / "adapter", tmp_path / "out")


def test_what_cannot_be_merged_is_refused(tmp_path):
    adapter(tmp_path, config=PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(UsageError, match="PROMPT_TUNING adapter cannot be merged"):
        merge(tmp_path / "adapter", tmp_path / "out")
    with pytest.raises(UsageError, match="is not an adapter"):
        merge(tmp_path / "base", tmp_path / "out")
    with pytest.raises(UsageError, match="not empty"):
        merge(tmp_path / "adapter", tmp_path / "base")
    assert not (tmp_path / "out").exists()


def test_a_file_that_writes_over_the_base_is_refused(tmp_path):
    adapter(tmp_path)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    name = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
    save_file({**load_file(file), name: torch.zeros(64, 64)}, file)
    with pytest.raises(UsageError, match=r"holds .*q_proj\.base_layer\.weight"):
        merge(tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
