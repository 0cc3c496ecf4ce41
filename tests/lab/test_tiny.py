from __future__ import annotations

import pytest
import torch

from shoestring.lab import tiny


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_same_every_time(family: str) -> None:
    torch.manual_seed(7)
    one = tiny.model(family)
    torch.manual_seed(8)
    two, other = tiny.model(family), tiny.model(family, seed=1)
    assert torch.equal(tiny.logits(one), tiny.logits(two))
    assert not torch.equal(tiny.logits(one), tiny.logits(other))
    assert not one.training and tiny.logits(one).shape[-1] == tiny.VOCAB


def test_building_one_leaves_the_callers_random_numbers_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    tiny.model()
    assert torch.equal(torch.rand(4), expected)


def test_changes_and_types_are_taken() -> None:
    made = tiny.model(num_hidden_layers=1, dtype=torch.bfloat16)
    assert made.config.num_hidden_layers == 1 and {p.dtype for p in made.parameters()} == {torch.bfloat16}


def test_a_batch_has_no_special_tokens() -> None:
    ids = tiny.batch(3, 50)
    assert ids.shape == (3, 50) and ids.min() == 3 and ids.max() < tiny.VOCAB
