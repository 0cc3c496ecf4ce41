#include "absent.h"

namespace ISA {
const SkFormat binary2 = Absent::format("binary2");
const SkFormat binary3 = Absent::format("binary3");
const SkFormat binary4 = Absent::format("binary4");
}
