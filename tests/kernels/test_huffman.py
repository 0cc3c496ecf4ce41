"""Huffman codes of exponents: the published arrays, read by an independent decoder, every chunk alone."""

from __future__ import annotations

import struct
from dataclasses import replace

import numpy as np
import pytest
import torch

from shoestring.core.errors import UsageError
from shoestring.kernels import formats, huffman, ops

RANDOM = np.random.default_rng(0)


def bfloat16(values: np.ndarray) -> np.ndarray:
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def matrices() -> dict[str, np.ndarray]:
    normal = bfloat16(0.02 * RANDOM.standard_normal((300, 257)))
    any_exponent = (RANDOM.integers(0, 240, 9000) << 7 | RANDOM.integers(0, 128, 9000)).astype(np.uint16)
    signs = (RANDOM.integers(0, 2, 9000) << 15).astype(np.uint16)
    return {
        "trained": normal,
        "one number": normal[:1, :1],
        "one exponent": np.full((40, 70), 0xBF80, np.uint16),
        "zeros": np.zeros((7, 9), np.uint16),
        "minus zeros and subnormals": np.array([[0x8000, 1, 0x807F, 0, 0x0080]], np.uint16).repeat(50, 0),
        "every exponent": any_exponent | signs,
        "long words": (np.minimum(RANDOM.geometric(0.5, 300_000), 100) << 7).astype(np.uint16),
        "none": np.zeros((0, 5), np.uint16),
    }


def slow_chunk(unit: huffman.Unit, chunk: int) -> list[int]:
    """The exponents whose words begin in a chunk, bit by bit, from nothing but the arrays."""
    text = "".join(f"{byte:08b}" for byte in unit.encoded_exponent[8 * chunk : 8 * chunk + 16])
    all_gaps = "".join(f"{byte:08b}" for byte in unit.gaps)
    at, found = int(all_gaps[5 * chunk : 5 * chunk + 5], 2), []
    end = min(64, 8 * len(unit.encoded_exponent) - 64 * chunk)
    while at < end:
        table, byte = 0, at
        while True:
            entry = int(unit.luts[table][int(text[byte : byte + 8].ljust(8, "0"), 2)])
            if entry < 240:
                break
            table, byte = 256 - entry, byte + 8
        found.append(entry)
        at += int(unit.luts[-1][entry])
    return found


@pytest.mark.parametrize("word", matrices())
def test_every_bit_comes_back(word, monkeypatch):
    values = matrices()[word]
    unit = huffman.encode([values])
    assert len(unit.luts) - 1 <= 16 and unit.luts[-1].max() <= 32
    assert np.array_equal(unit.decode(), values.reshape(-1))
    assert np.array_equal(unit.decode(threads=3), values.reshape(-1))
    assert np.array_equal(huffman.decode_plain(unit), values.reshape(-1))
    count = values.size
    for first, part in ((count // 3, count // 2), (count - 1, 1), (0, 0)) if count else ():
        assert np.array_equal(unit.decode(first, part), values.reshape(-1)[first : first + part])
    monkeypatch.setattr(huffman, "_library", lambda: None)
    assert np.array_equal(unit.decode(), values.reshape(-1))


def test_chunks_and_blocks_are_read_alone_by_an_independent_decoder():
    values = matrices()["trained"]
    unit = huffman.encode([values])
    exponents = values.reshape(-1) >> 7 & 255
    chunks = -(-len(unit.encoded_exponent) // 8)
    assert unit.blocks > 4 and len(unit.gaps) == unit.blocks * 512 * 5 // 8
    assert len(unit.output_positions) == unit.blocks + 1 and unit.output_positions[-1] == values.size
    for block in range(unit.blocks):
        at = int(unit.output_positions[block])
        for chunk in range(512 * block, min(512 * (block + 1), chunks)):
            found = slow_chunk(unit, chunk)[: values.size - at]
            assert found == exponents[at : at + len(found)].tolist()
            at += len(found)
        assert at == unit.output_positions[block + 1]


def test_a_unit_of_several_matrices_keeps_their_boundaries():
    parts = [matrices()[word] for word in ("trained", "zeros", "one exponent")]
    unit = huffman.encode(parts)
    assert unit.split_positions.tolist() == [parts[0].size, parts[0].size + parts[1].size]
    for part, found in zip(parts, np.split(unit.decode(), unit.split_positions), strict=True):
        assert np.array_equal(found, part.reshape(-1))


def test_words_are_a_prefix_code_of_32_bits_also_for_steep_counts():
    fibonacci = [1, 1]
    while len(fibonacci) < 60:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    steep = np.zeros(256, np.int64)
    steep[100:160] = fibonacci
    for counts in (steep, np.bincount([7], minlength=256), np.ones(256, np.int64) * (np.arange(256) < 240)):
        lengths, words, luts = huffman.code(counts)
        present = np.flatnonzero(counts)
        assert 1 <= lengths[present].min() and lengths.max() <= 32 and len(luts) - 1 <= 16
        texts = [format(int(words[s]), f"0{lengths[s]}b") for s in (*present, 256)]
        assert not any(a != b and b.startswith(a) for a in texts for b in texts)
        assert sum(2.0 ** -len(text) for text in texts) == 1
        for symbol, text in zip(present, texts, strict=False):
            table, rest = 0, text
            while (entry := int(luts[table][int(rest[:8].ljust(8, "0"), 2)])) >= 240:
                table, rest = 256 - entry, rest[8:]
            assert entry == symbol and luts[-1][entry] == len(text)


def test_length_is_that_of_the_entropy_and_the_side_data():
    values = bfloat16(0.02 * RANDOM.standard_normal((1024, 1024)))
    counts = np.bincount((values >> 7 & 255).reshape(-1), minlength=256)
    share = counts[counts > 0] / values.size
    entropy = -(share * np.log2(share)).sum()
    unit = huffman.encode([values])
    coded = 8 * len(unit.encoded_exponent) / values.size
    assert entropy <= coded < entropy + 0.1
    side = (5 / 64 + 32 / 32768) * coded
    assert abs(8 * huffman.pack(values).nbytes / values.size - (8 + coded + side)) < 0.02


def test_exponents_beyond_the_tables_stay_as_they_are():
    values = matrices()["trained"].copy()
    for pattern in (0x7800, 0x7F80, 0xFFC1):  # 2^113, infinity, a NaN
        values[3, 3] = pattern
        with pytest.raises(huffman.NoCode):
            huffman.encode([values])
        coded = huffman.unpack(huffman.pack(values), *values.shape)
        assert np.array_equal(coded.decode(), values) and np.array_equal(coded.decode(2, 3), values[2:5])


def test_rows_are_found_alone():
    weight = torch.from_numpy(matrices()["trained"].view(np.int16)).view(torch.bfloat16)
    tensors = formats.parse("huffman/0").pack(weight)
    format = formats.parse(f"huffman/{tensors['weight'].numel()}")
    for ids in ([299, 0, 299], [5], [], range(300)):
        ids = torch.tensor(list(ids), dtype=torch.int64)
        assert torch.equal(format.rows(tensors, ids, 257), weight[ids].float())
    assert torch.equal(format.unpack(tensors, 257), weight.float())
    for bad in ([300], [-1]):
        with pytest.raises(UsageError):
            format.rows(tensors, torch.tensor(bad), 257)


def test_the_engine_reads_it_into_plain_bfloat16():
    if not ops.backend()["native"]:
        pytest.skip("no native library in this installation")
    values = matrices()["trained"]
    data = huffman.pack(values)
    made = formats.parse(f"huffman/{len(data)}").layout.matrix({"weight": data}, *values.shape)
    assert made.format == "bf16" and np.array_equal(made.data.view(np.uint16), values.reshape(-1))


def test_bytes_that_lie_are_refused():
    values = matrices()["trained"]
    good = huffman.pack(values)
    for at, kind, number in (
        (0, "<B", 0),
        (8, "<q", 301),
        (16, "<q", 1),
        (24, "<q", 17),
        (24, "<q", -1),
        (32, "<q", 5),
    ):
        data = good.copy()
        struct.pack_into(kind, data, at, number)
        with pytest.raises(UsageError):
            huffman.unpack(data, 300, 257).decode()
    for data in (good[:-1], good[:63], good[:0]):
        with pytest.raises(UsageError):
            huffman.unpack(data, 300, 257)
    with pytest.raises(UsageError):
        huffman.unpack(good, 299, 257)


def test_arrays_that_lie_are_refused(monkeypatch):
    unit = huffman.encode([matrices()["trained"]])
    luts, positions = unit.luts.copy(), unit.output_positions.copy()
    luts[0] = 240  # to a table that is not there
    positions[1] += 1 << 20
    lies = [
        replace(unit, luts=luts),
        replace(unit, luts=np.zeros_like(unit.luts)),  # words without length
        replace(unit, encoded_exponent=unit.encoded_exponent[:-4096]),
        replace(unit, gaps=unit.gaps[:-1]),
        replace(unit, sign_mantissa=unit.sign_mantissa[:-1]),
        replace(unit, luts=unit.luts[:1]),
    ]
    for lie in (*lies, replace(unit, output_positions=positions)):
        with pytest.raises(UsageError):
            lie.decode()
    monkeypatch.setattr(huffman, "_library", lambda: None)
    for lie in lies:
        with pytest.raises(UsageError):
            lie.decode()
    for first, count in ((-1, 5), (0, unit.numbers + 1)):
        with pytest.raises(UsageError):
            unit.decode(first, count)
