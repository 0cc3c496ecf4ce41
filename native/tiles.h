// What the tiled formats share. A tile is 16 rows, one to a 32-bit lane, and one stream of bytes: for every group its codes
// in lines of 64 bytes, then 16 scales of 16 bits for each plane, then (formats with a minimum) 16 minima. A line of b-bit
// codes holds 32 / b columns of each row, four to a word: columns k..k+3 in the lowest b bits of the row's four bytes,
// k+4..k+7 in the next b, and so on. Where b does not divide 32, the lower bits (2 of 3, 4 of 5 or 6) come first, then one
// line of the upper ones. Of several planes the lines for the same columns follow one another. Codes are unsigned: F::ZERO
// stands for zero.
//   y[t][r] = sum_g token_scale[t][g] * sum_p weight_scale[p][r][g] * dot[p][r][t][g] (+ minimum[r][g] * token_sum[t][g])
// dot is an exact integer and the sum over groups runs in order, so a token gets the same bits in any batch.
// Rows a matrix does not have carry scale 0. A scale that is not a number makes its row not a number, and no other.
#pragma once
#include "ahead.h"
#include "kernels.h"
#include "number.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t SCALES = 2 * SK_TILE;  // bytes of a tile's scales of one group

template <class F>
constexpr int64_t lines(int64_t group) {
  return group * F::BITS * F::PLANES / 32;
}

template <class F>
constexpr int NUMBERS = F::PLANES + F::MINIMUM;  // 16-bit numbers of a row's group

template <class F>
constexpr int64_t group_bytes(int64_t group) {
  return lines<F>(group) * 64 + SCALES * NUMBERS<F>;
}

// Bits of a code that lie beside those of other columns, and those that are left for the last line.
template <class F>
constexpr int LOWER = F::BITS == 3 ? 2 : F::BITS == 5 || F::BITS == 6 ? 4 : F::BITS;
template <class F>
constexpr int UPPER = F::BITS - LOWER<F>;

// Columns of a step: whole lines, EACH of them.
template <class F>
constexpr int COLUMNS = 32 / (UPPER<F> ? UPPER<F> : F::BITS);
template <class F>
constexpr int EACH = COLUMNS<F> * F::BITS * F::PLANES / 32;

// Columns over which sums of products stay within 16 bits where each is one column's, and sums of two where it is a pair's:
// 8 * 31 * 127 and 8 * 2 * 15 * 127.
template <class F>
constexpr int SHORT = F::BITS > 6 ? 8 : F::BITS > 5 ? 16 : 32;
template <class F>
constexpr int SHORT_PAIRS = F::BITS > 6 ? 4 : F::BITS > 5 ? 8 : F::BITS > 4 ? 16 : 32;

// The codes of columns 4q..4q+3 of a step, a byte each, from as many bytes of each of its lines as a W has.
template <class F, class W>
inline __attribute__((always_inline)) W codes_of(const W* line, int q, int plane) {
  constexpr uint64_t EVERY = 0x0101010101010101;
  constexpr int L = LOWER<F>, U = UPPER<F>, A_LINE = 8 / L;
  if (F::BITS == 8) return line[plane];
  if (!U) return (line[plane] >> (L * q)) & W(W{} + EVERY * ((1 << L) - 1));
  const W low = line[q / A_LINE] >> (L * (q % A_LINE)), top = line[EACH<F> - 1];
  const W high = U * q < L ? top << (L - U * q) : top >> (U * q - L);
  return (low & W(W{} + EVERY * ((1 << L) - 1))) | (high & W(W{} + EVERY * (((1 << U) - 1) << L)));
}

// The inverse: a word of codes into the words of its row, which were zero.
template <class F>
inline void put_codes(uint32_t* line, int q, int plane, uint32_t codes) {
  constexpr uint32_t EVERY = 0x01010101;
  constexpr int L = LOWER<F>, U = UPPER<F>, A_LINE = 8 / L;
  if (!U) {
    line[plane] |= codes << (L * q);
  } else {
    line[q / A_LINE] |= (codes & EVERY * ((1 << L) - 1)) << (L * (q % A_LINE));
    line[EACH<F> - 1] |= (codes >> L & EVERY * ((1 << U) - 1)) << (U * q);
  }
}

// What codes add too much to a dot of which `offset` is that of ZERO = 8; a power of two, so nothing is lost.
template <class F, class T>
inline __attribute__((always_inline)) T of_zero(T offset) {
  constexpr int UP = F::ZERO > 8 ? F::ZERO / 8 : 1, DOWN = F::ZERO > 4 ? 0 : F::ZERO > 2 ? 1 : F::ZERO > 1 ? 2 : 3;
  return F::ZERO ? (offset * UP) >> DOWN : offset * 0;
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
  static constexpr int LINES = int(lines<F>(GROUP)), BYTES = int(group_bytes<F>(GROUP)), PLANES = F::PLANES;
  static constexpr int WIDE = COLUMNS<F>, QUADS = WIDE / 4, STEPS = GROUP / WIDE;

#if defined(__AVX512VNNI__)
  static constexpr int MOST = PLANES > 1 ? 4 : 6;  // tokens together: with two tiles their sums and dots fill the registers
  static constexpr int TILES = 2;
  static constexpr int64_t FAR = 32768;
  typedef uint64_t Wide __attribute__((vector_size(64)));

  static __m512 numbers(const uint8_t* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return F::HALF ? _mm512_cvtph_ps(bits) : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }

  static __m512i start(int32_t offset) {
    if (F::ZERO == 0) return _mm512_setzero_si512();
    const __m512i all = _mm512_set1_epi32(offset);
    if (F::ZERO == 8) return all;
    constexpr int POWER = __builtin_ctz(unsigned(F::ZERO ? F::ZERO : 8));
    return POWER > 3 ? _mm512_slli_epi32(all, POWER > 3 ? POWER - 3 : 0) : _mm512_srai_epi32(all, POWER < 3 ? 3 - POWER : 0);
  }

  // T tokens, N tiles that stand `next` bytes apart.
  template <int T, int N>
  static void some(const uint8_t* p, int64_t next, int64_t groups, const SkInput& x, int64_t token, float (*sums)[N][SK_TILE]) {
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
      __m512i dot[T][N][PLANES];
#pragma GCC unroll 8
      for (int i = 0; i < T; ++i) {
        const __m512i from = start(offsets[i * group_stride + g]);
        for (int n = 0; n < N; ++n)
          for (int plane = 0; plane < PLANES; ++plane) dot[i][n][plane] = from;
      }
#pragma GCC unroll 8
      for (int step = 0; step < STEPS; ++step) {
        Wide line[N][EACH<F>];
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
          for (int l = 0; l < EACH<F>; ++l) {
            const uint8_t* at = p + n * next + (step * EACH<F> + l) * 64;
            fetch<N == 1>(at + ahead);
            line[n][l] = Wide(_mm512_loadu_si512(at));
          }
#pragma GCC unroll 8
        for (int q = 0; q < QUADS; ++q) {
          __m512i codes[N][PLANES];
#pragma GCC unroll 2
          for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
            for (int plane = 0; plane < PLANES; ++plane) codes[n][plane] = __m512i(codes_of<F>(line[n], q, plane));
#pragma GCC unroll 8
          for (int i = 0; i < T; ++i) {
            const __m512i quad = _mm512_set1_epi32(four(a + i * stride + step * WIDE + q * 4));
#pragma GCC unroll 2
            for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
              for (int plane = 0; plane < PLANES; ++plane)
                dot[i][n][plane] = _mm512_dpbusd_epi32(dot[i][n][plane], codes[n][plane], quad);
          }
        }
      }
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) {
        const uint8_t* at = p + n * next + LINES * 64;
        fetch<N == 1>(at + ahead);
#pragma GCC unroll 4
        for (int plane = 0; plane < PLANES; ++plane) {
          const __m512 scale = numbers(at + plane * SCALES);
#pragma GCC unroll 8
          for (int i = 0; i < T; ++i) {
            const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(scales[i * group_stride + g]));
            sum[i][n] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[i][n][plane]), both, sum[i][n]);
          }
        }
        if (F::MINIMUM) {
          const __m512 minimum = numbers(at + PLANES * SCALES);
#pragma GCC unroll 8
          for (int i = 0; i < T; ++i)
            sum[i][n] = _mm512_fmadd_ps(minimum, _mm512_set1_ps(totals[i * group_stride + g]), sum[i][n]);
        }
      }
    }
    for (int i = 0; i < T; ++i)
      for (int n = 0; n < N; ++n) _mm512_storeu_ps(sums[i][n], sum[i][n]);
  }

#elif defined(__AVX2__)
  static constexpr int MOST = 4, TILES = 1;
  typedef uint64_t Wide __attribute__((vector_size(32)));

  static __m256 numbers(const uint8_t* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return F::HALF ? _mm256_cvtph_ps(bits) : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }

  // T tokens, N tiles that stand `next` bytes apart, half a tile at a time.
  template <int T, int N>
  static void some(const uint8_t* start, int64_t next, int64_t groups, const SkInput& x, int64_t token, float (*sums)[N][SK_TILE]) {
    const __m256i ones = _mm256_set1_epi16(1), sign = _mm256_set1_epi8(char(0x80));
    for (int half = 0; half < 2 * N; ++half) {
      const uint8_t* p = start + half / 2 * next;
      const int8_t* a = static_cast<const int8_t*>(x.rows) + token * x.stride;
      __m256 sum[T];
      for (int i = 0; i < T; ++i) sum[i] = _mm256_setzero_ps();
      for (int64_t g = 0; g < groups; ++g, p += BYTES, a += GROUP) {
        __m256i dot[T][PLANES];
#pragma GCC unroll 4
        for (int i = 0; i < T; ++i) {
          const int32_t from = F::BITS == 8 ? 0 : of_zero<F>(x.offsets[(token + i) * x.group_stride + g]);
#pragma GCC unroll 4
          for (int plane = 0; plane < PLANES; ++plane) dot[i][plane] = _mm256_set1_epi32(from);
        }
        // Whole steps whose sums fit, or a part of a step.
        constexpr int FIT = SHORT_PAIRS<F>, TOGETHER = FIT > WIDE ? FIT : WIDE, PART = FIT < WIDE ? FIT / 4 : QUADS;
        for (int span = 0; span < GROUP; span += TOGETHER) {
          __m256i pairs[T][PLANES];
#pragma GCC unroll 4
          for (int k = span; k < span + TOGETHER; k += WIDE) {
            Wide line[EACH<F>];
#pragma GCC unroll 8
            for (int l = 0; l < EACH<F>; ++l) {
              const uint8_t* at = p + (k / WIDE * EACH<F> + l) * 64 + half % 2 * 32;
              line[l] = Wide(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
            }
#pragma GCC unroll 8
            for (int q = 0; q < QUADS; ++q) {
              const bool first = PART < QUADS ? q % PART == 0 : k == span && q == 0;
              const bool last = PART < QUADS ? (q + 1) % PART == 0 : k + WIDE == span + TOGETHER && q + 1 == QUADS;
              __m256i codes[PLANES];
#pragma GCC unroll 4
              for (int plane = 0; plane < PLANES; ++plane) codes[plane] = __m256i(codes_of<F>(line, q, plane));
#pragma GCC unroll 4
              for (int i = 0; i < T; ++i) {
                const __m256i quad = _mm256_set1_epi32(four(a + i * x.stride + k + q * 4));
#pragma GCC unroll 4
                for (int plane = 0; plane < PLANES; ++plane) {
                  __m256i pair;
                  if (F::BITS == 8) {
                    const __m256i code = _mm256_xor_si256(codes[plane], sign);
                    pair = _mm256_maddubs_epi16(_mm256_abs_epi8(code), _mm256_sign_epi8(quad, code));
                  } else {
                    pair = _mm256_maddubs_epi16(codes[plane], quad);
                  }
                  pairs[i][plane] = first ? pair : _mm256_add_epi16(pairs[i][plane], pair);
                  if (last) dot[i][plane] = _mm256_add_epi32(dot[i][plane], _mm256_madd_epi16(pairs[i][plane], ones));
                }
              }
            }
          }
        }
        const uint8_t* at = p + LINES * 64 + half % 2 * (SCALES / 2);
#pragma GCC unroll 4
        for (int plane = 0; plane < PLANES; ++plane) {
          const __m256 scale = numbers(at + plane * SCALES);
#pragma GCC unroll 4
          for (int i = 0; i < T; ++i) {
            const __m256 both = _mm256_mul_ps(scale, _mm256_set1_ps(x.scales[(token + i) * x.group_stride + g]));
            sum[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot[i][plane]), both, sum[i]);
          }
        }
        if (F::MINIMUM) {
          const __m256 minimum = numbers(at + PLANES * SCALES);
#pragma GCC unroll 4
          for (int i = 0; i < T; ++i)
            sum[i] = _mm256_fmadd_ps(minimum, _mm256_set1_ps(x.sums[(token + i) * x.group_stride + g]), sum[i]);
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
        Ints dot[T][PLANES][8] = {};
        constexpr int TOGETHER = SHORT<F> > WIDE ? SHORT<F> : WIDE;
        for (int span = 0; span < GROUP; span += TOGETHER) {
          Shorts pairs[T][PLANES][8] = {};
          for (int k = span; k < span + TOGETHER; k += WIDE)
            for (int q = 0; q < QUADS; ++q) {
              Shorts quad[T];
              for (int i = 0; i < T; ++i) twice(a + i * x.stride + k + q * 4, quad[i]);
              for (int v = 0; v < 8; ++v) {
                uint64_t line[EACH<F>];
                for (int l = 0; l < EACH<F>; ++l) __builtin_memcpy(line + l, p + (k / WIDE * EACH<F> + l) * 64 + v * 8, 8);
                for (int plane = 0; plane < PLANES; ++plane) {
                  const uint64_t word = codes_of<F>(line, q, plane);
                  Codes bytes;
                  __builtin_memcpy(&bytes, &word, 8);
                  const Shorts code = __builtin_convertvector(bytes, Shorts) - (F::BITS == 8 ? 128 : 0);
                  for (int i = 0; i < T; ++i) pairs[i][plane][v] += code * quad[i];
                }
              }
            }
          for (int i = 0; i < T; ++i)
            for (int plane = 0; plane < PLANES; ++plane)
              for (int v = 0; v < 8; ++v) {
                Ints both;
                __builtin_memcpy(&both, &pairs[i][plane][v], 16);
                dot[i][plane][v] += (both >> 16) + ((both << 16) >> 16);
              }
        }
        for (int i = 0; i < T; ++i) {
          const int64_t at = (token + i) * x.group_stride + g;
          const int32_t offset = F::BITS == 8 ? 0 : of_zero<F>(x.offsets[at]);
          const float token_scale = x.scales[at], token_sum = x.sums[at];
          const uint8_t* from = p + LINES * 64;
          for (int plane = 0; plane < PLANES; ++plane)
            for (int r = 0; r < SK_TILE; ++r) {
              const Ints& pair = dot[i][plane][r / 2];
              const int32_t whole = pair[r % 2 * 2] + pair[r % 2 * 2 + 1] + offset;
              sum[i][r] += float(whole) * (number<F>(from + plane * SCALES, r) * token_scale);
            }
          if (F::MINIMUM)
            for (int r = 0; r < SK_TILE; ++r) sum[i][r] += number<F>(from + PLANES * SCALES, r) * token_sum;
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
    // Two tiles share the loads of their tokens; tokens that pass a tile once read one stream better than two.
    if (TILES == 2 && x.count > MOST)
      for (; row + SK_TILE < out.rows; row += 2 * SK_TILE) all_tokens<TILES>(m, x, out, row);
    const int64_t tile = (m.cols + GROUP - 1) / GROUP * BYTES, left = (out.rows - row + SK_TILE - 1) / SK_TILE;
    fetch_first<true>(static_cast<const uint8_t*>(m.data) + row / SK_TILE * tile, left * tile);
    for (; row < out.rows; row += SK_TILE) all_tokens<1>(m, x, out, row);
  }
};

// A format F says
//   BITS of a code, PLANES, ZERO (the code of zero, a power of two, or 0), HALF (float16 scales; else bfloat16), MINIMUM
//   bool fits(cols, group); int64_t row_bytes(cols, group) of a stored row
//   void read(source, scales, row, cols, group, g, codes, numbers): group g of a stored row, codes as in a tile, 128 for
//     each plane, and its NUMBERS
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
    uint8_t* p = static_cast<uint8_t*>(out) + begin * tile_bytes(cols, group);
    for (int64_t tile = begin; tile < end; ++tile)
      for (int64_t g = 0; g < groups(cols, group); ++g, p += group_bytes<F>(group))
        for (int64_t r = 0; r < SK_TILE; ++r) {
          const int64_t row = tile * SK_TILE + r;
          uint8_t codes[F::PLANES * 128];
          uint16_t numbers[NUMBERS<F>] = {};
          if (row < rows)
            F::read(source, scales, order ? order[row] : row, cols, group, g, codes, numbers);
          else
            __builtin_memset(codes, F::ZERO, sizeof codes);
          for (int64_t k = 0; k < group; k += COLUMNS<F>) {
            uint32_t line[EACH<F>] = {};
            for (int q = 0; q < COLUMNS<F> / 4; ++q)
              for (int plane = 0; plane < F::PLANES; ++plane) {
                uint32_t word;
                __builtin_memcpy(&word, codes + plane * 128 + k + q * 4, 4);
                put_codes<F>(line, q, plane, word);
              }
            for (int l = 0; l < EACH<F>; ++l) __builtin_memcpy(p + (k / COLUMNS<F> * EACH<F> + l) * 64 + r * 4, line + l, 4);
          }
          for (int n = 0; n < NUMBERS<F>; ++n) __builtin_memcpy(p + lines<F>(group) * 64 + n * SCALES + r * 2, numbers + n, 2);
        }
  }

  static void row(const SkMatrix& m, int64_t row, float* out) {
    const int64_t r = row % SK_TILE, count = lines<F>(m.group);
    const uint8_t* p = static_cast<const uint8_t*>(m.data) + row / SK_TILE * tile_bytes(m.cols, m.group);
    for (int64_t g = 0; g * m.group < m.cols; ++g, p += group_bytes<F>(m.group)) {
      float v[128] = {};
      for (int64_t k = 0; k < m.group; k += COLUMNS<F>) {
        uint32_t line[EACH<F>];
        for (int l = 0; l < EACH<F>; ++l) __builtin_memcpy(line + l, p + (k / COLUMNS<F> * EACH<F> + l) * 64 + r * 4, 4);
        for (int plane = 0; plane < F::PLANES; ++plane) {
          const float scale = number<F>(p + count * 64 + plane * SCALES, r);
          for (int q = 0; q < COLUMNS<F> / 4; ++q) {
            const uint32_t word = codes_of<F>(line, q, plane);
            for (int c = 0; c < 4; ++c) v[k + q * 4 + c] += scale * float(int32_t(word >> (8 * c) & 255) - F::ZERO);
          }
        }
      }
      if (F::MINIMUM) {
        const float minimum = number<F>(p + count * 64 + F::PLANES * SCALES, r);
        for (int64_t j = 0; j < m.group; ++j) v[j] += minimum;
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

  static constexpr SkFormat format(const char* name, decltype(SkFormat::sound) sound = nullptr) {
    return {name, SK_Q8, packed_size, source_size, pack, product, row, sound};
  }
};

}  // namespace
