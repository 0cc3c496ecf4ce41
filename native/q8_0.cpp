// GGUF's Q8_0: blocks of 32 columns: float16 d and 32 int8 codes. value = d * q.
#include "tiles.h"

namespace {

struct Q8_0 {
  static constexpr int BITS = 8, PLANES = 1, ZERO = 128;
  static constexpr bool HALF = true, MINIMUM = false;
  static bool fits(int64_t cols, int64_t group) { return group == 32 && cols % 32 == 0; }
  static int64_t row_bytes(int64_t cols, int64_t) { return cols / 32 * 34; }
  static void read(const void* source, const void*, int64_t row, int64_t cols, int64_t group, int64_t g, uint8_t* codes,
                   uint16_t* scale) {
    const uint8_t* block = static_cast<const uint8_t*>(source) + row * row_bytes(cols, group) + g * 34;
    __builtin_memcpy(scale, block, 2);
    for (int64_t j = 0; j < 32; ++j) codes[j] = block[2 + j] ^ 128;
  }
};

}  // namespace

namespace ISA {
const SkFormat q8_0 = Tiles<Q8_0>::format("q8_0");
}
