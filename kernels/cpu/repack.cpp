// repack.cpp: GPTQ qweight [k/8, n] <-> Marlin B [k/16, 2n], a tile (16 x 64 weights, 512 bytes) at a time.
//
// The format in bytes. layout.py defines a tile nibble by nibble; read as bytes it is simpler. Of a tile row, r0 and r1
// are the two rows of qweight (k = 0..7 and 8..15), of which the tile takes 64 words each. Byte t of a qweight word holds
// rows 2t (low nibble) and 2t+1 (high). So with
//
//     a = r0[16j + g]     b = r1[16j + g]     c = r0[16j + g + 8]     d = r1[16j + g + 8]
//
// the four bytes of word (g, t, j) are, from the lowest,
//
//     a.lo | b.lo << 4      c.lo | d.lo << 4      a.hi | b.hi << 4      c.hi | d.hi << 4        (bytes t of a, b, c, d)
//
// Hence two steps, both ways:
//   1. Nibbles, between words of r0 and r1 in the same column, no byte moves:
//          L = (r0 & 0x0f..) | (r1 & 0x0f..) << 4         H = (r0 & 0xf0..) >> 4 | (r1 & 0xf0..)
//      and back, by the same formula, from L and H to r0 and r1.
//   2. Bytes: byte t of L[16j + g], L[16j + g + 8], H[16j + g], H[16j + g + 8] make word (g, t, j); words stand in the
//      order g, t, j. Within a sub-tile j that is a permutation of 128 bytes; then, for each g, a 4 x 4 transposition
//      of 32-bit words, from (j, t) to (t, j).
#include <cstring>

#include "common.h"

#if MARLIN_X86
#include <immintrin.h>
#endif

namespace marlin {
namespace {

constexpr int64_t kTileN = MARLIN_TILE_N;
constexpr int64_t kTileWords = MARLIN_TILE_WORDS;
constexpr uint32_t kLow = 0x0f0f0f0fu;

// Least number of tiles for a thread: 64 KiB, about 10 us.
constexpr int64_t kLeastTiles = 128;

inline uint32_t load(const int32_t* p) {
  uint32_t v;
  std::memcpy(&v, p, sizeof v);  // no alignment is promised
  return v;
}
inline void store(int32_t* p, uint32_t v) { std::memcpy(p, &v, sizeof v); }

// ---- Plain C++ ----

void pack_tile_plain(const int32_t* r0, const int32_t* r1, int32_t* tile) {
  for (int j = 0; j < 4; ++j) {
    for (int g = 0; g < 8; ++g) {
      const uint32_t a = load(r0 + 16 * j + g), b = load(r1 + 16 * j + g);
      const uint32_t c = load(r0 + 16 * j + g + 8), d = load(r1 + 16 * j + g + 8);
      const uint32_t low0 = (a & kLow) | (b & kLow) << 4, high0 = (a >> 4 & kLow) | (b & ~kLow);
      const uint32_t low1 = (c & kLow) | (d & kLow) << 4, high1 = (c >> 4 & kLow) | (d & ~kLow);
      for (int t = 0; t < 4; ++t) {
        const int s = 8 * t;
        store(tile + 16 * g + 4 * t + j, (low0 >> s & 255) | (low1 >> s & 255) << 8 | (high0 >> s & 255) << 16 |
                                             (high1 >> s & 255) << 24);
      }
    }
  }
}

void unpack_tile_plain(const int32_t* tile, int32_t* r0, int32_t* r1) {
  for (int j = 0; j < 4; ++j) {
    for (int g = 0; g < 8; ++g) {
      uint32_t low0 = 0, low1 = 0, high0 = 0, high1 = 0;
      for (int t = 0; t < 4; ++t) {
        const uint32_t word = load(tile + 16 * g + 4 * t + j);
        const int s = 8 * t;
        low0 |= (word & 255) << s;
        low1 |= (word >> 8 & 255) << s;
        high0 |= (word >> 16 & 255) << s;
        high1 |= (word >> 24) << s;
      }
      store(r0 + 16 * j + g, (low0 & kLow) | (high0 & kLow) << 4);
      store(r1 + 16 * j + g, (low0 >> 4 & kLow) | (high0 & ~kLow));
      store(r0 + 16 * j + g + 8, (low1 & kLow) | (high1 & kLow) << 4);
      store(r1 + 16 * j + g + 8, (low1 >> 4 & kLow) | (high1 & ~kLow));
    }
  }
}

#if MARLIN_X86

// ---- AVX2: a register holds 8 columns, as two lanes of g = 0..3 and g = 4..7 ----

#define MARLIN_AVX2 __attribute__((target("avx2")))
#define MARLIN_AVX512 __attribute__((target("avx512f,avx512bw,avx512vbmi")))

MARLIN_AVX2 inline __m256i load256(const int32_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
MARLIN_AVX2 inline void store256(int32_t* p, __m256i v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }

MARLIN_AVX2 inline void mix_nibbles(__m256i x, __m256i y, __m256i* low, __m256i* high) {
  const __m256i mask = _mm256_set1_epi32(kLow);
  *low = _mm256_or_si256(_mm256_and_si256(x, mask), _mm256_slli_epi32(_mm256_and_si256(y, mask), 4));
  *high = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi32(x, 4), mask), _mm256_andnot_si256(mask, y));
}

// In each 128-bit lane, the 4 x 4 transposition of the 32-bit words of v[0..3].
MARLIN_AVX2 inline void transpose(__m256i v[4]) {
  const __m256i a = _mm256_unpacklo_epi32(v[0], v[1]), b = _mm256_unpackhi_epi32(v[0], v[1]);
  const __m256i c = _mm256_unpacklo_epi32(v[2], v[3]), d = _mm256_unpackhi_epi32(v[2], v[3]);
  v[0] = _mm256_unpacklo_epi64(a, c);
  v[1] = _mm256_unpackhi_epi64(a, c);
  v[2] = _mm256_unpacklo_epi64(b, d);
  v[3] = _mm256_unpackhi_epi64(b, d);
}

MARLIN_AVX2 void pack_tile_avx2(const int32_t* r0, const int32_t* r1, int32_t* tile) {
  __m256i words[4][4];  // [g % 4][j]: lane g / 4 holds t = 0..3
  for (int j = 0; j < 4; ++j) {
    __m256i low0, high0, low1, high1;
    mix_nibbles(load256(r0 + 16 * j), load256(r1 + 16 * j), &low0, &high0);
    mix_nibbles(load256(r0 + 16 * j + 8), load256(r1 + 16 * j + 8), &low1, &high1);
    // Interleave bytes, then pairs of bytes: (low0, low1, high0, high1) of one (g, t) side by side.
    const __m256i low01 = _mm256_unpacklo_epi8(low0, low1), low23 = _mm256_unpackhi_epi8(low0, low1);
    const __m256i high01 = _mm256_unpacklo_epi8(high0, high1), high23 = _mm256_unpackhi_epi8(high0, high1);
    words[0][j] = _mm256_unpacklo_epi16(low01, high01);
    words[1][j] = _mm256_unpackhi_epi16(low01, high01);
    words[2][j] = _mm256_unpacklo_epi16(low23, high23);
    words[3][j] = _mm256_unpackhi_epi16(low23, high23);
  }
  for (int g = 0; g < 4; ++g) {
    __m256i* v = words[g];
    transpose(v);  // now v[t], lane g / 4 holds j = 0..3
    store256(tile + 16 * g, _mm256_permute2x128_si256(v[0], v[1], 0x20));
    store256(tile + 16 * g + 8, _mm256_permute2x128_si256(v[2], v[3], 0x20));
    store256(tile + 16 * (g + 4), _mm256_permute2x128_si256(v[0], v[1], 0x31));
    store256(tile + 16 * (g + 4) + 8, _mm256_permute2x128_si256(v[2], v[3], 0x31));
  }
}

MARLIN_AVX2 void unpack_tile_avx2(const int32_t* tile, int32_t* r0, int32_t* r1) {
  __m256i words[4][4];
  for (int g = 0; g < 4; ++g) {
    __m256i* v = words[g];
    const __m256i a = load256(tile + 16 * g), b = load256(tile + 16 * g + 8);
    const __m256i c = load256(tile + 16 * (g + 4)), d = load256(tile + 16 * (g + 4) + 8);
    v[0] = _mm256_permute2x128_si256(a, c, 0x20);
    v[1] = _mm256_permute2x128_si256(a, c, 0x31);
    v[2] = _mm256_permute2x128_si256(b, d, 0x20);
    v[3] = _mm256_permute2x128_si256(b, d, 0x31);
    transpose(v);
  }
  // Bytes 0, 4, 8, 12 to the front, then 1, 5, 9, 13 and so on: from words to (low0, low1, high0, high1), 4 bytes each.
  const __m256i split = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,  //
                                         0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  for (int j = 0; j < 4; ++j) {
    __m256i v[4];
    for (int g = 0; g < 4; ++g) v[g] = _mm256_shuffle_epi8(words[g][j], split);
    transpose(v);  // v[0..3] = low0, low1, high0, high1, each with g = 0..3 in a lane
    __m256i x, y;
    mix_nibbles(v[0], v[2], &x, &y);
    store256(r0 + 16 * j, x);
    store256(r1 + 16 * j, y);
    mix_nibbles(v[1], v[3], &x, &y);
    store256(r0 + 16 * j + 8, x);
    store256(r1 + 16 * j + 8, y);
  }
}

// ---- AVX-512: a register holds the 16 columns of a sub-tile ----

MARLIN_AVX512 inline __m512i load512(const int32_t* p) { return _mm512_loadu_si512(p); }
MARLIN_AVX512 inline void store512(int32_t* p, __m512i v) { _mm512_storeu_si512(p, v); }

MARLIN_AVX512 inline void mix_nibbles(__m512i x, __m512i y, __m512i* low, __m512i* high) {
  const __m512i mask = _mm512_set1_epi32(kLow);
  // 0xca: where the mask is set the second operand, elsewhere the third.
  *low = _mm512_ternarylogic_epi32(mask, x, _mm512_slli_epi32(y, 4), 0xca);
  *high = _mm512_ternarylogic_epi32(mask, _mm512_srli_epi32(x, 4), y, 0xca);
}

MARLIN_AVX512 inline void transpose(__m512i v[4]) {
  const __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpackhi_epi32(v[0], v[1]);
  const __m512i c = _mm512_unpacklo_epi32(v[2], v[3]), d = _mm512_unpackhi_epi32(v[2], v[3]);
  v[0] = _mm512_unpacklo_epi64(a, c);
  v[1] = _mm512_unpackhi_epi64(a, c);
  v[2] = _mm512_unpacklo_epi64(b, d);
  v[3] = _mm512_unpackhi_epi64(b, d);
}

// Indices for step 2 within a sub-tile, into the 128 bytes (L, H) or (words of g = 0..3, words of g = 4..7). A word
// register is ordered lane t, then g % 4, then byte, so that the transposition with the three other sub-tiles, which
// works within lanes, ends with lane t, then j: the order of a line of the tile.
struct ByteIndices {
  alignas(64) uint8_t pack[2][64];    // [g / 4][position in the word register] -> position in (L, H)
  alignas(64) uint8_t unpack[2][64];  // [L or H][position] -> position in the two word registers
};

constexpr ByteIndices byte_indices() {
  ByteIndices indices{};
  for (int g = 0; g < 8; ++g) {
    for (int t = 0; t < 4; ++t) {
      for (int byte = 0; byte < 4; ++byte) {
        const int in_word = 16 * t + 4 * (g % 4) + byte;
        const int column = g + 8 * (byte % 2);
        const int half = byte / 2;  // 0: L, 1: H
        indices.pack[g / 4][in_word] = static_cast<uint8_t>(64 * half + 4 * column + t);
        indices.unpack[half][4 * column + t] = static_cast<uint8_t>(64 * (g / 4) + in_word);
      }
    }
  }
  return indices;
}

constexpr ByteIndices kBytes = byte_indices();

MARLIN_AVX512 void pack_tile_avx512(const int32_t* r0, const int32_t* r1, int32_t* tile) {
  const __m512i index0 = _mm512_load_si512(kBytes.pack[0]), index1 = _mm512_load_si512(kBytes.pack[1]);
  __m512i words[2][4];  // [g / 4][j]
  for (int j = 0; j < 4; ++j) {
    __m512i low, high;
    mix_nibbles(load512(r0 + 16 * j), load512(r1 + 16 * j), &low, &high);
    words[0][j] = _mm512_permutex2var_epi8(low, index0, high);
    words[1][j] = _mm512_permutex2var_epi8(low, index1, high);
  }
  for (int half = 0; half < 2; ++half) {
    transpose(words[half]);  // from [j], lane t, g % 4 to [g % 4], lane t, j
    for (int g = 0; g < 4; ++g) store512(tile + 16 * (4 * half + g), words[half][g]);
  }
}

MARLIN_AVX512 void unpack_tile_avx512(const int32_t* tile, int32_t* r0, int32_t* r1) {
  const __m512i index0 = _mm512_load_si512(kBytes.unpack[0]), index1 = _mm512_load_si512(kBytes.unpack[1]);
  __m512i words[2][4];
  for (int half = 0; half < 2; ++half) {
    for (int g = 0; g < 4; ++g) words[half][g] = load512(tile + 16 * (4 * half + g));
    transpose(words[half]);
  }
  for (int j = 0; j < 4; ++j) {
    const __m512i low = _mm512_permutex2var_epi8(words[0][j], index0, words[1][j]);
    const __m512i high = _mm512_permutex2var_epi8(words[0][j], index1, words[1][j]);
    __m512i x, y;
    mix_nibbles(low, high, &x, &y);
    store512(r0 + 16 * j, x);
    store512(r1 + 16 * j, y);
  }
}

#endif  // MARLIN_X86

// ---- Drivers: the loop over tiles, compiled once for each instruction set so that the tile function is inlined ----

// Call at_tile(first word of r0, of r1, of the tile) for the tiles [begin, end), which count along tile rows.
#define MARLIN_FOR_TILES(begin, end, n, STATEMENT)                                 \
  for (int64_t tile = (begin); tile < (end); ++tile) {                             \
    const int64_t row = tile / ((n) / kTileN), column = tile % ((n) / kTileN);     \
    const int64_t at0 = 2 * row * (n) + kTileN * column, at1 = at0 + (n);          \
    const int64_t at_tile = kTileWords * tile;                                     \
    STATEMENT;                                                                     \
  }

void pack_plain(const int32_t* q, int32_t* B, int64_t n, int64_t begin, int64_t end) {
  MARLIN_FOR_TILES(begin, end, n, pack_tile_plain(q + at0, q + at1, B + at_tile))
}
void unpack_plain(const int32_t* B, int32_t* q, int64_t n, int64_t begin, int64_t end) {
  MARLIN_FOR_TILES(begin, end, n, unpack_tile_plain(B + at_tile, q + at0, q + at1))
}
#if MARLIN_X86
MARLIN_AVX2 void pack_avx2(const int32_t* q, int32_t* B, int64_t n, int64_t begin, int64_t end) {
  MARLIN_FOR_TILES(begin, end, n, pack_tile_avx2(q + at0, q + at1, B + at_tile))
}
MARLIN_AVX2 void unpack_avx2(const int32_t* B, int32_t* q, int64_t n, int64_t begin, int64_t end) {
  MARLIN_FOR_TILES(begin, end, n, unpack_tile_avx2(B + at_tile, q + at0, q + at1))
}
MARLIN_AVX512 void pack_avx512(const int32_t* q, int32_t* B, int64_t n, int64_t begin, int64_t end) {
  MARLIN_FOR_TILES(begin, end, n, pack_tile_avx512(q + at0, q + at1, B + at_tile))
}
MARLIN_AVX512 void unpack_avx512(const int32_t* B, int32_t* q, int64_t n, int64_t begin, int64_t end) {
  MARLIN_FOR_TILES(begin, end, n, unpack_tile_avx512(B + at_tile, q + at0, q + at1))
}
#endif

using RangeFunction = void (*)(const int32_t* in, int32_t* out, int64_t n, int64_t begin, int64_t end);

#if MARLIN_X86
constexpr RangeFunction kPack[] = {nullptr, pack_plain, pack_avx2, pack_avx512};
constexpr RangeFunction kUnpack[] = {nullptr, unpack_plain, unpack_avx2, unpack_avx512};
#else
constexpr RangeFunction kPack[] = {nullptr, pack_plain};
constexpr RangeFunction kUnpack[] = {nullptr, unpack_plain};
#endif

int run(const RangeFunction* functions, const int32_t* in, int32_t* out, int64_t k, int64_t n, int threads, int isa) {
  if (in == nullptr || out == nullptr) return MARLIN_ERROR_NULL;
  if (!whole_tiles(k, n)) return MARLIN_ERROR_SHAPE;
  const int chosen = choose_isa(isa);
  if (chosen < 0) return MARLIN_ERROR_ISA;
  const RangeFunction function = functions[chosen];
  parallel((k / MARLIN_TILE_K) * (n / kTileN), kLeastTiles, threads,
           [=](int64_t begin, int64_t end) { function(in, out, n, begin, end); });
  return MARLIN_OK;
}

}  // namespace
}  // namespace marlin

extern "C" {

int marlin_cpu_abi_version(void) { return MARLIN_CPU_ABI_VERSION; }

int marlin_cpu_best_isa(void) { return marlin::best_isa(); }

int marlin_cpu_pack(const int32_t* qweight, int32_t* B, int64_t k, int64_t n, int threads, int isa) {
  return marlin::run(marlin::kPack, qweight, B, k, n, threads, isa);
}

int marlin_cpu_unpack(const int32_t* B, int32_t* qweight, int64_t k, int64_t n, int threads, int isa) {
  return marlin::run(marlin::kUnpack, B, qweight, k, n, threads, isa);
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
