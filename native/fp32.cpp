// float32 rows as stored.
#include "stored.h"

namespace {

struct Float32 {
  static constexpr SkKind KIND = SK_FLOAT32;
  static constexpr int64_t BYTES = 4, X_BYTES = 4;
  typedef Sum Weights, Tokens;
  static constexpr int64_t STEP = sizeof(Sum) / 4;

  static float at(const char* p, int64_t i) {
    float value;
    __builtin_memcpy(&value, p + 4 * i, 4);
    return value;
  }
#if defined(__AVX512F__)
  static Weights load(const char* p) { return _mm512_loadu_ps(p); }
  static Weights load_some(const char* p, int64_t count) { return _mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p); }
  static Tokens tokens(const char* x) { return _mm512_loadu_ps(x); }
  static void add(Sum& sum, const Weights& w, const Tokens& x) { sum = _mm512_fmadd_ps(w, x, sum); }
#elif defined(__AVX2__)
  static Weights load(const char* p) { return _mm256_loadu_ps(reinterpret_cast<const float*>(p)); }
  static Weights load_some(const char* p, int64_t count) {
    float few[8] = {};
    __builtin_memcpy(few, p, uint64_t(count) * 4);
    return _mm256_loadu_ps(few);
  }
  static Tokens tokens(const char* x) { return _mm256_loadu_ps(reinterpret_cast<const float*>(x)); }
  static void add(Sum& sum, const Weights& w, const Tokens& x) { sum = _mm256_fmadd_ps(w, x, sum); }
#else
  static Weights load(const char* p) { return load_some(p, STEP); }
  static Weights load_some(const char* p, int64_t count) {
    Weights w{};
    __builtin_memcpy(&w, p, uint64_t(count) * 4);
    return w;
  }
  static Tokens tokens(const char* x) { return load(x); }
  static void add(Sum& sum, const Weights& w, const Tokens& x) { sum += w * x; }
#endif
};

}  // namespace

namespace ISA {
const SkFormat fp32 = Stored<Float32>::format("fp32");
}
