// GGUF's Q4_0: blocks of 32 columns: float16 d, 16 bytes of codes; byte j holds columns j (low) and j + 16. value = d * (q - 8).
#include "tiles.h"

namespace {

struct Q4_0 {
  static constexpr int BITS = 4, PLANES = 1, ZERO = 8;
  static constexpr bool HALF = true, MINIMUM = false;
  static bool fits(int64_t cols, int64_t group) { return group == 32 && cols % 32 == 0; }
  static int64_t row_bytes(int64_t cols, int64_t) { return cols / 32 * 18; }
  static void read(const void* source, const void*, int64_t row, int64_t cols, int64_t group, int64_t g, uint8_t* codes,
                   uint16_t* scale) {
    const uint8_t* block = static_cast<const uint8_t*>(source) + row * row_bytes(cols, group) + g * 18;
    __builtin_memcpy(scale, block, 2);
    for (int64_t j = 0; j < 16; ++j) codes[j] = block[2 + j] & 15, codes[j + 16] = block[2 + j] >> 4;
  }
};

}  // namespace

namespace ISA {
const SkFormat q4_0 = Tiles<Q4_0>::format("q4_0");
}
