// Matrix times few tokens: packed rows are unpacked in registers, each time for up to MOST tokens.
//   y[t][r] = sum_g weight_scale[r][g] * token_scale[t][g] * sum_j q[r][g][j] * code[t][g][j]
// The inner sums are exact integers. The plain loop at the end is what every level computes; the two others
// exist because the compiler keeps one accumulator per group and reduces it at every group.
#include "ahead.h"
#include "kernels.h"
#include "number.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

void finish(const SkOutput& out, int64_t token, int64_t row, float sum) {
  const float bias = out.bias ? load(out.bias, out.type, row) : 0.f;
  store(out.y, out.type, token * out.stride + row, sum + bias);
}

#if defined(__AVX512VNNI__)
constexpr int MOST = 3;
constexpr int ROWS = 4;      // rows together: activations are loaded once for all of them

struct Lanes {
  alignas(64) int32_t group[16];    // which of the step's groups a 32-bit lane belongs to
  alignas(64) int64_t low[8], high[8];  // 8-byte pieces of 128 activations that meet the low and the high nibbles
};

__m128 quarters(__m512 v) {
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// The totals of four registers, cheaper together than one by one.
__m128 totals(__m512 a, __m512 b, __m512 c, __m512 d) {
  return _mm_hadd_ps(_mm_hadd_ps(quarters(a), quarters(b)), _mm_hadd_ps(quarters(c), quarters(d)));
}

template <int BITS, int GROUP>
constexpr Lanes lanes() {
  Lanes l{};
  for (int i = 0; i < 16; ++i) l.group[i] = BITS == 4 ? 8 * i / GROUP : GROUP == 32 ? i / 8 : 0;
  for (int i = 0; i < 8; ++i) {
    const int half = GROUP / 16;  // 8-byte pieces in half a group
    l.low[i] = i / half * 2 * half + i % half;
    l.high[i] = l.low[i] + half;
  }
  return l;
}

template <int BITS, int GROUP, int T, bool ONCE>
void rows_together(const SkWeight& w, const SkTokens& t, int64_t token, const SkOutput& out, int64_t begin, int64_t end) {
  // A step is 64 or 128 weights: whole groups, whole registers.
  constexpr int VECTORS = BITS == 4 || GROUP == 128 ? 2 : 1;
  constexpr int STEP = VECTORS * 64, STEP_GROUPS = STEP / GROUP, LOADS = STEP * BITS / 512;
  static constexpr Lanes L = lanes<BITS, GROUP>();
  const __m512i lane_group = _mm512_load_si512(L.group), low = _mm512_load_si512(L.low), high = _mm512_load_si512(L.high);
  const __m512i nibble = _mm512_set1_epi8(15), eight = _mm512_set1_epi8(8), sign = _mm512_set1_epi8(char(0x80));
  const int64_t row_bytes = w.groups * GROUP * BITS / 8;
  const uint8_t* limit = w.packed + w.rows * row_bytes;
  // Copies: the compiler must otherwise fear that storing a result changes them.
  const int64_t groups = w.groups, code_stride = t.code_stride, group_stride = t.group_stride;
  const int8_t* token_codes = t.codes + token * code_stride;
  const float* token_scales = t.scales + token * group_stride;
  for (int64_t row = begin; row < end; row += ROWS) {
    const uint8_t* p[ROWS];
    const uint16_t* s[ROWS];
    for (int r = 0; r < ROWS; ++r) {  // past the end the last row is computed again and not stored
      const int64_t at = row + r < end ? row + r : end - 1;
      p[r] = w.packed + at * row_bytes;
      s[r] = w.scales + at * w.groups;
    }
    const uint8_t* later = p[0] + (token == 0 ? AHEAD : 0);
    __m512 sum[ROWS][T];
    for (int r = 0; r < ROWS; ++r)
      for (int i = 0; i < T; ++i) sum[r][i] = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups; g += 16) {
      const int64_t some = groups - g < 16 ? groups - g : 16;
      __m512 scale[ROWS][T], token_scale[T];
      for (int i = 0; i < T; ++i) token_scale[i] = _mm512_loadu_ps(token_scales + i * group_stride + g);
      for (int r = 0; r < ROWS; ++r) {
        const __m256i half = _mm256_maskz_loadu_epi16(__mmask16((1u << some) - 1), s[r] + g);
        const __m512 weight_scale = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
        for (int i = 0; i < T; ++i) scale[r][i] = _mm512_mul_ps(weight_scale, token_scale[i]);
      }
      __m512i pick = lane_group;
      for (int64_t first = 0; first < some; first += STEP_GROUPS) {
        const int64_t k = (g + first) * GROUP, byte = k * BITS / 8;
        __m512i a[T][VECTORS], start[T];
#pragma GCC unroll 4
        for (int i = 0; i < T; ++i) {
          const int8_t* codes = token_codes + i * code_stride + k;
          for (int v = 0; v < VECTORS; ++v) a[i][v] = _mm512_loadu_si512(codes + 64 * v);
          if (BITS == 4 && GROUP < 128) {
            const __m512i both = a[i][0];
            a[i][0] = _mm512_permutex2var_epi64(both, low, a[i][VECTORS - 1]);
            a[i][VECTORS - 1] = _mm512_permutex2var_epi64(both, high, a[i][VECTORS - 1]);
          }
          // Codes are read as q + 8 or q + 128; what that adds is taken off again in each lane, where it is exact.
          __m512i extra = _mm512_setzero_si512();
          for (int v = 0; v < VECTORS; ++v) extra = _mm512_dpbusd_epi32(extra, BITS == 4 ? eight : sign, a[i][v]);
          start[i] = _mm512_sub_epi32(_mm512_setzero_si512(), extra);
        }
        // A register may run into the next row, where the activations are zero. Only the end of the matrix is read with
        // a mask: masked loads keep the hardware from reading ahead (measured 4-8 times slower).
        const bool whole = p[ROWS - 1] + byte + 64 * LOADS <= limit;
        const __mmask64 mask = row_bytes - byte >= 64 ? ~0ull : (1ull << (row_bytes - byte)) - 1;
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
          __m512i code[VECTORS];
          for (int v = 0; v < LOADS; ++v, later += 64) fetch<ONCE>(later);
          if (__builtin_expect(whole, 1))
            for (int v = 0; v < LOADS; ++v) code[v] = _mm512_loadu_si512(p[r] + byte + 64 * v);
          else
            code[0] = _mm512_maskz_loadu_epi8(mask, p[r] + byte);
          if (BITS == 4) {
            code[VECTORS - 1] = _mm512_and_si512(_mm512_srli_epi16(code[0], 4), nibble);
            code[0] = _mm512_and_si512(code[0], nibble);
          } else {
            for (int v = 0; v < VECTORS; ++v) code[v] = _mm512_xor_si512(code[v], sign);
          }
#pragma GCC unroll 4
          for (int i = 0; i < T; ++i) {
            __m512i dot = start[i];
            for (int v = 0; v < VECTORS; ++v) dot = _mm512_dpbusd_epi32(dot, code[v], a[i][v]);
            sum[r][i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_permutexvar_ps(pick, scale[r][i]), sum[r][i]);
          }
        }
        pick = _mm512_add_epi32(pick, _mm512_set1_epi32(STEP_GROUPS));
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < T; ++i) {
      float y[ROWS];
      _mm_storeu_ps(y, totals(sum[0][i], sum[1][i], sum[2][i], sum[3][i]));
      for (int r = 0; r < ROWS && row + r < end; ++r) finish(out, token + i, row + r, y[r]);
    }
  }
}

#elif defined(__AVX2__)
constexpr int MOST = 4;

float total(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

template <int BITS, int GROUP, int T, bool ONCE>
void rows_together(const SkWeight& w, const SkTokens& t, int64_t token, const SkOutput& out, int64_t begin, int64_t end) {
  constexpr int PIECES = GROUP / 32;  // registers of 32 codes in a group
  const __m256i nibble = _mm256_set1_epi8(15), eight = _mm256_set1_epi8(8), ones = _mm256_set1_epi16(1);
  for (int64_t row = begin; row < end; ++row) {
    const uint8_t* p = w.packed + row * w.groups * GROUP * BITS / 8;
    const uint16_t* s = w.scales + row * w.groups;
    __m256 sum[T];
    for (int i = 0; i < T; ++i) sum[i] = _mm256_setzero_ps();
    for (int64_t g = 0; g < w.groups; ++g, p += GROUP * BITS / 8) {
      __m256i code[PIECES];
      if (BITS == 4 && GROUP == 32) {
        const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        code[0] = _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(both, 4), both), nibble);
      } else if (BITS == 4) {
        for (int v = 0; v < PIECES / 2; ++v) {
          const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32 * v));
          code[v] = _mm256_and_si256(both, nibble);
          code[v + PIECES / 2] = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
        }
      } else {
        for (int v = 0; v < PIECES; ++v) code[v] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32 * v));
      }
      const float weight_scale = from_bfloat16(s[g]);
      for (int i = 0; i < T; ++i) {
        const int8_t* x = t.codes + (token + i) * t.code_stride + g * GROUP;
        __m256i dot = _mm256_setzero_si256();
        for (int v = 0; v < PIECES; ++v) {
          const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 32 * v));
          // Pairs stay within 16 bits: 2 * 15 * 127, times 4 pieces; or 2 * 128 * 127.
          if (BITS == 4)
            dot = _mm256_add_epi16(dot, _mm256_sub_epi16(_mm256_maddubs_epi16(code[v], a), _mm256_maddubs_epi16(eight, a)));
          else
            dot = _mm256_add_epi32(
                dot, _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(code[v]), _mm256_sign_epi8(a, code[v])), ones));
        }
        if (BITS == 4) dot = _mm256_madd_epi16(dot, ones);
        const float scale = weight_scale * t.scales[(token + i) * t.group_stride + g];
        sum[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), _mm256_set1_ps(scale), sum[i]);
      }
    }
    for (int i = 0; i < T; ++i) finish(out, token + i, row, total(sum[i]));
  }
}

#else
constexpr int MOST = 4;

template <int BITS, int GROUP, int T, bool ONCE>
void rows_together(const SkWeight& w, const SkTokens& t, int64_t token, const SkOutput& out, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    float sum[T] = {};
    for (int64_t g = 0; g < w.groups; ++g) {
      const uint8_t* p = w.packed + (row * w.groups + g) * GROUP * BITS / 8;
      const float weight_scale = from_bfloat16(w.scales[row * w.groups + g]);
      for (int i = 0; i < T; ++i) {
        const int8_t* x = t.codes + (token + i) * t.code_stride + g * GROUP;
        const int64_t at = (token + i) * t.group_stride + g;
        int32_t dot = t.offsets[at];
        if (BITS == 4) {
          for (int j = 0; j < GROUP / 2; ++j) dot += int32_t(p[j] & 15) * int32_t(x[j]);
          for (int j = 0; j < GROUP / 2; ++j) dot += int32_t(p[j] >> 4) * int32_t(x[j + GROUP / 2]);
        } else {
          const int8_t* q = reinterpret_cast<const int8_t*>(p);
          for (int j = 0; j < GROUP; ++j) dot += int32_t(q[j]) * int32_t(x[j]);
        }
        sum[i] += weight_scale * t.scales[at] * float(dot);
      }
    }
    for (int i = 0; i < T; ++i) finish(out, token + i, row, sum[i]);
  }
}
#endif

template <int BITS, int GROUP>
void tokens(const SkWeight& w, const SkTokens& t, const SkOutput& out, int64_t begin, int64_t end) {
  if (t.count == 1) return rows_together<BITS, GROUP, 1, true>(w, t, 0, out, begin, end);
  if (t.count == 2) return rows_together<BITS, GROUP, 2, true>(w, t, 0, out, begin, end);
  if (t.count == 3) return rows_together<BITS, GROUP, 3, true>(w, t, 0, out, begin, end);
  for (int64_t row = begin; row < end; row += 32) {  // few enough rows to stay in the nearest cache over all tokens
    const int64_t stop = row + 32 < end ? row + 32 : end;
    int64_t i = 0;
    for (; i + MOST <= t.count; i += MOST) rows_together<BITS, GROUP, MOST, false>(w, t, i, out, row, stop);
    if (MOST == 4 && t.count - i == 3) rows_together<BITS, GROUP, 3, false>(w, t, i, out, row, stop);
    if (t.count - i == 2) rows_together<BITS, GROUP, 2, false>(w, t, i, out, row, stop);
    if (t.count - i == 1) rows_together<BITS, GROUP, 1, false>(w, t, i, out, row, stop);
  }
}

}  // namespace

namespace ISA {

void product(const SkWeight& w, const SkTokens& t, const SkOutput& out, int64_t begin, int64_t end) {
  switch (w.bits * 1000 + w.group) {
    case 4032: return tokens<4, 32>(w, t, out, begin, end);
    case 4064: return tokens<4, 64>(w, t, out, begin, end);
    case 4128: return tokens<4, 128>(w, t, out, begin, end);
    case 8032: return tokens<8, 32>(w, t, out, begin, end);
    case 8064: return tokens<8, 64>(w, t, out, begin, end);
    case 8128: return tokens<8, 128>(w, t, out, begin, end);
  }
}

}  // namespace ISA
