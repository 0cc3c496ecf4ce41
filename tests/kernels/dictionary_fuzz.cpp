// Damaged bytes of a ternary matrix in memory of exactly their size: what is taken for sound is read, and nothing beyond it.
// argv: a file with a sound matrix of 9 x 21, rounds.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "kernels.h"

int main(int, char** argv) {
  static unsigned char sound[1 << 16];
  FILE* file = std::fopen(argv[1], "rb");
  const int64_t bytes = int64_t(std::fread(sound, 1, sizeof sound, file));
  std::fclose(file);
  const SkFormat& format = ISA::dictionary;
  const int64_t shapes[][2] = {{9, 21}, {9, 22}, {8, 21}, {9, 64}, {0, 5}, {100, 3}};
  std::srand(1);
  int64_t taken = 0;
  for (int64_t round = 0; round < std::atoll(argv[2]); ++round) {
    const int64_t size = round % 5 ? bytes : std::rand() % (bytes + 1);
    char* data = static_cast<char*>(std::malloc(size_t(size)));
    std::memcpy(data, sound, size_t(size));
    for (int changes = std::rand() % 4; changes > 0 && size; --changes) data[std::rand() % size] = char(std::rand());
    for (const auto& shape : shapes) {
      const int64_t rows = shape[0], cols = shape[1], stride = (cols + 15) / 16 * 16;
      if (!format.sound(rows, cols, 32, data, size)) continue;
      ++taken;
      float* x = static_cast<float*>(std::calloc(size_t(13 * stride), 4));
      float* y = static_cast<float*>(std::calloc(size_t(13 * rows), 4));
      float* out = static_cast<float*>(std::calloc(size_t(cols), 4));
      const SkMatrix matrix{data, nullptr, rows, cols, 0, 32};
      format.product(matrix, SkInput{x, nullptr, nullptr, nullptr, 13, stride, 0}, y, rows, false, 0, rows);
      for (int64_t row = 0; row < rows; ++row) format.row(matrix, row, out);
      std::free(x), std::free(y), std::free(out);
    }
    std::free(data);
  }
  std::puts(taken ? "done" : "nothing was sound");
}
