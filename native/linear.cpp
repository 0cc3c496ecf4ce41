// The quantized linear layer: checks arguments, quantizes the tokens, splits the rows, calls the kernels in use.
#include "kernels.h"

namespace {

constexpr int64_t FEW = 24;  // up to here using packed weights as they are beats turning them into tiles
constexpr int64_t TILE_ROWS = 32;
// Weight bytes (times tokens) below which a second thread costs more than it brings: between two short products it either
// sleeps, and comes late, or spins on a core that torch's own threads want.
constexpr int64_t ALONE = 1 << 20;

struct Job {
  const SkTable* table;
  const void* x;
  SkWeight w;
  SkTokens t;
  SkOutput out;
  int64_t in_features, rows_each, tokens_each;
  int32_t type;
};

void quantize_chunk(void* context, int64_t chunk) {
  const Job& j = *static_cast<Job*>(context);
  const int64_t begin = chunk * j.tokens_each, end = begin + j.tokens_each < j.t.count ? begin + j.tokens_each : j.t.count;
  j.table->quantize_tokens(j.x, j.type, j.in_features, j.w, j.t, begin, end);
}

void product_chunk(void* context, int64_t chunk) {
  const Job& j = *static_cast<Job*>(context);
  const int64_t begin = chunk * j.rows_each, end = begin + j.rows_each < j.w.rows ? begin + j.rows_each : j.w.rows;
  (j.t.count <= FEW ? j.table->product : j.table->product_many)(j.w, j.t, j.out, begin, end);
}

bool weight(const void* packed, const void* scales, int64_t rows, int64_t in_features, int64_t bits, int64_t group, SkWeight& w) {
  if ((bits != 4 && bits != 8) || (group != 32 && group != 64 && group != 128) || rows < 0 || in_features < 1) return false;
  w = {static_cast<const uint8_t*>(packed), static_cast<const uint16_t*>(scales), rows, (in_features + group - 1) / group,
       int32_t(bits), int32_t(group)};
  return true;
}

int64_t element_size(int32_t type) { return type == 0 ? 4 : 2; }

struct Rounding {
  const SkTable* table;
  const void* x;
  SkWeight w;
  int64_t in_features, rows_each;
  int32_t type, failed;
};

void round_chunk(void* context, int64_t chunk) {
  Rounding& r = *static_cast<Rounding*>(context);
  const int64_t begin = chunk * r.rows_each, end = begin + r.rows_each < r.w.rows ? begin + r.rows_each : r.w.rows;
  for (int64_t row = begin; row < end; ++row)
    if (!r.table->round_row(r.x, r.type, r.in_features, row, r.w)) __atomic_store_n(&r.failed, 1, __ATOMIC_RELAXED);
}

}  // namespace

int32_t sk_linear(const SkLayer* layer, const void* x, void* y, int64_t tokens, int32_t type, int32_t threads) {
  const int64_t in_features = layer->in_features, rows = layer->rows, bits = layer->bits, group = layer->group;
  Job j;
  if (type < 0 || type > 2 || !weight(layer->packed, layer->scales, rows, in_features, bits, group, j.w)) return 1;
  if (tokens <= 0 || rows == 0) return 0;
  j.table = sk_table();
  j.in_features = in_features;
  j.type = type;
  const int64_t most = tokens < SK_MAX_TOKENS ? tokens : SK_MAX_TOKENS;
  j.t.code_stride = (j.w.groups * group + 127) / 128 * 128;
  j.t.group_stride = (j.w.groups + 15) / 16 * 16;
  static thread_local SkScratch scratch;
  char* memory = scratch.at_least(int64_t(most * (j.t.code_stride + 8 * j.t.group_stride)));
  if (!memory) return 2;
  j.t.codes = reinterpret_cast<int8_t*>(memory);
  j.t.scales = reinterpret_cast<float*>(memory + most * j.t.code_stride);
  j.t.offsets = reinterpret_cast<int32_t*>(j.t.scales + most * j.t.group_stride);

  for (int64_t first = 0; first < tokens; first += SK_MAX_TOKENS) {
    j.t.count = tokens - first < SK_MAX_TOKENS ? tokens - first : SK_MAX_TOKENS;
    j.x = static_cast<const char*>(x) + int64_t(first * in_features) * element_size(type);
    j.out = {static_cast<char*>(y) + int64_t(first * rows) * element_size(type), layer->bias, rows, type};
    const int64_t bytes = rows * j.w.groups * group * bits / 8 * j.t.count;
    const int32_t hands = bytes < ALONE ? 1 : threads;

    const bool split_tokens = hands > 1 && j.t.count >= 16;
    j.tokens_each = split_tokens ? 8 : j.t.count;
    const int64_t token_chunks = (j.t.count + j.tokens_each - 1) / j.tokens_each;
    sk_parallel(quantize_chunk, &j, token_chunks, hands);

    // Several chunks a thread, so that one which is held up does not hold up the call; each a whole number of tiles.
    const int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS, wanted = hands > 1 ? hands * 4 : 1;
    j.rows_each = (tiles + wanted - 1) / wanted * TILE_ROWS;
    sk_parallel(product_chunk, &j, (rows + j.rows_each - 1) / j.rows_each, hands);
  }
  return 0;
}

int32_t sk_rows(const int64_t* ids, const void* packed, const void* scales, void* y, int64_t first, int64_t count, int64_t in_features, int64_t rows, int32_t type, int32_t bits, int32_t group) {
  SkWeight w;
  if (type < 0 || type > 2 || !weight(packed, scales, rows, in_features, bits, group, w)) return 1;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = ids ? ids[i] : first + i;
    if (row < 0 || row >= rows) return 1;
  }
  const SkTable* table = sk_table();
  for (int64_t i = 0; i < count; ++i)
    table->decode_row(w, ids ? ids[i] : first + i, in_features, static_cast<char*>(y) + int64_t(i * in_features) * element_size(type), type);
  return 0;
}

int32_t sk_round(const void* x, int32_t type, void* packed, void* scales, int64_t rows, int64_t in_features, int32_t bits, int32_t group, int32_t threads) {
  Rounding r;
  if (type < 0 || type > 2 || !weight(packed, scales, rows, in_features, bits, group, r.w)) return 1;
  r.table = sk_table();
  r.x = x;
  r.in_features = in_features;
  r.type = type;
  r.failed = 0;
  r.rows_each = (ALONE + in_features - 1) / in_features;
  sk_parallel(round_chunk, &r, (rows + r.rows_each - 1) / r.rows_each, threads);
  return r.failed;
}
