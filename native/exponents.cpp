// bfloat16 with 4 bits for the exponent: the matrix's 16 commonest exponents have a code, the others are listed by row. Every
// number comes back to the bit. After the head (see decoded.h), whose table holds the exponents of the codes:
//   uint32 [rows + 1]: ends of the rows in the list
//   uint32 [count]: the list, column and exponent << 24, columns growing within a row; whatever code stands there gives way
//   rows of pieces of 96 bytes: sign and mantissa of 64 columns, a byte each, then codes: byte j has columns j and j + 32
#include "decoded.h"

namespace {

struct Exponents {
  static constexpr int64_t PIECE_BYTES = 96, CODES = 64;
  const uint8_t *starts, *list, *pieces;
  int64_t row_bytes;
#if defined(__AVX512F__)
  __m512i table;  // 16-bit exponents in their place, twice: a lookup heeds five bits
#elif defined(__AVX2__)
  __m128i table;
#else
  const uint8_t* table;
#endif

  explicit Exponents(const SkMatrix& m) {
    const uint8_t* p = static_cast<const uint8_t*>(m.data);
    starts = p + HEAD;
    list = starts + 4 * (m.rows + 1);
    pieces = list + 4 * number_at<int64_t>(p, HEAD_COUNT);
    row_bytes = pieces_of(m.cols) * PIECE_BYTES;
#if defined(__AVX512F__)
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + HEAD_TABLE));
    table = _mm512_slli_epi16(_mm512_cvtepu8_epi16(_mm256_broadcastsi128_si256(bytes)), 7);
#elif defined(__AVX2__)
    table = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + HEAD_TABLE));
#else
    table = p + HEAD_TABLE;
#endif
  }

  struct Row {
    const Exponents* format;
    const uint8_t *p, *entry, *last;
    int64_t next_at, column;  // of the next entry, of the next piece

    Row() {}
    Row(const Exponents& f, int64_t row) : format(&f), p(f.pieces + row * f.row_bytes), column(0) {
      entry = f.list + 4 * int64_t(number_at<uint32_t>(f.starts, 4 * row));
      last = f.list + 4 * int64_t(number_at<uint32_t>(f.starts, 4 * row + 4));
      find();
    }

    void find() { next_at = entry < last ? number_at<uint32_t>(entry, 0) & 0xffffff : INT64_MAX; }

    void next(uint16_t* out) {
      decode(format->table, p, out);
      p += PIECE_BYTES, column += PIECE;
      while (__builtin_expect(next_at < column, 0)) {
        uint16_t& number = out[next_at - (column - PIECE)];
        number = uint16_t((number & 0x807f) | (number_at<uint32_t>(entry, 0) >> 24 << 7));
        entry += 4;
        find();
      }
    }
  };

  struct Later {
    const uint8_t* p;
    Later(const Exponents& f, int64_t row, int64_t) : p(f.pieces + row * f.row_bytes + AHEAD) {}
    void next() {  // a piece is longer than a line and shorter than two
      fetch<true>(p);
      fetch<true>(p + 64);
      p += PIECE_BYTES;
    }
  };

#if defined(__AVX512F__)
  static void decode(const __m512i& table, const uint8_t* p, uint16_t* out) {
    const __m512i kept = _mm512_set1_epi16(int16_t(0x807f));
    const __m512i codes = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + CODES)));
    const __m512i low = _mm512_permutexvar_epi16(codes, table), high = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4), table);
    const __m512i first = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    const __m512i second = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32)));
    _mm512_storeu_si512(out, _mm512_ternarylogic_epi32(first, kept, low, 0xea));  // first & kept | low
    _mm512_storeu_si512(out + 32, _mm512_ternarylogic_epi32(second, kept, high, 0xea));
  }
#elif defined(__AVX2__)
  static void decode(const __m128i& table, const uint8_t* p, uint16_t* out) {
    const __m256i kept = _mm256_set1_epi16(int16_t(0x807f));
    for (int i = 0; i < 4; ++i) {
      const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + CODES + 16 * (i & 1)));
      const __m128i codes = _mm_and_si128(i < 2 ? both : _mm_srli_epi16(both, 4), _mm_set1_epi8(15));
      const __m256i exponents = _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_shuffle_epi8(table, codes)), 7);
      const __m256i rest = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16 * i)));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 16 * i), _mm256_or_si256(_mm256_and_si256(rest, kept), exponents));
    }
  }
#else
  static void decode(const uint8_t* table, const uint8_t* p, uint16_t* out) {
    for (int64_t j = 0; j < PIECE; ++j) {
      const uint8_t code = uint8_t(p[CODES + (j & 31)] >> (j / 32 * 4)) & 15;
      out[j] = uint16_t((p[j] & 0x80) << 8 | table[code] << 7 | (p[j] & 0x7f));
    }
  }
#endif

  static bool sound(int64_t rows, int64_t cols, int64_t, const void* p, int64_t size) {
    if (!sound_head("SKEXPON1", rows, cols, p, size, 4, pieces_of(cols) * PIECE_BYTES, 0)) return false;
    const uint8_t *starts = static_cast<const uint8_t*>(p) + HEAD, *list = starts + 4 * (rows + 1);
    for (int64_t r = 0; r < rows; ++r) {
      int64_t before = -1;
      for (int64_t i = number_at<uint32_t>(starts, 4 * r); i < int64_t(number_at<uint32_t>(starts, 4 * r + 4)); ++i) {
        const int64_t column = number_at<uint32_t>(list, 4 * i) & 0xffffff;
        if (column <= before || column >= cols) return false;
        before = column;
      }
    }
    return true;
  }
};

}  // namespace

namespace ISA {
const SkFormat exponents = Decoded<Exponents>::format("exponents");
}
