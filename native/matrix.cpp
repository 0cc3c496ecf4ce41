// Matrices of every format: sizes, packing, and the product outside a fused step. Arguments are checked here.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace {

constexpr int64_t ALONE = 1 << 17;  // weight bytes times tokens below which a second thread costs more than it brings

int64_t rounded_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

const SkFormat* format_of(int64_t number, const SkTable* table = sk_table()) {
  return number < 0 || number >= SK_FORMAT_COUNT ? nullptr : table->formats[number];
}

constexpr int64_t PACKED_EACH = 1 << 17;  // bytes of a chunk

// Whether its sizes belong together, its codes mean something, and its order stays inside.
bool holds(const SkPacking& p) {
  const SkFormat* f = format_of(p.format);
  if (!f || f->packed_size(p.rows, p.cols, p.group) < 0 || f->packed_size(p.rows, p.cols, p.group) != p.out_size) return false;
  if (f->source_size(p.rows, p.cols, p.group) != p.source_size) return false;
  if (f->sound && !f->sound(p.rows, p.cols, p.group, p.source, p.source_size)) return false;
  if (p.order)
    for (int64_t r = 0; r < p.rows; ++r)
      if (p.order[r] < 0 || p.order[r] >= p.rows) return false;
  return true;
}

int64_t chunks_of(const SkPacking& p) { return (p.out_size + PACKED_EACH - 1) / PACKED_EACH; }

void pack_chunk(void* context, int64_t chunk) {
  const SkPacking* p = static_cast<const SkPacking*>(context);
  for (; chunk >= chunks_of(*p); ++p) chunk -= chunks_of(*p);
  const int64_t tiles = (p->rows + SK_TILE - 1) / SK_TILE, count = chunks_of(*p);
  format_of(p->format)->pack(p->rows, p->cols, p->group, p->source, p->scales, p->order, p->out, tiles * chunk / count,
                             tiles * (chunk + 1) / count);
}

struct Product {
  const SkTable* table;
  const SkFormat* format;
  const SkMatrix* matrix;
  const float* x;
  float* y;
  SkInput input;
  int64_t tokens_each, rows_each;
};

void prepare_chunk(void* context, int64_t chunk) {
  const Product& p = *static_cast<Product*>(context);
  const int64_t begin = chunk * p.tokens_each, end = begin + p.tokens_each;
  p.table->prepare(p.x, p.matrix->cols, p.matrix->cols, p.format->kind, p.matrix->group, p.input, begin,
                   end < p.input.count ? end : p.input.count);
}

void product_chunk(void* context, int64_t chunk) {
  const Product& p = *static_cast<Product*>(context);
  const int64_t rows = p.matrix->rows, begin = chunk * p.rows_each, end = begin + p.rows_each;
  p.format->product(*p.matrix, p.input, p.y, rows, false, begin, end < rows ? end : rows);
}

}  // namespace

char* SkScratch::at_least(int64_t wanted) {
  if (wanted > size) {
    std::free(memory);
    memory = std::aligned_alloc(64, size_t(rounded_up(wanted, 64)));
    size = memory ? wanted : 0;
  }
  return static_cast<char*>(memory);
}

SkScratch::~SkScratch() { std::free(memory); }

int64_t sk_input_size(SkKind kind, int64_t cols, int64_t group, int64_t count) {
  if (kind == SK_FLOAT32) return count * rounded_up(cols, 16) * 4;
  if (kind == SK_BFLOAT16) return count * rounded_up(cols, 32) * 2;
  const int64_t codes = rounded_up(cols, 128), groups = rounded_up((cols + group - 1) / group, 16);
  return count * (codes + 12 * groups + (kind == SK_Q8_TABLES ? 8 * codes : 0));
}

SkInput sk_input(void* memory, SkKind kind, int64_t cols, int64_t group, int64_t count) {
  SkInput in{memory, nullptr, nullptr, nullptr, count, 0, 0, nullptr, 0};
  if (kind == SK_FLOAT32) in.stride = rounded_up(cols, 16);
  if (kind == SK_BFLOAT16) in.stride = rounded_up(cols, 32);
  if (sk_has_codes(kind)) {
    in.stride = rounded_up(cols, 128);
    in.group_stride = rounded_up((cols + group - 1) / group, 16);
    in.scales = reinterpret_cast<float*>(static_cast<char*>(memory) + count * in.stride);
    in.sums = in.scales + count * in.group_stride;
    in.offsets = reinterpret_cast<const int32_t*>(in.sums + count * in.group_stride);
    if (kind == SK_Q8_TABLES) {
      in.tables = reinterpret_cast<const uint8_t*>(in.offsets + count * in.group_stride);
      in.table_stride = 8 * in.stride;
    }
  }
  return in;
}

int32_t sk_format(const char* name) {
  for (int32_t i = 0; i < SK_FORMAT_COUNT; ++i)
    if (!std::strcmp(name, sk_table()->formats[i]->name)) return i;
  return -1;
}

int64_t sk_packed_size(int32_t format, int64_t rows, int64_t cols, int64_t group) {
  const SkFormat* f = format_of(format);
  return f ? f->packed_size(rows, cols, group) : -1;
}

int32_t sk_pack(int32_t format, int64_t rows, int64_t cols, int64_t group, const void* source, int64_t source_size, const void* scales, const int64_t* order, void* out, int64_t out_size, int32_t threads) {
  const SkPacking one{source, scales, order, out, format, rows, cols, group, source_size, out_size};
  return sk_pack_all(&one, 1, threads) != 0;
}

int64_t sk_pack_all(const SkPacking* all, int64_t count, int32_t threads) {
  int64_t chunks = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (!holds(all[i])) return i + 1;
    chunks += chunks_of(all[i]);
  }
  sk_parallel(pack_chunk, const_cast<SkPacking*>(all), chunks, threads);
  return 0;
}

int32_t sk_sound(int32_t format, int64_t rows, int64_t cols, int64_t group, const void* source, int64_t source_size) {
  const SkFormat* f = format_of(format);
  if (!f || f->packed_size(rows, cols, group) < 0 || source_size < 0) return 1;
  return f->sound ? !f->sound(rows, cols, group, source, source_size) : 0;
}

int32_t sk_matrix(const SkMatrix* matrix, const void* x, void* y, int64_t tokens, int32_t threads) {
  const SkTable* table = sk_table();  // asked once: the level in use may be changed meanwhile
  const SkFormat* f = format_of(matrix->format, table);
  if (!f || f->packed_size(matrix->rows, matrix->cols, matrix->group) < 0) return 1;
  if (tokens <= 0 || matrix->rows == 0) return 0;
  const int64_t most = tokens < SK_MAX_TOKENS ? tokens : SK_MAX_TOKENS;
  void* memory = std::aligned_alloc(64, size_t(rounded_up(sk_input_size(f->kind, matrix->cols, matrix->group, most), 64)));
  if (!memory) return 2;
  Product p{table, f, matrix, nullptr, nullptr, {}, 0, 0};
  for (int64_t first = 0; first < tokens; first += most) {
    const int64_t count = tokens - first < most ? tokens - first : most;
    p.input = sk_input(memory, f->kind, matrix->cols, matrix->group, count);
    p.x = static_cast<const float*>(x) + first * matrix->cols;
    p.y = static_cast<float*>(y) + first * matrix->rows;
    const int32_t hands = matrix->rows * matrix->cols * count < ALONE ? 1 : threads;
    p.tokens_each = hands > 1 && count >= 16 ? 8 : count;
    sk_parallel(prepare_chunk, &p, (count + p.tokens_each - 1) / p.tokens_each, hands);
    // Several chunks a thread, so that one which is held up does not hold up the call; each a whole number of tiles.
    const int64_t tiles = (matrix->rows + SK_TILE - 1) / SK_TILE, wanted = hands > 1 ? hands * 4 : 1;
    p.rows_each = (tiles + wanted - 1) / wanted * SK_TILE;
    sk_parallel(product_chunk, &p, (matrix->rows + p.rows_each - 1) / p.rows_each, hands);
  }
  std::free(memory);
  return 0;
}

int32_t sk_matrix_rows(const SkMatrix* matrix, const int32_t* ids, void* y, int64_t count) {
  const SkFormat* f = format_of(matrix->format);
  if (!f || f->packed_size(matrix->rows, matrix->cols, matrix->group) < 0) return 1;
  for (int64_t i = 0; i < count; ++i)
    if (ids[i] < 0 || ids[i] >= matrix->rows) return 1;
  for (int64_t i = 0; i < count; ++i) f->row(*matrix, ids[i], static_cast<float*>(y) + i * matrix->cols);
  return 0;
}
