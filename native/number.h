// float32 <-> bfloat16 and float16 without instructions that an old CPU lacks. Everything is local to its unit.
#pragma once
#include <cstdint>

namespace {

inline float as_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t as_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

inline float from_bfloat16(uint16_t h) { return as_float(uint32_t(h) << 16); }

inline uint16_t to_bfloat16(float value) {
  const uint32_t bits = as_bits(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

inline float from_float16(uint16_t h) {
  const uint32_t magnitude = uint32_t(h & 0x7fff) << 13;
  const uint32_t scaled = as_bits(as_float(magnitude) * 0x1p112f);
  return as_float((uint32_t(h & 0x8000) << 16) | (magnitude >= 0x0f800000 ? magnitude | 0x7f800000 : scaled));
}

inline uint16_t to_float16(float value) {
  // Adding a power of two aligned with the result makes the float unit round to nearest even at the right bit.
  const uint32_t bits = as_bits(value), doubled = bits + bits;
  float magnitude = (as_float(bits & 0x7fffffff) * 0x1p112f) * 0x1p-110f;
  uint32_t exponent = doubled & 0xff000000;
  exponent = exponent < 0x71000000 ? 0x71000000 : exponent;
  const uint32_t sum = as_bits(as_float((exponent >> 1) + 0x07800000) + magnitude);
  const uint32_t number = ((sum >> 13) & 0x7c00) + (sum & 0x0fff);
  return uint16_t(((bits >> 16) & 0x8000) | (doubled > 0xff000000 ? 0x7e00 : number));
}

inline float load(const void* p, int32_t type, int64_t i) {
  if (type == 0) return static_cast<const float*>(p)[i];
  const uint16_t h = static_cast<const uint16_t*>(p)[i];
  return type == 1 ? from_bfloat16(h) : from_float16(h);
}

inline void store(void* p, int32_t type, int64_t i, float value) {
  if (type == 0)
    static_cast<float*>(p)[i] = value;
  else
    static_cast<uint16_t*>(p)[i] = type == 1 ? to_bfloat16(value) : to_float16(value);
}

}  // namespace
