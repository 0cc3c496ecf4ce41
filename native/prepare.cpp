// Tokens as the formats want them: float32 or bfloat16 rows, or int8 codes with a scale for each group, rounded as in tokens.cpp.
#include "kernels.h"
#include "number.h"

namespace {

constexpr float ROUND = 12582912.f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits

// A group's length is known when this is compiled: its loops then are a few registers each.
template <int GROUP>
void quantize(const float* x, int64_t cols, int8_t* codes, float* scales, float* sums, int32_t* offsets) {
  constexpr int32_t WHOLE = 0x4b400000;  // the bits of ROUND
  for (int64_t start = 0; start < cols; start += GROUP, codes += GROUP, ++scales, ++sums, ++offsets) {
    float last[GROUP];
    const float* v = x + start;
    if (cols - start < GROUP) {
      for (int64_t j = 0; j < GROUP; ++j) last[j] = start + j < cols ? v[j] : 0;
      v = last;
    }
    // As integers, the bits of |v| are ordered like |v| with infinity and NaN on top, so neither is lost.
    int32_t top = 0, sum = 0;
    for (int j = 0; j < GROUP; ++j) {
      const int32_t bits = int32_t(as_bits(v[j]) & 0x7fffffff);
      top = bits > top ? bits : top;
    }
    // Below 2^-120 the reciprocal overflows: such a group counts as zero.
    if (top < 0x03800000 || top >= 0x7f800000) {
      for (int j = 0; j < GROUP; ++j) codes[j] = 0;
      *scales = top < 0x03800000 ? 0.f : as_float(0x7fc00000);
    } else {
      const float inverse = 127.f / as_float(uint32_t(top));
      for (int j = 0; j < GROUP; ++j) {
        const int32_t bits = int32_t(as_bits(v[j] * inverse + ROUND));
        codes[j] = int8_t(bits);
        sum += bits - WHOLE;
      }
      *scales = as_float(uint32_t(top)) / 127.f;
    }
    *sums = *scales * float(sum);
    *offsets = -8 * sum;
  }
}

void quantize(const float* x, int64_t cols, int64_t group, int8_t* codes, float* scales, float* sums, int32_t* offsets) {
  switch (group) {
    case 16: return quantize<16>(x, cols, codes, scales, sums, offsets);
    case 32: return quantize<32>(x, cols, codes, scales, sums, offsets);
    case 64: return quantize<64>(x, cols, codes, scales, sums, offsets);
    case 128: return quantize<128>(x, cols, codes, scales, sums, offsets);
  }
}

// The tables of a row of codes, as SkInput says.
void tabulate(const int8_t* codes, int64_t stride, uint8_t* tables) {
  typedef int16_t Entries __attribute__((vector_size(32)));
  typedef uint8_t Bytes __attribute__((vector_size(16)));
  const Entries entry = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const Entries has[4] = {-(entry & 1), -(entry >> 1 & 1), -(entry >> 2 & 1), -(entry >> 3)};
  for (int64_t four = 0; four < stride / 4; ++four) {
    Entries sums = Entries{} + SK_ENTRY;
    for (int64_t j = 0; j < 4; ++j) sums += has[j] & int16_t(codes[four * 4 + j]);
    const Bytes low = __builtin_convertvector(sums & 31, Bytes), high = __builtin_convertvector(sums >> 5, Bytes);
    uint8_t* to = tables + four / 4 * 128 + four % 4 * 16;
    __builtin_memcpy(to, &low, 16);
    __builtin_memcpy(to + 64, &high, 16);
  }
}

}  // namespace

namespace ISA {

void prepare(const float* x, int64_t x_stride, int64_t cols, SkKind kind, int64_t group, const SkInput& in, int64_t begin,
             int64_t end) {
  void* rows = const_cast<void*>(in.rows);
  for (int64_t t = begin; t < end; ++t) {
    const float* from = x + t * x_stride;
    if (kind == SK_FLOAT32) {
      float* to = static_cast<float*>(rows) + t * in.stride;
      for (int64_t j = 0; j < cols; ++j) to[j] = from[j];
      for (int64_t j = cols; j < in.stride; ++j) to[j] = 0;
    } else if (kind == SK_BFLOAT16) {
      uint16_t* to = static_cast<uint16_t*>(rows) + t * in.stride;
      for (int64_t j = 0; j < cols; ++j) to[j] = to_bfloat16(from[j]);
      for (int64_t j = cols; j < in.stride; ++j) to[j] = 0;
    } else {
      const int64_t groups = (cols + group - 1) / group, at = t * in.group_stride;
      int8_t* to = static_cast<int8_t*>(rows) + t * in.stride;
      quantize(from, cols, group, to, const_cast<float*>(in.scales) + at, const_cast<float*>(in.sums) + at,
               const_cast<int32_t*>(in.offsets) + at);
      for (int64_t j = groups * group; j < in.stride; ++j) to[j] = 0;
      if (kind == SK_Q8_TABLES) tabulate(to, in.stride, const_cast<uint8_t*>(in.tables) + t * in.table_stride);
    }
  }
}

}  // namespace ISA
