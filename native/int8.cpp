// int8 codes in groups of 16, 32, 64 or 128 columns with bfloat16 scales, stored as kernels.h says. value = scale * q.
#include "tiles.h"

namespace {

struct Int8 {
  static constexpr int BITS = 8, PLANES = 1, ZERO = 128;
  static constexpr bool HALF = false, MINIMUM = false;
  static bool fits(int64_t, int64_t group) { return group == 16 || group == 32 || group == 64 || group == 128; }
  static int64_t row_bytes(int64_t cols, int64_t group) { return (cols + group - 1) / group * group; }
  static void read(const void* source, const void* scales, int64_t row, int64_t cols, int64_t group, int64_t g,
                   uint8_t* codes, uint16_t* scale) {
    const int64_t at = row * ((cols + group - 1) / group) + g;
    const uint8_t* block = static_cast<const uint8_t*>(source) + at * group;
    __builtin_memcpy(scale, static_cast<const uint8_t*>(scales) + 2 * at, 2);
    for (int64_t j = 0; j < group; ++j) codes[j] = block[j] ^ 128;
  }
};

}  // namespace

namespace ISA {
const SkFormat int8 = Tiles<Int8>::format("int8");
}
