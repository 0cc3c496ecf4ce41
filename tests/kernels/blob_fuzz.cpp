// Formats that are one run of bytes, damaged at random: what `sound` lets pass must be read without a step beside the memory,
// which is exactly as large as the bytes. Built and run by test_row_formats.py: blob_fuzz FORMAT ROWS COLS FILE ROUNDS.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "kernels.h"

namespace {

#define NUMBER(isa, name) N##name,
enum Number { SK_FORMATS(NUMBER, none) };

SkTable only_ours() {
  SkTable table{};
  table.prepare = ISA::prepare;
  table.formats[Nexponents] = &ISA::exponents;
  table.formats[Nsparse] = &ISA::sparse;
  return table;
}
const SkTable TABLE = only_ours();

uint64_t state = 1;
uint64_t draw() {
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return state;
}
int64_t below(int64_t n) { return int64_t(draw() % uint64_t(n)); }

// Exactly so many bytes, at an odd address now and then, with some of them changed, or cut short.
struct Damaged {
  char* memory;
  const char* p;
  int64_t size;
  Damaged(const std::vector<char>& good, int64_t head, bool cut) : size(int64_t(good.size()) - (cut && below(4) == 0 ? 1 + below(70) : 0)) {
    size = size < 0 ? 0 : size;
    const int64_t shift = below(3);
    memory = static_cast<char*>(std::malloc(size_t(size + shift)));
    std::memcpy(memory + shift, good.data(), size_t(size));
    p = memory + shift;
    for (int64_t n = below(6); n > 0 && size; --n) {
      // Mostly where the structure stands: one byte in a large body would hardly ever matter.
      const int64_t span = below(2) && head < size ? head : size;
      memory[shift + below(span)] = below(2) ? char(draw() >> 32) : char(-(below(3)));
    }
  }
  Damaged(const Damaged&) = delete;
  ~Damaged() { std::free(memory); }
};

int64_t passed = 0;

void matrix(int32_t number, int64_t rows, int64_t cols, const std::vector<char>& good) {
  const Damaged bytes(good, 64 + 4 * rows + 200, true);
  if (sk_sound(number, rows, cols, 32, bytes.p, bytes.size)) return;
  ++passed;
  const int64_t tokens = 1 + below(9);
  std::vector<float> x(size_t(tokens * cols), 1.f), y(size_t(tokens * rows)), out(static_cast<size_t>(cols));
  const SkMatrix m{bytes.p, nullptr, rows, cols, number, 32};
  if (sk_matrix(&m, x.data(), y.data(), tokens, 1)) std::exit(2);
  for (int32_t id = 0; id < rows; ++id)
    if (sk_matrix_rows(&m, &id, out.data(), 1)) std::exit(3);
}

void numbers(int64_t count, const std::vector<char>& good) {
  int64_t tables, length;
  std::memcpy(&tables, good.data() + 24, 8);
  std::memcpy(&length, good.data() + 32, 8);
  const int64_t blocks = (length + 4095) / 4096;
  const int64_t sizes[] = {256 * (tables + 1), 4 * (blocks + 1), count, length, blocks * 320};
  std::vector<char> parts[5];
  const char* from = good.data() + 64;
  for (int i = 0; i < 5; from += sizes[i++]) parts[i].assign(from, from + sizes[i]);
  const Damaged luts(parts[0], sizes[0], false), positions(parts[1], sizes[1], false), rest(parts[2], sizes[2], false);
  const Damaged stream(parts[3], sizes[3], false), gaps(parts[4], sizes[4], false);
  const int64_t first = below(count), wanted = 1 + below(count - first);
  std::vector<uint16_t> out(static_cast<size_t>(wanted));
  passed += sk_huffman(luts.p, tables, stream.p, stream.size, gaps.p, gaps.size, positions.p, blocks, rest.p, count, first, wanted, out.data(), 1) == 0;
}

}  // namespace

const SkTable* sk_table() { return &TABLE; }

void sk_parallel(void (*task)(void*, int64_t), void* context, int64_t chunks, int32_t) {
  for (int64_t chunk = 0; chunk < chunks; ++chunk) task(context, chunk);
}

int main(int, char** words) {
  const int64_t rows = std::atoll(words[2]), cols = std::atoll(words[3]), rounds = std::atoll(words[5]);
  std::FILE* file = std::fopen(words[4], "rb");
  std::vector<char> good;
  for (int c; (c = std::fgetc(file)) != EOF;) good.push_back(char(c));
  std::fclose(file);
  for (int64_t i = 0; i < rounds; ++i) {
    if (!std::strcmp(words[1], "huffman"))
      numbers(rows * cols, good);
    else
      matrix(std::strcmp(words[1], "sparse") ? Nexponents : Nsparse, rows, cols, good);
  }
  std::printf("%lld of %lld passed\n", static_cast<long long>(passed), static_cast<long long>(rounds));
}
