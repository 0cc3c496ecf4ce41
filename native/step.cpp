// Layers of a Llama-like model over a ragged batch. A layer is five parallel phases when tokens are few: q, k and v; attention;
// o; gate and up; down. What lies between them (norms, int8 codes) is then too short to share and the caller does it alone.
// Low-rank additions need no phase: their first half is the first chunks of the phase that they belong to, and the others
// wait for it when their own product is done. A mixture of experts is two phases like a plain feed-forward: gate and up of all
// experts that tokens have chosen, then their down, where a chunk owns outputs and adds the experts up in ascending order.
// Where experts share latent spaces, one more comes first, in which each token enters every space of its experts once; and one
// comes between, where experts are added up in their space before they leave it together.
// Every phase splits rows or tokens, never a sum, so results do not depend on the number of threads.
#include <cmath>
#include <cstring>

#include "kernels.h"

namespace {

constexpr int64_t PART = 256;        // tokens that pass a matrix together; bounds the scratch memory
constexpr int64_t FEW = 8;           // tokens below which the caller norms and quantizes alone
constexpr int64_t TOKENS_EACH = 8;   // of a chunk, where tokens are split
constexpr int64_t QUERIES_EACH = 24; // heads times tokens of an attention chunk
constexpr int64_t RUN = 32;          // most tokens of a low-rank chunk
enum Projection { Q, K, V, O, GATE, UP, DOWN, PROJECTIONS };
enum Placed { ALL, QUERIES_ALONE, KEYS_ALONE, VALUES_ALONE };  // of what a layer's attention begins with

thread_local SkScratch scratch;

// Hands out pieces of a block of memory; asked twice, first without a block to learn the size.
struct Pieces {
  char* memory;
  size_t used = 0;
  template <class T>
  void take(T*& piece, int64_t count) {
    piece = memory ? reinterpret_cast<T*>(memory + used) : nullptr;
    used += (size_t(count) * sizeof(T) + 63) / 64 * 64;
  }
};

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t rounded_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

struct Run {  // neighbouring tokens of one adapter
  const SkLowRank* adapter;
  int64_t begin, end;
};

struct Tile {  // queries of one sequence
  int64_t sequence, first, count;
  const int32_t* parents;  // of its chunk, or null: each token follows the one before
  int64_t kept, kept_stride;  // where its weights stay for other layers, and how much of that is one query's
};

struct Job {  // matrices that are multiplied with the same tokens, in one space of rows
  const SkMatrix* matrix[3];
  float* y[3];
  int64_t stride[3];
  int32_t projection[3];
  int32_t count;
  bool add;        // into the residual stream
  bool gated;      // two matrices whose rows belong together
  const float* x;  // [tokens][cols]
  int64_t x_stride;
  const float* norm;  // applied to x first, or null
  const SkFormat* format[3];
  SkInput input[3];
  int64_t tiles_each;
};

struct Group {  // the tokens of the part that meet an expert, or enter a latent space: neighbouring places, in their order
  const SkExpert* expert;  // or the space
  const Group* latent;     // of the space that the expert shares, or null
  int64_t first, count;    // places
  int64_t tile;            // of all that are computed in a phase, the first of this one
  float *gate, *up;      // [count][width]
  SkInput gate_input, up_input, down_input;
};

struct Room {  // what the mixtures of a model need, the largest of each
  int64_t choices, chosen, groups, places;
  int64_t inner;                      // floats of a part
  int64_t input_bytes, inner_bytes;   // of one place: inputs of gate and up, input of down
};

struct Step {
  const SkModel* model;
  const SkCache* cache;
  const SkBatch* batch;
  const SkTable* table;
  int32_t threads;
  bool shares;  // some layers take the attention weights of others
  int64_t q_width, kv_width;        // of the present layer; before the first one, of the widest
  int64_t kv_heads;                 // of the present layer
  int64_t rank;                     // the highest of the adapters in use, 0 for none
  int64_t low_bytes, low_x_bytes;   // of one token: a @ x as some matrix b wants it, x as some matrix a wants it

  const SkBlock* block;
  SkPageLayout layout;  // of the present layer's pages, and the first of them
  uint8_t* pages;
  bool leads, follows;          // its attention weights are taken by others; it takes those of another
  int64_t layer, begin, count;  // tokens of the present part
  Placed placed;
  Job job;
  int64_t tokens_each;
  const Tile* first_tile;

  Room room;
  int64_t places, groups;  // of the present part and mixture
  int64_t latents;         // groups that are latent spaces, which come first
  int64_t first_group, last_group;  // of the present phase

  float *q, *k, *v, *out, *normed, *gate, *up, *added, *sums, *kept;
  float *scores, *weights, *gates, *place_gates, *met, *met_sum;
  int32_t *experts, *place_tokens;
  int32_t *choice_rows, *place_rows;  // where in its group of a latent space a token stands that meets an expert
  int64_t* loads;
  Group* group;
  char *place_input, *inner_input;
  char *input, *low, *low_x;
  int32_t* sequence_of;  // [tokens]
  Run* runs;
  Tile* tiles;
  int64_t run_count;
  int64_t low_done;  // runs whose a @ x is there
};

int64_t input_bound(int64_t cols, int64_t count) {
  const int64_t plain = sk_input_size(SK_FLOAT32, cols, 32, count), codes = sk_input_size(SK_Q8_TABLES, cols, SK_LEAST_GROUP, count);
  return rounded_up(larger(plain, codes), 64);
}

// Where tokens of a sequence branch, and null where each follows the one before: then slots alone tell what is visible.
const int32_t* branches(const SkBatch& b, int64_t sequence) {
  if (!b.parents) return nullptr;
  const int32_t* parents = b.parents + b.starts[sequence];
  for (int64_t t = 0; t < b.starts[sequence + 1] - b.starts[sequence]; ++t)
    if (parents[t] != t - 1) return parents;
  return nullptr;
}

// Queries that are attended together, none across two parts. Gives the floats of their weights where these are kept.
template <class Use>
int64_t each_tile(const Step& s, Use use) {
  const SkBatch& b = *s.batch;
  const int64_t most = larger(1, QUERIES_EACH / (s.model->heads / s.model->kv_heads));
  int64_t kept = 0;
  for (int64_t q = 0; q < b.sequences; ++q) {
    const int32_t* parents = branches(b, q);
    const int64_t stride = s.shares ? sk_kept_stride(b.contexts[q] + b.starts[q + 1] - b.starts[q], parents) : 0;
    for (int64_t t = b.starts[q]; t < b.starts[q + 1];) {
      const int64_t end = smaller(smaller(t + most, b.starts[q + 1]), (t / PART + 1) * PART);
      use(Tile{q, t - b.starts[q], end - t, parents, kept, stride});
      kept += (end - t) * s.model->heads * stride;
      t = end;
    }
  }
  return kept;
}

void lay_out(Step& s, Pieces& pieces) {
  const SkModel& m = *s.model;
  const int64_t tokens = s.batch->tokens, part = smaller(tokens, PART), elsewhere = s.batch->attend ? tokens : part;
  pieces.take(s.q, tokens * s.q_width);
  pieces.take(s.k, elsewhere * s.kv_width);
  pieces.take(s.v, elsewhere * s.kv_width);
  pieces.take(s.out, s.batch->attend ? tokens * s.q_width : 0);
  pieces.take(s.normed, part * m.hidden);
  pieces.take(s.gate, larger(part * m.intermediate, s.room.inner));
  pieces.take(s.up, larger(part * m.intermediate, s.room.inner));
  pieces.take(s.scores, part * s.room.choices);
  pieces.take(s.weights, s.room.choices ? part : 0);
  pieces.take(s.gates, part * s.room.chosen);
  pieces.take(s.experts, part * s.room.chosen);
  pieces.take(s.place_gates, s.room.places);
  pieces.take(s.place_tokens, s.room.places);
  pieces.take(s.choice_rows, part * s.room.chosen);
  pieces.take(s.place_rows, s.room.places);
  pieces.take(s.loads, s.room.groups);
  pieces.take(s.group, s.room.groups);
  pieces.take(s.place_input, s.room.places * s.room.input_bytes);
  pieces.take(s.inner_input, s.room.places * s.room.inner_bytes);
  pieces.take(s.met, s.room.choices ? part * m.hidden : 0);
  pieces.take(s.met_sum, s.room.choices ? part * m.hidden : 0);
  pieces.take(s.added, m.residual_scale == 1 ? 0 : part * m.hidden);
  s.low_bytes = input_bound(s.rank, 1);
  s.low_x_bytes = input_bound(larger(larger(m.hidden, s.q_width), m.intermediate), 1);
  pieces.take(s.sums, part * s.rank);
  pieces.take(s.low, s.rank ? 3 * part * s.low_bytes : 0);
  pieces.take(s.low_x, s.rank ? part * s.low_x_bytes : 0);
  pieces.take(s.input, larger(3 * input_bound(m.hidden, part), input_bound(larger(s.q_width, m.intermediate), part)));
  pieces.take(s.sequence_of, tokens);
  pieces.take(s.runs, s.rank ? tokens : 0);
  pieces.take(s.tiles, tokens);
  pieces.take(s.kept, s.shares ? each_tile(s, [](const Tile&) {}) : 0);
}

// ---- checks ----

const SkFormat* format_of(const SkTable* table, const SkMatrix& m) {
  return m.format < 0 || m.format >= SK_FORMAT_COUNT ? nullptr : table->formats[m.format];
}

bool fits(const SkTable* table, const SkMatrix& m, int64_t rows, int64_t cols) {
  const SkFormat* f = format_of(table, m);
  return f && m.data && m.rows == rows && m.cols == cols && f->packed_size(rows, cols, m.group) >= 0;
}

bool follows(const SkModel& m, int64_t layer) { return m.blocks[layer].leader != layer; }

// Whether a layer before `last` takes the attention weights of this one.
bool leads(const SkModel& m, int64_t layer, int64_t last) {
  for (int64_t l = layer + 1; l < last; ++l)
    if (m.blocks[l].leader == layer) return true;
  return false;
}

// Of layers with keys, and of those that take the attention weights of others and so have values alone.
struct Layouts {
  SkPageLayout whole, values;
};

bool page_layouts(const SkModel& m, int64_t type, Layouts& out) {
  if (m.layers < 1 || !m.blocks) return false;
  bool window = false;
  for (int64_t l = 0; l < m.layers; ++l) window |= m.blocks[l].window > 0;
  return sk_page_layout(m.kv_heads, m.head_dim, type, window, true, out.whole) &&
         sk_page_layout(m.kv_heads, m.head_dim, type, false, false, out.values);
}

const SkPageLayout& layout_of(const SkModel& m, const Layouts& layouts, int64_t layer) {
  return follows(m, layer) ? layouts.values : layouts.whole;
}

// Bytes of a page in all the layers before this one.
int64_t page_bytes_before(const SkModel& m, const Layouts& layouts, int64_t layer) {
  int64_t bytes = 0;
  for (int64_t l = 0; l < layer; ++l) bytes += layout_of(m, layouts, l).bytes;
  return bytes;
}

// A layer takes the weights that were computed last of those that are kept, so one block of them is in memory at a time.
bool may_follow(const SkModel& m, int64_t layer, int64_t first) {
  const int64_t leader = m.blocks[layer].leader;
  if (leader < first || leader > layer || follows(m, leader) || m.blocks[leader].v.rows != m.blocks[layer].v.rows) return false;
  for (int64_t l = leader + 1; l < layer; ++l)
    if (leads(m, l, m.layers)) return false;
  return true;
}

// A latent space, which is like the first.
bool latent_holds(const SkTable* table, const SkModel& m, const SkExpert& l, const SkExpert& first) {
  const int64_t size = first.gate.rows;
  if (!l.down.rows != !first.down.rows || size < 1 || size > m.hidden || l.up_first || !fits(table, l.gate, size, m.hidden)) return false;
  return fits(table, l.up, size, m.hidden) && (!l.down.rows || fits(table, l.down, m.hidden, size));
}

// An expert, with the latent space that it shares, or null.
bool expert_holds(const SkTable* table, const SkModel& m, const SkExpert& e, const SkExpert* latent) {
  const int64_t width = e.down.cols, first = e.up_first;
  const int64_t in = latent ? latent->gate.rows : m.hidden, out = latent && latent->down.rows ? in : m.hidden;
  if (width < 1 || width > m.intermediate || !fits(table, e.down, out, width)) return false;
  if (first == 0) return fits(table, e.gate, width, in) && fits(table, e.up, width, in);
  if (latent || first != width || !fits(table, e.gate, 2 * width, m.hidden) || !fits(table, e.up, 2 * width, m.hidden)) return false;
  // Rows of packed tiles can only be asked for by whole tiles.
  return width % SK_TILE == 0 || format_of(table, e.up)->packed_size(e.up.rows, e.up.cols, e.up.group) == 0;
}

// The latent space that an expert shares, or null.
const SkExpert* latent_of(const SkMixture& x, int64_t expert) {
  return x.latents ? x.latents + expert / (x.count / x.latent_count) : nullptr;
}

bool mixture_holds(const SkTable* table, const SkModel& m, const SkMixture& x) {
  if (x.choices < 1 || x.choices > 65536 || x.count < 1 || x.count > x.choices || x.chosen < 1 || x.chosen > x.choices) return false;
  if (x.scores < 0 || x.scores > 1 || !x.experts || !x.targets || !fits(table, x.router, x.choices, m.hidden)) return false;
  for (int64_t i = 0; i < x.choices; ++i)
    if (x.targets[i] < 0 || x.targets[i] >= x.count) return false;
  if (x.latents && (x.latent_count < 1 || x.latent_count > x.count || x.count % x.latent_count)) return false;
  for (int64_t l = 0; x.latents && l < x.latent_count; ++l)
    if (!latent_holds(table, m, x.latents[l], *x.latents)) return false;
  for (int64_t e = 0; e < x.count; ++e)
    if (!expert_holds(table, m, x.experts[e], latent_of(x, e))) return false;
  if (x.weigher.rows && (!x.shared || !fits(table, x.weigher, 1, m.hidden))) return false;
  return !x.shared || expert_holds(table, m, *x.shared, nullptr);
}

bool model_holds(const SkTable* table, const SkModel& m, int64_t first, int64_t last) {
  if (m.hidden < 1 || m.intermediate < 1 || m.vocab < 1 || m.heads < 1 || m.heads > 65536 || m.heads % m.kv_heads) return false;
  if (m.rotary < 0 || m.rotary % 2 || m.rotary > m.head_dim || (m.rotary && (!m.cosines || !m.sines))) return false;
  if (m.activation < 0 || m.activation > 1) return false;
  const int64_t group = m.heads / m.kv_heads;
  for (int64_t l = first; l < last; ++l) {
    const SkBlock& b = m.blocks[l];
    // Layers may be smaller than the model says, each in its own way.
    const int64_t kv = b.v.rows, q = kv * group, width = b.gate.rows;
    if (kv < 1 || kv > m.kv_heads * m.head_dim || kv % m.head_dim) return false;
    if (!b.attention_norm || !b.mlp_norm) return false;
    if (!fits(table, b.v, kv, m.hidden)) return false;
    if (!follows(m, l) && (!fits(table, b.q, q, m.hidden) || !fits(table, b.k, kv, m.hidden))) return false;
    if (follows(m, l) && !may_follow(m, l, first)) return false;
    if (!fits(table, b.o, m.hidden, q)) return false;
    if (b.mixture) {
      if (!mixture_holds(table, m, *b.mixture)) return false;
      continue;
    }
    if (width < 1 || width > m.intermediate || !fits(table, b.down, m.hidden, width)) return false;
    if (!fits(table, b.gate, width, m.hidden) || !fits(table, b.up, width, m.hidden)) return false;
  }
  return true;
}

// Bytes of one token as a matrix wants it.
int64_t input_bytes(const SkTable* table, const SkMatrix& m) {
  return rounded_up(sk_input_size(format_of(table, m)->kind, m.cols, m.group, 1), 64);
}

// Rows of its gate, and of its up.
int64_t width_of(const SkExpert& e) { return e.gate.rows - e.up_first; }

int64_t tiles_of(const SkExpert& e) { return (width_of(e) + SK_TILE - 1) / SK_TILE; }

void make_room(const SkTable* table, const SkExpert& e, Room& room, int64_t& width) {
  width = larger(width, width_of(e));
  room.input_bytes = larger(room.input_bytes, input_bytes(table, e.gate) + input_bytes(table, e.up));
  room.inner_bytes = larger(room.inner_bytes, input_bytes(table, e.down));
}

Room room_for(const SkTable* table, const SkModel& m, const SkBatch& b) {
  Room room{};
  const int64_t part = smaller(b.tokens, PART);
  for (int64_t l = b.first_layer; l < b.last_layer; ++l) {
    const SkMixture* x = m.blocks[l].mixture;
    if (!x) continue;
    int64_t width = 0, shared = 0, latent = 0;
    const int64_t latents = x->latents ? x->latent_count : 0, entered = smaller(latents, x->chosen);
    for (int64_t e = 0; e < x->count; ++e) make_room(table, x->experts[e], room, width);
    for (int64_t l = 0; l < latents; ++l) make_room(table, x->latents[l], room, latent);
    if (x->shared) make_room(table, *x->shared, room, shared);
    room.choices = larger(room.choices, x->choices);
    room.chosen = larger(room.chosen, x->chosen);
    room.groups = larger(room.groups, x->count + latents + 1);
    room.places = larger(room.places, part * (x->chosen + entered + (x->shared ? 1 : 0)));
    room.inner = larger(room.inner, part * (x->chosen * width + entered * latent + shared));
  }
  return room;
}

bool batch_holds(const SkModel& m, const SkCache* cache, const SkBatch& b, bool shares, int64_t page_bytes) {
  if (b.tokens < 0 || b.sequences < 0 || b.tokens > INT32_MAX || !b.hidden || (b.attend && shares)) return false;
  if (!b.attend && (!cache || !cache->data || cache->page_bytes != page_bytes)) return false;
  if (b.starts[0] != 0 || b.starts[b.sequences] != b.tokens) return false;
  const bool from_ids = b.first_layer == 0 && !b.from_hidden;
  for (int64_t t = 0; t < b.tokens; ++t) {
    if (from_ids && (b.ids[t] < 0 || b.ids[t] >= m.vocab)) return false;
    if (b.positions[t] < 0 || (m.rotary && b.positions[t] >= m.positions)) return false;
  }
  for (int64_t s = 0; s < b.sequences; ++s) {
    const int64_t begin = b.starts[s], end = b.starts[s + 1];
    if (begin < 0 || end < begin || end > b.tokens) return false;
    if (b.parents)
      for (int64_t t = begin; t < end; ++t)
        if (b.parents[t] < -1 || b.parents[t] >= t - begin) return false;
    if (b.attend || end == begin) continue;
    if (b.contexts[s] < 0) return false;
    const int64_t pages = (int64_t(b.contexts[s]) + end - begin + SK_PAGE - 1) / SK_PAGE;
    if (pages > b.table_stride) return false;
    for (int64_t p = 0; p < pages; ++p) {
      const int32_t page = b.tables[s * b.table_stride + p];
      if (page < 0 || page >= cache->pages) return false;
    }
  }
  return true;
}

const SkMatrix& matrix_of(const SkBlock& b, int64_t projection) {
  const SkMatrix* all[PROJECTIONS] = {&b.q, &b.k, &b.v, &b.o, &b.gate, &b.up, &b.down};
  return *all[projection];
}

// The highest rank of the adapters in use, -1 when one of them does not exist or does not fit.
int64_t highest_rank(const SkTable* table, const SkModel& m, const SkBatch& b) {
  int64_t rank = 0;
  if (!b.adapters) return 0;
  int32_t known = -1;
  for (int64_t t = 0; t < b.tokens; ++t) {
    const int32_t adapter = b.adapters[t];
    if (adapter == -1 || adapter == known) continue;
    if (adapter < 0 || adapter >= b.adapter_count || !b.low_rank || !b.low_rank[adapter]) return -1;
    const SkLowRank* parts = b.low_rank[adapter];
    for (int64_t i = b.first_layer * PROJECTIONS; i < b.last_layer * PROJECTIONS; ++i) {
      const SkLowRank& part = parts[i];
      if (part.a.rows == 0) continue;
      const SkMatrix& whole = matrix_of(m.blocks[i / PROJECTIONS], i % PROJECTIONS);
      if (part.a.rows < 0 || part.a.rows > 65536 || part.a.bias || part.b.bias) return -1;
      if (!fits(table, part.a, part.a.rows, whole.cols) || !fits(table, part.b, whole.rows, part.a.rows)) return -1;
      rank = larger(rank, part.a.rows);
    }
    known = adapter;
  }
  return rank;
}

// ---- matrices ----

// Part of a token range that a chunk of the present phase takes.
bool chunk_tokens(const Step& s, int64_t chunk, int64_t& begin, int64_t& end) {
  begin = chunk * s.tokens_each;
  end = smaller(begin + s.tokens_each, s.count);
  return begin < end;
}

void prepare_chunk(void* context, int64_t chunk) {
  const Step& s = *static_cast<Step*>(context);
  const Job& j = s.job;
  int64_t begin, end;
  chunk_tokens(s, chunk, begin, end);
  const float* x = j.x;
  int64_t stride = j.x_stride;
  if (j.norm) {
    for (int64_t t = begin; t < end; ++t)
      s.table->normalize(x + t * stride, j.norm, s.model->epsilon, j.matrix[0]->cols, s.normed + t * j.matrix[0]->cols);
    x = s.normed;
    stride = j.matrix[0]->cols;
  }
  for (int32_t i = 0; i < j.count; ++i) {
    bool known = false;
    for (int32_t before = 0; before < i; ++before) known |= j.input[before].rows == j.input[i].rows;
    if (!known) s.table->prepare(x, stride, j.matrix[i]->cols, j.format[i]->kind, j.matrix[i]->group, j.input[i], begin, end);
  }
}

const SkLowRank& low_rank(const Step& s, const Run& run, int32_t projection) {
  return run.adapter[s.layer * PROJECTIONS + projection];
}

// The tokens of a run that lie in the present part, counted from its beginning.
bool clip(const Step& s, const Run& run, int64_t& begin, int64_t& end) {
  begin = larger(run.begin, s.begin) - s.begin;
  end = smaller(run.end, s.begin + s.count) - s.begin;
  return begin < end;
}

// Tokens begin..end-1 of those that a job has prepared.
SkInput some_of(const SkInput& in, SkKind kind, int64_t begin, int64_t end) {
  const int64_t bytes = kind == SK_FLOAT32 ? 4 : kind == SK_BFLOAT16 ? 2 : 1;
  SkInput some = in;
  some.rows = static_cast<const char*>(in.rows) + begin * in.stride * bytes;
  some.count = end - begin;
  if (!sk_has_codes(kind)) return some;
  some.scales += begin * in.group_stride;
  some.sums += begin * in.group_stride;
  some.offsets += begin * in.group_stride;
  if (in.tables) some.tables += begin * in.table_stride;
  return some;
}

bool same_input(const Step& s, const SkMatrix& a, const SkMatrix& b) {
  const SkKind kind = format_of(s.table, a)->kind;
  return kind == format_of(s.table, b)->kind && (!sk_has_codes(kind) || a.group == b.group);
}

// a @ x of tokens begin..end-1 and the job's matrix i.
SkInput low_input(const Step& s, int32_t i, const SkMatrix& b, int64_t begin, int64_t end) {
  char* memory = s.low + (i * smaller(s.batch->tokens, PART) + begin) * s.low_bytes;
  return sk_input(memory, format_of(s.table, b)->kind, b.cols, b.group, end - begin);
}

// a @ x of a run's tokens for every matrix of the job.
void reduce(const Step& s, const Run& run) {
  const Job& j = s.job;
  int64_t begin, end;
  if (!clip(s, run, begin, end)) return;
  const SkMatrix* prepared = nullptr;
  for (int32_t i = 0; i < j.count; ++i) {
    const SkLowRank& m = low_rank(s, run, j.projection[i]);
    if (m.a.rows == 0) continue;
    const SkFormat *a = format_of(s.table, m.a), *b = format_of(s.table, m.b);
    SkInput x;
    if (same_input(s, *j.matrix[i], m.a)) {
      x = some_of(j.input[i], a->kind, begin, end);
    } else {
      x = sk_input(s.low_x + begin * s.low_x_bytes, a->kind, m.a.cols, m.a.group, end - begin);
      const float* from = j.norm ? s.normed : j.x;
      const int64_t stride = j.norm ? m.a.cols : j.x_stride;
      if (!prepared || !same_input(s, *prepared, m.a))
        s.table->prepare(from + begin * stride, stride, m.a.cols, a->kind, m.a.group, x, 0, end - begin);
      prepared = &m.a;
    }
    float* sums = s.sums + begin * s.rank;
    a->product(m.a, x, sums, s.rank, false, 0, m.a.rows);
    s.table->prepare(sums, s.rank, m.b.cols, b->kind, m.b.group, low_input(s, i, m.b, begin, end), 0, end - begin);
  }
}

// Few rows of many adapters are too short for the hardware to see a stream: they are asked for while the product is computed.
void fetch_low_rank(const Step& s, int32_t i, int64_t begin, int64_t end) {
  for (int64_t r = 0; r < s.run_count; ++r) {
    const SkMatrix& b = low_rank(s, s.runs[r], s.job.projection[i]).b;
    if (b.rows == 0 || (r > 0 && s.runs[r].adapter == s.runs[r - 1].adapter)) continue;
    const SkFormat* f = format_of(s.table, b);
    const char* p = static_cast<const char*>(b.data);
    for (int64_t at = f->packed_size(begin, b.cols, b.group), stop = f->packed_size(end, b.cols, b.group); at < stop; at += 64)
      __builtin_prefetch(p + at);
  }
}

void multiply(const Step& s, int32_t i, int64_t begin, int64_t end) {
  const Job& j = s.job;
  const SkMatrix& m = *j.matrix[i];
  const bool aside = j.add && s.added;
  float* y = aside ? s.added : j.y[i];
  fetch_low_rank(s, i, begin, end);
  j.format[i]->product(m, j.input[i], y, j.stride[i], j.add && !aside, begin, end);
  if (aside)
    for (int64_t t = 0; t < s.count; ++t)
      s.table->scale_add(j.y[i] + t * j.stride[i] + begin, y + t * j.stride[i] + begin, float(s.model->residual_scale), end - begin);
  if (s.run_count) sk_wait(&s.low_done, s.run_count);
  for (int64_t r = 0; r < s.run_count; ++r) {
    const SkMatrix& b = low_rank(s, s.runs[r], j.projection[i]).b;
    int64_t first, last;
    if (b.rows == 0 || !clip(s, s.runs[r], first, last)) continue;
    const SkInput h = low_input(s, i, b, first, last);
    format_of(s.table, b)->product(b, h, j.y[i] + first * j.stride[i], j.stride[i], true, begin, end);
  }
}

void product_chunk(void* context, int64_t chunk) {
  Step& s = *static_cast<Step*>(context);
  const Job& j = s.job;
  if (chunk < s.run_count) {
    reduce(s, s.runs[chunk]);
    __atomic_fetch_add(&s.low_done, 1, __ATOMIC_RELEASE);
    return;
  }
  int64_t begin = (chunk - s.run_count) * j.tiles_each * SK_TILE, end = begin + j.tiles_each * SK_TILE;
  if (j.gated) {
    end = smaller(end, j.matrix[0]->rows);
    multiply(s, 0, begin, end);
    multiply(s, 1, begin, end);
    for (int64_t t = 0; t < s.count; ++t)
      s.table->gate(j.y[0] + t * j.stride[0] + begin, j.y[1] + t * j.stride[1] + begin, end - begin, s.model->activation);
    return;
  }
  for (int32_t i = 0; i < j.count && end > 0; ++i) {
    const int64_t rows = j.matrix[i]->rows, padded = rounded_up(rows, SK_TILE);
    if (begin < rows) multiply(s, i, larger(begin, 0), smaller(end, rows));
    begin -= padded;
    end -= padded;
  }
}

void run_job(Step& s) {
  Job& j = s.job;
  char* memory = s.input;
  int64_t tiles = 0;
  for (int32_t i = 0; i < j.count; ++i) {
    const SkMatrix& m = *j.matrix[i];
    j.format[i] = format_of(s.table, m);
    if (!j.gated || i == 0) tiles += (m.rows + SK_TILE - 1) / SK_TILE;
    bool known = false;
    for (int32_t before = 0; before < i && !known; ++before) {
      known = j.format[before]->kind == j.format[i]->kind && (!sk_has_codes(j.format[i]->kind) || j.matrix[before]->group == m.group);
      if (known) j.input[i] = j.input[before];
    }
    if (known) continue;
    j.input[i] = sk_input(memory, j.format[i]->kind, m.cols, m.group, s.count);
    memory += rounded_up(sk_input_size(j.format[i]->kind, m.cols, m.group, s.count), 64);
  }
  s.tokens_each = s.count <= FEW || s.threads <= 1 ? s.count : TOKENS_EACH;
  sk_parallel(prepare_chunk, &s, (s.count + s.tokens_each - 1) / s.tokens_each, s.threads);
  // Several chunks a thread, so that one which is held up does not hold up the step.
  const int64_t wanted = s.threads > 1 ? int64_t(s.threads) * 4 : 1;
  j.tiles_each = (tiles + wanted - 1) / wanted;
  s.low_done = 0;
  sk_parallel(product_chunk, &s, s.run_count + (tiles + j.tiles_each - 1) / j.tiles_each, s.threads);
}

// ---- attention ----

uint8_t* block_of(const Step& s, int64_t page, int64_t head) {
  return s.pages + page * s.layout.bytes + head * s.layout.head_bytes;
}

// Norms and rotates queries of one token of the part: those of kv heads begin..end-1.
void place_queries(const Step& s, int64_t token, int64_t begin, int64_t end) {
  const SkModel& m = *s.model;
  const SkBatch& b = *s.batch;
  const int64_t at = s.begin + token, group = m.heads / m.kv_heads, dim = m.head_dim;
  const bool rotated = s.block->rotate && m.rotary;
  for (int64_t h = begin * group; h < end * group; ++h) {
    float* q = s.q + at * s.q_width + h * dim;
    if (s.block->q_norm && !s.block->whole_norms) s.table->normalize(q, s.block->q_norm, m.epsilon, dim, q);
    if (rotated)
      s.table->rotate(q, m.cosines + b.positions[at] * (m.rotary / 2), m.sines + b.positions[at] * (m.rotary / 2), m.rotary);
  }
}

// Norms, rotates and stores keys and values likewise; values alone where the layer has no keys.
void place_keys(const Step& s, int64_t token, int64_t begin, int64_t end) {
  const SkModel& m = *s.model;
  const SkBatch& b = *s.batch;
  const int64_t at = s.begin + token, dim = m.head_dim;
  const int64_t own = b.attend ? at : token;  // k and v are kept for all tokens only where attention is computed elsewhere
  const int64_t sequence = s.sequence_of[at], slot = b.attend ? 0 : b.contexts[sequence] + at - b.starts[sequence];
  const int64_t page = b.attend ? 0 : b.tables[sequence * b.table_stride + slot / SK_PAGE];
  const bool rotated = s.block->rotate && m.rotary;
  const float* cosines = rotated ? m.cosines + b.positions[at] * (m.rotary / 2) : nullptr;
  const float* sines = rotated ? m.sines + b.positions[at] * (m.rotary / 2) : nullptr;
  for (int64_t h = begin; h < end; ++h) {
    float* k = s.k + own * s.kv_width + h * dim;
    if (s.placed == VALUES_ALONE) {
      s.table->store(s.layout, block_of(s, page, h), slot % SK_PAGE, nullptr, s.v + own * s.kv_width + h * dim);
      continue;
    }
    if (s.block->k_norm && !s.block->whole_norms) s.table->normalize(k, s.block->k_norm, m.epsilon, dim, k);
    if (rotated) s.table->rotate(k, cosines, sines, m.rotary);
    if (b.attend) continue;
    s.table->store(s.layout, block_of(s, page, h), slot % SK_PAGE, k, s.v + own * s.kv_width + h * dim);
  }
  if (begin == 0 && !b.attend && s.layout.bytes > s.layout.positions)
    reinterpret_cast<int32_t*>(block_of(s, page, 0) + s.layout.positions)[slot % SK_PAGE] = b.positions[at];
}

// Norms queries and keys of a token over all heads, where the layer does it so.
void norm_whole(const Step& s, int64_t token) {
  if (!s.block->whole_norms || s.placed == VALUES_ALONE) return;
  const SkModel& m = *s.model;
  const int64_t at = s.begin + token, own = s.batch->attend ? at : token;
  float *q = s.q + at * s.q_width, *k = s.k + own * s.kv_width;
  if (s.placed != KEYS_ALONE && s.block->q_norm) s.table->normalize(q, s.block->q_norm, m.epsilon, s.q_width, q);
  if (s.placed != QUERIES_ALONE && s.block->k_norm) s.table->normalize(k, s.block->k_norm, m.epsilon, s.kv_width, k);
}

void place_chunk(void* context, int64_t chunk) {
  const Step& s = *static_cast<Step*>(context);
  int64_t begin, end;
  chunk_tokens(s, chunk, begin, end);
  for (int64_t t = begin; t < end; ++t) {
    norm_whole(s, t);
    if (s.placed == ALL || s.placed == QUERIES_ALONE) place_queries(s, t, 0, s.kv_heads);
    if (s.placed != QUERIES_ALONE) place_keys(s, t, 0, s.kv_heads);
  }
}

void attend_tile(const Step& s, const Tile& tile, int64_t head) {
  const SkModel& m = *s.model;
  const SkBatch& b = *s.batch;
  const int64_t start = b.starts[tile.sequence], group = m.heads / m.kv_heads;
  float* q = s.q + (start + tile.first) * s.q_width + head * group * m.head_dim;
  SkAttention a{};
  a.layout = &s.layout;
  a.q = q;
  a.out = q;
  a.count = tile.count;
  a.stride = s.q_width;
  a.group = group;
  a.head = block_of(s, 0, head);
  a.positions_from_head = s.layout.positions - head * s.layout.head_bytes;
  a.table = b.tables + tile.sequence * b.table_stride;
  a.context = b.contexts[tile.sequence];
  a.first = tile.first;
  a.parents = tile.parents;
  a.positions = b.positions + start;
  a.window = s.block->window;
  a.scale = float(m.attention_scale);
  a.kept = s.leads || s.follows ? s.kept + tile.kept + head * tile.count * group * tile.kept_stride : nullptr;
  a.kept_stride = tile.kept_stride;
  s.follows ? s.table->take(a) : s.table->attend(a);
}

void attend_chunk(void* context, int64_t chunk) {
  const Step& s = *static_cast<Step*>(context);
  attend_tile(s, s.first_tile[chunk / s.kv_heads], chunk % s.kv_heads);
}

// A single short sequence: each kv head is placed and attended by one chunk. Other batches may share pages between
// sequences, so there everything is placed first.
void whole_head_chunk(void* context, int64_t head) {
  const Step& s = *static_cast<Step*>(context);
  for (int64_t t = 0; t < s.count; ++t) {
    if (!s.follows) place_queries(s, t, head, head + 1);
    place_keys(s, t, head, head + 1);
  }
  Tile tile = s.tiles[0];
  tile.count = s.count;
  attend_tile(s, tile, head);
}

// ---- mixtures of experts ----

// Products of a matrix with tokens begin..end-1 of those that are normed: [count][rows].
void score(const Step& s, const SkMatrix& m, char* memory, float* y, int64_t begin, int64_t end) {
  const SkFormat* f = format_of(s.table, m);
  const SkInput in = sk_input(memory, f->kind, m.cols, m.group, s.count);
  s.table->prepare(s.normed, m.cols, m.cols, f->kind, m.group, in, begin, end);
  f->product(m, some_of(in, f->kind, begin, end), y + begin * m.rows, m.rows, false, 0, m.rows);
}

float sigmoid(float x) { return 1.f / (1.f + std::exp(-x)); }

// A router's products become scores, those scores the gates of the best: experts[chosen], -1 for one that stands there already.
// Of equal ones the first is chosen. Numbers that are none choose any experts, with gates that are none.
void choose(const SkMixture& x, float* scores, int32_t* experts, float* gates) {
  if (x.scores) {
    for (int64_t i = 0; i < x.choices; ++i) scores[i] = sigmoid(scores[i]);
  } else {
    float top = scores[0], sum = 0;
    for (int64_t i = 1; i < x.choices; ++i) top = scores[i] > top ? scores[i] : top;
    for (int64_t i = 0; i < x.choices; ++i) sum += scores[i] = std::exp(scores[i] - top);
    for (int64_t i = 0; i < x.choices; ++i) scores[i] /= sum;
  }
  int64_t count = 0;
  for (int64_t i = 0; i < x.choices; ++i) {
    // Until the end `gates` has what they are compared by.
    const float by = x.correction ? scores[i] + x.correction[i] : scores[i];
    if (count == x.chosen && !(by > gates[count - 1])) continue;
    int64_t at = count < x.chosen ? count++ : count - 1;
    for (; at > 0 && by > gates[at - 1]; --at) gates[at] = gates[at - 1], experts[at] = experts[at - 1];
    gates[at] = by;
    experts[at] = int32_t(i);
  }
  float sum = 0;
  for (int64_t i = 0; i < x.chosen; ++i) sum += gates[i] = scores[experts[i]];
  for (int64_t i = 0; i < x.chosen; ++i) {
    if (x.normalized) gates[i] /= sum;
    gates[i] *= float(x.scale);
    experts[i] = x.targets[experts[i]];
    for (int64_t before = 0; before < i && experts[i] >= 0; ++before)
      if (experts[before] == experts[i]) gates[before] += gates[i], experts[i] = -1;
  }
}

void route_chunk(void* context, int64_t chunk) {
  const Step& s = *static_cast<Step*>(context);
  const SkMixture& x = *s.block->mixture;
  const int64_t hidden = s.model->hidden;
  int64_t begin, end;
  chunk_tokens(s, chunk, begin, end);
  for (int64_t t = begin; t < end; ++t)
    s.table->normalize(s.batch->hidden + (s.begin + t) * hidden, s.block->mlp_norm, s.model->epsilon, hidden, s.normed + t * hidden);
  score(s, x.router, s.input, s.scores, begin, end);
  for (int64_t t = begin; t < end; ++t) choose(x, s.scores + t * x.choices, s.experts + t * x.chosen, s.gates + t * x.chosen);
  if (x.weigher.rows) score(s, x.weigher, s.input + input_bound(hidden, s.count), s.weights, begin, end);
}

void add_group(Step& s, const SkExpert& expert, int64_t count, const Group* latent = nullptr) {
  const Group* last = s.groups ? &s.group[s.groups - 1] : nullptr;
  Group& g = s.group[s.groups];
  g.expert = &expert;
  g.latent = latent;
  g.first = s.places;
  g.count = count;
  const int64_t before = last ? last->count * width_of(*last->expert) : 0;
  g.tile = s.groups > s.latents ? last->tile + tiles_of(*last->expert) : 0;
  g.gate = last ? last->gate + before : s.gate;
  g.up = last ? last->up + before : s.up;
  const SkKind gate = format_of(s.table, expert.gate)->kind, up = format_of(s.table, expert.up)->kind;
  char* memory = s.place_input + s.places * s.room.input_bytes;
  g.gate_input = g.up_input = sk_input(memory, gate, expert.gate.cols, expert.gate.group, count);
  if (latent || !same_input(s, expert.gate, expert.up))
    g.up_input = sk_input(memory + count * input_bytes(s.table, expert.gate), up, expert.up.cols, expert.up.group, count);
  const SkKind down = format_of(s.table, expert.down)->kind;
  g.down_input = sk_input(s.inner_input + s.places * s.room.inner_bytes, down, expert.down.cols, expert.down.group, count);
  ++s.groups;
  s.places += count;
}

// Which tokens enter which latent space: each once, however many of its experts it meets.
void gather_latents(Step& s) {
  const SkMixture& x = *s.block->mixture;
  for (int64_t l = 0; l < x.latent_count; ++l) {
    int32_t count = 0;
    for (int64_t t = 0; t < s.count; ++t) {
      bool enters = false;
      for (int64_t i = t * x.chosen; i < (t + 1) * x.chosen; ++i)
        if (s.experts[i] >= 0 && latent_of(x, s.experts[i]) == x.latents + l) enters = true, s.choice_rows[i] = count;
      if (!enters) continue;
      s.place_tokens[s.places + count] = int32_t(t);
      s.place_gates[s.places + count++] = 1.f;
    }
    if (count) add_group(s, x.latents[l], count);
  }
  s.latents = s.groups;
}

// Which tokens meet which expert.
void gather(Step& s) {
  const SkMixture& x = *s.block->mixture;
  for (int64_t e = 0; e < x.count; ++e) s.loads[e] = 0;
  for (int64_t i = 0; i < s.count * x.chosen; ++i)
    if (s.experts[i] >= 0) ++s.loads[s.experts[i]];
  s.places = s.groups = s.latents = 0;
  if (x.latents) gather_latents(s);
  const Group* latent = s.group;
  for (int64_t e = 0; e < x.count; ++e) {
    const int64_t count = s.loads[e];
    s.loads[e] = s.places;  // from here on where its next token goes
    if (!count) continue;
    while (x.latents && latent->expert != latent_of(x, e)) ++latent;
    add_group(s, x.experts[e], count, x.latents ? latent : nullptr);
  }
  for (int64_t i = 0; i < s.count * x.chosen; ++i) {
    if (s.experts[i] < 0) continue;
    const int64_t place = s.loads[s.experts[i]]++;
    s.place_tokens[place] = int32_t(i / x.chosen);
    if (x.latents) s.place_rows[place] = s.choice_rows[i];
    s.place_gates[place] = s.gates[i];
  }
  if (!x.shared) return;
  for (int64_t t = 0; t < s.count; ++t) {
    s.place_tokens[s.places + t] = int32_t(t);
    s.place_gates[s.places + t] = x.weigher.rows ? sigmoid(s.weights[t]) : 1.f;
  }
  add_group(s, *x.shared, s.count);
}

// Every place of a chunk: its group, and which of the group's it is.
template <class Use>
void each_place(const Step& s, int64_t chunk, Use use) {
  const int64_t begin = s.group[s.first_group].first + chunk * s.tokens_each, end = begin + s.tokens_each;
  for (int64_t g = s.first_group; g < s.last_group; ++g) {
    const Group& group = s.group[g];
    for (int64_t p = larger(begin, group.first); p < smaller(end, group.first + group.count); ++p) use(group, p - group.first);
  }
}

void prepare_place(const Step& s, const float* x, const SkMatrix& m, const SkInput& in, int64_t place) {
  const SkKind kind = format_of(s.table, m)->kind;
  s.table->prepare(x, m.cols, m.cols, kind, m.group, some_of(in, kind, place, place + 1), 0, 1);
}

void places_chunk(void* context, int64_t chunk) {
  const Step& s = *static_cast<Step*>(context);
  each_place(s, chunk, [&](const Group& g, int64_t i) {
    const float *gate_x = s.normed + s.place_tokens[g.first + i] * s.model->hidden, *up_x = gate_x;
    if (g.latent) {
      const int64_t row = s.place_rows[g.first + i] * width_of(*g.latent->expert);
      gate_x = g.latent->gate + row;
      up_x = g.latent->up + row;
    }
    prepare_place(s, gate_x, g.expert->gate, g.gate_input, i);
    if (g.up_input.rows != g.gate_input.rows) prepare_place(s, up_x, g.expert->up, g.up_input, i);
  });
}

void inner_places_chunk(void* context, int64_t chunk) {
  const Step& s = *static_cast<Step*>(context);
  each_place(s, chunk, [&](const Group& g, int64_t i) {
    prepare_place(s, g.gate + i * g.expert->down.cols, g.expert->down, g.down_input, i);
  });
}

void inner_chunk(void* context, int64_t chunk) {
  const Step& s = *static_cast<Step*>(context);
  const int64_t first = chunk * s.job.tiles_each, last = first + s.job.tiles_each;
  for (int64_t i = s.first_group; i < s.last_group; ++i) {
    const Group& g = s.group[i];
    const SkExpert& e = *g.expert;
    const int64_t width = width_of(e);
    const int64_t begin = larger(first - g.tile, 0) * SK_TILE, end = smaller((last - g.tile) * SK_TILE, width);
    if (begin >= end) continue;
    format_of(s.table, e.gate)->product(e.gate, g.gate_input, g.gate, width, false, begin, end);
    const SkFormat* up = format_of(s.table, e.up);
    up->product(e.up, g.up_input, g.up - e.up_first, width, false, e.up_first + begin, e.up_first + end);
    if (i < s.latents) continue;
    for (int64_t t = 0; t < g.count; ++t)
      s.table->gate(g.gate + t * width + begin, g.up + t * width + begin, end - begin, s.model->activation);
  }
}

// Numbers begin..end-1 of what a group says to its tokens, times its gates, into their rows of y.
void add_up(const Step& s, const Group& g, const int32_t* rows, float* y, int64_t stride, int64_t begin, int64_t end) {
  const SkMatrix& down = g.expert->down;
  format_of(s.table, down)->product(down, g.down_input, s.met, stride, false, begin, end);
  for (int64_t t = 0; t < g.count; ++t)
    s.table->scale_add(y + rows[g.first + t] * stride + begin, s.met + t * stride + begin, s.place_gates[g.first + t], end - begin);
}

// Adds experts up in the space that they share; the sum takes the place of what they have read there. As each chunk has the
// same numbers of all spaces, no two write to one place of s.met.
void latent_chunk(void* context, int64_t chunk) {
  const Step& s = *static_cast<Step*>(context);
  const int64_t size = width_of(*s.group->expert), begin = chunk * s.job.tiles_each * SK_TILE;
  const int64_t end = smaller(begin + s.job.tiles_each * SK_TILE, size);
  for (int64_t i = 0; i < s.latents; ++i)
    for (int64_t t = 0; t < s.group[i].count; ++t)
      std::memset(s.group[i].gate + t * size + begin, 0, size_t(end - begin) * 4);
  for (int64_t i = s.latents; i < s.groups; ++i)
    if (const Group& g = s.group[i]; g.latent) add_up(s, g, s.place_rows, g.latent->gate, size, begin, end);
}

// Whether a group's down leads to the stream, and not into a latent space or nowhere.
bool leaves(const Group& g) { return g.latent ? g.latent->expert->down.rows == 0 : g.expert->down.rows > 0; }

void outer_chunk(void* context, int64_t chunk) {
  const Step& s = *static_cast<Step*>(context);
  const int64_t hidden = s.model->hidden, begin = chunk * s.job.tiles_each * SK_TILE;
  const int64_t end = smaller(begin + s.job.tiles_each * SK_TILE, hidden), width = end - begin;
  for (int64_t t = 0; t < s.count; ++t) std::memset(s.met_sum + t * hidden + begin, 0, size_t(width) * 4);
  for (int64_t i = 0; i < s.groups; ++i)
    if (leaves(s.group[i])) add_up(s, s.group[i], s.place_tokens, s.met_sum, hidden, begin, end);
  for (int64_t t = 0; t < s.count; ++t)
    s.table->scale_add(s.batch->hidden + (s.begin + t) * hidden + begin, s.met_sum + t * hidden + begin,
                       float(s.model->residual_scale), width);
}

// Tiles in several chunks a thread, more where experts have unequally many tokens.
void run_tiles(Step& s, void (*task)(void*, int64_t), int64_t tiles) {
  const int64_t wanted = s.threads > 1 ? int64_t(s.threads) * (s.count > FEW ? 16 : 4) : 1;
  s.job.tiles_each = (tiles + wanted - 1) / wanted;
  sk_parallel(task, &s, (tiles + s.job.tiles_each - 1) / s.job.tiles_each, s.threads);
}

// Gate and up of the groups of the present phase.
void run_inner(Step& s) {
  const Group& last = s.group[s.last_group - 1];
  run_tiles(s, inner_chunk, last.tile + tiles_of(*last.expert));
}

void run_places(Step& s, void (*task)(void*, int64_t)) {
  const Group& last = s.group[s.last_group - 1];
  const int64_t places = last.first + last.count - s.group[s.first_group].first;
  s.tokens_each = places <= 2 * FEW || s.threads <= 1 ? places : TOKENS_EACH;
  sk_parallel(task, &s, (places + s.tokens_each - 1) / s.tokens_each, s.threads);
}

void mix(Step& s) {
  s.tokens_each = s.count <= FEW || s.threads <= 1 ? s.count : TOKENS_EACH;
  sk_parallel(route_chunk, &s, (s.count + s.tokens_each - 1) / s.tokens_each, s.threads);
  gather(s);
  s.first_group = 0;
  s.last_group = s.latents;
  if (s.latents) {
    run_places(s, places_chunk);
    run_inner(s);
  }
  s.first_group = s.latents;
  s.last_group = s.groups;
  run_places(s, places_chunk);
  run_inner(s);
  run_places(s, inner_places_chunk);
  if (s.latents && leaves(s.group[0])) {
    s.first_group = 0;
    s.last_group = s.latents;
    run_tiles(s, latent_chunk, tiles_of(*s.group->expert));
    run_places(s, inner_places_chunk);
  }
  run_tiles(s, outer_chunk, (s.model->hidden + SK_TILE - 1) / SK_TILE);
}

// ---- a layer ----

void project(Step& s) {
  const SkBlock& b = *s.block;
  const int64_t own = s.batch->attend ? s.begin : 0;
  const SkMatrix* matrices[3] = {&b.q, &b.k, &b.v};
  float* y[3] = {s.q + s.begin * s.q_width, s.k + own * s.kv_width, s.v + own * s.kv_width};
  const int32_t first = s.placed == VALUES_ALONE ? V : s.placed == KEYS_ALONE ? K : Q, end = s.placed == QUERIES_ALONE ? K : O;
  s.job = Job{};
  for (int32_t p = first; p < end; ++p) {
    const int32_t i = s.job.count++;
    s.job.matrix[i] = matrices[p];
    s.job.y[i] = y[p];
    s.job.stride[i] = matrices[p]->rows;
    s.job.projection[i] = p;
  }
  s.job.x = s.batch->hidden + s.begin * s.model->hidden;
  s.job.x_stride = s.model->hidden;
  s.job.norm = b.attention_norm;
  run_job(s);
}

void project_and_place(Step& s) {
  project(s);
  s.tokens_each = s.threads <= 1 ? s.count : smaller(TOKENS_EACH, (s.count + s.threads - 1) / s.threads);
  sk_parallel(place_chunk, &s, (s.count + s.tokens_each - 1) / s.tokens_each, s.threads);
}

void add_to_hidden(Step& s, const SkMatrix& matrix, Projection projection, const float* x) {
  s.job = Job{};
  s.job.count = 1;
  s.job.matrix[0] = &matrix;
  s.job.y[0] = s.batch->hidden + s.begin * s.model->hidden;
  s.job.stride[0] = s.model->hidden;
  s.job.projection[0] = projection;
  s.job.add = true;
  s.job.x = x;
  s.job.x_stride = matrix.cols;
  run_job(s);
}

void feed_forward(Step& s) {
  const SkBlock& b = *s.block;
  if (b.mixture) return mix(s);
  s.job = Job{};
  s.job.count = 2;
  s.job.gated = true;
  const SkMatrix* matrices[2] = {&b.gate, &b.up};
  float* y[2] = {s.gate, s.up};
  for (int32_t i = 0; i < 2; ++i) {
    s.job.matrix[i] = matrices[i];
    s.job.y[i] = y[i];
    s.job.stride[i] = matrices[i]->rows;
    s.job.projection[i] = GATE + i;
  }
  s.job.x = s.batch->hidden + s.begin * s.model->hidden;
  s.job.x_stride = s.model->hidden;
  s.job.norm = b.mlp_norm;
  run_job(s);
  add_to_hidden(s, b.down, DOWN, s.gate);
}

template <class Work>
void each_part(Step& s, Work work) {
  for (s.begin = 0; s.begin < s.batch->tokens; s.begin += PART) {
    s.count = smaller(s.batch->tokens - s.begin, PART);
    work();
  }
}

void run_layer(Step& s) {
  const SkBatch& b = *s.batch;
  s.q_width = s.block->o.cols;
  s.kv_width = s.block->v.rows;
  const int64_t kv_heads = s.kv_heads = s.kv_width / s.model->head_dim;
  const bool single = b.tokens <= FEW && s.sequence_of[0] == s.sequence_of[b.tokens - 1] && !b.attend;
  if (b.attend && b.queries) {
    s.placed = QUERIES_ALONE;
    each_part(s, [&] { project_and_place(s); });
    b.queries(s.layer, s.q);
    s.placed = KEYS_ALONE;
  }
  if (s.follows) s.placed = VALUES_ALONE;
  each_part(s, [&] { single ? project(s) : project_and_place(s); });
  if (b.attend) b.attend(s.layer, s.q, s.k, s.v, s.out);
  const Tile* tile = s.tiles;
  each_part(s, [&] {
    if (single) {
      for (int64_t t = 0; t < s.count; ++t) norm_whole(s, t);
      sk_parallel(whole_head_chunk, &s, kv_heads, s.threads);
    } else if (!b.attend) {
      s.first_tile = tile;
      int64_t tokens = 0;
      for (; tokens < s.count; ++tile) tokens += tile->count;
      sk_parallel(attend_chunk, &s, (tile - s.first_tile) * kv_heads, s.threads);
    }
    add_to_hidden(s, s.block->o, O, (b.attend ? s.out : s.q) + s.begin * s.q_width);
    feed_forward(s);
  });
  s.placed = ALL;
}

void embed_chunk(void* context, int64_t chunk) {
  const Step& s = *static_cast<Step*>(context);
  const SkModel& m = *s.model;
  const SkFormat* f = format_of(s.table, *m.embedding);
  const int64_t begin = chunk * s.tokens_each, end = smaller(begin + s.tokens_each, s.batch->tokens);
  const float scale = float(m.embedding_scale);
  for (int64_t t = begin; t < end; ++t) {
    float* row = s.batch->hidden + t * m.hidden;
    f->row(*m.embedding, s.batch->ids[t], row);
    if (scale != 1)
      for (int64_t i = 0; i < m.hidden; ++i) row[i] *= scale;
  }
}

// Which sequence a token belongs to, queries that are attended together, and runs of adapters.
void divide(Step& s) {
  const SkBatch& b = *s.batch;
  Tile* tile = s.tiles;
  for (int64_t q = 0; q < b.sequences; ++q)
    for (int64_t t = b.starts[q]; t < b.starts[q + 1]; ++t) s.sequence_of[t] = int32_t(q);
  each_tile(s, [&](const Tile& made) { *tile++ = made; });
  s.run_count = 0;
  if (!s.rank) return;
  for (int64_t t = 0; t < b.tokens;) {
    int64_t end = t + 1;
    while (end < b.tokens && end < t + RUN && b.adapters[end] == b.adapters[t]) ++end;
    if (b.adapters[t] >= 0) s.runs[s.run_count++] = {b.low_rank[b.adapters[t]], t, end};
    t = end;
  }
}

struct Head {
  const SkModel* model;
  const SkTable* table;
  const SkFormat* format;
  const float* hidden;
  const int32_t* rows;
  float *normed, *logits;
  SkInput input;
  int64_t first, tokens_each, tiles_each;
};

void head_prepare_chunk(void* context, int64_t chunk) {
  const Head& h = *static_cast<Head*>(context);
  const SkModel& m = *h.model;
  const int64_t begin = chunk * h.tokens_each, end = smaller(begin + h.tokens_each, h.input.count);
  for (int64_t t = begin; t < end; ++t)
    h.table->normalize(h.hidden + h.rows[h.first + t] * m.hidden, m.final_norm, m.epsilon, m.hidden, h.normed + t * m.hidden);
  if (h.format) h.table->prepare(h.normed, m.hidden, m.hidden, h.format->kind, m.head->group, h.input, begin, end);
}

void head_product_chunk(void* context, int64_t chunk) {
  const Head& h = *static_cast<Head*>(context);
  const int64_t vocab = h.model->vocab, begin = chunk * h.tiles_each * SK_TILE;
  const int64_t end = smaller(begin + h.tiles_each * SK_TILE, vocab);
  h.format->product(*h.model->head, h.input, h.logits, vocab, false, begin, end);
  const float scale = float(h.model->logit_scale);
  if (scale != 1)
    for (int64_t t = 0; t < h.input.count; ++t)
      for (int64_t r = begin; r < end; ++r) h.logits[t * vocab + r] *= scale;
}

}  // namespace

int64_t sk_page_bytes(const SkModel* model, int64_t layer, int64_t type) {
  Layouts layouts;
  if (layer < 0 || layer >= model->layers || !page_layouts(*model, type, layouts)) return -1;
  return layout_of(*model, layouts, layer).bytes;
}

int32_t sk_run(const SkModel* model, const SkCache* cache, const SkBatch* batch, int32_t threads) {
  Step s{};
  s.model = model;
  s.cache = cache;
  s.batch = batch;
  s.table = sk_table();
  s.threads = threads;
  Layouts layouts;
  if (!page_layouts(*model, cache ? cache->type : 0, layouts)) return 1;
  if (batch->first_layer < 0 || batch->last_layer > model->layers || batch->first_layer > batch->last_layer) return 1;
  if (!model_holds(s.table, *model, batch->first_layer, batch->last_layer)) return 1;
  if (batch->first_layer == 0 && !batch->from_hidden &&
      (!model->embedding || !fits(s.table, *model->embedding, model->vocab, model->hidden)))
    return 1;
  for (int64_t l = 0; l < model->layers; ++l) s.shares |= follows(*model, l);
  if (!batch_holds(*model, cache, *batch, s.shares, page_bytes_before(*model, layouts, model->layers))) return 1;
  s.rank = highest_rank(s.table, *model, *batch);
  if (s.rank < 0) return 1;
  if (batch->tokens == 0) return 0;
  s.room = room_for(s.table, *model, *batch);
  s.q_width = model->heads * model->head_dim;
  s.kv_width = model->kv_heads * model->head_dim;
  Pieces sizes{nullptr};
  lay_out(s, sizes);
  char* memory = scratch.at_least(sizes.used);
  if (!memory) return 2;
  Pieces pieces{memory};
  lay_out(s, pieces);
  if (model->residual_scale == 1) s.added = nullptr;
  divide(s);
  if (batch->first_layer == 0 && !batch->from_hidden) {
    s.tokens_each = batch->tokens <= FEW ? batch->tokens : TOKENS_EACH;
    sk_parallel(embed_chunk, &s, (batch->tokens + s.tokens_each - 1) / s.tokens_each, threads);
  }
  if (cache) s.pages = static_cast<uint8_t*>(cache->data) + page_bytes_before(*model, layouts, batch->first_layer) * cache->pages;
  for (s.layer = batch->first_layer; s.layer < batch->last_layer; ++s.layer) {
    s.block = model->blocks + s.layer;
    s.follows = follows(*model, s.layer);
    s.leads = s.shares && leads(*model, s.layer, batch->last_layer);
    s.layout = layout_of(*model, layouts, s.layer);
    run_layer(s);
    s.pages += cache ? s.layout.bytes * cache->pages : 0;
  }
  return 0;
}

int32_t sk_logits(const SkModel* model, const void* hidden, const int32_t* rows, int64_t count, void* logits, void* normed, int32_t threads) {
  const SkTable* table = sk_table();
  if (count < 0 || model->hidden < 1 || model->vocab < 1 || !model->final_norm || !hidden) return 1;
  if (logits && (!model->head || !fits(table, *model->head, model->vocab, model->hidden))) return 1;
  for (int64_t i = 0; i < count; ++i)
    if (rows[i] < 0) return 1;
  Head h{};
  h.model = model;
  h.table = table;
  h.format = logits ? format_of(table, *model->head) : nullptr;
  h.hidden = static_cast<const float*>(hidden);
  h.rows = rows;
  const int64_t part = smaller(count, PART), input_bytes = input_bound(model->hidden, part);
  char* memory = scratch.at_least(size_t(input_bytes + part * model->hidden * 4));
  if (!memory) return 2;
  float* own = reinterpret_cast<float*>(memory + input_bytes);
  for (h.first = 0; h.first < count; h.first += PART) {
    const int64_t here = smaller(count - h.first, PART);
    h.normed = normed ? static_cast<float*>(normed) + h.first * model->hidden : own;
    h.input.count = here;
    if (logits) h.input = sk_input(memory, h.format->kind, model->hidden, model->head->group, here);
    h.tokens_each = here <= FEW || threads <= 1 ? here : TOKENS_EACH;
    sk_parallel(head_prepare_chunk, &h, (here + h.tokens_each - 1) / h.tokens_each, threads);
    if (!logits) continue;
    h.logits = static_cast<float*>(logits) + h.first * model->vocab;
    const int64_t tiles = (model->vocab + SK_TILE - 1) / SK_TILE, wanted = threads > 1 ? int64_t(threads) * 8 : 1;
    h.tiles_each = (tiles + wanted - 1) / wanted;
    sk_parallel(head_product_chunk, &h, (tiles + h.tiles_each - 1) / h.tiles_each, threads);
  }
  return 0;
}

int32_t sk_move(const SkModel* model, const SkCache* cache, const int32_t* table, const int32_t* from, const int32_t* to, int64_t count) {
  Layouts layouts;
  if (!page_layouts(*model, cache->type, layouts) || !cache->data) return 1;
  if (cache->page_bytes != page_bytes_before(*model, layouts, model->layers)) return 1;
  for (int64_t i = 0; i < count; ++i) {
    if (from[i] < 0 || to[i] < 0) return 1;
    const int32_t source = table[from[i] / SK_PAGE], target = table[to[i] / SK_PAGE];
    if (source < 0 || source >= cache->pages || target < 0 || target >= cache->pages) return 1;
  }
  const int64_t size = SK_CACHE_SIZES[cache->type], each = 4 / size;
  uint8_t* pages = static_cast<uint8_t*>(cache->data);
  for (int64_t l = 0; l < model->layers; ++l) {
    const SkPageLayout& layout = layout_of(*model, layouts, l);
    const int64_t pieces = layout.values / (SK_PAGE * 4);  // of keys, none where the layer has no keys
    for (int64_t i = 0; i < count; ++i) {
      uint8_t* source = pages + table[from[i] / SK_PAGE] * layout.bytes;
      uint8_t* target = pages + table[to[i] / SK_PAGE] * layout.bytes;
      const int64_t a = from[i] % SK_PAGE, b = to[i] % SK_PAGE, width = layout.value_width;
      for (int64_t h = 0; h < model->kv_heads; ++h) {
        uint8_t *x = source + h * layout.head_bytes, *y = target + h * layout.head_bytes;
        for (int64_t p = 0; p < pieces; ++p) std::memmove(y + p * 64 + b * 4, x + p * 64 + a * 4, 4);
        for (int64_t d = 0; d < width; ++d)
          std::memmove(y + layout.values + (b / each * width + d) * 4 + b % each * size,
                       x + layout.values + (a / each * width + d) * 4 + a % each * size, size_t(size));
        if (layout.type == SK_CACHE_INT8)
          for (int64_t scales = layout.key_scales; scales < layout.head_bytes; scales += SK_PAGE * 4)
            std::memmove(y + scales + b * 4, x + scales + a * 4, 4);
      }
      if (layout.bytes > layout.positions)
        std::memmove(target + layout.positions + b * 4, source + layout.positions + a * 4, 4);
    }
    pages += cache->pages * layout.bytes;
  }
  return 0;
}
