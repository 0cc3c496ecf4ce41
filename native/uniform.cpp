// Codes of 2 to 6 bits with a float16 scale and offset for each group of 32, 64 or 128 columns, stored as
// kernels/formats/uniform.py says. value = scale * (q - 2^(bits - 1)) + offset.
#include "pairs.h"
#include "tiles.h"

namespace {

template <int B>
struct Uniform {
  static constexpr int BITS = B, PLANES = 1, ZERO = 1 << (B - 1);
  static constexpr bool HALF = true, MINIMUM = true;
  static bool fits(int64_t, int64_t group) { return group == 32 || group == 64 || group == 128; }
  static int64_t row_bytes(int64_t cols, int64_t group) { return (cols + group - 1) / group * (group * B / 8); }
  static void read(const void* source, const void* scales, int64_t row, int64_t cols, int64_t group, int64_t g,
                   uint8_t* codes, uint16_t* numbers) {
    const int64_t at = row * ((cols + group - 1) / group) + g, half = group / 2, block = block_of(group);
    const uint8_t* from = static_cast<const uint8_t*>(source) + at * (group * B / 8);
    __builtin_memcpy(numbers, static_cast<const uint8_t*>(scales) + 4 * at, 4);
    if (B >= 4) {
      for (int64_t j = 0; j < half; ++j) codes[j] = from[j] & 15, codes[j + half] = from[j] >> 4;
      from += half;
      if (B == 5)
        for (int64_t j = 0; j < group; ++j) codes[j] |= (from[j / 8] >> j % 8 & 1) << 4;
      if (B == 6)
        for (int64_t start = 0; start < group; start += block, from += block / 4) {
          uint8_t upper[64];
          read_pairs(from, block, upper);
          for (int64_t j = 0; j < block; ++j) codes[start + j] |= upper[j] << 4;
        }
    } else {
      for (int64_t start = 0; start < group; start += block, from += block * B / 8) {
        read_pairs(from, block, codes + start);
        if (B == 3)
          for (int64_t j = 0; j < block; ++j) codes[start + j] |= (from[block / 4 + j / 8] >> j % 8 & 1) << 2;
      }
    }
  }
};

}  // namespace

namespace ISA {
const SkFormat uniform2 = Tiles<Uniform<2>>::format("uniform2");
const SkFormat uniform3 = Tiles<Uniform<3>>::format("uniform3");
const SkFormat uniform4 = Tiles<Uniform<4>>::format("uniform4");
const SkFormat uniform5 = Tiles<Uniform<5>>::format("uniform5");
const SkFormat uniform6 = Tiles<Uniform<6>>::format("uniform6");
}
