#include "bf16.h"

namespace ISA {
const SkFormat bf16 = Stored<BFloat16>::format("bf16");
}
