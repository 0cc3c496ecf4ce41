// Matrix times many tokens: 32 rows of weights are unpacked once, turned so that a register holds 4 elements of 16 rows,
// and met with all tokens; a group then needs no sum across lanes. Elsewhere than AVX-512 the few-token loop serves.
#include "kernels.h"
#include "number.h"
#if defined(__AVX512VNNI__)
#include <immintrin.h>

namespace {

constexpr int ROWS = 32, DEPTH = 1024, MOST = 6;

struct Tile {
  alignas(64) uint8_t code[2][DEPTH / 4][64];     // [16 rows][element / 4][row][element % 4]
  alignas(64) float scale[2][DEPTH / 32][16];     // [16 rows][group][row]
  alignas(64) float sum[SK_MAX_TOKENS][2][16];
};

// Elements k..k+63 of one row as unsigned codes; past the end of the row they are those of the next. Masked loads are for
// the end of the matrix alone: they keep the hardware from reading ahead.
__m512i codes64(const SkWeight& w, const uint8_t* row, const uint8_t* limit, int64_t k) {
  const uint8_t* at = row + (w.bits == 8 ? k : w.group == 128 ? k / 128 * 64 : k / 2);
  const int64_t width = w.bits == 8 || w.group == 128 ? 64 : 32, left = limit - at;
  __m512i raw;
  if (__builtin_expect(left < width, 0))
    raw = _mm512_maskz_loadu_epi8((1ull << left) - 1, at);
  else if (width == 64)
    raw = _mm512_loadu_si512(at);
  else
    raw = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
  if (w.bits == 8) return _mm512_xor_si512(raw, _mm512_set1_epi8(char(0x80)));
  const __m512i nibble = _mm512_set1_epi8(15), high = _mm512_and_si512(_mm512_srli_epi16(raw, 4), nibble);
  if (w.group == 128) return k % 128 ? high : _mm512_and_si512(raw, nibble);
  const __m512i halves = _mm512_inserti64x4(_mm512_and_si512(raw, nibble), _mm512_castsi512_si256(high), 1);
  if (w.group == 64) return halves;
  return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 1, 4, 5, 2, 3, 6, 7), halves);
}

// 16 registers of 16 32-bit lanes: rows become columns.
void transpose(const __m512i* in, uint8_t (*out)[64]) {
  __m512i a[16], b[16];
  for (int i = 0; i < 8; ++i) {
    a[2 * i] = _mm512_unpacklo_epi32(in[2 * i], in[2 * i + 1]);
    a[2 * i + 1] = _mm512_unpackhi_epi32(in[2 * i], in[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 2; ++j) {
      b[4 * i + 2 * j] = _mm512_unpacklo_epi64(a[4 * i + j], a[4 * i + 2 + j]);
      b[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(a[4 * i + j], a[4 * i + 2 + j]);
    }
  for (int j = 0; j < 4; ++j) {
    const __m512i even01 = _mm512_shuffle_i32x4(b[j], b[4 + j], 0x88), even23 = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0x88);
    const __m512i odd01 = _mm512_shuffle_i32x4(b[j], b[4 + j], 0xdd), odd23 = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0xdd);
    _mm512_store_si512(out[j], _mm512_shuffle_i32x4(even01, even23, 0x88));
    _mm512_store_si512(out[4 + j], _mm512_shuffle_i32x4(odd01, odd23, 0x88));
    _mm512_store_si512(out[8 + j], _mm512_shuffle_i32x4(even01, even23, 0xdd));
    _mm512_store_si512(out[12 + j], _mm512_shuffle_i32x4(odd01, odd23, 0xdd));
  }
}

void unpack(const SkWeight& w, int64_t first_row, int64_t rows, int64_t k, int64_t depth, Tile& tile) {
  const int64_t row_bytes = w.groups * w.group * w.bits / 8;
  const uint8_t* limit = w.packed + w.rows * row_bytes;
  for (int side = 0; side < 2; ++side) {
    for (int64_t d = 0; d < depth; d += 64) {
      __m512i in[16];
      for (int r = 0; r < 16; ++r) {
        const int64_t row = side * 16 + r < rows ? first_row + side * 16 + r : first_row;
        in[r] = codes64(w, w.packed + row * row_bytes, limit, k + d);
      }
      transpose(in, tile.code[side] + d / 4);
    }
    for (int64_t g = 0; g * w.group < depth; ++g)
      for (int r = 0; r < 16; ++r) {
        const int64_t row = first_row + side * 16 + r;
        tile.scale[side][g][r] = side * 16 + r < rows ? from_bfloat16(w.scales[row * w.groups + k / w.group + g]) : 0.f;
      }
  }
}

template <int T>
void multiply(const SkWeight& w, const SkTokens& t, int64_t token, int64_t k, int64_t depth, Tile& tile) {
  __m512 sum[T][2];
  for (int i = 0; i < T; ++i)
    for (int side = 0; side < 2; ++side) sum[i][side] = _mm512_load_ps(tile.sum[token + i][side]);
  const int8_t* codes = t.codes + token * t.code_stride + k;
  const int64_t steps = w.group / 4;
  for (int64_t g = 0; g * w.group < depth; ++g) {
    const int64_t at = token * t.group_stride + k / w.group + g;
    __m512i dot[T][2];
    for (int i = 0; i < T; ++i) dot[i][0] = dot[i][1] = _mm512_set1_epi32(t.offsets[at + i * t.group_stride]);
    for (int64_t step = g * steps; step < (g + 1) * steps; ++step) {
      const __m512i left = _mm512_load_si512(tile.code[0][step]), right = _mm512_load_si512(tile.code[1][step]);
      for (int i = 0; i < T; ++i) {
        int32_t four;
        __builtin_memcpy(&four, codes + i * t.code_stride + step * 4, 4);
        const __m512i a = _mm512_set1_epi32(four);
        dot[i][0] = _mm512_dpbusd_epi32(dot[i][0], left, a);
        dot[i][1] = _mm512_dpbusd_epi32(dot[i][1], right, a);
      }
    }
    const __m512 left = _mm512_load_ps(tile.scale[0][g]), right = _mm512_load_ps(tile.scale[1][g]);
    for (int i = 0; i < T; ++i) {
      const __m512 scale = _mm512_set1_ps(t.scales[at + i * t.group_stride]);
      sum[i][0] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[i][0]), _mm512_mul_ps(left, scale), sum[i][0]);
      sum[i][1] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[i][1]), _mm512_mul_ps(right, scale), sum[i][1]);
    }
  }
  for (int i = 0; i < T; ++i)
    for (int side = 0; side < 2; ++side) _mm512_store_ps(tile.sum[token + i][side], sum[i][side]);
}

}  // namespace

namespace ISA {

void product_many(const SkWeight& w, const SkTokens& t, const SkOutput& out, int64_t begin, int64_t end) {
  Tile tile;
  const int64_t elements = w.groups * w.group;
  for (int64_t row = begin; row < end; row += ROWS) {
    const int64_t rows = end - row < ROWS ? end - row : ROWS;
    for (int64_t i = 0; i < t.count; ++i)
      for (int side = 0; side < 2; ++side) _mm512_store_ps(tile.sum[i][side], _mm512_setzero_ps());
    for (int64_t k = 0; k < elements; k += DEPTH) {
      const int64_t depth = elements - k < DEPTH ? elements - k : DEPTH;
      unpack(w, row, rows, k, depth, tile);
      int64_t i = 0;
      for (; i + MOST <= t.count; i += MOST) multiply<MOST>(w, t, i, k, depth, tile);
      switch (t.count - i) {
        case 5: multiply<5>(w, t, i, k, depth, tile); break;
        case 4: multiply<4>(w, t, i, k, depth, tile); break;
        case 3: multiply<3>(w, t, i, k, depth, tile); break;
        case 2: multiply<2>(w, t, i, k, depth, tile); break;
        case 1: multiply<1>(w, t, i, k, depth, tile); break;
      }
    }
    float bias[ROWS];
    for (int64_t r = 0; r < ROWS; ++r) bias[r] = out.bias && r < rows ? load(out.bias, out.type, row + r) : 0.f;
    for (int64_t i = 0; i < t.count; ++i) {
      float v[ROWS];
      for (int64_t r = 0; r < ROWS; ++r) v[r] = tile.sum[i][r / 16][r % 16] + bias[r];
      const int64_t at = i * out.stride + row;
      if (out.type == 0)
        for (int64_t r = 0; r < rows; ++r) static_cast<float*>(out.y)[at + r] = v[r];
      else if (out.type == 1)
        for (int64_t r = 0; r < rows; ++r) static_cast<uint16_t*>(out.y)[at + r] = to_bfloat16(v[r]);
      else
        for (int64_t r = 0; r < rows; ++r) static_cast<uint16_t*>(out.y)[at + r] = to_float16(v[r]);
    }
  }
}

}  // namespace ISA

#else

namespace ISA {

void product_many(const SkWeight& w, const SkTokens& t, const SkOutput& out, int64_t begin, int64_t end) {
  product(w, t, out, begin, end);
}

}  // namespace ISA
#endif
