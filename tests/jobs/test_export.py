import pytest
import torch
from job_cases import word_tokenizer
from transformers import AutoModelForCausalLM

from shoestring.core import catalog
from shoestring.core.errors import UsageError
from shoestring.jobs.export import export
from shoestring.lab import tiny
from shoestring.models import save
from shoestring.planner.plan import by_verb

torch.set_num_threads(1)


@pytest.mark.parametrize("tied", [False, True])
def test_packed_weights_become_plain_ones(tmp_path, tied):
    save(tiny.model(tie_word_embeddings=tied), word_tokenizer(), tmp_path / "float")
    name = next(m.name for m in by_verb("compress") if m.default)
    config = catalog.module(name).example()
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    save(packed, word_tokenizer(), tmp_path / "packed")
    export(tmp_path / "packed", tmp_path / "plain", dtype="float32")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert getattr(plain.config, "quantization_config", None) is None
    assert type(plain.model.layers[0].mlp.down_proj) is torch.nn.Linear
    # The packed product rounds activations to 8 bits, the plain one does not.
    difference = (tiny.logits(plain) - tiny.logits(packed)).abs().max() / tiny.logits(packed).abs().max()
    assert difference < 0.05
    assert (tmp_path / "plain" / "tokenizer.json").exists()


def test_the_type_of_plain_weights(tmp_path):
    save(tiny.model(), word_tokenizer(), tmp_path / "float")
    export(tmp_path / "float", tmp_path / "plain")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "plain").dtype == torch.bfloat16


def test_refusals(tmp_path):
    save(tiny.model(), word_tokenizer(), tmp_path / "float")
    with pytest.raises(UsageError, match="unknown format onnx"):
        export(tmp_path / "float", tmp_path / "out", format="onnx")
    with pytest.raises(UsageError, match="not empty"):
        export(tmp_path / "float", tmp_path / "float")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match="Merge it"):
        export(tmp_path / "adapter", tmp_path / "out")
