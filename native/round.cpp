// Rows of a float matrix rounded to 8- or 4-bit codes in groups with a bfloat16 scale, to the bit as kernels/reference.py
// says: the largest magnitude of a group meets 127, or with its sign -8.
#include "kernels.h"
#include "number.h"

namespace {

constexpr float ROUND = 12582912.f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
constexpr int32_t SIGN = INT32_MIN, INFINITE = 0x7f800000;

// Numbers begin.. of x as float32.
void read(const void* x, int32_t type, int64_t begin, int64_t count, float* v) {
  if (type == 0)
    for (int64_t j = 0; j < count; ++j) v[j] = static_cast<const float*>(x)[begin + j];
  else if (type == 1)
    for (int64_t j = 0; j < count; ++j) v[j] = from_bfloat16(static_cast<const uint16_t*>(x)[begin + j]);
  else
    for (int64_t j = 0; j < count; ++j) v[j] = from_float16(static_cast<const uint16_t*>(x)[begin + j]);
}

// The number of the largest magnitude, the first where several have it; not finite where one of them is not.
template <int WIDTH>
float largest(const float* v) {
  // As integers, the bits of magnitudes are ordered like them with infinity and NaN on top.
  int32_t above = SIGN, below = SIGN;
  for (int j = 0; j < WIDTH; ++j) {
    const int32_t bits = int32_t(as_bits(v[j])), turned = bits ^ SIGN;
    above = bits > above ? bits : above;
    below = turned > below ? turned : below;
  }
  if (above != below) return as_float(uint32_t(above > below ? above : below ^ SIGN));
  int first = 0;
  while (int32_t(as_bits(v[first]) & 0x7fffffff) != above) ++first;
  return v[first];
}

// One group; false where a number is not finite.
template <int BITS, int WIDTH>
bool round_group(const float* v, uint8_t* packed, uint16_t* scale) {
  constexpr float LOW = BITS == 4 ? -8.f : -127.f, HIGH = BITS == 4 ? 7.f : 127.f;
  const float top = largest<WIDTH>(v);
  const uint32_t magnitude = as_bits(top) & 0x7fffffff;
  if (int32_t(magnitude) >= INFINITE) return false;
  *scale = to_bfloat16(BITS == 4 ? top / LOW : as_float(magnitude) / HIGH);
  const float step = from_bfloat16(*scale), by = step == 0 ? as_float(INFINITE) : step;
  int32_t codes[WIDTH];
  for (int j = 0; j < WIDTH; ++j) {
    float q = v[j] / by;
    q = q < LOW ? LOW : q;
    q = q > HIGH ? HIGH : q;
    codes[j] = int32_t(as_bits(q + ROUND));
  }
  if (BITS == 8)
    for (int j = 0; j < WIDTH; ++j) packed[j] = uint8_t(codes[j]);
  else
    for (int j = 0; j < WIDTH / 2; ++j) packed[j] = uint8_t((codes[j] + 8 & 15) | uint32_t(codes[j + WIDTH / 2] + 8) << 4);
  return true;
}

template <int BITS, int WIDTH>
bool round_groups(const void* x, int32_t type, int64_t in_features, int64_t row, const SkWeight& w) {
  uint8_t* packed = const_cast<uint8_t*>(w.packed) + row * w.groups * (WIDTH * BITS / 8);
  uint16_t* scales = const_cast<uint16_t*>(w.scales) + row * w.groups;
  bool finite = true;
  for (int64_t g = 0; g < w.groups; ++g) {
    float v[WIDTH];
    const int64_t left = in_features - g * WIDTH;
    if (left >= WIDTH) {
      read(x, type, row * in_features + g * WIDTH, WIDTH, v);
    } else {
      read(x, type, row * in_features + g * WIDTH, left, v);
      for (int64_t j = left; j < WIDTH; ++j) v[j] = 0;
    }
    finite = round_group<BITS, WIDTH>(v, packed + g * (WIDTH * BITS / 8), scales + g) && finite;
  }
  return finite;
}

}  // namespace

namespace ISA {

bool round_row(const void* x, int32_t type, int64_t in_features, int64_t row, const SkWeight& w) {
  if (w.bits == 8)
    return (w.group == 32 ? round_groups<8, 32> : w.group == 64 ? round_groups<8, 64> : round_groups<8, 128>)(x, type, in_features, row, w);
  return (w.group == 32 ? round_groups<4, 32> : w.group == 64 ? round_groups<4, 64> : round_groups<4, 128>)(x, type, in_features, row, w);
}

}  // namespace ISA
