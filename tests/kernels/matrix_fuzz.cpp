// Random shapes and random bytes through every format of one instruction set. All memory is exactly as large as it must be,
// so that the sanitizers see a read or a write beside it. Built and run by test_matrix_sanitized.py.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "kernels.h"

#define ADDRESS(isa, name) &isa::name,
namespace {
SkTable only_formats() {
  const SkFormat* formats[] = {SK_FORMATS(ADDRESS, ISA)};
  SkTable table{};
  table.prepare = ISA::prepare;
  std::memcpy(table.formats, formats, sizeof formats);
  return table;
}
const SkTable TABLE = only_formats();

uint64_t state = 1;
uint64_t draw() {
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return state;
}
int64_t below(int64_t n) { return int64_t(draw() % uint64_t(n)); }

struct Memory {
  char* p;
  explicit Memory(int64_t size) : p(static_cast<char*>(std::malloc(size_t(size)))) {
    for (int64_t i = 0; i < size; ++i) p[i] = char(draw() >> 32);
  }
  Memory(const Memory&) = delete;
  ~Memory() { std::free(p); }
};

void check(bool right, const char* what) {
  if (right) return;
  std::fprintf(stderr, "%s\n", what);
  std::exit(1);
}

// 16-bit numbers of a row's group, beside its codes.
int64_t numbers_of(const char* name) {
  if (!std::strncmp(name, "binary", 6)) return name[6] - '0' + 1;
  return !std::strncmp(name, "uniform", 7) || !std::strcmp(name, "tritplanes") ? 2 : 1;
}

// Formats whose bytes say themselves how long they are have tests of their own.
bool says_its_size(const SkFormat& f) { return f.sound && f.packed_size(1, 64, 64) == 0; }

void once() {
  const int32_t number = int32_t(below(SK_FORMAT_COUNT));
  const SkFormat& f = *TABLE.formats[number];
  if (says_its_size(f)) return;
  const bool ggml = std::strchr(f.name, '_'), stored = number < 2;
  const int64_t rows = 1 + below(40), group = ggml ? 32 : 32 << below(3), cols = ggml ? 32 * (1 + below(8)) : 1 + below(300);
  const int64_t groups = (cols + group - 1) / group, tokens = 1 + below(14);
  const int64_t size = f.packed_size(rows, cols, group), source_size = f.source_size(rows, cols, group);
  check(size >= 0 && source_size > 0, "a good shape is refused");
  // Weights in a mapped file start anywhere.
  const int64_t shift = stored ? below(3) * 2 : below(3);
  Memory source(source_size + shift), scales(rows * groups * 2 * numbers_of(f.name)), packed(size ? size : 1);
  char* start = source.p + shift;
  std::unique_ptr<int64_t[]> order(new int64_t[size_t(rows)]);
  for (int64_t r = 0; r < rows; ++r) order[size_t(r)] = below(rows);
  const int64_t* use = below(2) ? order.get() : nullptr;
  if (f.sound) {  // trits: no code may be 3
    const bool sound = f.sound(rows, cols, group, start, source_size);
    check(sk_sound(number, rows, cols, group, start, source_size) == !sound, "sound");
    check(sk_pack(number, rows, cols, group, start, source_size, scales.p, use, packed.p, size, 1) == !sound, "unsound");
    for (int64_t i = 0; i < source_size; ++i) start[i] = char(start[i] & ~((start[i] & (start[i] >> 1) & 0x55) << 1));
  }
  if (!stored) {
    check(sk_pack(number, rows, cols, group, start, source_size - 1, scales.p, use, packed.p, size, 1) == 1, "source_size");
    check(sk_pack(number, rows, cols, group, start, source_size, scales.p, use, packed.p, size + 1, 1) == 1, "out_size");
    check(sk_pack(number, rows, cols, group, start, source_size, scales.p, use, packed.p, size, 1) == 0, "pack");
  }
  Memory bias(rows * 4), x(tokens * cols * 4), y(tokens * rows * 4), out(cols * 4);
  const SkMatrix m{stored ? start : packed.p, below(2) ? reinterpret_cast<const float*>(bias.p) : nullptr, rows, cols, number, group};
  check(sk_matrix(&m, x.p, y.p, tokens, 1) == 0, "product");
  int32_t id = int32_t(below(rows));
  check(sk_matrix_rows(&m, &id, out.p, 1) == 0, "row");
  id = below(2) ? int32_t(rows) : -1;
  check(sk_matrix_rows(&m, &id, out.p, 1) == 1, "an id outside the matrix is taken");
  // A part of the rows, added to what stands there, next to memory that is not to be touched.
  Memory input_memory(sk_input_size(f.kind, cols, group, tokens) + 64);
  void* aligned = input_memory.p + (64 - reinterpret_cast<uintptr_t>(input_memory.p) % 64) % 64;
  const SkInput input = sk_input(aligned, f.kind, cols, group, tokens);
  TABLE.prepare(reinterpret_cast<const float*>(x.p), cols, cols, f.kind, group, input, 0, tokens);
  const int64_t begin = below((rows + 15) / 16) * 16;
  f.product(m, input, reinterpret_cast<float*>(y.p), rows, true, begin, rows);
}

}  // namespace

const SkTable* sk_table() { return &TABLE; }

void sk_parallel(void (*task)(void*, int64_t), void* context, int64_t chunks, int32_t) {
  for (int64_t chunk = 0; chunk < chunks; ++chunk) task(context, chunk);
}

int main(int count, char** words) {
  const int64_t rounds = count > 1 ? std::atoll(words[1]) : 1000;
  const int64_t wrong[] = {-1, int64_t(1) << 62};
  for (const int64_t rows : wrong)
    for (int32_t number = -1; number <= SK_FORMAT_COUNT; ++number)
      if (number < 0 || number == SK_FORMAT_COUNT || !says_its_size(*TABLE.formats[number]))
        check(sk_packed_size(number, rows, 64, 32) == -1, "a wrong number of rows is taken");
  for (int64_t i = 0; i < rounds; ++i) once();
  std::puts("done");
}
