// The only place where a signature stands. Python reads the SK_API lines (kernels/loader.py), so both sides agree.
#pragma once
#include <cstdint>

#define SK_API extern "C" __attribute__((visibility("default")))

// Element types of x, y and bias: 0 float32, 1 bfloat16, 2 float16. Weight scales are bfloat16.
// Weights: bits 8: int8 [rows][groups * group]; bits 4: uint8 [rows][groups * group / 2], code = q + 8; inside a group byte j
// holds element j in its low nibble and element j + group / 2 in its high nibble. group is 32, 64 or 128.
// Functions that return int32_t give 0 when done, 1 for a bad argument, 2 when memory ran out.

// Counts up with every change of a signature or of SkLayer, so that newer Python code refuses an older library.
SK_API int32_t sk_version(void);

// The instruction set in use, and the space-separated list this CPU can run, best first.
SK_API const char* sk_isa(void);
SK_API const char* sk_isas(void);
// Use the best level that is not above `name`; 1 when no level has that name.
SK_API int32_t sk_set_isa(const char* name);

// A linear layer: eight-byte fields, so that a caller can pack it once and use it at every call. bias may be null.
struct SkLayer {
  const void *packed, *scales, *bias;
  int64_t in_features, rows, bits, group;
};

// y[tokens][rows] = x[tokens][in_features] @ weight.T + bias. Results do not depend on `threads`, the most that may work.
SK_API int32_t sk_linear(const SkLayer* layer, const void* x, void* y, int64_t tokens, int32_t type, int32_t threads);

// y[count][in_features] = weight[ids[i]], or weight[first + i] when ids is null; 1 when an id is outside 0..rows-1.
SK_API int32_t sk_rows(const int64_t* ids, const void* packed, const void* scales, void* y, int64_t first, int64_t count, int64_t in_features, int64_t rows, int32_t type, int32_t bits, int32_t group);

// ---- inside the library ----

constexpr int64_t SK_MAX_TOKENS = 192;  // tokens quantized together; bounds the scratch memory of a call

struct SkWeight {
  const uint8_t* packed;
  const uint16_t* scales;
  int64_t rows, groups;
  int32_t bits, group;
};

// Activations of up to SK_MAX_TOKENS tokens: symmetric int8, one scale per token and group.
struct SkTokens {
  int8_t* codes;     // [count][code_stride], zero after the last element; code_stride is a multiple of 128
  float* scales;     // [count][group_stride], zero after the last group; group_stride is a multiple of 16
  int32_t* offsets;  // [count][group_stride]: what to add to sum(stored weight code * activation code) of a group
  int64_t count, code_stride, group_stride;
};

struct SkOutput {
  void* y;  // [tokens][stride]
  const void* bias;
  int64_t stride;
  int32_t type;
};

#define SK_DECLARE(isa)                                                                                                      \
  namespace isa {                                                                                                            \
  void quantize_tokens(const void* x, int32_t type, int64_t in_features, const SkWeight& w, const SkTokens& t, int64_t begin, \
                       int64_t end);                                                                                         \
  void product(const SkWeight& w, const SkTokens& t, const SkOutput& out, int64_t begin, int64_t end);                       \
  void product_many(const SkWeight& w, const SkTokens& t, const SkOutput& out, int64_t begin, int64_t end);                  \
  void decode_row(const SkWeight& w, int64_t row, int64_t in_features, void* y, int32_t type);                               \
  }
SK_DECLARE(base)
SK_DECLARE(avx2)
SK_DECLARE(avx512vnni)
SK_DECLARE(neondot)

struct SkTable {
  const char* name;
  decltype(&base::quantize_tokens) quantize_tokens;
  decltype(&base::product) product;
  decltype(&base::product_many) product_many;
  decltype(&base::decode_row) decode_row;
};
const SkTable* sk_table();

// Runs task(context, chunk) for every chunk in 0..chunks-1 on at most `threads` threads, the caller among them.
void sk_parallel(void (*task)(void*, int64_t), void* context, int64_t chunks, int32_t threads);
