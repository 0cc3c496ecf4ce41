// bfloat16 rows as stored. With instructions for them products of bfloat16 pairs are summed in float32 (tokens are rounded
// to bfloat16, and numbers below 2^-126 count as zero); elsewhere weights are widened and the tokens stay float32.
#pragma once
#include "stored.h"

namespace {

struct BFloat16 {
  static constexpr int64_t BYTES = 2;

  static float at(const char* p, int64_t i) {
    uint16_t bits;
    __builtin_memcpy(&bits, p + 2 * i, 2);
    return from_bfloat16(bits);
  }
#if defined(__AVX512BF16__)
  static constexpr SkKind KIND = SK_BFLOAT16;
  static constexpr int64_t X_BYTES = 2, STEP = 32;
  typedef __m512i Weights, Tokens;
  static Weights load(const char* p) { return _mm512_loadu_si512(p); }
  static Weights load_some(const char* p, int64_t count) { return _mm512_maskz_loadu_epi16(__mmask32((1u << count) - 1), p); }
  static Tokens tokens(const char* x) { return _mm512_loadu_si512(x); }
  static void add(Sum& sum, const Weights& w, const Tokens& x) { sum = _mm512_dpbf16_ps(sum, __m512bh(w), __m512bh(x)); }
#else
  static constexpr SkKind KIND = SK_FLOAT32;
  static constexpr int64_t X_BYTES = 4, STEP = sizeof(Sum) / 4;
  typedef Sum Weights, Tokens;
#if defined(__AVX512F__)
  static Weights widened(__m256i bits) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)); }
  static Weights load(const char* p) { return widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static Weights load_some(const char* p, int64_t count) {
    return widened(_mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), p));
  }
  static Tokens tokens(const char* x) { return _mm512_loadu_ps(x); }
  static void add(Sum& sum, const Weights& w, const Tokens& x) { sum = _mm512_fmadd_ps(w, x, sum); }
#elif defined(__AVX2__)
  static Weights load(const char* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static Weights load_some(const char* p, int64_t count) {
    char few[16] = {};
    __builtin_memcpy(few, p, uint64_t(count) * 2);
    return load(few);
  }
  static Tokens tokens(const char* x) { return _mm256_loadu_ps(reinterpret_cast<const float*>(x)); }
  static void add(Sum& sum, const Weights& w, const Tokens& x) { sum = _mm256_fmadd_ps(w, x, sum); }
#else
  static Weights load(const char* p) { return load_some(p, STEP); }
  static Weights load_some(const char* p, int64_t count) {
    uint16_t bits[STEP] = {};
    __builtin_memcpy(bits, p, uint64_t(count) * 2);
    Weights w;
    for (int64_t i = 0; i < STEP; ++i) w[i] = from_bfloat16(bits[i]);
    return w;
  }
  static Tokens tokens(const char* x) {
    Tokens numbers;
    __builtin_memcpy(&numbers, x, sizeof numbers);
    return numbers;
  }
  static void add(Sum& sum, const Weights& w, const Tokens& x) { sum += w * x; }
#endif
#endif
};

}  // namespace
