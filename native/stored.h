// What the formats share that are used as a weight file holds them: rows one after another, aligned to nothing in particular.
// Each lane adds up its own columns in order and the lanes are added at the end, so a token gets the same bits in any batch.
#pragma once
#include "kernels.h"
#include "number.h"

namespace {

// A format F says BYTES of an element and float at(source, i).
template <class F>
struct Stored {
  static int64_t packed_size(int64_t rows, int64_t cols, int64_t) { return source_size(rows, cols, 0) < 0 ? -1 : 0; }
  static int64_t source_size(int64_t rows, int64_t cols, int64_t) {
    int64_t size;
    if (rows < 0 || cols < 1 || __builtin_mul_overflow(rows, cols, &size)) return -1;
    return __builtin_mul_overflow(size, F::BYTES, &size) ? -1 : size;
  }
  static void pack(int64_t, int64_t, int64_t, const void*, const void*, const int64_t*, void*, int64_t, int64_t) {}

  static void row(const SkMatrix& m, int64_t row, float* out) {
    const char* p = static_cast<const char*>(m.data) + row * m.cols * F::BYTES;
    for (int64_t j = 0; j < m.cols; ++j) out[j] = F::at(p, j);
  }

  static void product(const SkMatrix& m, const SkInput& x, float* y, int64_t y_stride, bool add, int64_t begin, int64_t end) {
    constexpr int64_t LANES = 16;
    for (int64_t r = begin; r < end; ++r)
      for (int64_t t = 0; t < x.count; ++t) {
        const char* p = static_cast<const char*>(m.data) + r * m.cols * F::BYTES;
        const float* a = static_cast<const float*>(x.rows) + t * x.stride;
        float lane[LANES] = {};
        int64_t k = 0;
        for (; k + LANES <= m.cols; k += LANES)
          for (int64_t j = 0; j < LANES; ++j) lane[j] += F::at(p, k + j) * a[k + j];
        for (int64_t j = 0; k < m.cols; ++k, ++j) lane[j] += F::at(p, k) * a[k];
        for (int64_t half = LANES / 2; half; half /= 2)
          for (int64_t j = 0; j < half; ++j) lane[j] += lane[j + half];
        float* to = y + t * y_stride + r;
        const float value = m.bias ? lane[0] + m.bias[r] : lane[0];
        *to = add ? *to + value : value;
      }
  }

  static constexpr SkFormat format(const char* name) {
    return {name, SK_FLOAT32, packed_size, source_size, pack, product, row};
  }
};

}  // namespace
