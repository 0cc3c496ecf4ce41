// Pages of keys and values on their own: how they are laid out, and attention over them for a process that has no model.
#include "kernels.h"

namespace {

constexpr int64_t MOST_DIM = 512;

int64_t rounded_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

struct Work {
  const SkPages* pages;
  const SkQuery* query;
  const SkTable* table;
  SkPageLayout layout;
};

uint8_t* block_of(const Work& w, int64_t page, int64_t head) {
  return static_cast<uint8_t*>(w.pages->data) + page * w.layout.bytes + head * w.layout.head_bytes;
}

bool query_holds(const SkPages& p, const SkQuery& q) {
  if (q.tokens < 0 || q.sequences < 0 || q.heads < 1 || q.heads % p.kv_heads || (!q.parents && !q.seen)) return false;
  if (q.starts[0] != 0 || q.starts[q.sequences] != q.tokens) return false;
  for (int64_t s = 0; s < q.sequences; ++s) {
    const int64_t begin = q.starts[s], end = q.starts[s + 1];
    if (begin < 0 || end < begin || end > q.tokens || q.contexts[s] < 0) return false;
    int64_t most = q.parents ? int64_t(q.contexts[s]) + end - begin : 0;
    for (int64_t t = begin; t < end; ++t) {
      if (q.parents && (q.parents[t] < -1 || q.parents[t] >= t - begin)) return false;
      if (!q.parents && q.seen[t] < 0) return false;
      if (!q.parents && q.seen[t] > most) most = q.seen[t];
    }
    const int64_t pages = (most + SK_PAGE - 1) / SK_PAGE;
    if (pages > q.table_stride) return false;
    for (int64_t i = 0; i < pages; ++i) {
      const int32_t page = q.tables[s * q.table_stride + i];
      if (page < 0 || page >= p.pages) return false;
    }
  }
  return true;
}

void attend_chunk(void* context, int64_t chunk) {
  const Work& w = *static_cast<Work*>(context);
  const SkQuery& q = *w.query;
  const int64_t kv_heads = w.pages->kv_heads, sequence = chunk / kv_heads, head = chunk % kv_heads;
  const int64_t start = q.starts[sequence], group = q.heads / kv_heads, width = q.heads * w.pages->head_dim;
  SkAttention a{};
  a.layout = &w.layout;
  a.q = q.q + start * width + head * group * w.pages->head_dim;
  a.out = q.out + (a.q - q.q);
  a.count = q.starts[sequence + 1] - start;
  a.stride = width;
  a.group = group;
  a.head = block_of(w, 0, head);
  a.table = q.tables + sequence * q.table_stride;
  a.context = q.contexts[sequence];
  a.parents = q.parents ? q.parents + start : nullptr;
  a.seen = q.parents ? nullptr : q.seen + start;
  a.scale = float(q.scale);
  a.log_sums = q.log_sums ? q.log_sums + start * q.heads + head * group : nullptr;
  a.log_stride = q.heads;
  if (a.count) w.table->attend(a);
}

}  // namespace

bool sk_page_layout(int64_t kv_heads, int64_t head_dim, int64_t type, bool window, bool keys, SkPageLayout& out) {
  if (type < 0 || type > 2 || head_dim < 2 || head_dim > MOST_DIM || head_dim % 2 || kv_heads < 1 || kv_heads > 65536)
    return false;
  out.type = type;
  out.head_dim = head_dim;
  out.value_width = rounded_up(head_dim, 16);
  const int64_t size = SK_CACHE_SIZES[type];
  const int64_t scales = type == SK_CACHE_INT8 ? SK_PAGE * 4 : 0;
  out.values = keys ? rounded_up(head_dim, 4 / size) * SK_PAGE * size : 0;
  out.key_scales = out.values + out.value_width * SK_PAGE * size;
  out.value_scales = out.key_scales + (keys ? scales : 0);
  out.head_bytes = out.value_scales + scales;
  out.positions = out.head_bytes * kv_heads;
  out.bytes = out.positions + (window ? SK_PAGE * 4 : 0);
  return true;
}

int64_t sk_pages_bytes(int64_t kv_heads, int64_t head_dim, int64_t type) {
  SkPageLayout layout;
  return sk_page_layout(kv_heads, head_dim, type, false, true, layout) ? layout.bytes : -1;
}

int32_t sk_pages_store(const SkPages* pages, const int32_t* slots, const float* k, const float* v, int64_t tokens) {
  Work w{pages, nullptr, sk_table(), {}};
  const SkPages& p = *pages;
  if (!p.data || tokens < 0 || !sk_page_layout(p.kv_heads, p.head_dim, p.type, false, true, w.layout)) return 1;
  for (int64_t t = 0; t < tokens; ++t)
    if (slots[t] >= 0 && slots[t] / SK_PAGE >= p.pages) return 1;
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t h = 0; slots[t] >= 0 && h < p.kv_heads; ++h) {
      const int64_t at = (t * p.kv_heads + h) * p.head_dim;
      w.table->store(w.layout, block_of(w, slots[t] / SK_PAGE, h), slots[t] % SK_PAGE, k + at, v + at);
    }
  return 0;
}

int32_t sk_pages_attend(const SkPages* pages, const SkQuery* query, int32_t threads) {
  Work w{pages, query, sk_table(), {}};
  const SkPages& p = *pages;
  if (!p.data || !sk_page_layout(p.kv_heads, p.head_dim, p.type, false, true, w.layout) || !query_holds(p, *query)) return 1;
  sk_parallel(attend_chunk, &w, query->sequences * p.kv_heads, threads);
  return 0;
}
