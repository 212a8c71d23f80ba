// repack.cpp: GPTQ qweight <-> Marlin B, of a layer or a block of its rows; and rows in another order, as GPTQ words.
#include <cstring>

#include "tiles.h"

namespace marlin {
namespace {

// ---- Drivers: the loop over tiles, compiled once for each instruction set so that the tile function is inlined ----

// STATEMENT for the tiles [begin, end), which count along tile rows: `at` is the first word of the tile's first row in
// qweight, `at_tile` that of the tile in B.
#define MARLIN_FOR_TILES(bits, begin, end, n, STATEMENT)                            \
  for (int64_t tile = (begin); tile < (end); ++tile) {                              \
    const int64_t row = tile / ((n) / kTileN), column = tile % ((n) / kTileN);      \
    const int64_t at = row * (MARLIN_TILE_K * (bits) / 32) * (n) + kTileN * column; \
    const int64_t at_tile = tile * (MARLIN_TILE_K * kTileN * (bits) / 32);          \
    STATEMENT;                                                                      \
  }

void pack_plain(const int32_t* q, int32_t* B, int64_t n, int64_t begin, int64_t end) {
  MARLIN_FOR_TILES(4, begin, end, n, pack_tile_plain(q + at, q + at + n, B + at_tile))
}
void unpack_plain(const int32_t* B, int32_t* q, int64_t n, int64_t begin, int64_t end) {
  MARLIN_FOR_TILES(4, begin, end, n, unpack_tile_plain(B + at_tile, q + at, q + at + n))
}
void pack8_plain(const int32_t* q, int32_t* B, int64_t n, int64_t begin, int64_t end) {
  MARLIN_FOR_TILES(8, begin, end, n, pack_tile8_plain(q + at, n, B + at_tile))
}
void unpack8_plain(const int32_t* B, int32_t* q, int64_t n, int64_t begin,
                   int64_t end){MARLIN_FOR_TILES(8, begin, end, n, unpack_tile8_plain(B + at_tile, q + at, n))}
#if MARLIN_X86
MARLIN_AVX2 void pack_avx2(const int32_t* q, int32_t* B, int64_t n, int64_t begin, int64_t end){
    MARLIN_FOR_TILES(4, begin, end, n, pack_tile_avx2(q + at, q + at + n, B + at_tile))} MARLIN_AVX2
    void unpack_avx2(const int32_t* B, int32_t* q, int64_t n, int64_t begin, int64_t end){
        MARLIN_FOR_TILES(4, begin, end, n, unpack_tile_avx2(B + at_tile, q + at, q + at + n))} MARLIN_AVX2
    void pack8_avx2(const int32_t* q, int32_t* B, int64_t n, int64_t begin, int64_t end){
        MARLIN_FOR_TILES(8, begin, end, n, pack_tile8_avx2(q + at, n, B + at_tile))} MARLIN_AVX2
    void unpack8_avx2(const int32_t* B, int32_t* q, int64_t n, int64_t begin, int64_t end){
        MARLIN_FOR_TILES(8, begin, end, n, unpack_tile8_avx2(B + at_tile, q + at, n))} MARLIN_AVX512
    void pack_avx512(const int32_t* q, int32_t* B, int64_t n, int64_t begin, int64_t end){
        MARLIN_FOR_TILES(4, begin, end, n, pack_tile_avx512(q + at, q + at + n, B + at_tile))} MARLIN_AVX512
    void unpack_avx512(const int32_t* B, int32_t* q, int64_t n, int64_t begin, int64_t end) {
  MARLIN_FOR_TILES(4, begin, end, n, unpack_tile_avx512(B + at_tile, q + at, q + at + n))
}
#endif

using RangeFunction = void (*)(const int32_t* in, int32_t* out, int64_t n, int64_t begin, int64_t end);

// [bits / 8][isa]. 8-bit tiles are moved as fast as memory goes with AVX2.
#if MARLIN_X86
constexpr RangeFunction kPack[2][4] = {{nullptr, pack_plain, pack_avx2, pack_avx512},
                                       {nullptr, pack8_plain, pack8_avx2, pack8_avx2}};
constexpr RangeFunction kUnpack[2][4] = {{nullptr, unpack_plain, unpack_avx2, unpack_avx512},
                                         {nullptr, unpack8_plain, unpack8_avx2, unpack8_avx2}};
#else
constexpr RangeFunction kPack[2][4] = {{nullptr, pack_plain}, {nullptr, pack8_plain}};
constexpr RangeFunction kUnpack[2][4] = {{nullptr, unpack_plain}, {nullptr, unpack8_plain}};
#endif

int run(const RangeFunction (&functions)[2][4], const int32_t* in, int32_t* out, int64_t k, int64_t n, int bits,
        int threads, int isa) {
  if (in == nullptr || out == nullptr) return MARLIN_ERROR_NULL;
  if (bits != 4 && bits != 8) return MARLIN_ERROR_BITS;
  if (!whole_tiles(k, n)) return MARLIN_ERROR_SHAPE;
  const int chosen = choose_isa(isa);
  if (chosen < 0) return MARLIN_ERROR_ISA;
  const RangeFunction function = functions[bits / 8][chosen];
  parallel((k / MARLIN_TILE_K) * (n / kTileN), kLeastTiles, threads,
           [=](int64_t begin, int64_t end) { function(in, out, n, begin, end); });
  return MARLIN_OK;
}

// ---- Rows in another order, and padding ----

struct Arrangement {
  const int32_t *qweight, *perm;
  const uint8_t* fill;
  int32_t* out;
  int64_t k, n, k0, rows, padded_n;
};

// Columns that are done for all rows before the next ones. With act-order a word of `out` takes rows from all over
// qweight, each of whose words serves 32 / bits rows: so many columns of a layer stay in the cache until all are done.
constexpr int64_t kStrip = 256;

// The word rows of `out` in columns [begin, end). `codes` and `shift` are constants where this is inlined.
template <int bits>
inline __attribute__((always_inline)) void arrange_strip(const Arrangement& a, int64_t begin, int64_t end) {
  constexpr int kCodes = 32 / bits;
  constexpr uint32_t kMask = (1u << bits) - 1;
  const int64_t inside = std::min(end, a.n);
  for (int64_t row = 0; row < a.rows / kCodes; ++row) {
    int32_t* out = a.out + row * a.padded_n;
    const int32_t* from[kCodes];
    int shift[kCodes];
    int known = 0;  // the source's rows come before the padding
    for (; known < kCodes && a.k0 + row * kCodes + known < a.k; ++known) {
      const int64_t k = a.k0 + row * kCodes + known;
      const int64_t source = a.perm ? a.perm[k] : k;
      from[known] = a.qweight + source / kCodes * a.n;
      shift[known] = static_cast<int>(source % kCodes) * bits;
    }
    if (known == kCodes && a.perm == nullptr) {
      if (inside > begin) std::memcpy(out + begin, from[0] + begin, sizeof(int32_t) * (inside - begin));
    } else if (known == kCodes) {
      for (int64_t c = begin; c < inside; ++c) {
        uint32_t word = 0;
        for (int i = 0; i < kCodes; ++i) word |= (load(from[i] + c) >> shift[i] & kMask) << bits * i;
        store(out + c, word);
      }
    } else {
      for (int64_t c = begin; c < inside; ++c) {
        uint32_t word = 0;
        for (int i = 0; i < kCodes; ++i)
          word |= (i < known ? load(from[i] + c) >> shift[i] & kMask : a.fill[c] & kMask) << bits * i;
        store(out + c, word);
      }
    }
    for (int64_t c = std::max(begin, a.n); c < end; ++c) store(out + c, (a.fill[c] & kMask) * (~0u / kMask));
  }
}

#define MARLIN_ARRANGE(NAME, TARGET)                                                           \
  TARGET void NAME(const Arrangement& a, int bits, int64_t begin, int64_t end) {               \
    for (int64_t at = begin * kStrip; at < std::min(a.padded_n, end * kStrip); at += kStrip) { \
      const int64_t to = std::min(a.padded_n, at + kStrip);                                    \
      if (bits == 4) {                                                                         \
        arrange_strip<4>(a, at, to);                                                           \
      } else {                                                                                 \
        arrange_strip<8>(a, at, to);                                                           \
      }                                                                                        \
    }                                                                                          \
  }
MARLIN_ARRANGE(arrange_plain, )
#if MARLIN_X86
MARLIN_ARRANGE(arrange_avx2, MARLIN_AVX2)
MARLIN_ARRANGE(arrange_avx512, MARLIN_AVX512)
#endif

using ArrangeFunction = void (*)(const Arrangement& a, int bits, int64_t begin, int64_t end);
#if MARLIN_X86
constexpr ArrangeFunction kArrange[] = {nullptr, arrange_plain, arrange_avx2, arrange_avx512};
#else
constexpr ArrangeFunction kArrange[] = {nullptr, arrange_plain};
#endif

}  // namespace
}  // namespace marlin

extern "C" {

int marlin_cpu_abi_version(void) { return MARLIN_CPU_ABI_VERSION; }

int marlin_cpu_best_isa(void) { return marlin::best_isa(); }

int marlin_cpu_pack(const int32_t* qweight, int32_t* B, int64_t k, int64_t n, int bits, int threads, int isa) {
  return marlin::run(marlin::kPack, qweight, B, k, n, bits, threads, isa);
}

int marlin_cpu_unpack(const int32_t* B, int32_t* qweight, int64_t k, int64_t n, int bits, int threads, int isa) {
  return marlin::run(marlin::kUnpack, B, qweight, k, n, bits, threads, isa);
}

int marlin_cpu_arrange(const int32_t* qweight, const int32_t* perm, const uint8_t* fill, int32_t* out, int64_t k,
                       int64_t n, int64_t k0, int64_t rows, int64_t padded_n, int bits, int threads, int isa) {
  using namespace marlin;
  if (qweight == nullptr || fill == nullptr || out == nullptr) return MARLIN_ERROR_NULL;
  if (bits != 4 && bits != 8) return MARLIN_ERROR_BITS;
  const int64_t codes = 32 / bits;
  if (k <= 0 || n <= 0 || rows <= 0 || k0 < 0 || padded_n < n || k % codes || k0 % codes || rows % codes)
    return MARLIN_ERROR_SHAPE;
  for (int64_t i = 0; perm != nullptr && i < k; ++i)
    if (perm[i] < 0 || perm[i] >= k) return MARLIN_ERROR_SHAPE;
  const int chosen = choose_isa(isa);
  if (chosen < 0) return MARLIN_ERROR_ISA;
  const ArrangeFunction function = kArrange[chosen];
  const Arrangement a = {qweight, perm, fill, out, k, n, k0, rows, padded_n};
  constexpr int64_t kLeastWords = 1 << 14;
  const int64_t strips = (padded_n + kStrip - 1) / kStrip;
  parallel(strips, kLeastWords / (rows / codes * kStrip) + 1, threads,
           [=](int64_t begin, int64_t end) { function(a, bits, begin, end); });
  return MARLIN_OK;
}

int64_t marlin_cpu_first_difference(const int32_t* a, const int32_t* b, int64_t count) {
  constexpr int64_t kChunk = 4096;  // elements; memcmp is fast but tells no place
  for (int64_t begin = 0; begin < count; begin += kChunk) {
    const int64_t end = std::min(count, begin + kChunk);
    if (std::memcmp(a + begin, b + begin, sizeof(int32_t) * (end - begin)) == 0) continue;
    for (int64_t i = begin; i < end; ++i) {
      if (marlin::load(a + i) != marlin::load(b + i)) return i;
    }
  }
  return -1;
}

}  // extern "C"
