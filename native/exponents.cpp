#include "absent.h"

namespace ISA {
const SkFormat exponents = Absent::format("exponents");
}
