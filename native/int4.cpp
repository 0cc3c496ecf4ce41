// 4-bit codes in groups of 32, 64 or 128 columns with bfloat16 scales, stored as kernels.h says. value = scale * (q - 8).
#include "tiles.h"

namespace {

struct Int4 {
  static constexpr int BITS = 4, PLANES = 1, ZERO = 8;
  static constexpr bool HALF = false, MINIMUM = false;
  static bool fits(int64_t, int64_t group) { return group == 32 || group == 64 || group == 128; }
  static int64_t row_bytes(int64_t cols, int64_t group) { return (cols + group - 1) / group * (group / 2); }
  static void read(const void* source, const void* scales, int64_t row, int64_t cols, int64_t group, int64_t g,
                   uint8_t* codes, uint16_t* scale) {
    const int64_t at = row * ((cols + group - 1) / group) + g, half = group / 2;
    const uint8_t* block = static_cast<const uint8_t*>(source) + at * half;
    __builtin_memcpy(scale, static_cast<const uint8_t*>(scales) + 2 * at, 2);
    for (int64_t j = 0; j < half; ++j) codes[j] = block[j] & 15, codes[j + half] = block[j] >> 4;
  }
};

}  // namespace

namespace ISA {
const SkFormat int4 = Tiles<Int4>::format("int4");
}
