// GGUF's Q4_1: blocks of 32 columns: float16 d and m, 16 bytes of codes; byte j holds columns j (low) and j + 16. value = d * q + m.
#include "tiles.h"

namespace {

struct Q4_1 {
  static constexpr int BITS = 4, PLANES = 1, ZERO = 0;
  static constexpr bool HALF = true, MINIMUM = true;
  static bool fits(int64_t cols, int64_t group) { return group == 32 && cols % 32 == 0; }
  static int64_t row_bytes(int64_t cols, int64_t) { return cols / 32 * 20; }
  static void read(const void* source, const void*, int64_t row, int64_t cols, int64_t group, int64_t g, uint8_t* codes,
                   uint16_t* numbers) {
    const uint8_t* block = static_cast<const uint8_t*>(source) + row * row_bytes(cols, group) + g * 20;
    __builtin_memcpy(numbers, block, 4);
    for (int64_t j = 0; j < 16; ++j) codes[j] = block[4 + j] & 15, codes[j + 16] = block[4 + j] >> 4;
  }
};

}  // namespace

namespace ISA {
const SkFormat q4_1 = Tiles<Q4_1>::format("q4_1");
}
