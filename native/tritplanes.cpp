#include "absent.h"

namespace ISA {
const SkFormat tritplanes = Absent::format("tritplanes");
}
