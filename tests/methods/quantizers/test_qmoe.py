from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, OlmoeConfig, OlmoeForCausalLM

from shoestring import models
from shoestring.core import catalog
from shoestring.core.errors import UsageError
from shoestring.core.ledger import Ledger
from shoestring.core.shape import Shape, Weight
from shoestring.core.step import Step, Work
from shoestring.kernels.formats import dictionary, parse
from shoestring.lab import tiny
from shoestring.methods.quantizers import _gptq
from shoestring.methods.quantizers._shared import packed_modules
from shoestring.models import streamed

QMOE = catalog.module("qmoe")


def ternary(rows: int, cols: int, zeros: float, seed: int = 0) -> torch.Tensor:
    draw = torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed))
    return torch.where(draw < zeros, 0, torch.where(draw < (1 + zeros) / 2, 1, 2)).to(torch.uint8)


def sides(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    return -torch.linspace(0.01, 2, rows).bfloat16().float(), torch.linspace(3, 0.02, rows).bfloat16().float()


def rows_of(count: int = 12, length: int = 16, seed: int = 0) -> list[dict[str, Any]]:
    draw = torch.randint(3, tiny.VOCAB, (count, length), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": ids} for ids in draw.tolist()]


def compress(
    folder: Path, model: Any = None, rows: list[dict[str, Any]] | None = None, work: Work | None = None, **options: Any
) -> tuple[Any, Path, dict[str, Any]]:
    """The float model saved, streamed into a folder and loaded from there; the folder, and the facts."""
    (model or QMOE.base()).save_pretrained(folder / "float")
    (folder / "packed").mkdir()
    given = rows_of() if rows is None else rows
    facts = QMOE.stream(
        folder / "float", folder / "packed", QMOE.QMoEConfig(**options), given, work or Work(Ledger(), folder)
    )
    return AutoModelForCausalLM.from_pretrained(folder / "packed").eval(), folder / "packed", facts


# ---------------------------------------------------------------- the code


def test_the_dictionary_is_made_of_three_numbers() -> None:
    pairs, lengths = dictionary.table()
    assert (len(pairs), dictionary.LONGEST) == (65_536, 14) and lengths.min() == 1 and lengths.max() == 14
    digest = hashlib.sha256(pairs.tobytes() + lengths.tobytes()).hexdigest()
    assert digest == "496c57c1a957a923ffeabbfb7a765088ea0b0acf29234f556d7c01aed8085fc2"


def test_every_beginning_of_a_word_is_a_word() -> None:
    pairs, lengths = dictionary.table()
    words = {tuple(row[:n].tolist()) for row, n in zip(pairs, lengths)}
    assert len(words) == 65_536 and {(pair,) for pair in range(9)} <= words
    assert all(len(word) == 1 or word[:-1] in words for word in words)


def test_words_are_the_most_probable_sequences() -> None:
    pairs, lengths = (torch.from_numpy(array).long() for array in dictionary.table())
    other = ((pairs % 3 != 0).long() + (pairs // 3 != 0).long()).sum(1)
    chance = other * torch.tensor(0.0575).double().log() + (2 * lengths - other) * torch.tensor(0.885).double().log()
    assert (chance.diff() <= 1e-9).all()
    # Whatever extends a word and is none itself is no more probable than the last word.
    assert (dictionary._children()[:-1] == -1).any() and chance[-1] == chance.min()
    longer = chance + 2 * torch.tensor(0.885).double().log()
    ends = torch.from_numpy(dictionary._children()[:-1][:, 0] == -1) & (lengths < 14)
    assert (longer[ends] <= chance[-1] + 1e-9).all()


@pytest.mark.parametrize("cols", [1, 2, 7, 28, 29, 64, 333])
@pytest.mark.parametrize("zeros", [0.0, 0.3, 0.885, 1.0])
def test_the_code_loses_nothing(cols: int, zeros: float) -> None:
    symbols, (low, high) = ternary(11, cols, zeros), sides(11)
    packed = dictionary.encode(symbols, low, high)
    found = dictionary.decode(packed, cols)
    assert all(map(torch.equal, found, (symbols, low, high)))
    weight = parse(f"dictionary/{len(packed)}").unpack({"weight": packed}, cols)
    assert torch.equal(weight, dictionary.values(symbols, low, high))


@pytest.mark.parametrize(("zeros", "bits"), [(0.5, 2.95), (0.7, 1.72), (0.8, 1.14), (0.885, 0.758), (0.95, 0.62)])
def test_bytes_are_as_the_formula_says(zeros: float, bits: float) -> None:
    rows, cols = 256, 3072
    packed = dictionary.encode(ternary(rows, cols, zeros), *sides(rows))
    words = len(dictionary.split(packed, cols).words)
    assert len(packed) == 2 * words + 8 * rows + 4
    assert 8 * len(packed) / (rows * cols) == pytest.approx(bits, rel=0.02)
    if zeros == 0.885:
        assert 8 * len(packed) / (rows * cols) < 0.8


def test_the_price_is_that_of_885_zeros_in_a_thousand() -> None:
    experts, rows, cols = 4, 96, 1000
    blobs = [dictionary.encode(ternary(rows, cols, 0.885, seed), *sides(rows)) for seed in range(experts)]
    weight = Weight("model.layers.0.mlp.experts.gate_up_proj", "expert", (experts, rows, cols), 0, 0)
    down = Weight("model.layers.0.mlp.experts.down_proj", "expert", (experts, cols, rows // 2), 0, 0)
    priced, _ = QMOE.price(Shape((weight, down), 1, cols, 1, 1, 1, 1), {}).shape.weights
    assert priced.stored == pytest.approx(sum(map(len, blobs)) + 8 * (experts + 1), rel=0.01)


def test_what_is_no_such_matrix_is_refused() -> None:
    packed = dictionary.encode(ternary(5, 21, 0.8), *sides(5))
    for wrong in (packed[:-1], packed[:-2], packed[:3], torch.cat((packed, packed[:2])), packed[4:]):
        with pytest.raises(UsageError, match="no ternary matrix"):
            dictionary.decode(wrong, 21)
    for cols in (20, 23, 40):
        with pytest.raises(UsageError, match="no ternary matrix"):
            dictionary.decode(packed, cols)
    nan = packed.clone()
    nan[24:26] = torch.tensor([0xC0, 0x7F], dtype=torch.uint8)  # the first row's smallest value
    with pytest.raises(UsageError, match="not numbers with zero between"):
        dictionary.decode(nan, 21)


# ---------------------------------------------------------------- rounding


def test_a_row_without_one_sign_maps_its_zeros_to_zero() -> None:
    weight = torch.tensor([[0.0, 1.0, 3.0, 0.4], [0.0, -2.0, -0.1, 0.0], [0.0, 0.0, 0.0, 0.0]])
    low, high = dictionary.ends(weight)
    assert low.tolist() == [0, -2, -1] and high.tolist() == [3, 0, 1]
    symbols = dictionary.to_symbols(weight, low, high)
    assert symbols.tolist() == [[0, 0, 2, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert dictionary.values(symbols, low, high)[:2].tolist() == [[0, 0, 3, 0], [0, -2, 0, 0]]


def inputs(tokens: int, cols: int, seed: int) -> torch.Tensor:
    """Correlated: most of them lies in a few directions."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(cols // 4, cols, generator=torch.Generator().manual_seed(99))
    return torch.randn(tokens, cols // 4, generator=draw) @ mix + 0.3 * torch.randn(tokens, cols, generator=draw)


def test_gptq_beats_rounding_on_inputs_it_has_not_seen() -> None:
    weight = torch.randn(3, 24, 160, generator=torch.Generator().manual_seed(0))
    seen = torch.stack([inputs(600, 160, seed) for seed in (1, 2, 3)])
    new = torch.stack([inputs(300, 160, seed) for seed in (4, 5, 6)])

    def error(hessian: torch.Tensor) -> torch.Tensor:
        rounded = dictionary.values(*_gptq.gptq(weight, hessian))
        return ((rounded - weight) @ new.mT).square().mean((1, 2))

    nearest = error(torch.eye(160).expand(3, -1, -1))
    assert (error(seen.mT @ seen) < 0.6 * nearest).all()


def test_no_calibration_is_rounding_to_the_nearest() -> None:
    weight = torch.randn(2, 7, 150)
    symbols, low, high = _gptq.gptq(weight, torch.eye(150).expand(2, -1, -1))
    assert torch.equal(symbols, dictionary.to_symbols(weight, low, high))


@pytest.mark.parametrize("bad", ["negative", "nan", "zero"])
def test_a_singular_hessian_leaves_its_neighbours_alone(bad: str) -> None:
    weight = torch.randn(3, 6, 40)
    hessian = torch.stack([inputs(80, 40, seed).T @ inputs(80, 40, seed) for seed in range(3)])
    alone, _, _ = _gptq.gptq(weight[::2], hessian[::2])
    hessian[1] = {"negative": -torch.eye(40) * 1e3, "nan": torch.full((40, 40), torch.nan), "zero": hessian[1] * 0}[bad]
    symbols, low, high = _gptq.gptq(weight, hessian)
    assert torch.equal(symbols[::2], alone)
    assert torch.equal(symbols[1], dictionary.to_symbols(weight[1], low[1], high[1]))


# ---------------------------------------------------------------- compressing


def test_what_is_stored_is_what_was_rounded(tmp_path: Path) -> None:
    model, folder, facts = compress(tmp_path, rounding="nearest")
    original = dict(QMOE.base().named_parameters())
    bits = weights = 0
    for name, packed in packed_modules(model):
        weight = original[f"{name}_proj"].detach()
        low, high = dictionary.ends(weight)
        plain = dictionary.values(dictionary.to_symbols(weight, low, high), low, high)
        assert torch.equal(packed.unpacked().view(weight.shape), plain)
        assert len(packed.starts) == 5 and packed.starts[-1] == packed.weight.numel()
        bits, weights = bits + 8 * (packed.weight.numel() + 8 * len(packed.starts)), weights + weight.numel()
    assert facts["expert_bits"] == bits / weights
    kept = {n: p for n, p in original.items() if "experts" not in n}
    assert all(torch.equal(model.get_parameter(name), p) for name, p in kept.items())
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["rounding"] == "nearest"


def test_only_experts_that_got_tokens_run(tmp_path: Path) -> None:
    model, _, _ = compress(tmp_path)
    experts = model.model.layers[0].mlp.experts
    ran: list[int] = []
    for product in (experts.gate_up, experts.down):
        product.register_forward_pre_hook(lambda _, args: ran.append(args[1]))
    routes, weights = torch.tensor([[2, 0], [2, 0], [0, 2]]), torch.full((3, 2), 0.5)
    x = torch.randn(3, 64)
    got = experts(x, routes, weights)
    assert sorted(ran) == [0, 0, 2, 2]
    plain = model.dequantize().model.layers[0].mlp.experts
    torch.testing.assert_close(got, plain(x, routes, weights), atol=1e-5, rtol=1e-4)


def test_calibration_reads_its_samples_and_nothing_else(tmp_path: Path) -> None:
    def made(name: str, rows: list[dict[str, Any]], **given: Any) -> bytes:
        (tmp_path / name).mkdir()
        _, folder, _ = compress(tmp_path / name, rows=rows, samples=6, work=Work(Ledger(), tmp_path, **given))
        return (folder / "model.safetensors").read_bytes()

    first, other = rows_of(6), rows_of(6, seed=5)
    plain = made("plain", first)
    assert made("beyond", first + other) == plain
    assert made("valid", first, train=object(), valid=other) == plain
    assert made("other", other) != plain


def test_special_tokens_are_not_calibrated_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    whole = _gptq.gptq

    def count(inputs: list[torch.Tensor], *_: Any) -> torch.Tensor:
        seen.append(sum(map(len, inputs)))
        return torch.eye(_[0]).expand(len(inputs), -1, -1)

    monkeypatch.setattr(QMOE, "_hessians", count)
    monkeypatch.setattr(QMOE, "gptq", whole)
    monkeypatch.setattr(QMOE, "load_tokenizer", lambda *_: type("T", (), {"all_special_ids": [5]})())
    rows = [{"input_ids": [5, 5, 7, 8, 9, 5, 11, 12]}] * 2
    compress(tmp_path, rows=rows)
    # Two experts a token; of a group of four no one takes more than its share here.
    assert seen == [2 * 10] * 4


def test_a_hot_expert_takes_at_most_four_times_its_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[list[int]] = []
    monkeypatch.setattr(
        QMOE,
        "_hessians",
        lambda inputs, cols, _: sizes.append([len(x) for x in inputs]) or torch.eye(cols).expand(len(inputs), -1, -1),
    )
    model = QMOE.base(num_local_experts=12, num_experts_per_tok=1)
    model.model.layers[0].mlp.gate.weight.data[1:] = 0
    model.model.layers[0].mlp.gate.weight.data[0] = 0
    rows = rows_of(30, 16)
    compress(tmp_path, model, rows=rows)
    # All scores are equal, so one expert gets every token.
    assert sorted(sizes[0])[-1] == 4 * 30 * 16 // 12 and sum(sizes[0]) == sorted(sizes[0])[-1]


def test_one_block_stands_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a checkpoint in many files."""
    model = QMOE.base(num_hidden_layers=5)
    model.save_pretrained(tmp_path / "float", max_shard_size="30KB")
    assert len(list((tmp_path / "float").glob("*.safetensors"))) > streamed.SHARDS
    (tmp_path / "packed").mkdir()
    most: list[int] = []
    plain = streamed.Streamed.load

    def load(self: Any, *parts: str) -> None:
        plain(self, *parts)
        most.append(sum(not p.is_meta for n, p in self.model.named_parameters() if n.endswith("gate_up_proj")))
        assert len(self._open) <= streamed.SHARDS

    monkeypatch.setattr(streamed.Streamed, "load", load)
    QMOE.stream(tmp_path / "float", tmp_path / "packed", QMOE.example(), rows_of(), Work(Ledger(), tmp_path))
    assert most == [1] * 5
    whole, _, _ = compress(tmp_path / "whole", QMOE.base(num_hidden_layers=5))
    sharded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(tiny.logits(sharded), tiny.logits(whole))


def test_adapters_find_their_way_in_a_packed_mixture(tmp_path: Path) -> None:
    model, folder, _ = compress(tmp_path)
    anatomy = models.inspect(model)
    assert [block.projections["expert"] for block in anatomy.blocks] == [
        f"model.layers.{index}.mlp.experts" for index in range(2)
    ]
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"]))
    ids = tiny.batch()
    wrapped(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in wrapped.parameters() if p.requires_grad)
    assert models.shape_of(folder).parameters == models.shape_of(QMOE.base()).parameters


def test_later_blocks_see_what_the_compressed_ones_give(tmp_path: Path) -> None:
    """The second block is calibrated on the first one's compressed output, so what the first one lost matters."""
    plain, _, _ = compress(tmp_path / "all")
    part, _, _ = compress(tmp_path / "part", modules_to_not_convert=["layers.0"])
    second = "model.layers.1.mlp.experts.gate_up"
    assert not torch.equal(plain.get_submodule(second).unpacked(), part.get_submodule(second).unpacked())


def test_another_family_of_mixtures(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=tiny.VOCAB, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, num_experts=6, num_experts_per_tok=2, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    plain = OlmoeForCausalLM(config).eval()
    model, _, _ = compress(tmp_path, plain)
    assert len(list(packed_modules(model))) == 4
    error = (tiny.logits(model) - tiny.logits(plain)).norm() / tiny.logits(plain).norm()
    assert 0 < error < 0.3


def test_a_dense_model_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="LlamaForCausalLM has no experts.*dense"):
        compress(tmp_path, tiny.model())
    with pytest.raises(UsageError, match="A llama model has no experts"):
        QMOE.price(models.shape_of(tiny.model()), {})


def test_loading_a_float_model_says_how_to_compress_it(tmp_path: Path) -> None:
    QMOE.base().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="shoestring compress MODEL --method qmoe --data"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=QMOE.example())


def test_without_data_it_says_so(tmp_path: Path) -> None:
    QMOE.base().save_pretrained(tmp_path / "float")
    with pytest.raises(UsageError, match="--data"):
        catalog.contract("quantizers").apply(
            QMOE, Step("compress", "qmoe"), tmp_path / "float", tmp_path / "out", Work(Ledger(), tmp_path)
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [{"samples": 0}, {"samples": 1.5}, {"rounding": "up"}])
def test_values_that_are_not_possible(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=str(next(iter(options.values())))):
        QMOE.QMoEConfig(**options)


@pytest.mark.real
def test_nine_in_ten_weights_of_a_trained_model_become_zero() -> None:
    stored = models.load(dtype="bfloat16").model
    shares = []
    for block in models.inspect(stored).blocks[::6]:
        for role in ("gate", "up", "down"):
            weight = stored.get_submodule(block.projections[role]).weight.float()
            shares.append((dictionary.to_symbols(weight, *dictionary.ends(weight)) == 0).float().mean().item())
    assert 0.88 < sum(shares) / len(shares) < 0.91 and min(shares) > 0.86 and max(shares) < 0.95
