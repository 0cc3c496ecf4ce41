// bfloat16 without its zeros: a bit for every column and the numbers that are there. After the head (see decoded.h):
//   uint32 [rows + 1]: ends of the rows among the numbers
//   uint64 [rows][pieces]: bit j of a word is column j of its piece; none beyond the last column
//   uint16 [count]: the numbers
//   64 bytes of anything, so that a register may be read at the last number
#include "decoded.h"

namespace {

#if defined(__AVX2__) && !defined(__AVX512F__)
struct Spread {  // for each byte of bits: where in eight numbers the bytes of each of eight columns stand; 0x80: nowhere
  alignas(64) uint8_t at[256][16];
};

constexpr Spread spread() {
  Spread s{};
  for (int bits = 0; bits < 256; ++bits)
    for (int j = 0, seen = 0; j < 8; ++j) {
      const bool there = bits >> j & 1;
      s.at[bits][2 * j] = uint8_t(there ? 2 * seen : 0x80);
      s.at[bits][2 * j + 1] = uint8_t(there ? 2 * seen + 1 : 0x80);
      seen += there;
    }
  return s;
}
constexpr Spread SPREAD = spread();
#endif

struct Sparse {
  const uint8_t *starts, *bits, *numbers;
  int64_t row_bits;  // bytes

  explicit Sparse(const SkMatrix& m) {
    starts = static_cast<const uint8_t*>(m.data) + HEAD;
    bits = starts + 4 * (m.rows + 1);
    row_bits = pieces_of(m.cols) * 8;
    numbers = bits + m.rows * row_bits;
  }

  struct Row {
    const uint8_t *bits, *numbers;

    Row() {}
    Row(const Sparse& f, int64_t row) : bits(f.bits + row * f.row_bits), numbers(f.numbers + 2 * int64_t(number_at<uint32_t>(f.starts, 4 * row))) {}

    void next(uint16_t* out) {
      const uint64_t there = number_at<uint64_t>(bits, 0);
      decode(there, numbers, out);
      bits += 8, numbers += 2 * __builtin_popcountll(there);
    }
  };

  struct Later {
    const uint8_t *bits, *numbers;
    int64_t each;  // bytes of numbers of a piece, as many as rows have on average
    Later(const Sparse& f, int64_t row, int64_t count) : bits(f.bits + row * f.row_bits + AHEAD / 8) {
      const int64_t first = number_at<uint32_t>(f.starts, 4 * row), last = number_at<uint32_t>(f.starts, 4 * (row + count));
      const int64_t pieces = count * f.row_bits / 8;
      numbers = f.numbers + 2 * first + AHEAD;
      each = pieces ? (2 * (last - first) + pieces - 1) / pieces : 0;
    }
    void next() {  // numbers of a piece are two lines at most
      fetch<true>(bits);
      fetch<true>(numbers);
      fetch<true>(numbers + 64);
      bits += 8, numbers += each;
    }
  };

#if defined(__AVX512F__)
  static __m256i sixteen(uint64_t there, const uint8_t* numbers) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(numbers)));
    return _mm512_cvtepi32_epi16(_mm512_maskz_expand_epi32(__mmask16(there), wide));
  }
  static void decode(uint64_t there, const uint8_t* numbers, uint16_t* out) {
    for (int i = 0; i < 4; i += 2) {
      const int64_t before = __builtin_popcountll(there & ((uint64_t(1) << 16 * i) - 1));
      const int64_t between = __builtin_popcountll(there >> 16 * i & 0xffff);
      const __m256i low = sixteen(there >> 16 * i, numbers + 2 * before);
      const __m256i high = sixteen(there >> 16 * (i + 1), numbers + 2 * (before + between));
      _mm512_storeu_si512(out + 16 * i, _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
    }
  }
#elif defined(__AVX2__)
  static void decode(uint64_t there, const uint8_t* numbers, uint16_t* out) {
    for (int i = 0; i < 8; ++i) {
      const uint64_t byte = there >> 8 * i & 0xff, before = there & ((uint64_t(1) << 8 * i) - 1);
      const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(numbers + 2 * __builtin_popcountll(before)));
      const __m128i at = _mm_load_si128(reinterpret_cast<const __m128i*>(SPREAD.at[byte]));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 8 * i), _mm_shuffle_epi8(eight, at));
    }
  }
#else
  static void decode(uint64_t there, const uint8_t* numbers, uint16_t* out) {
    for (int64_t j = 0; j < PIECE; ++j) {
      const bool is = there >> j & 1;
      out[j] = is ? number_at<uint16_t>(numbers, 0) : 0;
      numbers += 2 * is;
    }
  }
#endif

  static bool sound(int64_t rows, int64_t cols, int64_t, const void* p, int64_t size) {
    const int64_t pieces = pieces_of(cols);
    if (!sound_head("SKSPARS1", rows, cols, p, size, 2, pieces * 8, 64)) return false;
    const uint8_t *starts = static_cast<const uint8_t*>(p) + HEAD, *bits = starts + 4 * (rows + 1);
    const uint64_t beyond = cols % PIECE ? ~uint64_t(0) << cols % PIECE : 0;
    for (int64_t r = 0; r < rows; ++r) {
      int64_t count = 0;
      for (int64_t i = 0; i < pieces; ++i) count += __builtin_popcountll(number_at<uint64_t>(bits, (r * pieces + i) * 8));
      if (number_at<uint64_t>(bits, (r * pieces + pieces - 1) * 8) & beyond) return false;
      if (count != int64_t(number_at<uint32_t>(starts, 4 * r + 4)) - int64_t(number_at<uint32_t>(starts, 4 * r))) return false;
    }
    return true;
  }
};

}  // namespace

namespace ISA {
const SkFormat sparse = Decoded<Sparse>::format("sparse");
}
