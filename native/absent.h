// A format that is known by name and has no kernels yet: no matrix can be made in it.
#pragma once
#include "kernels.h"

namespace {

struct Absent {
  static int64_t size(int64_t, int64_t, int64_t) { return -1; }
  static void pack(int64_t, int64_t, int64_t, const void*, const void*, const int64_t*, void*, int64_t, int64_t) {}
  static void product(const SkMatrix&, const SkInput&, float*, int64_t, bool, int64_t, int64_t) {}
  static void row(const SkMatrix&, int64_t, float*) {}
  static constexpr SkFormat format(const char* name) { return {name, SK_FLOAT32, size, size, pack, product, row, nullptr}; }
};

}  // namespace
