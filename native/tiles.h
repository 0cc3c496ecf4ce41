// What the tiled formats share. A tile is 16 rows, one to a 32-bit lane, and one stream of bytes: for every group its codes
// in lines of 64 bytes, then 16 scales of 16 bits, then (formats with a minimum) 16 minima. A line of 8-bit codes holds 4
// columns of each row, one of 4-bit codes 8: columns k..k+3 in the low nibbles and k+4..k+7 in the high ones. Codes are
// unsigned: 8-bit ones q + 128, 4-bit ones q + 8, or q where there is a minimum.
//   y[t][r] = sum_g weight_scale[r][g] * token_scale[t][g] * dot[r][t][g] (+ minimum[r][g] * token_sum[t][g])
// dot is an exact integer and the sum over groups runs in order, so a token gets the same bits in any batch.
// Rows a matrix does not have carry scale 0. A scale that is not a number makes its row not a number, and no other.
#pragma once
#include "kernels.h"
#include "number.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t SCALES = 2 * SK_TILE;  // bytes of a tile's scales of one group

template <class F>
constexpr int64_t lines(int64_t group) {
  return group * F::BITS / 32;
}

template <class F>
constexpr int64_t group_bytes(int64_t group) {
  return lines<F>(group) * 64 + SCALES * (F::MINIMUM ? 2 : 1);
}

// Number i of 16-bit ones at p.
template <class F>
float number(const uint8_t* p, int64_t i) {
  uint16_t bits;
  __builtin_memcpy(&bits, p + 2 * i, 2);
  return F::HALF ? from_float16(bits) : from_bfloat16(bits);
}

struct Output {
  float* y;
  int64_t stride;
  bool add;
  int64_t rows;  // where the rows of the call end

  void put(const float* bias, int64_t token, int64_t row, const float* sums) const {
    float* to = y + token * stride + row;
    const int64_t here = rows - row;
    if (here >= SK_TILE) return put_some<SK_TILE>(bias, row, sums, to, SK_TILE);
    put_some<0>(bias, row, sums, to, here);
  }

  // A loop of known length becomes two or three instructions.
  template <int64_t KNOWN>
  void put_some(const float* bias, int64_t row, const float* sums, float* to, int64_t here) const {
    for (int64_t r = 0; r < (KNOWN ? KNOWN : here); ++r) {
      const float value = bias ? sums[r] + bias[row + r] : sums[r];
      to[r] = add ? to[r] + value : value;
    }
  }
};

inline int32_t four(const int8_t* codes) {
  int32_t bytes;
  __builtin_memcpy(&bytes, codes, 4);
  return bytes;
}

template <class F, int GROUP>
struct Product {
  static constexpr int LINES = int(lines<F>(GROUP)), BYTES = int(group_bytes<F>(GROUP)), COLUMNS = F::BITS == 8 ? 4 : 8;

#if defined(__AVX512VNNI__)
  static constexpr int MOST = 6;       // tokens together: with two tiles their sums and dots fill the registers
  static constexpr int TILES = 2;
  static constexpr int64_t AHEAD = 8192, FAR = 32768;  // bytes fetched in advance on the first pass over a tile

  static __m512 numbers(const uint8_t* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return F::HALF ? _mm512_cvtph_ps(bits) : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }

  // T tokens, N tiles that stand `next` bytes apart.
  template <int T, int N>
  static void some(const uint8_t* p, int64_t next, int64_t groups, const SkInput& x, int64_t token, float (*sums)[N][SK_TILE]) {
    const __m512i nibble = _mm512_set1_epi8(15);
    const int64_t stride = x.stride, group_stride = x.group_stride;
    const int8_t* a = static_cast<const int8_t*>(x.rows) + token * stride;
    const float *scales = x.scales + token * group_stride, *totals = x.sums + token * group_stride;
    const int32_t* offsets = x.offsets + token * group_stride;
    // Two tiles side by side fetch the two after them, if those are not too far away.
    const int64_t ahead = token > 0 ? 0 : N == 2 && 2 * next <= FAR ? 2 * next : AHEAD;
    __m512 sum[T][N];
    for (int i = 0; i < T; ++i)
      for (int n = 0; n < N; ++n) sum[i][n] = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups; ++g, p += BYTES, a += GROUP) {
      __m512i dot[T][N];
#pragma GCC unroll 8
      for (int i = 0; i < T; ++i) {
        __m512i start = _mm512_setzero_si512();
        if (!F::MINIMUM) start = _mm512_set1_epi32(offsets[i * group_stride + g]);
        if (F::BITS == 8) start = _mm512_slli_epi32(start, 4);
        for (int n = 0; n < N; ++n) dot[i][n] = start;
      }
#pragma GCC unroll 8
      for (int line = 0; line < LINES; ++line) {
        __m512i low[N], high[N];
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) {
          _mm_prefetch(p + n * next + line * 64 + ahead, _MM_HINT_T0);
          low[n] = _mm512_loadu_si512(p + n * next + line * 64);
          if (F::BITS == 4) {
            high[n] = _mm512_and_si512(_mm512_srli_epi16(low[n], 4), nibble);
            low[n] = _mm512_and_si512(low[n], nibble);
          }
        }
#pragma GCC unroll 8
        for (int i = 0; i < T; ++i) {
          const int8_t* at = a + i * stride + line * COLUMNS;
          const __m512i left = _mm512_set1_epi32(four(at));
#pragma GCC unroll 2
          for (int n = 0; n < N; ++n) dot[i][n] = _mm512_dpbusd_epi32(dot[i][n], low[n], left);
          if (F::BITS == 4) {
            const __m512i right = _mm512_set1_epi32(four(at + 4));
#pragma GCC unroll 2
            for (int n = 0; n < N; ++n) dot[i][n] = _mm512_dpbusd_epi32(dot[i][n], high[n], right);
          }
        }
      }
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) {
        _mm_prefetch(p + n * next + LINES * 64 + ahead, _MM_HINT_T0);
        const __m512 scale = numbers(p + n * next + LINES * 64);
        __m512 minimum = scale;
        if (F::MINIMUM) minimum = numbers(p + n * next + LINES * 64 + SCALES);
#pragma GCC unroll 8
        for (int i = 0; i < T; ++i) {
          const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(scales[i * group_stride + g]));
          sum[i][n] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[i][n]), both, sum[i][n]);
          if (F::MINIMUM) sum[i][n] = _mm512_fmadd_ps(minimum, _mm512_set1_ps(totals[i * group_stride + g]), sum[i][n]);
        }
      }
    }
    for (int i = 0; i < T; ++i)
      for (int n = 0; n < N; ++n) _mm512_storeu_ps(sums[i][n], sum[i][n]);
  }

#elif defined(__AVX2__)
  static constexpr int MOST = 4, TILES = 1;

  static __m256 numbers(const uint8_t* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return F::HALF ? _mm256_cvtph_ps(bits) : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }

  // T tokens, N tiles that stand `next` bytes apart, half a tile at a time.
  template <int T, int N>
  static void some(const uint8_t* start, int64_t next, int64_t groups, const SkInput& x, int64_t token, float (*sums)[N][SK_TILE]) {
    const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1), sign = _mm256_set1_epi8(char(0x80));
    for (int half = 0; half < 2 * N; ++half) {
      const uint8_t* p = start + half / 2 * next;
      const int8_t* a = static_cast<const int8_t*>(x.rows) + token * x.stride;
      __m256 sum[T];
      for (int i = 0; i < T; ++i) sum[i] = _mm256_setzero_ps();
      for (int64_t g = 0; g < groups; ++g, p += BYTES, a += GROUP) {
        __m256i dot[T];
        for (int i = 0; i < T; ++i)
          dot[i] = _mm256_set1_epi32(F::BITS == 4 && !F::MINIMUM ? x.offsets[(token + i) * x.group_stride + g] : 0);
        // Pairs of products stay within 16 bits: 2 * 15 * 127, four lines of both nibbles of it; or once 2 * 128 * 127.
        constexpr int TOGETHER = F::BITS == 4 ? 4 : 1;
        for (int line = 0; line < LINES; line += TOGETHER) {
          __m256i pairs[T];
          for (int i = 0; i < T; ++i) pairs[i] = _mm256_setzero_si256();
#pragma GCC unroll 4
          for (int l = line; l < line + TOGETHER; ++l) {
            __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + l * 64 + half % 2 * 32)), high = low;
            if (F::BITS == 4) {
              high = _mm256_and_si256(_mm256_srli_epi16(low, 4), nibble);
              low = _mm256_and_si256(low, nibble);
            } else {
              low = _mm256_xor_si256(low, sign);
              high = _mm256_abs_epi8(low);
            }
#pragma GCC unroll 4
            for (int i = 0; i < T; ++i) {
              const int8_t* at = a + i * x.stride + l * COLUMNS;
              const __m256i left = _mm256_set1_epi32(four(at));
              if (F::BITS == 8) {
                pairs[i] = _mm256_maddubs_epi16(high, _mm256_sign_epi8(left, low));
              } else {
                pairs[i] = _mm256_add_epi16(pairs[i], _mm256_maddubs_epi16(low, left));
                pairs[i] = _mm256_add_epi16(pairs[i], _mm256_maddubs_epi16(high, _mm256_set1_epi32(four(at + 4))));
              }
            }
          }
          for (int i = 0; i < T; ++i) dot[i] = _mm256_add_epi32(dot[i], _mm256_madd_epi16(pairs[i], ones));
        }
        const uint8_t* at = p + LINES * 64 + half % 2 * (SCALES / 2);
        const __m256 scale = numbers(at);
        __m256 minimum = scale;
        if (F::MINIMUM) minimum = numbers(at + SCALES);
        for (int i = 0; i < T; ++i) {
          const int64_t number = (token + i) * x.group_stride + g;
          const __m256 both = _mm256_mul_ps(scale, _mm256_set1_ps(x.scales[number]));
          sum[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot[i]), both, sum[i]);
          if (F::MINIMUM) sum[i] = _mm256_fmadd_ps(minimum, _mm256_set1_ps(x.sums[number]), sum[i]);
        }
      }
      for (int i = 0; i < T; ++i) _mm256_storeu_ps(sums[i][half / 2] + half % 2 * 8, sum[i]);
    }
  }

#else
  static constexpr int MOST = 2, TILES = 1;
  typedef uint8_t Codes __attribute__((vector_size(8)));
  typedef int16_t Shorts __attribute__((vector_size(16)));  // two rows of four columns
  typedef int32_t Ints __attribute__((vector_size(16)));

  static void twice(const int8_t* from, Shorts& to) {
    for (int c = 0; c < 8; ++c) to[c] = from[c % 4];
  }

  // T tokens, N tiles that stand `next` bytes apart.
  template <int T, int N>
  static void some(const uint8_t* start, int64_t next, int64_t groups, const SkInput& x, int64_t token, float (*sums)[N][SK_TILE]) {
    for (int n = 0; n < N; ++n) {
      const uint8_t* p = start + n * next;
      const int8_t* a = static_cast<const int8_t*>(x.rows) + token * x.stride;
      float sum[T][SK_TILE] = {};
      for (int64_t g = 0; g < groups; ++g, p += BYTES, a += GROUP) {
        Ints dot[T][8] = {};
        // Sums of products stay within 16 bits: four lines of 15 * 127 from both nibbles, or two of 128 * 127.
        constexpr int TOGETHER = F::BITS == 4 ? 4 : 2;
        for (int line = 0; line < LINES; line += TOGETHER) {
          Shorts pairs[T][8] = {};
          for (int l = line; l < line + TOGETHER; ++l)
            for (int i = 0; i < T; ++i) {
              const int8_t* at = a + i * x.stride + l * COLUMNS;
              Shorts left, right;
              twice(at, left);
              if (F::BITS == 4) twice(at + 4, right);
              for (int v = 0; v < 8; ++v) {
                Codes bytes;
                __builtin_memcpy(&bytes, p + l * 64 + v * 8, 8);
                const Shorts code = __builtin_convertvector(bytes, Shorts);
                if (F::BITS == 4)
                  pairs[i][v] += (code & 15) * left + (code >> 4) * right;
                else
                  pairs[i][v] += (code - 128) * left;
              }
            }
          for (int i = 0; i < T; ++i)
            for (int v = 0; v < 8; ++v) {
              Ints both;
              __builtin_memcpy(&both, &pairs[i][v], 16);
              dot[i][v] += (both >> 16) + ((both << 16) >> 16);
            }
        }
        for (int i = 0; i < T; ++i) {
          const int64_t at = (token + i) * x.group_stride + g;
          const int32_t offset = F::BITS == 4 && !F::MINIMUM ? x.offsets[at] : 0;
          const float token_scale = x.scales[at], token_sum = x.sums[at];
          for (int r = 0; r < SK_TILE; ++r) {
            const int32_t whole = dot[i][r / 2][r % 2 * 2] + dot[i][r / 2][r % 2 * 2 + 1] + offset;
            sum[i][r] += float(whole) * (number<F>(p + LINES * 64, r) * token_scale);
            if (F::MINIMUM) sum[i][r] += number<F>(p + LINES * 64 + SCALES, r) * token_sum;
          }
        }
      }
      for (int i = 0; i < T; ++i) __builtin_memcpy(sums[i][n], sum[i], sizeof sum[i]);
    }
  }
#endif

  template <int T, int N>
  static void tokens(const SkMatrix& m, const SkInput& x, const Output& out, int64_t row, int64_t token) {
    const int64_t groups = (m.cols + GROUP - 1) / GROUP, next = groups * BYTES;
    const uint8_t* p = static_cast<const uint8_t*>(m.data) + row / SK_TILE * next;
    float sums[T][N][SK_TILE];
    some<T, N>(p, next, groups, x, token, sums);
    for (int i = 0; i < T; ++i)
      for (int n = 0; n < N; ++n) out.put(m.bias, token + i, row + n * SK_TILE, sums[i][n]);
  }

  template <int N>
  static void all_tokens(const SkMatrix& m, const SkInput& x, const Output& out, int64_t row) {
    int64_t token = 0;
    for (; token + MOST <= x.count; token += MOST) tokens<MOST, N>(m, x, out, row, token);
    if constexpr (MOST > 4) {
      if (x.count - token == 5) return tokens<5, N>(m, x, out, row, token);
      if (x.count - token == 4) return tokens<4, N>(m, x, out, row, token);
    }
    if constexpr (MOST > 2) {
      if (x.count - token == 3) return tokens<3, N>(m, x, out, row, token);
      if (x.count - token == 2) return tokens<2, N>(m, x, out, row, token);
    }
    if (x.count - token == 1) tokens<1, N>(m, x, out, row, token);
  }

  static void all(const SkMatrix& m, const SkInput& x, const Output& out, int64_t row) {
    // Two tiles share the loads of their tokens; with few tokens one stream is read better than two.
    if (TILES == 2 && x.count > 4)
      for (; row + SK_TILE < out.rows; row += 2 * SK_TILE) all_tokens<TILES>(m, x, out, row);
    for (; row < out.rows; row += SK_TILE) all_tokens<1>(m, x, out, row);
  }
};

// A format F says
//   BITS, HALF (float16 scales; else bfloat16), MINIMUM
//   bool fits(cols, group); int64_t row_bytes(cols, group) of a stored row
//   void read(source, scales, row, cols, group, g, codes, scale, minimum): group g of a stored row, codes as in a tile
template <class F>
struct Tiles {
  static int64_t groups(int64_t cols, int64_t group) { return (cols + group - 1) / group; }
  static int64_t tile_bytes(int64_t cols, int64_t group) { return groups(cols, group) * group_bytes<F>(group); }

  static int64_t packed_size(int64_t rows, int64_t cols, int64_t group) {
    if (rows < 0 || cols < 1 || !F::fits(cols, group)) return -1;
    int64_t size;
    if (__builtin_mul_overflow(rows / SK_TILE + (rows % SK_TILE != 0), tile_bytes(cols, group), &size)) return -1;
    return size;
  }

  static int64_t source_size(int64_t rows, int64_t cols, int64_t group) {
    int64_t size;
    if (rows < 0 || cols < 1 || !F::fits(cols, group)) return -1;
    return __builtin_mul_overflow(rows, F::row_bytes(cols, group), &size) ? -1 : size;
  }

  static void pack(int64_t rows, int64_t cols, int64_t group, const void* source, const void* scales, const int64_t* order,
                   void* out, int64_t begin, int64_t end) {
    constexpr uint8_t NOTHING = F::MINIMUM ? 0 : F::BITS == 4 ? 8 : 128;
    uint8_t* p = static_cast<uint8_t*>(out) + begin * tile_bytes(cols, group);
    for (int64_t tile = begin; tile < end; ++tile)
      for (int64_t g = 0; g < groups(cols, group); ++g) {
        uint16_t scale[SK_TILE], minimum[SK_TILE];
        for (int64_t r = 0; r < SK_TILE; ++r) {
          const int64_t row = tile * SK_TILE + r;
          uint8_t codes[128];
          if (row < rows) {
            F::read(source, scales, order ? order[row] : row, cols, group, g, codes, scale + r, minimum + r);
          } else {
            for (int64_t j = 0; j < group; ++j) codes[j] = NOTHING;
            scale[r] = minimum[r] = 0;
          }
          for (int64_t line = 0; line < lines<F>(group); ++line) {
            uint32_t word, high;  // four columns of the row
            __builtin_memcpy(&word, codes + line * (F::BITS == 8 ? 4 : 8), 4);
            if (F::BITS == 4) {
              __builtin_memcpy(&high, codes + line * 8 + 4, 4);
              word |= high << 4;
            }
            __builtin_memcpy(p + line * 64 + r * 4, &word, 4);
          }
        }
        p += lines<F>(group) * 64;
        __builtin_memcpy(p, scale, SCALES);
        p += SCALES;
        if (F::MINIMUM) {
          __builtin_memcpy(p, minimum, SCALES);
          p += SCALES;
        }
      }
  }

  static void row(const SkMatrix& m, int64_t row, float* out) {
    const int64_t r = row % SK_TILE, count = lines<F>(m.group);
    const uint8_t* p = static_cast<const uint8_t*>(m.data) + row / SK_TILE * tile_bytes(m.cols, m.group);
    for (int64_t g = 0; g * m.group < m.cols; ++g, p += group_bytes<F>(m.group)) {
      float v[128];
      const float scale = number<F>(p + count * 64, r), minimum = F::MINIMUM ? number<F>(p + count * 64 + SCALES, r) : 0.f;
      for (int64_t j = 0; j < m.group; ++j) {
        const int64_t in_line = F::BITS == 8 ? 4 : 8, byte = j / in_line * 64 + r * 4 + j % 4;
        const int32_t code = F::BITS == 8 ? p[byte] - 128 : j % 8 < 4 ? p[byte] & 15 : p[byte] >> 4;
        v[j] = F::MINIMUM ? scale * float(code) + minimum : scale * float(F::BITS == 8 ? code : code - 8);
      }
      const int64_t start = g * m.group, here = m.cols - start < m.group ? m.cols - start : m.group;
      for (int64_t j = 0; j < here; ++j) out[start + j] = v[j];
    }
  }

  static void product(const SkMatrix& m, const SkInput& x, float* y, int64_t y_stride, bool add, int64_t begin, int64_t end) {
    if constexpr (F::BITS == 8)
      if (m.group == 16) return Product<F, 16>::all(m, x, {y, y_stride, add, end}, begin);
    switch (m.group) {
      case 32: return Product<F, 32>::all(m, x, {y, y_stride, add, end}, begin);
      case 64: return Product<F, 64>::all(m, x, {y, y_stride, add, end}, begin);
      case 128: return Product<F, 128>::all(m, x, {y, y_stride, add, end}, begin);
    }
  }

  static constexpr SkFormat format(const char* name) { return {name, SK_Q8, packed_size, source_size, pack, product, row, nullptr}; }
};

}  // namespace
