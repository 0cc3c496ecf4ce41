// What the formats share that stand for bfloat16 rows and are decoded a piece at a time, just before use. The decoded numbers
// meet the tokens as those of format bf16 do, in the same order, so a product has the same bits as bf16's.
// The bytes begin with a head of HEAD bytes, all numbers little-endian, and are aligned to nothing.
#pragma once

#include "bf16.h"

namespace {

constexpr int64_t PIECE = 64;           // columns that are decoded together; rows are filled up to whole pieces
constexpr int64_t FEW = 6;              // tokens up to which a piece meets them all at once
constexpr int64_t WIDEST = 1 << 24;     // columns
constexpr int64_t HEAD = 64;
constexpr int64_t HEAD_ROWS = 8, HEAD_COLS = 16, HEAD_COUNT = 24, HEAD_TABLE = 32;

template <class T>
inline T number_at(const void* p, int64_t offset) {
  T number;
  __builtin_memcpy(&number, static_cast<const char*>(p) + offset, sizeof number);
  return number;
}

inline int64_t pieces_of(int64_t cols) { return (cols + PIECE - 1) / PIECE; }

// The head names the format, the matrix, and how many entries the list has whose ends of rows stand behind the head:
// uint32 [rows + 1], growing from 0 to the count. `rest` is what follows, of `entry` bytes an entry and `row` bytes a row.
inline bool sound_head(const char* name, int64_t rows, int64_t cols, const void* p, int64_t size, int64_t entry, int64_t row, int64_t rest) {
  if (!p || size < HEAD || cols > WIDEST || __builtin_memcmp(p, name, 8)) return false;
  const int64_t count = number_at<int64_t>(p, HEAD_COUNT);
  if (number_at<int64_t>(p, HEAD_ROWS) != rows || number_at<int64_t>(p, HEAD_COLS) != cols) return false;
  if (count < 0 || count > int64_t(UINT32_MAX)) return false;
  int64_t lists, each;
  if (__builtin_mul_overflow(rows, row + 4, &each) || __builtin_mul_overflow(count, entry, &lists)) return false;
  int64_t whole;
  if (__builtin_add_overflow(each, lists, &whole) || __builtin_add_overflow(whole, HEAD + 4 + rest, &whole) || whole != size) return false;
  uint32_t before = 0;
  for (int64_t r = 0; r <= rows; ++r) {
    const uint32_t start = number_at<uint32_t>(p, HEAD + 4 * r);
    if (r == 0 ? start != 0 : start < before) return false;
    before = start;
  }
  return int64_t(before) == count;
}

// A format F is made of a matrix and says
//   Row: where it is in a row, made of (const F&, int64_t row); next(uint16_t* out) decodes the next PIECE columns, anything
//     beyond the last one
//   Later: made of (const F&, int64_t row, int64_t count); next() asks for the next piece of `count` rows' bytes AHEAD of them
//   bool sound(rows, cols, group, source, source_size)
template <class F>
struct Decoded {
  typedef BFloat16 B;

  static int64_t packed_size(int64_t rows, int64_t cols, int64_t group) { return Stored<B>::packed_size(rows, cols, group); }
  static int64_t source_size(int64_t, int64_t, int64_t) { return -1; }

  static void row(const SkMatrix& m, int64_t row, float* out) {
    const F format(m);
    typename F::Row from(format, row);
    uint16_t piece[PIECE];
    for (int64_t k = 0; k < m.cols; k += PIECE) {
      from.next(piece);
      for (int64_t j = 0; j < PIECE && k + j < m.cols; ++j) out[k + j] = from_bfloat16(piece[j]);
    }
  }

  template <int R, int T>
  static void meet(Sum (&sum)[R][T], const typename B::Weights (&w)[R], const char* a, int64_t x_bytes) {
#pragma GCC unroll 6
    for (int i = 0; i < T; ++i) {
      const typename B::Tokens x = B::tokens(a + i * x_bytes);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) B::add(sum[r][i], w[r], x);
    }
  }

  template <int R, int T>
  static void some(const F& format, const SkMatrix& m, const SkInput& x, int64_t row, float* y, int64_t y_stride, bool add) {
    const int64_t x_bytes = x.stride * B::X_BYTES;
    const char* a = static_cast<const char*>(x.rows);
    alignas(64) uint16_t piece[R][PIECE];
    typename F::Row from[R];
    Sum sum[R][T];
    typename F::Later later(format, row, R);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      from[r] = typename F::Row(format, row + r);
#pragma GCC unroll 8
      for (int i = 0; i < T; ++i) sum[r][i] = nothing();
    }
    int64_t k = 0;
    for (; k + PIECE <= m.cols; k += PIECE) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        later.next();
        from[r].next(piece[r]);
      }
#pragma GCC unroll 4
      for (int64_t j = 0; j < PIECE; j += B::STEP, a += B::STEP * B::X_BYTES) {
        typename B::Weights w[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) w[r] = B::load(reinterpret_cast<const char*>(piece[r] + j));
        meet<R, T>(sum, w, a, x_bytes);
      }
    }
    if (k < m.cols)
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) from[r].next(piece[r]);
    for (int64_t j = 0; k + j < m.cols; j += B::STEP, a += B::STEP * B::X_BYTES) {
      const int64_t left = m.cols - k - j;
      typename B::Weights w[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const char* p = reinterpret_cast<const char*>(piece[r] + j);
        w[r] = left < B::STEP ? B::load_some(p, left) : B::load(p);
      }
      meet<R, T>(sum, w, a, x_bytes);
    }
#pragma GCC unroll 8
    for (int i = 0; i < T; ++i)
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        float* to = y + i * y_stride + row + r;
        const float value = m.bias ? total(sum[r][i]) + m.bias[row + r] : total(sum[r][i]);
        *to = add ? *to + value : value;
      }
  }

  template <int T>
  static void few(const F& format, const SkMatrix& m, const SkInput& x, float* y, int64_t y_stride, bool add, int64_t begin, int64_t end) {
    for (; begin + ROWS <= end; begin += ROWS) some<ROWS, T>(format, m, x, begin, y, y_stride, add);
    for (; begin < end; ++begin) some<1, T>(format, m, x, begin, y, y_stride, add);
  }

  // Rows are decoded once for all tokens, PANEL of them at a time.
  static bool many(const F& format, const SkMatrix& m, const SkInput& x, float* y, int64_t y_stride, bool add, int64_t begin, int64_t end) {
    static thread_local SkScratch scratch;
    const int64_t width = pieces_of(m.cols) * PIECE;
    uint16_t* rows = reinterpret_cast<uint16_t*>(scratch.at_least((PANEL * m.cols + width) * 2));
    if (!rows) return false;
    typename F::Later later(format, begin, end - begin);
    for (; begin < end; begin += PANEL) {
      const int64_t count = end - begin < PANEL ? end - begin : PANEL;
      for (int64_t r = 0; r < count; ++r) {
        typename F::Row from(format, begin + r);
        for (int64_t k = 0; k < m.cols; k += PIECE) {
          later.next();
          from.next(rows + r * m.cols + k);  // the next row covers what is too much
        }
      }
      const SkMatrix panel{rows, m.bias ? m.bias + begin : nullptr, count, m.cols, m.format, m.group};
      Stored<B>::product(panel, x, y + begin, y_stride, add, 0, count);
    }
    return true;
  }

  static void product(const SkMatrix& m, const SkInput& x, float* y, int64_t y_stride, bool add, int64_t begin, int64_t end) {
    const F format(m);
    if (x.count > FEW && many(format, m, x, y, y_stride, add, begin, end)) return;
    SkInput part = x;
    for (int64_t t = 0; t < x.count; t += part.count, y += part.count * y_stride) {
      part.rows = static_cast<const char*>(x.rows) + t * x.stride * B::X_BYTES;
      part.count = x.count - t < MOST ? x.count - t : MOST;
      if (part.count == 1) few<1>(format, m, part, y, y_stride, add, begin, end);
      if (part.count == 2) few<2>(format, m, part, y, y_stride, add, begin, end);
      if constexpr (MOST > 2)
        if (part.count == 3) few<3>(format, m, part, y, y_stride, add, begin, end);
      if constexpr (MOST > 3) {
        if (part.count == 4) few<4>(format, m, part, y, y_stride, add, begin, end);
        if (part.count == 5) few<5>(format, m, part, y, y_stride, add, begin, end);
        if (part.count == 6) few<6>(format, m, part, y, y_stride, add, begin, end);
      }
    }
  }

  static constexpr SkFormat format(const char* name) {
    return {name, B::KIND, packed_size, source_size, Stored<B>::pack, product, row, F::sound};
  }
};

}  // namespace
