// float32 rows as stored.
#include "stored.h"

namespace {

struct Float32 {
  static constexpr int64_t BYTES = 4;
  static float at(const char* p, int64_t i) {
    float value;
    __builtin_memcpy(&value, p + 4 * i, 4);
    return value;
  }
};

}  // namespace

namespace ISA {
const SkFormat fp32 = Stored<Float32>::format("fp32");
}
