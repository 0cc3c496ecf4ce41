#include "absent.h"

namespace ISA {
const SkFormat ternary = Absent::format("ternary");
}
