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

namespace {

// A format F says
//   BITS, HALF (float16 scales; else bfloat16), MINIMUM
//   bool fits(cols, group); int64_t row_bytes(cols, group) of a stored row
//   void read(source, scales, row, cols, group, g, codes, scale, minimum): group g of a stored row, codes as in a tile
template <class F>
struct Tiles {
  static constexpr int64_t SCALES = 2 * SK_TILE;

  static int64_t lines(int64_t group) { return group * F::BITS / 32; }
  static int64_t group_bytes(int64_t group) { return lines(group) * 64 + SCALES * (F::MINIMUM ? 2 : 1); }
  static int64_t groups(int64_t cols, int64_t group) { return (cols + group - 1) / group; }
  static int64_t tile_bytes(int64_t cols, int64_t group) { return groups(cols, group) * group_bytes(group); }

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
          for (int64_t line = 0; line < lines(group); ++line)
            for (int64_t c = 0; c < 4; ++c)
              p[line * 64 + r * 4 + c] =
                  F::BITS == 8 ? codes[line * 4 + c] : uint8_t(codes[line * 8 + c] | codes[line * 8 + 4 + c] << 4);
        }
        p += lines(group) * 64;
        __builtin_memcpy(p, scale, SCALES);
        p += SCALES;
        if (F::MINIMUM) {
          __builtin_memcpy(p, minimum, SCALES);
          p += SCALES;
        }
      }
  }

  static float number(const uint8_t* p, int64_t i) {
    uint16_t bits;
    __builtin_memcpy(&bits, p + 2 * i, 2);
    return F::HALF ? from_float16(bits) : from_bfloat16(bits);
  }

  static void row(const SkMatrix& m, int64_t row, float* out) {
    const int64_t r = row % SK_TILE, count = lines(m.group);
    const uint8_t* p = static_cast<const uint8_t*>(m.data) + row / SK_TILE * tile_bytes(m.cols, m.group);
    for (int64_t g = 0; g * m.group < m.cols; ++g, p += group_bytes(m.group)) {
      float v[128];
      const float scale = number(p + count * 64, r), minimum = F::MINIMUM ? number(p + count * 64 + SCALES, r) : 0.f;
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
    const int64_t count = lines(m.group);
    for (int64_t first = begin; first < end; first += SK_TILE)
      for (int64_t t = 0; t < x.count; ++t) {
        float sum[SK_TILE] = {};
        const uint8_t* p = static_cast<const uint8_t*>(m.data) + first / SK_TILE * tile_bytes(m.cols, m.group);
        const int8_t* a = static_cast<const int8_t*>(x.rows) + t * x.stride;
        for (int64_t g = 0; g < groups(m.cols, m.group); ++g) {
          const int64_t at = t * x.group_stride + g;
          int32_t dot[SK_TILE];
          for (int64_t r = 0; r < SK_TILE; ++r) dot[r] = F::MINIMUM ? 0 : F::BITS == 4 ? x.offsets[at] : 16 * x.offsets[at];
          for (int64_t line = 0; line < count; ++line, p += 64, a += F::BITS == 8 ? 4 : 8)
            for (int64_t r = 0; r < SK_TILE; ++r)
              for (int64_t c = 0; c < 4; ++c) {
                const int32_t code = p[r * 4 + c];
                dot[r] += F::BITS == 8 ? code * a[c] : (code & 15) * a[c] + (code >> 4) * a[c + 4];
              }
          for (int64_t r = 0; r < SK_TILE; ++r) {
            sum[r] += float(dot[r]) * (number(p, r) * x.scales[at]);
            if (F::MINIMUM) sum[r] += number(p + SCALES, r) * x.sums[at];
          }
          p += group_bytes(m.group) - count * 64;
        }
        for (int64_t r = 0; r < SK_TILE && first + r < end; ++r) {
          float* to = y + t * y_stride + first + r;
          const float value = m.bias ? sum[r] + m.bias[first + r] : sum[r];
          *to = add ? *to + value : value;
        }
      }
  }

  static constexpr SkFormat format(const char* name) { return {name, SK_Q8, packed_size, source_size, pack, product, row}; }
};

}  // namespace
