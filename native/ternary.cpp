// Weights of -1, 0 and 1 as 2-bit codes t + 1, with a float16 scale for each group of 32, 64 or 128 columns, stored as
// kernels/formats/ternary.py says. value = scale * t.
#include "pairs.h"
#include "tiles.h"

namespace {

struct Ternary {
  static constexpr int BITS = 2, PLANES = 1, ZERO = 1;
  static constexpr bool HALF = true, MINIMUM = false;
  static bool fits(int64_t, int64_t group) { return group == 32 || group == 64 || group == 128; }
  static int64_t row_bytes(int64_t cols, int64_t group) { return (cols + group - 1) / group * (group / 4); }
  static void read(const void* source, const void* scales, int64_t row, int64_t cols, int64_t group, int64_t g,
                   uint8_t* codes, uint16_t* numbers) {
    const int64_t at = row * ((cols + group - 1) / group) + g, block = block_of(group);
    const uint8_t* from = static_cast<const uint8_t*>(source) + at * (group / 4);
    __builtin_memcpy(numbers, static_cast<const uint8_t*>(scales) + 2 * at, 2);
    for (int64_t start = 0; start < group; start += block, from += block / 4) read_pairs(from, block, codes + start);
  }
};

}  // namespace

namespace ISA {
const SkFormat ternary = Tiles<Ternary>::format("ternary", are_trits);
}
