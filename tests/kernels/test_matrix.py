"""Every matrix format on every instruction set, against plain numpy."""

from __future__ import annotations

import mmap

import numpy as np
import pytest

from shoestring.core.errors import UsageError
from shoestring.kernels import matrix, matrix_reference, ops

LEVELS = [level for level in ops.backend()["levels"] if level != "reference"]
if not LEVELS:
    pytest.skip("no native library in this installation", allow_module_level=True)

FORMS = [
    *((name, 32) for name in ("fp32", "bf16", "q8_0", "q4_0", "q4_1")),
    *((name, group) for name in ("int8", "int4") for group in (32, 64, 128)),
    *((name, group) for name in ("binary2", "binary3", "binary4") for group in (32, 64, 128)),
    *((f"uniform{bits}", group) for bits in range(2, 7) for group in (32, 64, 128)),
    *((name, group) for name in ("ternary", "tritplanes") for group in (32, 64, 128)),
]
BLOCK = {"q8_0": 34, "q4_0": 18, "q4_1": 20}
BITS = {**{f"uniform{bits}": bits for bits in range(2, 7)}, "ternary": 2, "tritplanes": 4}
TRITS = ("ternary", "tritplanes")


@pytest.fixture(autouse=True)
def best_level():
    yield
    matrix.library().sk_set_isa(LEVELS[0].encode())


@pytest.fixture(params=LEVELS)
def level(request) -> str:
    assert matrix.library().sk_set_isa(request.param.encode()) == 0
    return request.param


def stored(
    name: str, rows: int, cols: int, group: int, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray | None]:
    """A weight as a file holds it: any codes, scales as weights have them."""
    groups = -(-cols // group)
    if name == "fp32":
        return random.standard_normal((rows, cols)).astype(np.float32), None
    if name == "bf16":
        return matrix_reference.to_bfloat16(random.standard_normal((rows, cols))), None
    if name in BLOCK:
        blocks = random.integers(0, 256, (rows, groups, BLOCK[name]), dtype=np.uint8)
        for at, size in ((0, 0.01), (2, 0.1))[: 2 if name == "q4_1" else 1]:
            numbers = (random.standard_normal((rows, groups, 1)) * size).astype(np.float16)
            blocks[..., at : at + 2] = numbers.view(np.uint8)
        return blocks, None
    if name.startswith("binary"):
        bits = random.integers(0, 256, (rows, int(name[-1]), groups * group // 8), dtype=np.uint8)
        numbers = random.standard_normal((rows, groups, matrix.SCALES[name])) * 0.01
        return bits, numbers.astype(np.float16).view(np.uint16)
    if name in BITS:
        codes = random.integers(0, 256, (rows, groups, group * BITS[name] // 8), dtype=np.uint8)
        numbers = random.standard_normal((rows, groups, matrix.SCALES[name])) * 0.01
        return trits(codes) if name in TRITS else codes, numbers.astype(np.float16).view(np.uint16)
    codes = random.integers(0, 256, (rows, groups, group if name == "int8" else group // 2), dtype=np.uint8)
    return codes, matrix_reference.to_bfloat16(random.standard_normal((rows, groups)) * 0.01)


def trits(codes: np.ndarray) -> np.ndarray:
    """The bytes with their codes 3 turned into 1."""
    return codes & ~((codes & codes >> 1 & 0x55) << 1)


def columns(name: str) -> tuple[int, ...]:
    return (32, 96, 352) if name in BLOCK else (1, 31, 33, 96, 300)


def kind(name: str, level: str) -> str:
    if name == "fp32":
        return "float32"
    if name == "bf16":
        return "bfloat16" if level == "avx512bf16" else "float32"
    return "q8"


def error(y: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(y - expected) / max(np.linalg.norm(expected), 1e-20))


@pytest.mark.parametrize("name,group", FORMS)
def test_product_and_rows_equal_numpy(level, name, group):
    random = np.random.default_rng(0)
    for rows in (1, 15, 16, 17, 33):
        for cols in columns(name):
            source, scales = stored(name, rows, cols, group, random)
            bias = random.standard_normal(rows).astype(np.float32)
            made = matrix.make(name, rows, cols, source, group=group, scales=scales, bias=bias)
            weight = matrix_reference.weight(name, rows, cols, source, group, scales)
            assert np.array_equal(made.rows_of(np.arange(rows)), weight), (rows, cols)
            for tokens in (0, 1, 2, 3, 4, 5, 6, 7, 13, 40):
                x = random.standard_normal((tokens, cols)).astype(np.float32)
                y = made.multiply(x)
                assert y.shape == (tokens, rows)
                expected = matrix_reference.multiply(
                    weight, matrix_reference.rounded(x, kind(name, level), group), bias
                )
                assert error(y, expected) < 1e-5, (rows, cols, tokens)


@pytest.mark.parametrize("name,group", FORMS)
def test_same_bits_alone_in_a_batch_and_with_threads(level, name, group):
    random = np.random.default_rng(1)
    rows, cols = 600, 320
    source, scales = stored(name, rows, cols, group, random)
    made = matrix.make(name, rows, cols, source, group=group, scales=scales)
    x = random.standard_normal((200, cols)).astype(np.float32)  # more than are prepared together
    y = made.multiply(x, threads=1)
    assert np.array_equal(y, made.multiply(x, threads=3))
    for tokens in range(1, 14):
        first = 11 * tokens
        assert np.array_equal(y[first : first + tokens], made.multiply(x[first : first + tokens], threads=2)), tokens


@pytest.mark.parametrize("name,group", FORMS)
def test_extreme_values(level, name, group):
    """All codes at one end and all activations of one sign: no sum of products may overflow."""
    rows, cols = 17, 256
    random = np.random.default_rng(2)
    x = np.abs(random.standard_normal((5, cols))).astype(np.float32) + 1
    x[1] *= -1
    x[2, 7], x[3], x[4] = 1e6, 0, 1  # in the last every code is 127
    for byte in (0x00, 0xFF, 0x80, 0x7F, 0x0F, 0xF0):
        source, scales = stored(name, rows, cols, group, random)
        if name in BLOCK:
            source[..., 4 if name == "q4_1" else 2 :] = byte
        elif scales is not None:
            source[...] = trits(np.array(byte, np.uint8)) if name in TRITS else byte
        made = matrix.make(name, rows, cols, source, group=group, scales=scales)
        weight = matrix_reference.weight(name, rows, cols, source, group, scales)
        expected = matrix_reference.multiply(weight, matrix_reference.rounded(x, kind(name, level), group))
        y = made.multiply(x)
        for token in range(5):
            assert error(y[token], expected[token]) < 1e-5, (byte, token)


@pytest.mark.parametrize("name,group", FORMS)
def test_zero_rows_give_exactly_zero(level, name, group):
    rows, cols = 20, 64
    random = np.random.default_rng(3)
    source, scales = stored(name, rows, cols, group, random)
    source[4] = 0
    if scales is not None:
        scales[4] = 0
    made = matrix.make(name, rows, cols, source, group=group, scales=scales)
    y = made.multiply(random.standard_normal((9, cols)).astype(np.float32))
    assert (y[:, 4] == 0).all() and (y[:, 5] != 0).any()


@pytest.mark.parametrize("name,group", FORMS)
def test_not_a_number_stays_with_its_token_and_its_row(level, name, group):
    rows, cols = 33, 128
    random = np.random.default_rng(4)
    source, scales = stored(name, rows, cols, group, random)
    nan = np.float16(np.nan).view(np.uint16) if name in BLOCK else 0x7FC0
    if name == "fp32":
        source[17, 5] = np.nan
    elif name == "bf16":
        source[17, 5] = nan
    elif scales is not None:
        scales[17, 0] = nan if name.startswith("int") else 0x7E00
    else:
        source[17, 0, :2] = np.array([nan], np.uint16).view(np.uint8)
    made = matrix.make(name, rows, cols, source, group=group, scales=scales)
    others = np.arange(rows) != 17
    for tokens in (1, 3, 9):
        for bad in (np.nan, np.inf, -np.inf):
            x = random.standard_normal((tokens, cols)).astype(np.float32)
            x[0, 100] = bad
            y = made.multiply(x)
            assert not np.isfinite(y[0]).any()
            assert np.isnan(y[:, 17]).all() and np.isfinite(y[1:][:, others]).all()


@pytest.mark.parametrize("name,group", FORMS)
def test_order_permutes_rows(name, group):
    rows, cols = 37, 96
    random = np.random.default_rng(5)
    source, scales = stored(name, rows, cols, group, random)
    order = random.permutation(rows)
    made = matrix.make(name, rows, cols, source, group=group, scales=scales, order=order, threads=2)
    plain = matrix_reference.weight(name, rows, cols, source, group, scales)
    assert np.array_equal(made.rows_of(np.arange(rows)), plain[order])


@pytest.mark.parametrize("name,group", FORMS)
def test_packed_bytes_are_the_same_at_every_level(name, group):
    if name in matrix.AS_STORED:
        pytest.skip("used as stored")
    source, scales = stored(name, 21, 160, group, np.random.default_rng(6))
    packed = []
    for level in LEVELS:
        matrix.library().sk_set_isa(level.encode())
        packed.append(matrix.make(name, 21, 160, source, group=group, scales=scales).data.tobytes())
    assert len(set(packed)) == 1


@pytest.mark.parametrize("name", TRITS)
def test_the_code_that_no_trit_has_is_refused(name):
    for cols, group in ((1, 32), (300, 64), (129, 128)):
        source, scales = stored(name, 3, cols, group, np.random.default_rng(11))
        matrix.make(name, 3, cols, source, group=group, scales=scales)
        for byte in (0, source.size // 2, source.size - 1):
            for bits in (0x03, 0x0C, 0x30, 0xC0):
                bad = source.copy()
                bad.reshape(-1)[byte] |= bits
                with pytest.raises(UsageError, match=name):
                    matrix.make(name, 3, cols, bad, group=group, scales=scales)


@pytest.mark.parametrize("name,group", [form for form in FORMS if form[0] in BITS])
def test_packed_codes_take_their_real_width(name, group):
    source, scales = stored(name, 48, 4 * group, group, np.random.default_rng(12))
    made = matrix.make(name, 48, 4 * group, source, group=group, scales=scales)
    assert made.size == source.nbytes + scales.nbytes


@pytest.mark.parametrize("name", BLOCK)
def test_blocks_mean_what_gguf_says(name):
    gguf = pytest.importorskip("gguf")
    source, _ = stored(name, 9, 160, 32, np.random.default_rng(7))
    theirs = gguf.quants.dequantize(source.reshape(9, -1), gguf.GGMLQuantizationType[name.upper()])
    assert np.array_equal(matrix_reference.weight(name, 9, 160, source), theirs)


def test_stored_weights_stay_where_they_are_and_need_no_alignment(level):
    random = np.random.default_rng(8)
    memory = np.zeros(3 * 50 * 4 + 64, np.uint8)
    for name, size in matrix.AS_STORED.items():
        source, _ = stored(name, 3, 50, 32, random)
        at = 2 if name == "bf16" else 4
        here = memory[at : at + 150 * size]
        here[:] = source.reshape(-1).view(np.uint8)
        made = matrix.make(name, 3, 50, here)
        assert made.data.ctypes.data == here.ctypes.data
        x = random.standard_normal((2, 50)).astype(np.float32)
        weight = matrix_reference.weight(name, 3, 50, source)
        expected = matrix_reference.multiply(weight, matrix_reference.rounded(x, kind(name, level)))
        assert error(made.multiply(x), expected) < 1e-5


def test_stored_weights_are_read_to_their_end_and_no_further(level):
    """The last byte of the matrix is the last one of a mapping, as in a mapped file; what follows cannot be read."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    random = np.random.default_rng(9)
    for name, size in matrix.AS_STORED.items():
        block = mmap.mmap(-1, 2 * mmap.PAGESIZE)
        pages = np.frombuffer(block, np.uint8)
        address = pages.ctypes.data + mmap.PAGESIZE
        assert libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
        try:
            here = pages[mmap.PAGESIZE - 5 * 33 * size : mmap.PAGESIZE]
            source, _ = stored(name, 5, 33, 32, random)
            here[:] = source.reshape(-1).view(np.uint8)
            for tokens in (1, 5):
                matrix.make(name, 5, 33, here).multiply(random.standard_normal((tokens, 33)).astype(np.float32))
        finally:
            libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(mmap.PAGESIZE), mmap.PROT_READ)


def test_refusals():
    source, scales = stored("int4", 4, 64, 32, np.random.default_rng(10))
    cases = [
        dict(format="int5", source=source, scales=scales),
        dict(format="int4", source=source[:3], scales=scales),
        dict(format="int4", source=source, scales=scales[:3]),
        dict(format="int4", source=source, scales=None),
        dict(format="int4", source=source, scales=scales, group=48),
        dict(format="int4", source=source, scales=scales, order=np.array([0, 1, 2, 4])),
        dict(format="int4", source=source, scales=scales, bias=np.zeros(5)),
        dict(format="q4_0", source=np.zeros((4, 18), np.uint8), cols=48),
        dict(format="q4_0", source=np.zeros((4, 35), np.uint8)),
        dict(format="bf16", source=np.zeros((4, 63), np.uint16)),
        dict(format="fp32", source=np.zeros((4, 128), np.float32)[:, ::2]),
        dict(format="q8_0", source=np.zeros((4, 68), np.uint8), rows=1 << 62),
        dict(format="q8_0", source=np.zeros(0, np.uint8), rows=-1),
        dict(format="fp32", source=np.zeros(0, np.uint8), cols=0),
    ]
    for case in cases:
        with pytest.raises(UsageError):
            matrix.make(**{"rows": 4, "cols": 64, **case})
    made = matrix.make("int4", 4, 64, source, scales=scales)
    with pytest.raises(UsageError):
        made.multiply(np.zeros((2, 63), np.float32))
    for ids in ([4], [-1], [0, 1 << 30]):
        with pytest.raises(UsageError):
            made.rows_of(np.array(ids))
    assert made.rows_of(np.array([], np.int32)).shape == (0, 64)


def test_library_refuses_sizes_itself():
    library = matrix.library()
    source = np.zeros(4 * 36, np.uint8)
    size = library.sk_packed_size(matrix.FORMATS.index("q4_0"), 4, 64, 32)
    out = np.zeros(size, np.uint8)
    order = np.array([0, 1, 2, 4], np.int64)

    def pack(source_size: int, out_size: int, use: int | None = None, format: int = 5) -> int:
        return library.sk_pack(
            format, 4, 64, 32, source.ctypes.data, source_size, None, use, out.ctypes.data, out_size, 1
        )

    assert pack(144, size) == 0
    assert pack(143, size) == pack(144, size - 1) == pack(144, size + 1) == 1
    assert pack(144, size, order.ctypes.data) == 1
    assert pack(144, size, format=-1) == pack(144, size, format=99) == 1
    assert [library.sk_format(name.encode()) for name in (*matrix.FORMATS, "int5")] == [*range(len(matrix.FORMATS)), -1]
