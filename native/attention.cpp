// Attention over pages of keys and values. A register holds the same dimension of many keys, so that scores need no sums
// across lanes. Keys are taken in spans of SPAN slots counted from slot 0, softmax is exact inside a span, and spans are
// merged in order: a token's result does not depend on what is computed beside it. A node of a token tree counts as
// standing in the slot of its depth, where it comes to stand when it is accepted, so that it gets the bits of plain decoding.
#include "kernels.h"
#include "lanes.h"
#include "number.h"

namespace {

constexpr int64_t SPAN = SK_SPAN;
// A tree's depth is less than the number of its nodes, so these may stand in slots after the span that they count to.
constexpr int64_t WIDTH = SPAN + SK_BEYOND;
constexpr int ROWS = LANES == 16 ? 12 : 4;  // queries together: keys and values are widened once for all of them
constexpr int KEYS = 2;                     // registers of keys together
constexpr int64_t FETCHED = 2 * ROWS - 1;   // so few queries wait for memory; of more of them others have just met the page
constexpr float LOWEST = -1e30f;            // a maximum of no scores; finite, so that differences are numbers
constexpr int64_t MOST_DIM = 512;

struct Rows {  // some queries while they pass over the spans
  alignas(64) float q[ROWS][MOST_DIM + 16];  // times scale and log2(e)
  alignas(64) float score[ROWS][WIDTH];    // then the weight of each value
  alignas(64) int32_t seen[ROWS][WIDTH];   // -1 where a key is visible, else 0; of the first row of each token
  alignas(64) float sum[ROWS][MOST_DIM];   // of weighted values
  float highest[ROWS], total[ROWS];
  int64_t limit[ROWS];  // slots before this one may be visible
};

constexpr int64_t AHEAD = 4;  // pages whose keys are fetched in advance: pages are too short for the hardware to see a stream

struct Span {
  const uint8_t* heads[WIDTH / SK_PAGE + AHEAD];
  int64_t first, keys;  // slots
};

template <int R, int TYPE>
void scores(const SkPageLayout& layout, const Span& span, Rows& rows, bool fetch) {
  const int64_t dims = layout.head_dim;
  for (int64_t key = 0; key < span.keys; key += KEYS * LANES) {
    const uint8_t *k[KEYS], *later[KEYS];
    for (int v = 0; v < KEYS; ++v) {
      const int64_t at = key + v * LANES;
      k[v] = span.heads[at / SK_PAGE] + at % SK_PAGE * 4;
      later[v] = span.heads[at / SK_PAGE + AHEAD] + at % SK_PAGE * 4;
    }
    Floats dot[R][KEYS] = {};
    const float* q = rows.q[0];
    constexpr int64_t NEXT = MOST_DIM + 16;  // from one query to the next
    if (TYPE == SK_CACHE_FLOAT32) {
      for (int64_t d = 0; d < dims; ++d, ++q) {
        Floats key_dim[KEYS];
        for (int v = 0; v < KEYS; ++v) {
          read(k[v] + d * (SK_PAGE * 4), key_dim[v]);
          if (fetch) {
            __builtin_prefetch(later[v] + d * (SK_PAGE * 4));
            __builtin_prefetch(k[v] + layout.values + d * (SK_PAGE * 4));
          }
        }
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r)
          for (int v = 0; v < KEYS; ++v) dot[r][v] += key_dim[v] * q[r * NEXT];
      }
    } else if (TYPE != SK_CACHE_INT8) {
      for (int64_t d = 0; d < dims; d += 2, q += 2) {
        Floats even[KEYS], odd[KEYS];
        for (int v = 0; v < KEYS; ++v) {
          Words pair;
          read(k[v] + d * (SK_PAGE * 2), pair);
          if (fetch) {
            __builtin_prefetch(later[v] + d * (SK_PAGE * 2));
            __builtin_prefetch(k[v] + layout.values + d * (SK_PAGE * 2));
          }
          even[v] = Floats(pair << 16);
          odd[v] = Floats(pair & 0xffff0000u);
        }
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r)
          for (int v = 0; v < KEYS; ++v) {
            dot[r][v] += even[v] * q[r * NEXT];
            dot[r][v] += odd[v] * q[r * NEXT + 1];
          }
      }
    } else {
      for (int64_t d = 0; d < dims; d += 4, q += 4) {
        Floats part[4][KEYS];
        for (int v = 0; v < KEYS; ++v) {
          Words four;
          read(k[v] + d * SK_PAGE, four);
          if (fetch) {
            __builtin_prefetch(later[v] + d * SK_PAGE);
            __builtin_prefetch(k[v] + layout.values + d * SK_PAGE);
          }
          for (int i = 0; i < 4; ++i) part[i][v] = __builtin_convertvector(Ints(four << (24 - 8 * i)) >> 24, Floats);
        }
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r)
          for (int v = 0; v < KEYS; ++v)
            for (int i = 0; i < 4; ++i) dot[r][v] += part[i][v] * q[r * NEXT + i];
      }
      for (int v = 0; v < KEYS; ++v) {
        Floats scale;
        read(k[v] + layout.key_scales, scale);
        for (int r = 0; r < R; ++r) dot[r][v] *= scale;
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < KEYS; ++v) write(rows.score[r] + key + v * LANES, dot[r][v]);
  }
}

// How deep a token of a tree stands: how many of its chunk it descends from.
int64_t depth_of(const SkAttention& a, int64_t token) {
  int64_t depth = 0;
  for (int64_t at = a.parents[token]; at >= 0; at = a.parents[at]) ++depth;
  return depth;
}

// Adds the weights of a token and of its ancestors in the chunk to the lanes of the slots that they count as standing in, in
// the order of these. Keys before `own` are not the chunk's; the others that are seen stand in slots side by side.
void add_line(const SkAttention& a, const Span& span, int64_t token, const int32_t* seen, int64_t own, const float* score,
              float* lanes) {
  const int64_t deepest = a.context + depth_of(a, token) - span.first;
  int64_t slot = deepest < SPAN ? deepest + 1 : SPAN;
  for (int64_t key = own < 0 ? 0 : own; key < span.keys; ++key) slot += seen[key];
  for (int64_t key = own < 0 ? 0 : own; key < span.keys; ++key)
    if (seen[key]) lanes[slot++ % 16] += score[key];
}

// Scores of one query become weights relative to the span's highest score; the span joins the running maximum and total.
// Gives what the earlier sum and this span's values are multiplied with. `seen_keys` is null where slots
// alone tell what is visible; `kept` is where the span's weights stay, or null.
void weigh(const SkAttention& a, const Span& span, Rows& rows, int r, int64_t token, const int32_t* seen_keys, float* kept,
           float& before, float& now) {
  const SkPageLayout& layout = *a.layout;
  float* score = rows.score[r];
  const int32_t left = int32_t(rows.limit[r] - span.first < span.keys ? rows.limit[r] - span.first : span.keys);
  const int32_t own = a.parents ? int32_t(a.context - span.first < span.keys ? a.context - span.first : span.keys) : left;
  Ints lane;
  for (int64_t i = 0; i < LANES; ++i) lane[i] = int32_t(i);
  Floats highest = Floats{} + LOWEST;
  for (int64_t key = 0; key < span.keys; key += LANES) {
    Ints visible = lane + int32_t(key) < left, seen;
    if (seen_keys) {
      read(seen_keys + key, seen);
      visible &= seen;
    }
    Floats s;
    read(score + key, s);
    s = visible ? s : Floats{} - __builtin_inff();
    highest = s > highest ? s : highest;
    write(score + key, s);
  }
  float top = highest[0];
  for (int64_t i = 1; i < LANES; ++i) top = highest[i] > top ? highest[i] : top;
  Floats total[16 / LANES] = {};  // sixteen lanes on every level
  for (int64_t key = 0; key < span.keys; key += LANES) {
    Floats s;
    read(score + key, s);
    Floats weight = s - top;
    power_of_two(weight);
    weight = s == -__builtin_inff() ? Floats{} : weight;
    total[key / LANES % (16 / LANES)] += lane + int32_t(key) < own ? weight : Floats{};
    write(score + key, weight);
    if (kept) write(kept + 16 + key, weight);
  }
  if (kept) kept[0] = top;
  float lanes[16], sum = 0;
  for (int64_t i = 0; i < 16 / LANES; ++i) write(lanes + i * LANES, total[i]);
  if (a.parents && span.keys > own) add_line(a, span, token, seen_keys, own, score, lanes);
  if (layout.type == SK_CACHE_INT8)
    for (int64_t key = 0; key < span.keys; key += LANES) {
      Floats weight, scale;
      read(score + key, weight);
      read(span.heads[key / SK_PAGE] + layout.value_scales + key % SK_PAGE * 4, scale);
      write(score + key, weight * scale);
    }
  for (int i = 0; i < 16; ++i) sum += lanes[i];
  const float old = rows.highest[r], joint = top > old ? top : old;
  Floats both{};
  both[0] = old - joint;
  both[1] = top - joint;
  power_of_two(both);
  before = both[0];
  now = both[1];
  rows.highest[r] = joint;
  rows.total[r] = rows.total[r] * before + sum * now;
}

// The weighted sums of D registers of dimensions.
template <int R, int D, int TYPE>
void values(const SkPageLayout& layout, const Span& span, Rows& rows, int64_t dim, const float* before, const float* now) {
  constexpr int64_t EACH = 4 / SK_CACHE_SIZES[TYPE];  // keys in a word
  Floats sum[R][D] = {};
  const int64_t stride = layout.value_width * 4, keys = span.keys;
  for (int64_t first = 0; first < keys; first += SK_PAGE) {
    const uint8_t* v = span.heads[first / SK_PAGE] + layout.values + dim * 4;
    const int64_t here = keys - first < SK_PAGE ? keys - first : SK_PAGE;
    const float* weight = rows.score[0] + first;
    for (int64_t key = 0; key < here; key += EACH, v += stride, weight += EACH) {
      Words word[D];
      for (int d = 0; d < D; ++d) read(v + d * LANES * 4, word[d]);
      // A slot that was never written may hold anything, NaN too: it must not be touched, even with weight zero.
      const int64_t some = here - key < EACH ? here - key : EACH;
#pragma GCC unroll 4
      for (int64_t i = 0; i < EACH; ++i) {
        if (i >= some) break;
        Floats x[D];
        for (int d = 0; d < D; ++d) {
          if (TYPE == SK_CACHE_FLOAT32)
            x[d] = Floats(word[d]);
          else if (TYPE == SK_CACHE_INT8)
            x[d] = __builtin_convertvector(Ints(word[d] << (24 - 8 * i)) >> 24, Floats);
          else
            x[d] = Floats(i ? word[d] & 0xffff0000u : word[d] << 16);
        }
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r)
          for (int d = 0; d < D; ++d) sum[r][d] += x[d] * weight[r * WIDTH + i];
      }
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
    for (int d = 0; d < D; ++d) {
      Floats old;
      read(rows.sum[r] + dim + d * LANES, old);
      write(rows.sum[r] + dim + d * LANES, old * before[r] + sum[r][d] * now[r]);
    }
}

// Which keys of the span a token sees, for token trees and windows. False when it sees none.
bool look(const SkAttention& a, const Span& span, int64_t token, int32_t* seen) {
  const int64_t end = span.first + span.keys, rounded = (span.keys + KEYS * LANES - 1) / (KEYS * LANES) * (KEYS * LANES);
  for (int64_t key = 0; key < rounded; ++key)
    seen[key] = span.first + key < (a.parents ? a.context : a.context + token + 1) ? -1 : 0;
  if (a.parents) {
    int64_t depth = depth_of(a, token);
    for (int64_t at = token; at >= 0; at = a.parents[at], --depth) {
      const int64_t slot = a.context + depth - span.first, key = a.context + at;
      if (slot >= 0 && slot < SPAN && key < end) seen[key - span.first] = -1;
    }
  }
  if (a.window > 0)
    for (int64_t key = 0; key < span.keys; ++key) {
      // Another thread may be writing the chunk's own positions into the page.
      const int64_t own = span.first + key - a.context;
      const uint8_t* page = span.heads[key / SK_PAGE] + a.positions_from_head;
      const int64_t position = own < 0 ? reinterpret_cast<const int32_t*>(page)[key % SK_PAGE] : a.positions[own];
      if (a.positions[token] - position >= a.window) seen[key] = 0;
    }
  int32_t any = 0;
  for (int64_t key = 0; key < span.keys; ++key) any |= seen[key];
  return any != 0;
}

// Sums of nothing yet, and how far each row sees; gives how far any of them does.
template <int R>
int64_t begin_rows(const SkAttention& a, int64_t row, Rows& rows) {
  int64_t most = 0;
  for (int r = 0; r < R; ++r) {
    const int64_t token = (row + r) / a.group;
    for (int64_t d = 0; d < a.layout->value_width; ++d) rows.sum[r][d] = 0;
    rows.limit[r] = a.seen ? a.seen[a.first + token] : a.context + a.first + token + 1;
    most = rows.limit[r] > most ? rows.limit[r] : most;
  }
  return most;
}

void find_span(const SkAttention& a, int64_t first, int64_t most, Span& span) {
  span.first = first;
  const int64_t reach = a.parents && a.context < first + SPAN ? WIDTH : SPAN;  // what lies beyond is then the chunk's own
  span.keys = most - first < reach ? most - first : reach;
  for (int64_t p = 0; p < (span.keys + 2 * SK_PAGE - 1) / (2 * SK_PAGE) * 2 + AHEAD; ++p) {
    const int64_t page = first / SK_PAGE + p, last = (most - 1) / SK_PAGE;
    span.heads[p] = a.head + int64_t(a.table[page < last ? page : last]) * a.layout->bytes;
  }
}

template <int R, int TYPE>
void all_values(const SkPageLayout& layout, const Span& span, Rows& rows, const float* before, const float* now) {
  constexpr int WIDE = LANES == 16 && R <= 4 ? 4 : 2;  // enough sums to keep the units busy, and all in registers
  const int64_t width = layout.value_width;
  int64_t dim = 0;
  for (; dim + WIDE * LANES <= width; dim += WIDE * LANES) values<R, WIDE, TYPE>(layout, span, rows, dim, before, now);
  for (; dim < width; dim += LANES) values<R, 1, TYPE>(layout, span, rows, dim, before, now);
}

float* kept_span(const SkAttention& a, int64_t row, int64_t first) {
  return a.kept ? a.kept + row * a.kept_stride + first / SPAN * sk_kept_span(a.parents) : nullptr;
}

// The weights of a query were relative to the highest score of their span; what makes them those of the whole stays with them.
void finish_kept(const SkAttention& a, int64_t row, int64_t most, float highest, float total) {
  for (int64_t first = 0; first < most; first += SPAN) {
    float* kept = kept_span(a, row, first);
    Floats factor{};
    factor[0] = kept[0] - highest;
    power_of_two(factor);
    kept[0] = kept[0] == -__builtin_inff() ? 0.f : factor[0] / total;  // nothing was written of a span that is not seen
  }
}

template <int R, int TYPE>
void some_rows(const SkAttention& a, int64_t row, Rows& rows) {
  const SkPageLayout& layout = *a.layout;
  const int64_t dims = layout.head_dim, group = a.group, most = begin_rows<R>(a, row, rows);
  const float scale = a.scale * 1.44269504f;
  for (int r = 0; r < R; ++r) {
    const float* q = a.q + (row + r) / group * a.stride + (row + r) % group * dims;
    for (int64_t d = 0; d < dims; ++d) rows.q[r][d] = q[d] * scale;
    for (int64_t d = dims; d < dims + 2; ++d) rows.q[r][d] = 0;  // int8 keys come in fours
    rows.highest[r] = LOWEST;
    rows.total[r] = 0;
  }
  for (int64_t first = 0; first < most; first += SPAN) {
    Span span;
    find_span(a, first, most, span);
    const int32_t* seen[R] = {};
    if (a.window > 0 || (a.parents && first + span.keys > a.context)) {
      bool any = false;
      for (int r = 0; r < R; ++r) {
        const bool same = r > 0 && (row + r) % group != 0;  // as the row before, of another head
        seen[r] = same ? seen[r - 1] : rows.seen[r];
        if (!same) any |= look(a, span, a.first + (row + r) / group, rows.seen[r]);
      }
      for (int r = 0; !any && a.kept && r < R; ++r) *kept_span(a, row + r, first) = -__builtin_inff();
      if (!any) continue;
    }
    scores<R, TYPE>(layout, span, rows, row == 0 && a.count * group <= FETCHED);
    float before[R], now[R];
    for (int r = 0; r < R; ++r)
      weigh(a, span, rows, r, a.first + (row + r) / group, seen[r], kept_span(a, row + r, first), before[r], now[r]);
    all_values<R, TYPE>(layout, span, rows, before, now);
  }
  for (int r = 0; r < R; ++r) {
    float* out = a.out + (row + r) / group * a.stride + (row + r) % group * dims;
    const float all = rows.total[r], none = rows.limit[r] == 0 ? 1.f : 0.f;
    for (int64_t d = 0; d < dims; ++d) out[d] = rows.sum[r][d] / (all + none);
    if (!a.log_sums) continue;
    float* log_sum = a.log_sums + (row + r) / group * a.log_stride + (row + r) % group;
    *log_sum = all > 0 ? (rows.highest[r] + __builtin_log2f(all)) * 0.693147181f : -__builtin_inff();
  }
  for (int r = 0; a.kept && r < R; ++r) finish_kept(a, row + r, most, rows.highest[r], rows.total[r]);
}

// Values alone, with weights that were kept.
template <int R, int TYPE>
void take_rows(const SkAttention& a, int64_t row, Rows& rows) {
  const SkPageLayout& layout = *a.layout;
  const int64_t dims = layout.head_dim, most = begin_rows<R>(a, row, rows);
  float before[R], now[R];
  for (int r = 0; r < R; ++r) before[r] = 1;
  for (int64_t first = 0; first < most; first += SPAN) {
    bool any = false;
    for (int r = 0; r < R; ++r) any |= (now[r] = *kept_span(a, row + r, first)) != 0;
    if (!any) continue;
    Span span;
    find_span(a, first, most, span);
    for (int r = 0; r < R; ++r) {
      const float* kept = kept_span(a, row + r, first) + 16;
      for (int64_t key = 0; key < span.keys; key += LANES) {
        Floats weight;
        read(kept + key, weight);
        if (TYPE == SK_CACHE_INT8) {
          Floats scale;
          read(span.heads[key / SK_PAGE] + layout.value_scales + key % SK_PAGE * 4, scale);
          weight *= scale;
        }
        write(rows.score[r] + key, weight);
      }
    }
    all_values<R, TYPE>(layout, span, rows, before, now);
  }
  for (int r = 0; r < R; ++r) {
    float* out = a.out + (row + r) / a.group * a.stride + (row + r) % a.group * dims;
    for (int64_t d = 0; d < dims; ++d) out[d] = rows.sum[r][d];
  }
}

// Rows in blocks of at most R.
template <int R, int TYPE, bool TAKE>
int64_t blocks(const SkAttention& a, int64_t row, Rows& rows) {
  if constexpr (R <= ROWS)
    for (; a.count * a.group - row >= R; row += R) TAKE ? take_rows<R, TYPE>(a, row, rows) : some_rows<R, TYPE>(a, row, rows);
  return row;
}

template <int TYPE, bool TAKE>
void all_rows(const SkAttention& a) {
  Rows rows;
  int64_t row = blocks<12, TYPE, TAKE>(a, 0, rows);
  row = blocks<9, TYPE, TAKE>(a, row, rows);
  row = blocks<8, TYPE, TAKE>(a, row, rows);
  row = blocks<6, TYPE, TAKE>(a, row, rows);
  row = blocks<5, TYPE, TAKE>(a, row, rows);
  row = blocks<4, TYPE, TAKE>(a, row, rows);
  row = blocks<3, TYPE, TAKE>(a, row, rows);
  row = blocks<2, TYPE, TAKE>(a, row, rows);
  blocks<1, TYPE, TAKE>(a, row, rows);
}

template <bool TAKE>
void of_any_type(const SkAttention& a) {
  if (a.layout->type == SK_CACHE_FLOAT32) return all_rows<SK_CACHE_FLOAT32, TAKE>(a);
  a.layout->type == SK_CACHE_INT8 ? all_rows<SK_CACHE_INT8, TAKE>(a) : all_rows<0, TAKE>(a);
}

}  // namespace

namespace ISA {

void store(const SkPageLayout& layout, uint8_t* head, int64_t slot, const float* k, const float* v) {
  const int64_t dims = layout.head_dim, width = layout.value_width;
  if (layout.type == SK_CACHE_FLOAT32) {
    float* keys = reinterpret_cast<float*>(head) + slot;
    for (int64_t d = 0; k && d < dims; ++d) keys[d * SK_PAGE] = k[d];
    float* value = reinterpret_cast<float*>(head + layout.values) + slot * width;
    for (int64_t d = 0; d < width; ++d) value[d] = d < dims ? v[d] : 0;
    return;
  }
  if (layout.type != SK_CACHE_INT8) {
    uint16_t* keys = reinterpret_cast<uint16_t*>(head) + slot * 2;
    for (int64_t d = 0; k && d < dims; ++d) keys[d / 2 * (SK_PAGE * 2) + d % 2] = to_bfloat16(k[d]);
    uint16_t* value = reinterpret_cast<uint16_t*>(head + layout.values) + slot / 2 * width * 2 + slot % 2;
    for (int64_t d = 0; d < width; ++d) value[d * 2] = d < dims ? to_bfloat16(v[d]) : 0;
    return;
  }
  const float* from[2] = {k, v};
  for (int which = k ? 0 : 1; which < 2; ++which) {
    uint32_t top = 0;  // bits of |x| are ordered like |x|, with infinity and NaN on top
    for (int64_t d = 0; d < dims; ++d) {
      const uint32_t bits = as_bits(from[which][d]) & 0x7fffffff;
      top = bits > top ? bits : top;
    }
    const bool usual = top >= 0x03800000 && top < 0x7f800000;  // below 2^-120 the reciprocal overflows: counts as zero
    const float inverse = usual ? 127.f / as_float(top) : 0.f;
    const float scale = usual ? as_float(top) / 127.f : top < 0x03800000 ? 0.f : as_float(0x7fc00000);
    reinterpret_cast<float*>(head + (which ? layout.value_scales : layout.key_scales))[slot] = scale;
    for (int64_t d = 0; d < (which ? width : (dims + 3) / 4 * 4); ++d) {
      const float x = d < dims && usual ? from[which][d] * inverse + 12582912.f : 0.f;  // the integer in the low bits
      const int8_t code = int8_t(as_bits(x));
      if (which)
        reinterpret_cast<int8_t*>(head + layout.values)[(slot / 4 * width + d) * 4 + slot % 4] = code;
      else
        reinterpret_cast<int8_t*>(head)[d / 4 * (SK_PAGE * 4) + slot * 4 + d % 4] = code;
    }
  }
}

void attend(const SkAttention& a) { of_any_type<false>(a); }

void take(const SkAttention& a) { of_any_type<true>(a); }

}  // namespace ISA
