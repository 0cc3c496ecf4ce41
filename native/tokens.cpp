// Activations to int8: per token and group, scale = absmax / 127, codes rounded half to even.
#include "kernels.h"
#include "number.h"

namespace {
#if defined(__AVX512VNNI__)
constexpr int32_t OFFSET8 = 128;  // vpdpbusd wants unsigned weights: stored q is read as q + 128
#else
constexpr int32_t OFFSET8 = 0;
#endif
constexpr float ROUND = 12582912.f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
}  // namespace

namespace ISA {

void quantize_tokens(const void* x, int32_t type, int64_t in_features, const SkWeight& w, const SkTokens& t, int64_t begin,
                     int64_t end) {
  const int32_t offset = w.bits == 4 ? 8 : OFFSET8;
  const int64_t width = w.group;
  for (int64_t token = begin; token < end; ++token) {
    int8_t* codes = t.codes + token * t.code_stride;
    float* scales = t.scales + token * t.group_stride;
    int32_t* offsets = t.offsets + token * t.group_stride;
    for (int64_t g = 0; g < w.groups; ++g) {
      float v[128];
      const int64_t start = g * width, here = in_features - start < width ? in_features - start : width;
      const int64_t source = token * in_features + start;
      if (type == 0)
        for (int64_t j = 0; j < here; ++j) v[j] = static_cast<const float*>(x)[source + j];
      else if (type == 1)
        for (int64_t j = 0; j < here; ++j) v[j] = from_bfloat16(static_cast<const uint16_t*>(x)[source + j]);
      else
        for (int64_t j = 0; j < here; ++j) v[j] = from_float16(static_cast<const uint16_t*>(x)[source + j]);
      for (int64_t j = here; j < width; ++j) v[j] = 0;
      // As integers, the bits of |v| are ordered like |v| with infinity and NaN on top, so neither is lost.
      int32_t top = 0;
      for (int64_t j = 0; j < width; ++j) {
        const int32_t bits = int32_t(as_bits(v[j]) & 0x7fffffff);
        top = bits > top ? bits : top;
      }
      int32_t sum = 0;
      // Below 2^-120 the reciprocal overflows: such a group counts as zero.
      if (top < 0x03800000 || top >= 0x7f800000) {
        for (int64_t j = 0; j < width; ++j) codes[start + j] = 0;
        scales[g] = top < 0x03800000 ? 0.f : as_float(0x7fc00000);
      } else {
        const float inverse = 127.f / as_float(uint32_t(top));
        for (int64_t j = 0; j < width; ++j) codes[start + j] = int8_t(as_bits(v[j] * inverse + ROUND));
        for (int64_t j = 0; j < width; ++j) sum += codes[start + j];
        scales[g] = as_float(uint32_t(top)) / 127.f;
      }
      offsets[g] = -offset * sum;
    }
    for (int64_t k = w.groups * width; k < t.code_stride; ++k) codes[k] = 0;
    for (int64_t g = w.groups; g < t.group_stride; ++g) scales[g] = 0, offsets[g] = 0;
  }
}

}  // namespace ISA
