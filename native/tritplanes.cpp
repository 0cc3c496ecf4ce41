// Two planes of -1, 0 and 1 as 2-bit codes t + 1, each with a float16 scale for each group of 32, 64 or 128 columns, stored as
// kernels/formats/tritplanes.py says. value = scale0 * t0 + scale1 * t1. Both planes share the loads of their tokens.
#include "pairs.h"
#include "tiles.h"

namespace {

struct Tritplanes {
  static constexpr int BITS = 2, PLANES = 2, ZERO = 1;
  static constexpr bool HALF = true, MINIMUM = false;
  static bool fits(int64_t, int64_t group) { return group == 32 || group == 64 || group == 128; }
  static int64_t row_bytes(int64_t cols, int64_t group) { return (cols + group - 1) / group * (group / 2); }
  static void read(const void* source, const void* scales, int64_t row, int64_t cols, int64_t group, int64_t g,
                   uint8_t* codes, uint16_t* numbers) {
    const int64_t at = row * ((cols + group - 1) / group) + g, block = block_of(group);
    const uint8_t* from = static_cast<const uint8_t*>(source) + at * (group / 2);
    __builtin_memcpy(numbers, static_cast<const uint8_t*>(scales) + 4 * at, 4);
    for (int64_t start = 0; start < group; start += block)
      for (int64_t plane = 0; plane < PLANES; ++plane, from += block / 4) read_pairs(from, block, codes + plane * 128 + start);
  }
};

}  // namespace

namespace ISA {
const SkFormat tritplanes = Tiles<Tritplanes>::format("tritplanes", are_trits);
}
