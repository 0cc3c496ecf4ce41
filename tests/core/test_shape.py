from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import GPT2Config, LlamaConfig, MambaConfig, MptConfig, PretrainedConfig

from shoestring.core.shape import PROJECTIONS, ROLES, Shape, Weight, context_of


def weight(name: str, role: str, *dims: int, bytes: int = 2, **more: object) -> Weight:
    count = 1
    for d in dims:
        count *= d
    return Weight(name, role, dims, count * bytes, count * bytes, **more)  # type: ignore[arg-type]


SHAPE = Shape(
    (
        weight("table", "embed", 100, 8),
        weight("q", "q", 8, 8),
        weight("norm", "norm", 8),
        weight("bias", "bias", 8),
        weight("head", "head", 100, 8, tied="table"),
    ),
    layers=3, hidden=8, heads=4, kv_heads=2, head_dim=2, vocab=100, other_files=1000,
)  # fmt: skip


def test_tied_weights_count_once() -> None:
    assert SHAPE.parameters == 800 + 64 + 8 + 8
    assert SHAPE.storage == 2 * SHAPE.parameters + 1000
    assert SHAPE.resident == 2 * SHAPE.parameters


def test_flops_count_what_is_multiplied() -> None:
    # The tied head multiplies; the table, the norm and the bias do not.
    assert SHAPE.flops_per_token() == 2 * (64 + 800)
    assert SHAPE.flops_per_token(10) - SHAPE.flops_per_token() == 4 * 3 * 10 * 4 * 2


def test_a_mixture_counts_the_experts_at_work() -> None:
    expert = weight("e", "expert", 16, 8, 8, used=0.25)
    more = replace(SHAPE, weights=(*SHAPE.weights, expert))
    assert more.flops_per_token() - SHAPE.flops_per_token() == 2 * 1024 / 4
    assert more.storage - SHAPE.storage == 2048


def test_key_value_cache() -> None:
    assert SHAPE.kv_bytes(10) == 2 * 3 * 2 * 2 * 10 * 2
    assert SHAPE.kv_bytes(10, bytes_per_value=4) == 2 * SHAPE.kv_bytes(10)


def test_change_makes_another_shape() -> None:
    halved = SHAPE.change(lambda w: replace(w, stored=w.stored // 2))
    assert halved.storage == (SHAPE.storage - 1000) / 2 + 1000 and SHAPE.storage == 2 * 880 + 1000
    assert halved.resident == SHAPE.resident


def test_roles() -> None:
    assert [w.name for w in SHAPE.of("embed", "head")] == ["table", "head"]
    assert set(ROLES) > PROJECTIONS


def test_layers_without_keys_remember_and_compute_half() -> None:
    plain = Shape((), layers=6, hidden=64, heads=4, kv_heads=2, head_dim=16, vocab=64)
    shared = replace(plain, keyless=2)
    assert (plain.kv_bytes(10), shared.kv_bytes(10)) == (2 * 6 * 2 * 16 * 10 * 2, (12 - 2) * 2 * 16 * 10 * 2)
    assert plain.flops_per_token(100) - shared.flops_per_token(100) == 2 * 2 * 100 * 4 * 16


@pytest.mark.parametrize(("config", "context"), [
    (GPT2Config(n_positions=48), 48), (LlamaConfig(max_position_embeddings=64), 64), (MptConfig(max_seq_len=96), 96),
    (MambaConfig(), 0),
])  # fmt: skip
def test_how_many_tokens_a_model_sees_at_once(config: PretrainedConfig, context: int) -> None:
    assert context_of(config) == context
