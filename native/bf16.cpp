// bfloat16 rows as stored.
#include "stored.h"

namespace {

struct BFloat16 {
  static constexpr int64_t BYTES = 2;
  static float at(const char* p, int64_t i) {
    uint16_t bits;
    __builtin_memcpy(&bits, p + 2 * i, 2);
    return from_bfloat16(bits);
  }
};

}  // namespace

namespace ISA {
const SkFormat bf16 = Stored<BFloat16>::format("bf16");
}
