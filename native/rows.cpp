// One row of a packed matrix as plain numbers: embedding look-up and dequantization.
#include "kernels.h"
#include "number.h"

namespace ISA {

void decode_row(const SkWeight& w, int64_t row, int64_t in_features, void* y, int32_t type) {
  const int64_t width = w.group, half = width / 2;
  for (int64_t g = 0; g < w.groups; ++g) {
    float v[128];
    const float scale = from_bfloat16(w.scales[row * w.groups + g]);
    const uint8_t* p = w.packed + (row * w.groups + g) * width * w.bits / 8;
    if (w.bits == 4)
      for (int64_t j = 0; j < half; ++j) {
        v[j] = scale * float(int32_t(p[j] & 15) - 8);
        v[j + half] = scale * float(int32_t(p[j] >> 4) - 8);
      }
    else
      for (int64_t j = 0; j < width; ++j) v[j] = scale * float(int8_t(p[j]));
    const int64_t start = g * width, here = in_features - start < width ? in_features - start : width;
    if (type == 0)
      for (int64_t j = 0; j < here; ++j) static_cast<float*>(y)[start + j] = v[j];
    else if (type == 1)
      for (int64_t j = 0; j < here; ++j) static_cast<uint16_t*>(y)[start + j] = to_bfloat16(v[j]);
    else
      for (int64_t j = 0; j < here; ++j) static_cast<uint16_t*>(y)[start + j] = to_float16(v[j]);
  }
}

}  // namespace ISA
