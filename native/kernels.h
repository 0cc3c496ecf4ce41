// The only place where a signature stands. Python reads the SK_API lines (kernels/loader.py), so both sides agree.
#pragma once
#include <cstdint>

#define SK_API extern "C" __attribute__((visibility("default")))

// Element types of x, y and bias: 0 float32, 1 bfloat16, 2 float16. Weight scales are bfloat16.
// Weights: bits 8: int8 [rows][groups * group]; bits 4: uint8 [rows][groups * group / 2], code = q + 8; inside a group byte j
// holds element j in its low nibble and element j + group / 2 in its high nibble. group is 32, 64 or 128.
// Functions that return int32_t give 0 when done, 1 for a bad argument, 2 when memory ran out.

// Counts up with every change of a signature or of SkLayer, so that newer Python code refuses an older library.
SK_API int32_t sk_version(void);

// The instruction set in use, and the space-separated list this CPU can run, best first.
SK_API const char* sk_isa(void);
SK_API const char* sk_isas(void);
// Use the best level that is not above `name`; 1 when no level has that name.
SK_API int32_t sk_set_isa(const char* name);

// A linear layer: eight-byte fields, so that a caller can pack it once and use it at every call. bias may be null.
struct SkLayer {
  const void *packed, *scales, *bias;
  int64_t in_features, rows, bits, group;
};

// y[tokens][rows] = x[tokens][in_features] @ weight.T + bias. Results do not depend on `threads`, the most that may work.
SK_API int32_t sk_linear(const SkLayer* layer, const void* x, void* y, int64_t tokens, int32_t type, int32_t threads);

// y[count][in_features] = weight[ids[i]], or weight[first + i] when ids is null; 1 when an id is outside 0..rows-1.
SK_API int32_t sk_rows(const int64_t* ids, const void* packed, const void* scales, void* y, int64_t first, int64_t count, int64_t in_features, int64_t rows, int32_t type, int32_t bits, int32_t group);

// x[rows][in_features] rounded to codes in groups: packed and scales as SkLayer has them. 1 where a number is not finite, too.
SK_API int32_t sk_round(const void* x, int32_t type, void* packed, void* scales, int64_t rows, int64_t in_features, int32_t bits, int32_t group, int32_t threads);

// ---- numbers in files ----

// Numbers first..first+count-1 of bfloat16 ones whose exponents are Huffman codes, as kernels/huffman.py lays them out:
// tables uint8 [table_count + 1][256], positions uint32 [blocks + 1], rest uint8 [rest_size]. 1 when the bytes contradict
// themselves; then `out` is of no use.
SK_API int32_t sk_huffman(const void* tables, int64_t table_count, const void* encoded, int64_t encoded_size, const void* gaps, int64_t gaps_size, const void* positions, int64_t blocks, const void* rest, int64_t rest_size, int64_t first, int64_t count, void* out, int32_t threads);

// ---- the engine: whole layers of a Llama-like model over packed weights ----

// A matrix [rows][cols] in a format of sk_format. All fields are eight bytes, here and below, so that Python can lay them out.
struct SkMatrix {
  const void* data;   // what sk_pack wrote, or for fp32 and bf16 the rows as a weight file holds them
  const float* bias;  // [rows], or null
  int64_t rows, cols, format, group;
};

// The number of a format of SK_FORMATS, -1 for an unknown name.
SK_API int32_t sk_format(const char* name);
// Bytes of a matrix as sk_pack writes it; 0 where rows are used as stored, -1 for a bad argument.
SK_API int64_t sk_packed_size(int32_t format, int64_t rows, int64_t cols, int64_t group);
// Lay a stored matrix out for the kernels. source: GGUF blocks, or int8/int4 codes with their bfloat16 scales [rows][groups].
// order: stored row of each packed row, or null. source_size and out_size are checked.
SK_API int32_t sk_pack(int32_t format, int64_t rows, int64_t cols, int64_t group, const void* source, int64_t source_size, const void* scales, const int64_t* order, void* out, int64_t out_size, int32_t threads);

// Of formats that not any bytes can be: 0 when a product may read these, 1 when they contradict themselves or the matrix.
// sk_pack asks by itself; formats that are used as stored must be asked.
SK_API int32_t sk_sound(int32_t format, int64_t rows, int64_t cols, int64_t group, const void* source, int64_t source_size);

struct SkPacking {  // arguments of sk_pack
  const void *source, *scales;
  const int64_t* order;
  void* out;
  int64_t format, rows, cols, group, source_size, out_size;
};
// Many at once; 0, or which of them (from 1) has a bad argument: then none was packed.
SK_API int64_t sk_pack_all(const SkPacking* all, int64_t count, int32_t threads);
// y[tokens][rows] float32 = x[tokens][cols] float32 @ matrix.T + bias.
SK_API int32_t sk_matrix(const SkMatrix* matrix, const void* x, void* y, int64_t tokens, int32_t threads);
// y[count][cols] float32 = rows ids[i] of the matrix.
SK_API int32_t sk_matrix_rows(const SkMatrix* matrix, const int32_t* ids, void* y, int64_t count);

struct SkExpert {  // a gated feed-forward as wide as `down` has columns
  SkMatrix gate, up, down;
  int64_t up_first;  // the row of `up` where it begins: 0, or the width where gate and up are one matrix, which both name
};

struct SkMixture {  // experts of which a token meets a few
  SkMatrix router;   // [choices][hidden]
  SkMatrix weigher;  // [1][hidden]: the shared expert counts as the sigmoid of its product says; rows 0: wholly
  const SkExpert* experts;  // [count]
  // [latent_count] or null: equally large spaces, each shared by count / latent_count neighbouring experts. Its gate and up lead
  // a token into it, where those of its experts read each its own half; its down leads the sum of them out. With rows 0 of down
  // theirs lead to the stream.
  const SkExpert* latents;
  const SkExpert* shared;   // what every token meets beside them, or null
  const int32_t* targets;   // [choices]: the expert that a choice stands for; of one that is chosen twice the gates add up
  const float* correction;  // [choices]: added to scores when the best are looked for, not to gates; or null
  int64_t choices, count, chosen, latent_count;
  int64_t scores;      // 0: softmax of the router's products, 1: sigmoid
  int64_t normalized;  // 1: the gates of those chosen sum to 1
  double scale;        // of gates
};

struct SkBlock {  // one transformer layer; norms are float32, q_norm and k_norm [head_dim] or null (see whole_norms)
  SkMatrix q, k, v, o, gate, up, down;
  const SkMixture* mixture;  // in place of gate, up and down, or null
  const float *attention_norm, *mlp_norm, *q_norm, *k_norm;
  int64_t rotate;  // 0: this layer has no rotary positions
  int64_t window;  // how many positions back a token sees, itself included; 0: all
  int64_t leader;  // the layer whose attention weights it takes: itself, or one before; then q and k are not there
  int64_t whole_norms;  // 1: q_norm and k_norm are as wide as q and k, and each is normed as a whole
};

struct SkModel {
  int64_t layers, hidden, heads, kv_heads, head_dim, intermediate, vocab;
  int64_t rotary;     // leading dimensions of a head that are rotated, in halves (not pairs)
  int64_t positions;  // rows of cosines and sines
  int64_t activation; // of the gate: 0 silu, 1 gelu by tanh
  double epsilon, attention_scale, embedding_scale, residual_scale, logit_scale;
  const SkBlock* blocks;
  const SkMatrix *embedding, *head;
  const float *final_norm, *cosines, *sines;  // [hidden]; [positions][rotary / 2]
};

// Keys and values in pages of SK_PAGE tokens: the pages of a layer side by side, those of the layers one after another.
struct SkCache {
  void* data;
  int64_t pages, page_bytes;  // bytes of one page, summed over the layers
  int64_t type;  // 0: bfloat16, 1: int8 with a float32 scale for each key and value, 2: float32
};

// y += b @ (a @ x): a [rank][in], b [out][rank] with all scales in it, without biases. a.rows 0: absent.
struct SkLowRank {
  SkMatrix a, b;
};

// Attention computed elsewhere: q [tokens][heads][head_dim] after rotation, k and v; writes out like q. Null: computed here.
typedef void (*SkAttend)(int64_t layer, const float* q, const float* k, const float* v, float* out);
// Called before it with the queries alone, which are then computed first. Null: keys and values come in the same product.
typedef void (*SkQueries)(int64_t layer, const float* q);

struct SkBatch {  // see engine/runner.py: Batch
  int64_t tokens, sequences, table_stride, first_layer, last_layer;
  const int32_t *ids;        // used when first_layer is 0 and from_hidden is 0
  const int32_t *positions, *starts, *contexts, *tables, *parents, *adapters;  // parents and adapters may be null
  const SkLowRank* const* low_rank;  // [adapters]: [layers][7] in the order q k v o gate up down
  int64_t adapter_count, from_hidden;
  float* hidden;             // [tokens][hidden], in and out
  SkAttend attend;
  SkQueries queries;
};

// Bytes of one page of a layer, -1 for a bad argument.
SK_API int64_t sk_page_bytes(const SkModel* model, int64_t layer, int64_t type);
// Layers first_layer..last_layer-1 over a ragged batch; fills the cache. 1: an index outside its range (nothing was written), 2: memory.
SK_API int32_t sk_run(const SkModel* model, const SkCache* cache, const SkBatch* batch, int32_t threads);
// Final norm and head on chosen rows of hidden: logits [count][vocab]; normed [count][hidden] (either may be null).
SK_API int32_t sk_logits(const SkModel* model, const void* hidden, const int32_t* rows, int64_t count, void* logits, void* normed, int32_t threads);
// Copy slot from[i] to slot to[i] of one sequence, in order, in every layer.
SK_API int32_t sk_move(const SkModel* model, const SkCache* cache, const int32_t* table, const int32_t* from, const int32_t* to, int64_t count);

// Pages of one layer without its model, for a process that computes attention alone. No windows.
struct SkPages {
  void* data;  // page_bytes of sk_pages_bytes each
  int64_t pages, kv_heads, head_dim, type;
};
// Bytes of such a page, -1 for a bad argument.
SK_API int64_t sk_pages_bytes(int64_t kv_heads, int64_t head_dim, int64_t type);
// k and v [tokens][kv_heads][head_dim] of token t into slot slots[t] % SK_PAGE of page slots[t] / SK_PAGE; below 0: not kept.
SK_API int32_t sk_pages_store(const SkPages* pages, const int32_t* slots, const float* k, const float* v, int64_t tokens);
struct SkQuery {  // ragged, as in SkBatch
  const float* q;        // [tokens][heads][head_dim]
  float *out, *log_sums; // like q; [tokens][heads]: log of the sum of exp(score), -inf with out 0 where nothing is seen
  const int32_t *starts, *contexts, *tables, *parents;  // parents may be null
  const int32_t* seen;   // [tokens]: slots of its table that a token sees, used when parents is null
  int64_t tokens, sequences, table_stride, heads;
  double scale;
};
SK_API int32_t sk_pages_attend(const SkPages* pages, const SkQuery* query, int32_t threads);

// ---- inside the library ----

constexpr int64_t SK_PAGE = 16;
constexpr int64_t SK_TILE = 16;  // rows of a packed tile: one row a 32-bit lane
constexpr int64_t SK_LEAST_GROUP = 16;
constexpr int64_t SK_CACHE_INT8 = 1, SK_CACHE_FLOAT32 = 2;
constexpr int64_t SK_CACHE_SIZES[] = {2, 1, 4};  // bytes of a number, by SkCache.type

constexpr int32_t SK_ENTRY = 512;  // what is added to each entry of a table, so that none is negative

// What a format wants to be multiplied with. Q8: int8 codes in the matrix's groups, as in SkTokens; Q8_TABLES: tables beside them.
enum SkKind : int32_t { SK_FLOAT32 = 0, SK_BFLOAT16 = 1, SK_Q8 = 2, SK_Q8_TABLES = 3 };
inline bool sk_has_codes(SkKind kind) { return kind == SK_Q8 || kind == SK_Q8_TABLES; }

struct SkInput {  // tokens prepared for matrices of one kind and group; sk_input lays it out, prepare fills it
  const void* rows;        // [count][stride] float32, bfloat16 or int8, zero beyond the last column
  const float* scales;     // [count][group_stride], here and below only with codes
  const float* sums;       // [count][group_stride]: scale * sum of codes
  const int32_t* offsets;  // [count][group_stride]: -8 * sum of codes, what codes stored as q + 8 add too much
  int64_t count, stride, group_stride;
  // SK_Q8_TABLES: [count][table_stride]. For each 16 columns 64 bytes and 64 more: entry k of a four of columns is the sum of
  // those codes whose bit in k is set, plus SK_ENTRY; its 5 low bits are byte 16 * four + k, its 5 high ones 64 bytes further.
  const uint8_t* tables;
  int64_t table_stride;
};

// The layout of `count` tokens of a kind and group (where there are codes) on memory of sk_input_size bytes, aligned to 64.
int64_t sk_input_size(SkKind kind, int64_t cols, int64_t group, int64_t count);
SkInput sk_input(void* memory, SkKind kind, int64_t cols, int64_t group, int64_t count);

struct SkFormat {  // one for each format and instruction set: a file a format, and a name in SK_FORMATS
  const char* name;
  SkKind kind;
  int64_t (*packed_size)(int64_t rows, int64_t cols, int64_t group);  // 0: used as stored; -1: bad argument
  int64_t (*source_size)(int64_t rows, int64_t cols, int64_t group);
  // Tiles begin..end-1 (SK_TILE rows each).
  void (*pack)(int64_t rows, int64_t cols, int64_t group, const void* source, const void* scales, const int64_t* order, void* out, int64_t begin, int64_t end);
  // Rows begin..end-1 (begin a multiple of SK_TILE) of y[count][y_stride] = or += (add) x @ matrix.T + bias.
  void (*product)(const SkMatrix& m, const SkInput& x, float* y, int64_t y_stride, bool add, int64_t begin, int64_t end);
  void (*row)(const SkMatrix& m, int64_t row, float* out);
  // Null, or where not any bytes will do: whether these may be read as such a matrix.
  bool (*sound)(int64_t rows, int64_t cols, int64_t group, const void* source, int64_t source_size);
};

// Every format, in the order of its numbers.
#define SK_FORMATS(F, isa) \
  F(isa, fp32) F(isa, bf16) F(isa, int8) F(isa, int4) F(isa, q8_0) F(isa, q4_0) F(isa, q4_1) \
  F(isa, uniform2) F(isa, uniform3) F(isa, uniform4) F(isa, uniform5) F(isa, uniform6) \
  F(isa, ternary) F(isa, tritplanes) \
  F(isa, binary2) F(isa, binary3) F(isa, binary4) F(isa, exponents) F(isa, sparse) F(isa, dictionary)

constexpr int64_t SK_MAX_TOKENS = 192;  // tokens quantized together; bounds the scratch memory of a call

struct SkWeight {
  const uint8_t* packed;
  const uint16_t* scales;
  int64_t rows, groups;
  int32_t bits, group;
};

// Activations of up to SK_MAX_TOKENS tokens: symmetric int8, one scale per token and group.
struct SkTokens {
  int8_t* codes;     // [count][code_stride], zero after the last element; code_stride is a multiple of 128
  float* scales;     // [count][group_stride], zero after the last group; group_stride is a multiple of 16
  int32_t* offsets;  // [count][group_stride]: what to add to sum(stored weight code * activation code) of a group
  int64_t count, code_stride, group_stride;
};

struct SkOutput {
  void* y;  // [tokens][stride]
  const void* bias;
  int64_t stride;
  int32_t type;
};

struct SkPageLayout {  // bytes; a page holds one block a kv head, then, where a layer has a window, its tokens' positions
  int64_t type, head_dim;
  int64_t value_width;  // head_dim rounded up to whole registers
  // Of a block, where a 32-bit word holds n numbers: keys [head_dim / n][SK_PAGE][n] come first, where the layer has keys,
  // then at `values` [SK_PAGE / n][value_width][n]; for int8 float32 [SK_PAGE] of each at `key_scales` and `value_scales`.
  int64_t values, key_scales, value_scales, head_bytes;
  int64_t positions;  // int32 [SK_PAGE] in a page
  int64_t bytes;      // of a page, a multiple of 64
};

struct SkAttention {  // queries of one kv head of one sequence
  const SkPageLayout* layout;
  const float* q;  // [count][stride], the heads of the group side by side
  float* out;      // like q, and may be q
  int64_t count, stride, group;
  const uint8_t* head;          // the kv head's block in page 0 of the layer
  int64_t positions_from_head;  // from a block to the positions of its page
  const int32_t* table;
  int64_t context, first;               // slots before the chunk; which of its tokens is the first query
  const int32_t *parents, *positions;   // of the chunk; parents null: a chain
  int64_t window;
  float scale;
  const int32_t* seen;  // of the chunk: slots a token sees, or null for all up to its own
  float* log_sums;      // of a query at [token][log_stride] + head of the group, or null
  int64_t log_stride;
  // Where its weights stay for layers that take them, or null; there, where they are taken: [count * group][kept_stride],
  // for each span of slots 16 floats, of which the first is what its sums are multiplied with, and a weight a key.
  float* kept;
  int64_t kept_stride;
};

constexpr int64_t SK_SPAN = 256;   // slots whose softmax is computed in one go
constexpr int64_t SK_BEYOND = 96;  // slots after a span that nodes of a tree may fill and yet count as inside
// Floats of a query's weights that are kept: of a span, and over so many slots. Static: kernels share no symbol.
static inline int64_t sk_kept_span(bool tree) { return 16 + SK_SPAN + (tree ? SK_BEYOND : 0); }
static inline int64_t sk_kept_stride(int64_t slots, bool tree) { return (slots + SK_SPAN - 1) / SK_SPAN * sk_kept_span(tree); }

bool sk_page_layout(int64_t kv_heads, int64_t head_dim, int64_t type, bool window, bool keys, SkPageLayout& out);

#define SK_DECLARE_FORMAT(isa, name) extern const SkFormat name;
#define SK_DECLARE(isa)                                                                                                      \
  namespace isa {                                                                                                            \
  void quantize_tokens(const void* x, int32_t type, int64_t in_features, const SkWeight& w, const SkTokens& t, int64_t begin, \
                       int64_t end);                                                                                         \
  void product(const SkWeight& w, const SkTokens& t, const SkOutput& out, int64_t begin, int64_t end);                       \
  void product_many(const SkWeight& w, const SkTokens& t, const SkOutput& out, int64_t begin, int64_t end);                  \
  void decode_row(const SkWeight& w, int64_t row, int64_t in_features, void* y, int32_t type);                               \
  /* Row of x into w; false where a number is not finite. */                                                                 \
  bool round_row(const void* x, int32_t type, int64_t in_features, int64_t row, const SkWeight& w);                          \
  SK_FORMATS(SK_DECLARE_FORMAT, isa)                                                                                         \
  /* Tokens begin..end-1 of x [count][x_stride] float32 into `in`, which was laid out for the same kind, cols and group. */  \
  void prepare(const float* x, int64_t x_stride, int64_t cols, SkKind kind, int64_t group, const SkInput& in, int64_t begin, \
               int64_t end);                                                                                                 \
  void normalize(const float* x, const float* weight, double epsilon, int64_t width, float* y);                              \
  void rotate(float* head, const float* cosines, const float* sines, int64_t rotary);                                        \
  /* g = activation(g) * up */                                                                                               \
  void gate(float* g, const float* up, int64_t width, int64_t activation);                                                   \
  void scale_add(float* y, const float* x, float scale, int64_t width);                                                      \
  /* Key and value of one token into its slot of a kv head's block; k null where the layer has no keys. */                   \
  void store(const SkPageLayout& layout, uint8_t* head, int64_t slot, const float* k, const float* v);                       \
  void attend(const SkAttention& a);                                                                                         \
  /* The same with weights that another layer has kept, and without q. */                                                    \
  void take(const SkAttention& a);                                                                                           \
  }
SK_DECLARE(base)
SK_DECLARE(avx2)
SK_DECLARE(avx512vnni)
SK_DECLARE(avx512bf16)
SK_DECLARE(neondot)

#define SK_ONE(isa, name) +1
constexpr int32_t SK_FORMAT_COUNT = 0 SK_FORMATS(SK_ONE, none);
#undef SK_ONE

struct SkTable {
  const char* name;
  decltype(&base::quantize_tokens) quantize_tokens;
  decltype(&base::product) product;
  decltype(&base::product_many) product_many;
  decltype(&base::decode_row) decode_row;
  decltype(&base::round_row) round_row;
  decltype(&base::prepare) prepare;
  decltype(&base::normalize) normalize;
  decltype(&base::rotate) rotate;
  decltype(&base::gate) gate;
  decltype(&base::scale_add) scale_add;
  decltype(&base::store) store;
  decltype(&base::attend) attend;
  decltype(&base::take) take;
  const SkFormat* formats[SK_FORMAT_COUNT];
};
const SkTable* sk_table();

// Memory that a thread keeps between calls and that only grows. 64-byte aligned; null when there is none to be had.
struct SkScratch {
  void* memory = nullptr;
  int64_t size = 0;
  char* at_least(int64_t wanted);
  ~SkScratch();
};

// Runs task(context, chunk) for every chunk in 0..chunks-1 on at most `threads` threads, the caller among them. Chunks begin
// in order, so a chunk may wait for earlier ones.
void sk_parallel(void (*task)(void*, int64_t), void* context, int64_t chunks, int32_t threads);
// Returns when *done, which other threads raise by __atomic_fetch_add, has reached `wanted`.
void sk_wait(const int64_t* done, int64_t wanted);
