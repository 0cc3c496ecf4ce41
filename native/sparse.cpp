#include "absent.h"

namespace ISA {
const SkFormat sparse = Absent::format("sparse");
}
