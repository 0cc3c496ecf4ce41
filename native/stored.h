// What the formats share that are used as a weight file holds them: rows one after another, aligned to nothing in particular.
// Every lane of a register adds up its own columns in order and the lanes are added at the end, so a token gets the same
// bits in any batch. A weight that is not a number makes its row's results not a number, and no other's.
#pragma once
#include "ahead.h"
#include "kernels.h"
#include "number.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
typedef __m512 Sum;
inline Sum nothing() { return _mm512_setzero_ps(); }

inline float total(Sum v) {
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  const __m128 pair = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
}
constexpr int MOST = 6, ROWS = 4;  // their sums fill the registers
#elif defined(__AVX2__)
typedef __m256 Sum;
inline Sum nothing() { return _mm256_setzero_ps(); }

inline float total(Sum v) {
  const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 pair = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
}
constexpr int MOST = 3, ROWS = 4;
#else
typedef float Sum __attribute__((vector_size(16)));
#define nothing() Sum{}
#define total(v) (((v)[0] + (v)[2]) + ((v)[1] + (v)[3]))
constexpr int MOST = 2, ROWS = 4;
#endif

constexpr int64_t PANEL = 32;      // rows that stay in the second cache while all tokens meet them
constexpr int64_t NEAREST = 24576; // bytes of tokens that stay in the nearest cache while a panel meets them

// A format F says
//   KIND, BYTES of a weight, X_BYTES of a prepared activation, STEP columns of a register
//   float at(source, i)
//   Weights load(p); Weights load_some(p, count): zero beyond count
//   Tokens tokens(x), of a register's columns
//   void add(Sum&, const Weights&, const Tokens&)
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

  // R rows meet T tokens. Every loop over sums is unrolled by name, and tokens are read once: where one loop is left, the
  // compiler keeps all sums in memory, and where rows are inside, it may read the weights again for each token (measured 1.6
  // times slower).
  template <int R, int T, bool ONCE>
  static void some(const SkMatrix& m, const SkInput& x, int64_t token, int64_t row, float* y, int64_t y_stride, bool add) {
    const int64_t row_bytes = m.cols * F::BYTES, x_bytes = x.stride * F::X_BYTES;
    const char* p = static_cast<const char*>(m.data) + row * row_bytes;
    const char* a = static_cast<const char*>(x.rows) + token * x_bytes;
    const char* later = p + (token == 0 ? AHEAD : 0);
    Sum sum[R][T];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 12
      for (int i = 0; i < T; ++i) sum[r][i] = nothing();
    int64_t k = 0;
    for (; k + F::STEP <= m.cols; k += F::STEP, p += F::STEP * F::BYTES, a += F::STEP * F::X_BYTES) {
      typename F::Tokens t[T];
#pragma GCC unroll 12
      for (int i = 0; i < T; ++i) t[i] = F::tokens(a + i * x_bytes);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r, later += F::STEP * F::BYTES) {
        fetch<ONCE>(later);
        const typename F::Weights w = F::load(p + r * row_bytes);
#pragma GCC unroll 12
        for (int i = 0; i < T; ++i) F::add(sum[r][i], w, t[i]);
      }
    }
    if (k < m.cols)
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const typename F::Weights w = F::load_some(p + r * row_bytes, m.cols - k);
#pragma GCC unroll 12
        for (int i = 0; i < T; ++i) F::add(sum[r][i], w, F::tokens(a + i * x_bytes));
      }
#pragma GCC unroll 12
    for (int i = 0; i < T; ++i)
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        float* to = y + (token + i) * y_stride + row + r;
        const float value = m.bias ? total(sum[r][i]) + m.bias[row + r] : total(sum[r][i]);
        *to = add ? *to + value : value;
      }
  }

  template <int T>
  static void rows(const SkMatrix& m, const SkInput& x, int64_t token, int64_t row, int64_t end, float* y, int64_t y_stride, bool add) {
    if (end - row >= ROWS) return some<ROWS, T, false>(m, x, token, row, y, y_stride, add);
    for (; row < end; ++row) some<1, T, false>(m, x, token, row, y, y_stride, add);
  }

  // All T tokens meet each weight while it is there: fewer rows together, where their sums would not fit otherwise.
  template <int T>
  static void once(const SkMatrix& m, const SkInput& x, int64_t begin, int64_t end, float* y, int64_t y_stride, bool add) {
    constexpr int R = T <= MOST ? ROWS : ROWS * MOST / T;
    const int64_t row_bytes = m.cols * F::BYTES;
    fetch_first<true>(static_cast<const char*>(m.data) + begin * row_bytes, (end - begin) * row_bytes);
    for (; begin + R <= end; begin += R) some<R, T, true>(m, x, 0, begin, y, y_stride, add);
    for (; begin < end; ++begin) some<1, T, true>(m, x, 0, begin, y, y_stride, add);
  }

  template <int T>
  static void few(const SkMatrix& m, const SkInput& x, int64_t begin, int64_t end, float* y, int64_t y_stride, bool add) {
    if (x.count == T) return once<T>(m, x, begin, end, y, y_stride, add);
    if constexpr (T > 1) few<T - 1>(m, x, begin, end, y, y_stride, add);
  }

  static void product(const SkMatrix& m, const SkInput& x, float* y, int64_t y_stride, bool add, int64_t begin, int64_t end) {
    if (x.count <= 2 * MOST) return few<2 * MOST>(m, x, begin, end, y, y_stride, add);
    const int64_t fit = NEAREST / (x.stride * F::X_BYTES) / MOST * MOST, block = fit > MOST ? fit : MOST;
    for (int64_t panel = begin; panel < end; panel += PANEL)
      for (int64_t first = 0; first < x.count; first += block) {
        const int64_t stop = panel + PANEL < end ? panel + PANEL : end, last = first + block < x.count ? first + block : x.count;
        for (int64_t row = panel; row < stop; row += ROWS) {
          int64_t token = first;
          for (; token + MOST <= last; token += MOST) rows<MOST>(m, x, token, row, stop, y, y_stride, add);
          if constexpr (MOST > 3) {
            if (last - token == 5) rows<5>(m, x, token, row, stop, y, y_stride, add);
            if (last - token == 4) rows<4>(m, x, token, row, stop, y, y_stride, add);
            if (last - token == 3) rows<3>(m, x, token, row, stop, y, y_stride, add);
          }
          if constexpr (MOST > 2)
            if (last - token == 2) rows<2>(m, x, token, row, stop, y, y_stride, add);
          if (last - token == 1) rows<1>(m, x, token, row, stop, y, y_stride, add);
        }
      }
  }

  static constexpr SkFormat format(const char* name) { return {name, F::KIND, packed_size, source_size, pack, product, row, nullptr}; }
};

}  // namespace
