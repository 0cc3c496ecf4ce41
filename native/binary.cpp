// Weights as sums of planes of signs, w = offset + sum_i scale_i * sign_i, multiplied by looking sums up instead of adding.
// A nibble of a plane is four neighbouring columns of a row; what it selects of a token's four codes stands in a table
// (`tabulate` in prepare.cpp), and the sum over all columns gives the signs' product: 2 * selected - all, an exact integer.
//   y[t][r] = sum_g token_scale[t][g] * (sum_i scale[r][g][i] * dot[r][t][g][i]) + offset[r][g] * token_sum[t][g]
// A tile is 16 rows. For every group: of each plane, first to last, its nibbles in lines of 64 bytes, then 16 float16 scales
// of each plane and 16 offsets. A line holds 32 columns: byte 16 * l + r has columns 4l..4l+3 of row r in its low nibble and
// 16 + 4l.. in its high one, so that each quarter of a register has a table of its own. An entry is 5 low and 5 high bits:
// a quarter adds up at most eight of each, which stay within a byte.
// Source: uint8 [rows][planes][groups * group / 8], bit j of byte t is column 8t + j, set for +; float16 scales
// [rows][groups][planes + 1], the offset last.

#include "tiles.h"

namespace {

struct Half {
  static constexpr bool HALF = true;
};

constexpr int64_t TOGETHER = 256 << 10;  // bytes of tables that stay in the second cache while all rows meet them

template <int PLANES, int GROUP>
struct Signs {
  static constexpr int LINES = GROUP / 32, PLANE = LINES * 64, BYTES = PLANES * PLANE + (PLANES + 1) * int(SCALES);

  // What turns the sum of entries into that of signed codes: twice the 512 of every entry, and the codes' own sum once.
  static int32_t start(const SkInput& x, int64_t at) { return (x.offsets[at] >> 3) - 2 * SK_ENTRY * (GROUP / 4); }

#if defined(__AVX512VNNI__)
  static constexpr int MOST = 4;

  static __m512 numbers(const uint8_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }

  template <int T>
  static void some(const uint8_t* p, int64_t groups, const SkInput& x, int64_t token, float (*sums)[SK_TILE]) {
    const __m512i nibble = _mm512_set1_epi8(15), twice = _mm512_set1_epi8(2), times64 = _mm512_set1_epi8(64);
    // The four quarters of a row, side by side: dwords change places, then bytes within four of them.
    const __m512i dwords = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i bytes = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const uint8_t* tables = x.tables + token * x.table_stride;
    const int64_t at = token * x.group_stride, ahead = token > 0 ? 0 : AHEAD;
    __m512 sum[T];
    for (int i = 0; i < T; ++i) sum[i] = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups; ++g, p += BYTES, tables += GROUP * 8) {
      __m512 value[T];
      __m512i begin[T];
      for (int i = 0; i < T; ++i) value[i] = _mm512_setzero_ps();
      for (int i = 0; i < T; ++i) begin[i] = _mm512_set1_epi32(start(x, at + i * x.group_stride + g));
#pragma GCC unroll 4
      for (int plane = 0; plane < PLANES; ++plane) {
        __m512i low[T], high[T];
        for (int i = 0; i < T; ++i) low[i] = high[i] = _mm512_setzero_si512();
#pragma GCC unroll 4
        for (int line = 0; line < LINES; ++line) {
          const uint8_t* from = p + plane * PLANE + line * 64;
          fetch<false>(from + ahead);
          const __m512i both = _mm512_loadu_si512(from);
          const __m512i left = _mm512_and_si512(both, nibble), right = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
#pragma GCC unroll 4
          for (int i = 0; i < T; ++i) {
            const uint8_t* t = tables + i * x.table_stride + line * 256;
            low[i] = _mm512_add_epi8(low[i], _mm512_shuffle_epi8(_mm512_loadu_si512(t), left));
            high[i] = _mm512_add_epi8(high[i], _mm512_shuffle_epi8(_mm512_loadu_si512(t + 64), left));
            low[i] = _mm512_add_epi8(low[i], _mm512_shuffle_epi8(_mm512_loadu_si512(t + 128), right));
            high[i] = _mm512_add_epi8(high[i], _mm512_shuffle_epi8(_mm512_loadu_si512(t + 192), right));
          }
        }
        const __m512 scale = numbers(p + PLANES * PLANE + plane * SCALES);
#pragma GCC unroll 4
        for (int i = 0; i < T; ++i) {
          const __m512i units = _mm512_shuffle_epi8(_mm512_permutexvar_epi32(dwords, low[i]), bytes);
          const __m512i thirties = _mm512_shuffle_epi8(_mm512_permutexvar_epi32(dwords, high[i]), bytes);
          const __m512i dot = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(begin[i], units, twice), thirties, times64);
          value[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), scale, value[i]);
        }
      }
      const __m512 offset = numbers(p + PLANES * (PLANE + SCALES));
#pragma GCC unroll 4
      for (int i = 0; i < T; ++i) {
        const int64_t number = at + i * x.group_stride + g;
        sum[i] = _mm512_fmadd_ps(value[i], _mm512_set1_ps(x.scales[number]), sum[i]);
        sum[i] = _mm512_fmadd_ps(offset, _mm512_set1_ps(x.sums[number]), sum[i]);
      }
    }
    for (int i = 0; i < T; ++i) _mm512_storeu_ps(sums[i], sum[i]);
  }

#elif defined(__AVX2__)
  static constexpr int MOST = 2;

  static __m256 numbers(const uint8_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static __m256i load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

  static __m128i halves(__m256i v) { return _mm_add_epi16(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)); }

  template <int T>
  static void some(const uint8_t* p, int64_t groups, const SkInput& x, int64_t token, float (*sums)[SK_TILE]) {
    const __m256i nibble = _mm256_set1_epi8(15), weights = _mm256_set1_epi16(1 + 32 * 256);
    const uint8_t* tables = x.tables + token * x.table_stride;
    const int64_t at = token * x.group_stride;
    __m256 sum[T][2];
    for (int i = 0; i < T; ++i) sum[i][0] = sum[i][1] = _mm256_setzero_ps();
    for (int64_t g = 0; g < groups; ++g, p += BYTES, tables += GROUP * 8) {
      __m256 value[T][2];
      for (int i = 0; i < T; ++i) value[i][0] = value[i][1] = _mm256_setzero_ps();
      for (int plane = 0; plane < PLANES; ++plane) {
        // Rows 0..7 and 8..15 of two quarters each. All four quarters of a row come to 32736 at most.
        __m256i first[T], second[T];
        for (int i = 0; i < T; ++i) first[i] = second[i] = _mm256_setzero_si256();
        for (int half = 0; half < 2; ++half) {
          __m256i low[T], high[T];
          for (int i = 0; i < T; ++i) low[i] = high[i] = _mm256_setzero_si256();
#pragma GCC unroll 4
          for (int line = 0; line < LINES; ++line) {
            const __m256i both = load(p + plane * PLANE + line * 64 + half * 32);
            const __m256i left = _mm256_and_si256(both, nibble), right = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
#pragma GCC unroll 2
            for (int i = 0; i < T; ++i) {
              const uint8_t* t = tables + i * x.table_stride + line * 256 + half * 32;
              low[i] = _mm256_add_epi8(low[i], _mm256_shuffle_epi8(load(t), left));
              high[i] = _mm256_add_epi8(high[i], _mm256_shuffle_epi8(load(t + 64), left));
              low[i] = _mm256_add_epi8(low[i], _mm256_shuffle_epi8(load(t + 128), right));
              high[i] = _mm256_add_epi8(high[i], _mm256_shuffle_epi8(load(t + 192), right));
            }
          }
          for (int i = 0; i < T; ++i) {
            first[i] = _mm256_add_epi16(first[i], _mm256_maddubs_epi16(_mm256_unpacklo_epi8(low[i], high[i]), weights));
            second[i] = _mm256_add_epi16(second[i], _mm256_maddubs_epi16(_mm256_unpackhi_epi8(low[i], high[i]), weights));
          }
        }
        const uint8_t* scales = p + PLANES * PLANE + plane * SCALES;
        for (int i = 0; i < T; ++i) {
          const __m256i begin = _mm256_set1_epi32(start(x, at + i * x.group_stride + g));
          const __m128i both[2] = {halves(first[i]), halves(second[i])};
          for (int part = 0; part < 2; ++part) {
            const __m256i dot = _mm256_add_epi32(_mm256_slli_epi32(_mm256_cvtepi16_epi32(both[part]), 1), begin);
            value[i][part] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), numbers(scales + part * SCALES / 2), value[i][part]);
          }
        }
      }
      for (int i = 0; i < T; ++i)
        for (int part = 0; part < 2; ++part) {
          const int64_t number = at + i * x.group_stride + g;
          const __m256 offset = numbers(p + PLANES * (PLANE + SCALES) + part * SCALES / 2);
          sum[i][part] = _mm256_fmadd_ps(value[i][part], _mm256_set1_ps(x.scales[number]), sum[i][part]);
          sum[i][part] = _mm256_fmadd_ps(offset, _mm256_set1_ps(x.sums[number]), sum[i][part]);
        }
    }
    for (int i = 0; i < T; ++i)
      for (int part = 0; part < 2; ++part) _mm256_storeu_ps(sums[i] + part * 8, sum[i][part]);
  }

#else
  static constexpr int MOST = 1;

  template <int T>
  static void some(const uint8_t* p, int64_t groups, const SkInput& x, int64_t token, float (*sums)[SK_TILE]) {
    const uint8_t* tables = x.tables + token * x.table_stride;
    float sum[SK_TILE] = {};
    for (int64_t g = 0; g < groups; ++g, p += BYTES) {
      int32_t selected[PLANES][SK_TILE] = {};
      for (int line = 0; line < LINES; ++line, tables += 256)
        for (int quarter = 0; quarter < 4; ++quarter) {
          uint16_t left[16], right[16];
          for (int k = 0; k < 16; ++k) {
            const uint8_t* t = tables + quarter * 16 + k;
            left[k] = uint16_t(t[0] + 32 * t[64]);
            right[k] = uint16_t(t[128] + 32 * t[192]);
          }
          for (int plane = 0; plane < PLANES; ++plane) {
            const uint8_t* from = p + plane * PLANE + line * 64 + quarter * 16;
            for (int r = 0; r < SK_TILE; ++r) selected[plane][r] += left[from[r] & 15] + right[from[r] >> 4];
          }
        }
      const int64_t at = token * x.group_stride + g;
      const uint8_t* scales = p + PLANES * PLANE;
      for (int r = 0; r < SK_TILE; ++r) {
        float value = 0;
        for (int plane = 0; plane < PLANES; ++plane)
          value += float(2 * selected[plane][r] + start(x, at)) * number<Half>(scales + plane * SCALES, r);
        sum[r] += value * x.scales[at];
        sum[r] += number<Half>(scales + PLANES * SCALES, r) * x.sums[at];
      }
    }
    __builtin_memcpy(sums[0], sum, sizeof sum);
  }
#endif

  template <int T>
  static void tokens(const SkMatrix& m, const SkInput& x, const Output& out, int64_t row, int64_t token) {
    const int64_t groups = (m.cols + GROUP - 1) / GROUP;
    float sums[T][SK_TILE];
    some<T>(static_cast<const uint8_t*>(m.data) + row / SK_TILE * groups * BYTES, groups, x, token, sums);
    for (int i = 0; i < T; ++i) out.put(m.bias, token + i, row, sums[i]);
  }

  static void all(const SkMatrix& m, const SkInput& x, const Output& out, int64_t begin) {
    const int64_t fit = TOGETHER / x.table_stride / MOST * MOST, block = fit > MOST ? fit : MOST;
    for (int64_t first = 0; first < x.count; first += block) {
      const int64_t last = first + block < x.count ? first + block : x.count;
      for (int64_t row = begin; row < out.rows; row += SK_TILE) {
        int64_t token = first;
        for (; token + MOST <= last; token += MOST) tokens<MOST>(m, x, out, row, token);
        if constexpr (MOST > 3)
          if (last - token == 3) tokens<3>(m, x, out, row, token);
        if constexpr (MOST > 2)
          if (last - token == 2) tokens<2>(m, x, out, row, token);
        if (last - token == 1) tokens<1>(m, x, out, row, token);
      }
    }
  }
};

template <int PLANES>
struct Binary {
  static int64_t groups(int64_t cols, int64_t group) { return (cols - 1) / group + 1; }
  static int64_t group_bytes(int64_t group) { return PLANES * group * 2 + (PLANES + 1) * SCALES; }

  static int64_t all_bytes(int64_t count, int64_t cols, int64_t group, int64_t each) {
    int64_t size;
    if (count < 0 || cols < 1 || (group != 32 && group != 64 && group != 128)) return -1;
    if (__builtin_mul_overflow(groups(cols, group), each, &size) || __builtin_mul_overflow(size, count, &size)) return -1;
    return size;
  }

  static int64_t packed_size(int64_t rows, int64_t cols, int64_t group) {
    return all_bytes(rows < 0 ? -1 : rows / SK_TILE + (rows % SK_TILE != 0), cols, group, group_bytes(group));
  }

  static int64_t source_size(int64_t rows, int64_t cols, int64_t group) { return all_bytes(rows, cols, group, PLANES * group / 8); }

  static void pack(int64_t rows, int64_t cols, int64_t group, const void* source, const void* scales, const int64_t* order,
                   void* out, int64_t begin, int64_t end) {
    const int64_t count = groups(cols, group), lines = group / 32, width = count * group / 8;
    uint8_t* p = static_cast<uint8_t*>(out) + begin * count * group_bytes(group);
    for (int64_t tile = begin; tile < end; ++tile)
      for (int64_t g = 0; g < count; ++g, p += group_bytes(group)) {
        __builtin_memset(p, 0, uint64_t(group_bytes(group)));
        for (int64_t r = 0; r < SK_TILE && tile * SK_TILE + r < rows; ++r) {
          const int64_t row = order ? order[tile * SK_TILE + r] : tile * SK_TILE + r;
          for (int64_t plane = 0; plane < PLANES; ++plane) {
            const uint8_t* from = static_cast<const uint8_t*>(source) + (row * PLANES + plane) * width + g * group / 8;
            uint8_t* to = p + plane * lines * 64 + r;
            for (int64_t line = 0; line < lines; ++line, from += 4, to += 64)
              for (int64_t quarter = 0; quarter < 4; ++quarter) {
                const int32_t shift = quarter % 2 * 4;
                to[quarter * 16] = uint8_t((from[quarter / 2] >> shift & 15) | (from[2 + quarter / 2] >> shift & 15) << 4);
              }
          }
          for (int64_t i = 0; i <= PLANES; ++i)
            __builtin_memcpy(p + PLANES * lines * 64 + i * SCALES + r * 2,
                             static_cast<const char*>(scales) + ((row * count + g) * (PLANES + 1) + i) * 2, 2);
        }
      }
  }

  static void row(const SkMatrix& m, int64_t row, float* out) {
    const int64_t r = row % SK_TILE, each = group_bytes(m.group), lines = m.group / 32;
    const uint8_t* p = static_cast<const uint8_t*>(m.data) + row / SK_TILE * groups(m.cols, m.group) * each;
    for (int64_t j = 0; j < m.cols; ++j) {
      const uint8_t* g = p + j / m.group * each;
      const uint8_t* scales = g + PLANES * lines * 64;
      const int64_t line = j % m.group / 32, column = j % 32, byte = line * 64 + column % 16 / 4 * 16 + r;
      float value = 0;
      for (int64_t plane = 0; plane < PLANES; ++plane) {
        const bool plus = g[plane * lines * 64 + byte] >> (column / 16 * 4 + column % 4) & 1;
        const float scale = number<Half>(scales + plane * SCALES, r);
        value += plus ? scale : -scale;
      }
      out[j] = value + number<Half>(scales + PLANES * SCALES, r);
    }
  }

  static void product(const SkMatrix& m, const SkInput& x, float* y, int64_t y_stride, bool add, int64_t begin, int64_t end) {
    switch (m.group) {
      case 32: return Signs<PLANES, 32>::all(m, x, {y, y_stride, add, end}, begin);
      case 64: return Signs<PLANES, 64>::all(m, x, {y, y_stride, add, end}, begin);
      case 128: return Signs<PLANES, 128>::all(m, x, {y, y_stride, add, end}, begin);
    }
  }

  static constexpr SkFormat format(const char* name) {
    return {name, SK_Q8_TABLES, packed_size, source_size, pack, product, row, nullptr};
  }
};

}  // namespace

namespace ISA {
const SkFormat binary2 = Binary<2>::format("binary2");
const SkFormat binary3 = Binary<3>::format("binary3");
const SkFormat binary4 = Binary<4>::format("binary4");
}
