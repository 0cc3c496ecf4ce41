from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from shoestring.core import catalog
from shoestring.core.errors import UsageError
from shoestring.lab import tiny
from shoestring.models.packed import ROOM
from shoestring.models.seal import seal

FORMATS = ("int4", "int8")


def packed(name: str, folder: Path, model: Any = None, **options: Any) -> Any:
    (model or tiny.model()).save_pretrained(folder)
    config = catalog.load(name)(**options)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32).eval()


@contextmanager
def forgotten(name: str) -> Iterator[None]:
    """transformers as it is where nobody imported the room."""
    kind = f"shoestring_{name}"
    known = AUTO_QUANTIZATION_CONFIG_MAPPING.pop(kind)
    try:
        yield
    finally:
        AUTO_QUANTIZATION_CONFIG_MAPPING[kind] = known


@pytest.mark.parametrize("name", [*FORMATS, "lut_gemm"])
def test_without_options_a_config_is_what_the_command_line_takes(name: str) -> None:
    module = catalog.module(name)
    config = catalog.contract("quantizers").config
    assert config(module, {}).to_dict() == config(module, dict(module.settings()[0])).to_dict()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"group_size": 48}, "group_size 48 is not possible. Use one of 32, 64, 128"),
        ({"group_size": 0}, "group_size 0"),
        ({"group_size": -64}, "group_size -64"),
        ({"group_size": "64"}, "group_size '64'"),
        ({"group_size": None}, "group_size None"),
        ({"embeddings": 3}, "embeddings 3 is not possible. Use 8, 4, or None"),
        ({"embeddings": "8"}, "embeddings '8'"),
        ({"bitz": 4, "zoo": 1}, "no option bitz, zoo"),
    ],
)
def test_values_that_are_not_possible(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        catalog.load(name)(**options)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("embeddings", [8, 4])
def test_a_reader_that_does_not_know_the_format_gets_no_model(
    name: str, group: int, embeddings: int, tmp_path: Path
) -> None:
    """Not even from a folder that `save_pretrained` alone wrote, without the seal."""
    model = packed(name, tmp_path / "float", group_size=group, embeddings=embeddings)
    model.save_pretrained(tmp_path / "packed")
    with forgotten(name), pytest.raises(Exception, match=r"(?s)size|shape|mismatch"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(tiny.logits(again), tiny.logits(model))


@pytest.mark.parametrize("name", FORMATS)
def test_a_sealed_folder_says_the_remedy(name: str, tmp_path: Path) -> None:
    packed(name, tmp_path / "float").save_pretrained(tmp_path / "packed")
    seal(tmp_path / "packed", ROOM)
    with forgotten(name), pytest.raises(Exception, match="import-shoestring.methods.quantizers"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_another_type_for_activations_leaves_the_format_alone(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    made = tiny.model()
    made.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e8  # its scale is beyond float16
    model = packed(name, tmp_path / "float", made)
    before = {key: value.clone() for key, value in model.state_dict().items() if not value.is_floating_point()}
    scales = {k: v.clone() for k, v in model.named_buffers() if k.endswith("scales")}
    model.to(dtype).to(torch.float32)
    after = dict(model.named_buffers())
    assert scales and all(after[k].dtype == torch.bfloat16 and torch.equal(after[k], v) for k, v in scales.items())
    assert before and all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.weight is table.weight and torch.equal(head.scales, table.scales)


@pytest.mark.parametrize("name", FORMATS)
def test_activations_have_the_type_that_was_asked_for(name: str, tmp_path: Path) -> None:
    model = packed(name, tmp_path / "float").to(torch.bfloat16)
    with torch.no_grad():
        assert model(tiny.batch()).logits.dtype == torch.bfloat16
        assert model.get_input_embeddings()(tiny.batch()).dtype == torch.bfloat16
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("name", FORMATS)
def test_embeddings_that_are_scaled_stay_scaled(name: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "gemma3_text", vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, sliding_window=32,
    )  # fmt: skip
    torch.manual_seed(0)
    original = AutoModelForCausalLM.from_config(config).float().eval()
    model = packed(name, tmp_path / "float", original, group_size=32)
    ids = tiny.batch()
    rows, expected = model.get_input_embeddings()(ids), original.get_input_embeddings()(ids)
    assert (rows - expected).norm() / expected.norm() < 0.02, "the table's rows come out scaled"
    with torch.no_grad():
        got, reference = model(ids).logits, original(ids).logits
    limit = 0.3 if name == "int4" else 0.03
    assert (got - reference).norm() / reference.norm() < limit
    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, got)
        plain = model.dequantize()(ids).logits
    assert (plain - got).norm() / got.norm() < 0.05


def test_fewer_bits_and_larger_groups_are_further_off(tmp_path: Path) -> None:
    reference = tiny.logits(tiny.model())
    error = {}
    for name, group in (("int8", 32), ("int4", 32), ("int4", 128)):
        got = tiny.logits(packed(name, tmp_path / f"{name}{group}", group_size=group))
        error[name, group] = ((got - reference).norm() / reference.norm()).item()
    assert error["int8", 32] < error["int4", 32] < error["int4", 128]
