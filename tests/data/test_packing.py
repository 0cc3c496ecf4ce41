"""Packing loses nothing, crosses no border, and gives a model the logits it gives each row alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoestring.core.errors import UsageError
from shoestring.data import Collator, check_packing
from shoestring.data.packing import pack_rows

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rows_of(sizes):
    return [{"input_ids": [n] * size, "labels": [n] * size} for n, size in enumerate(sizes)]


@settings(deadline=None)
@given(st.lists(st.integers(1, 20), max_size=60))
def test_packing_keeps_every_row_whole(sizes):
    packed = pack_rows(rows_of(sizes), 20)
    seen = []
    for row in packed:
        assert len(row["input_ids"]) == len(row["labels"]) == len(row["position_ids"]) <= 20
        starts = [index for index, position in enumerate(row["position_ids"]) if position == 0]
        for start, end in zip(starts, [*starts[1:], len(row["input_ids"])]):
            (number,) = set(row["input_ids"][start:end])
            seen.append((number, end - start))
            assert row["labels"][start:end] == [-100] + [number] * (end - start - 1)
            assert row["position_ids"][start:end] == list(range(end - start))
    assert sorted(seen) == list(enumerate(sizes))
    half_full = [row for row in packed if len(row["input_ids"]) <= 10]
    assert len(half_full) <= 1


def tiny(kind, attention="sdpa"):
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SIZES, intermediate_size=48, bos_token_id=1, eos_token_id=2)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_batch_gives_the_logits_of_the_rows_alone(attention):
    model = tiny("llama", attention)
    check_packing(model)
    rows = [{"input_ids": list(range(n, n + size)), "labels": [1] * size} for n, size in ((3, 5), (20, 4), (40, 7))]
    batch = Collator(0, multiple_of=4)(pack_rows(rows, 9))
    assert "attention_mask" not in batch and batch["input_ids"].shape == (2, 12)
    with torch.no_grad():
        packed = model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits
        for row in rows:
            alone = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
            (where,) = [
                (line, start)
                for line in range(2)
                for start in range(12)
                if batch["input_ids"][line, start : start + len(alone)].tolist() == row["input_ids"]
            ]
            torch.testing.assert_close(packed[where[0], where[1] : where[1] + len(alone)], alone, rtol=1e-4, atol=1e-4)


def test_model_that_mixes_rows_is_refused():
    for kind in ("mamba", "bloom"):
        with pytest.raises(UsageError, match="does not keep packed rows apart.*Train without packing"):
            check_packing(tiny(kind, "eager"))


def test_collator_pads_on_the_right():
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    batch = Collator(pad_id=9)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert all(value.dtype == torch.int64 for value in batch.values())
    assert Collator(9, multiple_of=8)(rows)["input_ids"].shape == (2, 8)
