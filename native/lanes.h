// Registers of floats through the compiler's vector types: one source, whatever the width of the unit's instruction set.
#pragma once
#include <cstdint>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int64_t LANES = 16;
#elif defined(__AVX2__)
constexpr int64_t LANES = 8;
#else
constexpr int64_t LANES = 4;
#endif
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

// By reference, not by value: how wide vectors are passed depends on the instruction set, and the compiler warns of it.
template <class T>
inline __attribute__((always_inline)) void read(const void* from, T& to) {
  __builtin_memcpy(&to, from, sizeof to);
}

template <class T>
inline __attribute__((always_inline)) void write(void* to, const T& from) {
  __builtin_memcpy(to, &from, sizeof from);
}

// With the instructions by name: the compiler takes five where one will do.
inline __attribute__((always_inline)) void read_bfloat16(const uint16_t* from, Floats& to) {
#if defined(__AVX512F__)
  to = Floats(Words(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))) << 16);
#elif defined(__AVX2__)
  to = Floats(Words(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))) << 16);
#else
  Halves h;
  read(from, h);
  to = Floats(__builtin_convertvector(h, Words) << 16);
#endif
}

// x becomes 2 to the power of x, off by less than 2 parts in 10^7 and exactly 1 at 0; x counts as at most 126 and at least
// -126; NaN stays NaN.
inline __attribute__((always_inline)) void power_of_two(Floats& x) {
  constexpr float ROUND = 12582912.f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  x = x < -126.f ? Floats{} - 126.f : x;
  x = x > 126.f ? Floats{} + 126.f : x;
  const Floats shifted = x + ROUND, f = x - (shifted - ROUND);
  Floats y = f * 1.52527338e-5f + 1.54035304e-4f;
  y = y * f + 1.33335581e-3f;
  y = y * f + 9.61812911e-3f;
  y = y * f + 5.55041087e-2f;
  y = y * f + 2.40226507e-1f;
  y = y * f + 6.93147181e-1f;
  y = y * f + 1.f;
  x = y * Floats((Words(shifted) << 23) + 0x3f800000);  // the integer's bits, moved to where an exponent stands
}

}  // namespace
