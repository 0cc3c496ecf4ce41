// What a token passes between matrices: norms, rotary positions, the gate. Every level sums in the same sixteen lanes, so that
// activations do not depend on the instruction set.
#include "kernels.h"
#include "lanes.h"
#include "number.h"

namespace {

constexpr int64_t PARTS = 16 / LANES;
constexpr float LOG2_E = 1.44269504f;

float sixteen(const Floats* parts) {
  float v[16];
  for (int64_t p = 0; p < PARTS; ++p) write(v + p * LANES, parts[p]);
  for (int64_t step = 8; step; step /= 2)
    for (int64_t i = 0; i < step; ++i) v[i] += v[i + step];
  return v[0];
}

// x becomes 1 / (1 + e^-x).
inline __attribute__((always_inline)) void sigmoid(Floats& x) {
  x = x * -LOG2_E;
  power_of_two(x);
  x = 1.f / (1.f + x);
}

inline __attribute__((always_inline)) void gated(Floats& g, const Floats& up, int64_t activation) {
  Floats s = g;
  if (activation) s = g * 1.59576912f * (1.f + g * g * 0.044715f);  // tanh(z) = 2 sigmoid(2z) - 1
  sigmoid(s);
  g = g * s * up;
}

}  // namespace

namespace ISA {

void normalize(const float* x, const float* weight, double epsilon, int64_t width, float* y) {
  Floats sums[PARTS] = {};
  int64_t i = 0;
  for (; i + 16 <= width; i += 16)
    for (int64_t p = 0; p < PARTS; ++p) {
      Floats v;
      read(x + i + p * LANES, v);
      sums[p] += v * v;
    }
  float sum = sixteen(sums);
  for (int64_t j = i; j < width; ++j) sum += x[j] * x[j];
  const float scale = 1.f / __builtin_sqrtf(sum / float(width) + float(epsilon));
  for (i = 0; i + LANES <= width; i += LANES) {
    Floats v, w;
    read(x + i, v);
    read(weight + i, w);
    write(y + i, w * (v * scale));
  }
  for (; i < width; ++i) y[i] = weight[i] * (x[i] * scale);
}

void rotate(float* head, const float* cosines, const float* sines, int64_t rotary) {
  const int64_t half = rotary / 2;
  int64_t i = 0;
  for (; i + LANES <= half; i += LANES) {
    Floats a, b, c, s;
    read(head + i, a);
    read(head + half + i, b);
    read(cosines + i, c);
    read(sines + i, s);
    write(head + i, a * c - b * s);
    write(head + half + i, b * c + a * s);
  }
  for (; i < half; ++i) {
    const float a = head[i], b = head[half + i];
    head[i] = a * cosines[i] - b * sines[i];
    head[half + i] = b * cosines[i] + a * sines[i];
  }
}

void gate(float* g, const float* up, int64_t width, int64_t activation) {
  int64_t i = 0;
  Floats a, b;
  for (; i + LANES <= width; i += LANES) {
    read(g + i, a);
    read(up + i, b);
    gated(a, b, activation);
    write(g + i, a);
  }
  if (i == width) return;
  float rest[2][LANES] = {};
  for (int64_t j = i; j < width; ++j) rest[0][j - i] = g[j], rest[1][j - i] = up[j];
  read(rest[0], a);
  read(rest[1], b);
  gated(a, b, activation);
  write(rest[0], a);
  for (int64_t j = i; j < width; ++j) g[j] = rest[0][j - i];
}

void scale_add(float* y, const float* x, float scale, int64_t width) {
  for (int64_t i = 0; i < width; ++i) y[i] = y[i] + x[i] * scale;
}

}  // namespace ISA
