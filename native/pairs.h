// 2-bit codes as weight files have them: in blocks of 64 columns (32 in groups of 32), of which byte j holds the columns j,
// j + a quarter of the block, and so on, from its low bits upwards.
#pragma once
#include "kernels.h"

namespace {

inline int64_t block_of(int64_t group) { return group < 64 ? group : 64; }

inline void read_pairs(const uint8_t* from, int64_t block, uint8_t* codes) {
  const int64_t quarter = block / 4;
  for (int64_t shift = 0; shift < 4; ++shift)
    for (int64_t j = 0; j < quarter; ++j) codes[shift * quarter + j] = from[j] >> (2 * shift) & 3;
}

// Whether none of the codes is 3, which stands for no trit.
inline bool are_trits(int64_t, int64_t, int64_t, const void* source, int64_t size) {
  const uint8_t* p = static_cast<const uint8_t*>(source);
  uint64_t threes = 0;
  int64_t i = 0;
  for (; i + 8 <= size; i += 8) {
    uint64_t word;
    __builtin_memcpy(&word, p + i, 8);
    threes |= word & word >> 1;
  }
  for (; i < size; ++i) threes |= p[i] & p[i] >> 1;
  return (threes & 0x5555555555555555) == 0;
}

}  // namespace
