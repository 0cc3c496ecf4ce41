#include "absent.h"

namespace ISA {
const SkFormat uniform2 = Absent::format("uniform2");
const SkFormat uniform3 = Absent::format("uniform3");
const SkFormat uniform4 = Absent::format("uniform4");
}
