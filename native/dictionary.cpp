// Ternary rows in a fixed dictionary code, used as stored: int32 row_off[rows + 1] (code words before each row), bfloat16
// [rows][2] (the row's smallest and largest value), uint16 words. A weight is 0, the smallest or the largest. A word stands for
// 1 to 14 pairs of weights: the most probable ones of all such sequences when a weight is 0 with probability 0.885.
#include "kernels.h"
#include "number.h"
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

constexpr int WORDS = 65536, LONGEST = 14;

// A word's weights, first one in the lowest bit; its length in pairs stands above the 28 bits of `low`.
struct Entry {
  uint32_t low, high;
};

int pairs(const Entry& e) { return int(e.low >> 28); }

Entry table[WORDS];
int32_t state;  // of the table: 0 absent, 1 being made, 2 there

// Sequences of so many pairs with so many weights other than 0 are equally probable: they have neighbouring numbers, in the order
// of their pairs. The last kind that finds room finds it in part.
struct Kind {
  double chance;
  int pairs, other;
  int64_t count, first, most;
};

struct Maker {
  Kind* kind_of[LONGEST + 1][2 * LONGEST + 1] = {};

  void spell(int length, int other, uint32_t low, uint32_t high) {
    for (uint32_t pair = 0; pair < 9 && length < LONGEST; ++pair) {
      const uint32_t a = pair % 3, b = pair / 3;  // the pair's first weight and its second
      const int now = other + (a != 0) + (b != 0);
      Kind* kind = kind_of[length + 1][now];
      if (!kind || kind->count == kind->most) continue;
      const uint32_t l = low | uint32_t((a == 1) | (b == 1) << 1) << 2 * length;
      const uint32_t h = high | uint32_t((a == 2) | (b == 2) << 1) << 2 * length;
      table[kind->first + kind->count++] = {l | uint32_t(length + 1) << 28, h};
      spell(length + 1, now, l, h);
    }
  }
};

void make_table() {
  Kind kinds[LONGEST * (2 * LONGEST + 1)];
  int count = 0;
  double none = 1;
  for (int length = 1; length <= LONGEST; ++length) {
    none *= 0.885 * 0.885;
    double chance = none, ways = 1;
    for (int other = 0; other <= 2 * length; ++other) {
      // Insertion, most probable first: a few hundred kinds.
      int at = count++;
      for (; at > 0 && kinds[at - 1].chance < chance; --at) kinds[at] = kinds[at - 1];
      kinds[at] = {chance, length, other, 0, 0, int64_t(ways + 0.5)};
      chance *= 0.0575 / 0.885;
      ways = ways * 2 * (2 * length - other) / (other + 1);
    }
  }
  Maker maker;
  int64_t first = 0;
  for (int k = 0; k < count && first < WORDS; ++k) {
    kinds[k].first = first;
    if (kinds[k].most > WORDS - first) kinds[k].most = WORDS - first;
    first += kinds[k].most;
    maker.kind_of[kinds[k].pairs][kinds[k].other] = &kinds[k];
  }
  maker.spell(0, 0, 0, 0);
}

void need_table() {
  if (__atomic_load_n(&state, __ATOMIC_ACQUIRE) == 2) return;
  int32_t absent = 0;
  if (__atomic_compare_exchange_n(&state, &absent, 1, false, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED)) {
    make_table();
    __atomic_store_n(&state, 2, __ATOMIC_RELEASE);
  }
  while (__atomic_load_n(&state, __ATOMIC_ACQUIRE) != 2) {
  }
}

template <class T>
inline T at(const void* p, int64_t i) {
  T value;
  __builtin_memcpy(&value, static_cast<const char*>(p) + i * int64_t(sizeof(T)), sizeof(T));
  return value;
}

// The parts of a stored matrix; they lie even only by chance.
struct Parts {
  const char *offsets, *ends, *words;
  Parts(const void* data, int64_t rows)
      : offsets(static_cast<const char*>(data)), ends(offsets + 4 * (rows + 1)), words(ends + 4 * rows) {}
};

inline float value(const Parts& p, int64_t row, int end) { return from_bfloat16(at<uint16_t>(p.ends, 2 * row + end)); }

// The weights of a row, 16 columns at a time, as bits.
struct Reader {
  const char* words;
  int64_t next;
  uint64_t low = 0, high = 0;
  int held = 0;
  Reader(const Parts& p, int64_t row) : words(p.words), next(at<int32_t>(p.offsets, row)) {}

  void read(int64_t columns, uint32_t* low16, uint32_t* high16) {
    while (held < columns) {
      const Entry e = table[at<uint16_t>(words, next++)];
      low |= uint64_t(e.low & 0xFFFFFFF) << held;
      high |= uint64_t(e.high) << held;
      held += 2 * pairs(e);
    }
    *low16 = uint32_t(low & 0xFFFF);
    *high16 = uint32_t(high & 0xFFFF);
    low >>= 16, high >>= 16, held -= 16;
  }
};

// Sums of the activations that meet the smallest and the largest value, lane by lane: no multiplications but two at the end.
#if defined(__AVX512F__)
struct Sums {
  __m512 low = _mm512_setzero_ps(), high = _mm512_setzero_ps();
  void add(const float* x, uint32_t l, uint32_t h) {
    const __m512 v = _mm512_loadu_ps(x);
    low = _mm512_mask_add_ps(low, __mmask16(l), low, v);
    high = _mm512_mask_add_ps(high, __mmask16(h), high, v);
  }
  void store(float* l, float* h) const {
    _mm512_storeu_ps(l, low);
    _mm512_storeu_ps(h, high);
  }
};
#else
struct Sums {
  float low[16] = {}, high[16] = {};
  void add(const float* x, uint32_t l, uint32_t h) {
    for (; l; l &= l - 1) low[__builtin_ctz(l)] += x[__builtin_ctz(l)];
    for (; h; h &= h - 1) high[__builtin_ctz(h)] += x[__builtin_ctz(h)];
  }
  void store(float* l, float* h) const {
    for (int i = 0; i < 16; ++i) l[i] = low[i], h[i] = high[i];
  }
};
#endif

inline float total(const float* lanes) {
  float sum[8];
  for (int i = 0; i < 8; ++i) sum[i] = lanes[i] + lanes[i + 8];
  for (int i = 0; i < 4; ++i) sum[i] += sum[i + 4];
  return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

template <int T>
void some(const SkMatrix& m, const Parts& p, const float* x, int64_t stride, int64_t row, float* y, int64_t y_stride, bool add) {
  Reader reader(p, row);
  Sums sums[T];
  for (int64_t j = 0; j < m.cols; j += 16) {
    uint32_t low, high;
    reader.read(m.cols - j < 16 ? m.cols - j : 16, &low, &high);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) sums[t].add(x + t * stride + j, low, high);
  }
  for (int t = 0; t < T; ++t) {
    float low[16], high[16];
    sums[t].store(low, high);
    float result = value(p, row, 0) * total(low) + value(p, row, 1) * total(high);
    if (m.bias) result += m.bias[row];
    float* to = y + t * y_stride + row;
    *to = add ? *to + result : result;
  }
}

struct Dictionary {
  static int64_t source_size(int64_t, int64_t, int64_t) { return -1; }  // the words say it
  static int64_t packed_size(int64_t rows, int64_t cols, int64_t) { return rows < 0 || cols < 1 ? -1 : 0; }
  static void pack(int64_t, int64_t, int64_t, const void*, const void*, const int64_t*, void*, int64_t, int64_t) {}

  static void product(const SkMatrix& m, const SkInput& in, float* y, int64_t y_stride, bool add, int64_t begin, int64_t end) {
    need_table();
    const Parts p(m.data, m.rows);
    const float* x = static_cast<const float*>(in.rows);
    for (int64_t row = begin; row < end; ++row) {
      int64_t t = 0;
      for (; t + 8 <= in.count; t += 8) some<8>(m, p, x + t * in.stride, in.stride, row, y + t * y_stride, y_stride, add);
      for (; t + 4 <= in.count; t += 4) some<4>(m, p, x + t * in.stride, in.stride, row, y + t * y_stride, y_stride, add);
      for (; t < in.count; ++t) some<1>(m, p, x + t * in.stride, in.stride, row, y + t * y_stride, y_stride, add);
    }
  }

  static void row(const SkMatrix& m, int64_t row, float* out) {
    need_table();
    const Parts p(m.data, m.rows);
    Reader reader(p, row);
    for (int64_t j = 0; j < m.cols; j += 16) {
      const int64_t columns = m.cols - j < 16 ? m.cols - j : 16;
      uint32_t low, high;
      reader.read(columns, &low, &high);
      for (int64_t i = 0; i < columns; ++i)
        out[j + i] = low >> i & 1 ? value(p, row, 0) : high >> i & 1 ? value(p, row, 1) : 0.0f;
    }
  }

  // Every row has words for its columns and no more, and ends that are numbers with 0 between them.
  static bool sound(int64_t rows, int64_t cols, int64_t, const void* source, int64_t size) {
    need_table();
    if (rows > (size - 4) / 8 || size < 4) return false;
    const Parts p(source, rows);
    const int64_t words = (size - 4 - 8 * rows) / 2;
    if (at<int32_t>(p.offsets, 0) != 0 || at<int32_t>(p.offsets, rows) != words || 4 + 8 * rows + 2 * words != size) return false;
    for (int64_t r = 0; r < rows; ++r) {
      const float low = value(p, r, 0), high = value(p, r, 1);
      if (!(low > -__builtin_inff() && low <= 0 && high >= 0 && high < __builtin_inff())) return false;
      const int64_t first = at<int32_t>(p.offsets, r), end = at<int32_t>(p.offsets, r + 1);
      if (first > end || end > words) return false;
      int64_t seen = 0;
      Entry last{};
      for (int64_t w = first; w < end && seen < cols; ++w) {
        last = table[at<uint16_t>(p.words, w)];
        seen += 2 * pairs(last);
        if (seen >= cols && w + 1 != end) return false;
      }
      if (seen - cols != (cols & 1)) return false;
      // Beyond an odd last column stands a zero.
      if ((cols & 1) && ((last.low & 0xFFFFFFF) | last.high) >> (2 * pairs(last) - 1) & 1) return false;
    }
    return true;
  }

  static constexpr SkFormat format(const char* name) { return {name, SK_FLOAT32, packed_size, source_size, pack, product, row, sound}; }
};

}  // namespace

namespace ISA {
const SkFormat dictionary = Dictionary::format("dictionary");
}
