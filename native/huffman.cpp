// bfloat16 numbers whose exponents are Huffman codes, as kernels/huffman.py lays them out: a stream in blocks of 4096 bytes,
// of which it is known where the first code begins and which number it belongs to. Blocks are decoded independently, several
// at a time, each by a table that says for 11 bits all the codes that lie in them. Nothing in the bytes is trusted.
#include <atomic>
#include <cstring>
#include <memory>
#include <new>

#include "kernels.h"

namespace {

constexpr int64_t BLOCK = 4096, CHUNKS = 512;  // bytes, and chunks of 8 bytes with a gap each
constexpr int64_t MOST_SYMBOLS = BLOCK * 8;    // no code is shorter than a bit
constexpr int32_t WINDOW = 11, WINDOWS = 1 << WINDOW, LONGEST = 32, LOOKUPS = 4;
constexpr int32_t POINTER = 240;  // from here on an entry of a table names another table
constexpr int TOGETHER = 4;
static_assert(WINDOW * LOOKUPS <= 57, "bits of a window that a load at a byte gives");

struct Entry {
  uint8_t symbols[6], count, bits;  // bits 0: no whole code, or one of more than WINDOW bits
};

struct Code {
  Entry entries[WINDOWS];
  const uint8_t *tables, *lengths;
  int64_t count;

  // The symbol that begins the window, its length in `bits`, which is 0 when there is none.
  uint8_t walk(uint64_t window, int32_t& bits) const {
    int64_t table = 0;
    bits = 0;
    for (int level = 0; level < 4; ++level) {
      const uint8_t entry = tables[table * 256 + (window >> (56 - 8 * level) & 255)];
      if (entry < POINTER) {
        bits = lengths[entry] <= LONGEST ? lengths[entry] : 0;
        return entry;
      }
      table = 256 - entry;
      if (table >= count) return 0;
    }
    return 0;
  }

  void prepare() {
    // The word that begins each window. Where there is none, tables repeat what stands before it: only as many windows from
    // a symbol's first on as its length allows are its own.
    uint8_t symbols[WINDOWS], bits[WINDOWS];
    int32_t first[256];
    for (int32_t& f : first) f = -1;
    for (int32_t i = 0; i < WINDOWS; ++i) {
      int32_t length;
      const uint8_t symbol = symbols[i] = walk(uint64_t(i) << (64 - WINDOW), length);
      bits[i] = 0;
      if (length < 1 || length > WINDOW) continue;
      if (first[symbol] < 0) first[symbol] = i;
      if (i - first[symbol] < 1 << (WINDOW - length)) bits[i] = uint8_t(length);
    }
    for (int32_t i = 0; i < WINDOWS; ++i) {
      Entry e{};
      for (int32_t at = i; e.count < 6; at = i << e.bits & (WINDOWS - 1)) {
        if (bits[at] == 0 || e.bits + bits[at] > WINDOW) break;
        e.symbols[e.count++] = symbols[at];
        e.bits = uint8_t(e.bits + bits[at]);
      }
      entries[i] = e;
    }
  }
};

struct Job {
  const Code* code;
  const uint8_t *encoded, *gaps, *positions, *rest;
  int64_t encoded_size, gaps_size, blocks, first, count, from, to;  // blocks from..to-1 hold what is wanted
  uint16_t* out;
  std::atomic<int32_t> failed;

  int64_t position(int64_t block) const {
    uint32_t number;
    std::memcpy(&number, positions + 4 * block, 4);
    return number;
  }

  int64_t gap(int64_t block) const {
    const int64_t bit = block * CHUNKS * 5, byte = bit / 8;
    const uint32_t two = uint32_t(gaps[byte]) << 8 | (byte + 1 < gaps_size ? gaps[byte + 1] : 0);
    return two >> (11 - bit % 8) & 31;
  }
};

struct Stream {
  int64_t bit, end, wanted, made;
  uint8_t symbols[MOST_SYMBOLS + 64];

  bool going() const { return made < wanted && bit < end; }
};

uint64_t window_at(const Job& j, int64_t bit) {
  const int64_t byte = bit >> 3;
  uint64_t bytes = 0;
  if (byte + 8 <= j.encoded_size)
    std::memcpy(&bytes, j.encoded + byte, 8);
  else if (byte < j.encoded_size)
    std::memcpy(&bytes, j.encoded + byte, size_t(j.encoded_size - byte));
  return __builtin_bswap64(bytes) << (bit & 7);
}

inline __attribute__((always_inline)) bool advance(const Job& j, Stream& s) {
  const Code& code = *j.code;
  uint64_t window = window_at(j, s.bit);
  for (int i = 0; i < LOOKUPS; ++i) {
    const Entry& e = code.entries[window >> (64 - WINDOW)];
    if (__builtin_expect(e.bits == 0, 0)) {
      int32_t bits;
      const uint8_t symbol = code.walk(window_at(j, s.bit), bits);
      if (bits == 0) return false;
      s.symbols[s.made++] = symbol;
      s.bit += bits;
      return true;
    }
    std::memcpy(s.symbols + s.made, &e, 8);
    s.made += e.count;
    s.bit += e.bits;
    window <<= e.bits;
  }
  return true;
}

// All together while all have work, then one after the other.
bool run(const Job& j, Stream* streams, int count) {
  if (count == TOGETHER)
    while (streams[0].going() && streams[1].going() && streams[2].going() && streams[3].going())
#pragma GCC unroll 4
      for (int i = 0; i < TOGETHER; ++i)
        if (!advance(j, streams[i])) return false;
  for (int i = 0; i < count; ++i) {
    while (streams[i].going())
      if (!advance(j, streams[i])) return false;
    if (streams[i].made < streams[i].wanted) return false;
  }
  return true;
}

void join(const uint8_t* exponents, const uint8_t* rest, uint16_t* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const uint16_t r = rest[i];
    out[i] = uint16_t((r & 0x80) << 8 | uint16_t(exponents[i]) << 7 | (r & 0x7f));
  }
}

void decode(void* context, int64_t chunk) {
  Job& j = *static_cast<Job*>(context);
  static thread_local std::unique_ptr<Stream[]> streams;
  if (!streams) streams.reset(new (std::nothrow) Stream[TOGETHER]);
  if (!streams) {
    j.failed = 2;
    return;
  }
  const int64_t begin = j.from + chunk * TOGETHER;
  const int count = int(j.to - begin < TOGETHER ? j.to - begin : TOGETHER);
  for (int i = 0; i < count; ++i) {
    Stream& s = streams[i];
    const int64_t block = begin + i;
    s.bit = block * BLOCK * 8 + j.gap(block);
    s.end = (block + 1 < j.blocks ? (block + 1) * BLOCK : j.encoded_size) * 8;
    s.wanted = j.position(block + 1) - j.position(block);
    s.made = 0;
  }
  if (!run(j, streams.get(), count)) {
    j.failed = 1;
    return;
  }
  for (int i = 0; i < count; ++i) {
    const int64_t start = j.position(begin + i), end = start + streams[i].wanted, last = j.first + j.count;
    const int64_t low = start > j.first ? start : j.first, high = end < last ? end : last;
    if (low < high) join(streams[i].symbols + (low - start), j.rest + low, j.out + (low - j.first), high - low);
  }
}

}  // namespace

int32_t sk_huffman(const void* tables, int64_t table_count, const void* encoded, int64_t encoded_size, const void* gaps, int64_t gaps_size, const void* positions, int64_t blocks, const void* rest, int64_t rest_size, int64_t first, int64_t count, void* out, int32_t threads) {
  if (table_count < 1 || table_count > 256 - POINTER || encoded_size < 0 || blocks != (encoded_size + BLOCK - 1) / BLOCK) return 1;
  if (gaps_size < blocks * CHUNKS * 5 / 8 || first < 0 || count < 0 || first > rest_size - count) return 1;
  std::unique_ptr<Code> code(new (std::nothrow) Code);
  if (!code) return 2;
  const uint8_t* bytes = static_cast<const uint8_t*>(tables);
  code->tables = bytes, code->lengths = bytes + 256 * table_count, code->count = table_count;
  Job j{code.get(), static_cast<const uint8_t*>(encoded), static_cast<const uint8_t*>(gaps), static_cast<const uint8_t*>(positions), static_cast<const uint8_t*>(rest), encoded_size, gaps_size, blocks, first, count, 0, blocks, static_cast<uint16_t*>(out), {0}};
  if (j.position(0) != 0 || j.position(blocks) != rest_size) return 1;
  for (int64_t b = 0; b < blocks; ++b)
    if (j.position(b + 1) < j.position(b) || j.position(b + 1) - j.position(b) > MOST_SYMBOLS) return 1;
  if (count == 0) return 0;
  while (j.position(j.from + 1) <= first) ++j.from;
  while (j.position(j.to - 1) >= first + count) --j.to;
  code->prepare();
  sk_parallel(decode, &j, (j.to - j.from + TOGETHER - 1) / TOGETHER, threads);
  return j.failed;
}
