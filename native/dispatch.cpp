// One decision, at load: the best instruction set this CPU has, capped by SHOESTRING_ISA. Tests move the cap at run time.
#include <cstdlib>
#include <cstring>

#include "kernels.h"
#if defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace {

#define SK_ADDRESS(isa, name) &isa::name,
#define SK_TABLE(isa)                                                                                     \
  {#isa,         isa::quantize_tokens, isa::product, isa::product_many, isa::decode_row, isa::round_row,  \
   isa::prepare, isa::normalize, isa::rotate, isa::gate, isa::scale_add, isa::store, isa::attend,         \
   isa::take,    {SK_FORMATS(SK_ADDRESS, isa)}}

// Best first.
#if defined(__x86_64__)
constexpr SkTable TABLES[] = {SK_TABLE(avx512bf16), SK_TABLE(avx512vnni), SK_TABLE(avx2), SK_TABLE(base)};
bool runs_here(int level) {
  __builtin_cpu_init();
  if (level <= 1)
    return (level == 1 || __builtin_cpu_supports("avx512bf16")) && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("bmi2");
  if (level == 2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  return true;
}
constexpr const char* OTHERS[] = {"neondot"};
#elif defined(__aarch64__)
constexpr SkTable TABLES[] = {SK_TABLE(neondot), SK_TABLE(base)};
bool runs_here(int level) { return level != 0 || (getauxval(AT_HWCAP2) & (1ul << 13)); }  // HWCAP2_I8MM: usdot
constexpr const char* OTHERS[] = {"avx512bf16", "avx512vnni", "avx2"};
#else
constexpr SkTable TABLES[] = {SK_TABLE(base)};
bool runs_here(int) { return true; }
constexpr const char* OTHERS[] = {"avx512bf16", "avx512vnni", "avx2", "neondot"};
#endif
constexpr int LEVELS = sizeof(TABLES) / sizeof(TABLES[0]);

const SkTable* best_from(int level) {
  while (!runs_here(level)) ++level;
  return &TABLES[level];
}

const SkTable* named(const char* name) {
  for (int level = 0; level < LEVELS; ++level)
    if (!std::strcmp(name, TABLES[level].name)) return best_from(level);
  for (const char* other : OTHERS)  // a level of another architecture caps nothing here but the base
    if (!std::strcmp(name, other)) return &TABLES[LEVELS - 1];
  return nullptr;
}

const SkTable* current = nullptr;

}  // namespace

const SkTable* sk_table() {
  const SkTable* table = __atomic_load_n(&current, __ATOMIC_ACQUIRE);
  if (table) return table;
  const char* cap = std::getenv("SHOESTRING_ISA");
  table = cap && *cap ? named(cap) : nullptr;
  if (!table) table = best_from(0);
  __atomic_store_n(&current, table, __ATOMIC_RELEASE);
  return table;
}

int32_t sk_version(void) { return 12; }

const char* sk_isa(void) { return sk_table()->name; }

const char* sk_isas(void) {
  static char list[128];
  char text[128] = "";
  for (int level = 0; level < LEVELS; ++level) {
    if (!runs_here(level)) continue;
    if (*text) std::strcat(text, " ");
    std::strcat(text, TABLES[level].name);
  }
  std::memcpy(list, text, sizeof list);
  return list;
}

int32_t sk_set_isa(const char* name) {
  const SkTable* table = named(name);
  if (!table) return 1;
  __atomic_store_n(&current, table, __ATOMIC_RELEASE);
  return 0;
}
