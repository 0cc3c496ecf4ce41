#include "absent.h"

namespace ISA {
const SkFormat dictionary = Absent::format("dictionary");
}
