// repack.cpp: GPTQ qweight <-> Marlin B, a tile (16 x 64 weights) at a time; and the rows of a layer in another order.
//
// 4 bits, a tile of 512 bytes. The format in bytes. layout.py defines a tile nibble by nibble; read as bytes it is simpler. Of a tile row, r0 and r1
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
//
// 8 bits, a tile of 1024 bytes. Of the tile's four rows of qweight words, r0 .. r3 (k = 0..3, 4..7, 8..11, 12..15), word
// (g, t, j, h) takes column 16j + g + 8h and of it rows 2t, 2t+8, 2t+1, 2t+9. So the bytes of r0 and r2, interleaved, are
// the words t = 0 and t = 1 of their column, those of r1 and r3 the words t = 2 and t = 3. What is left is to bring words
// from the order (j, h), g, t into the order g, t, (j, h).
#include <atomic>
#include <cstring>

#include "common.h"

#if MARLIN_X86
#include <immintrin.h>
#endif

namespace marlin {
namespace {

constexpr int64_t kTileN = MARLIN_TILE_N;
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

void pack_tile8_plain(const int32_t* r, int64_t n, int32_t* tile) {
  for (int c = 0; c < kTileN; ++c) {
    const int j = c / 16, h = c / 8 % 2, g = c % 8;
    for (int t = 0; t < 4; ++t) {
      const uint32_t x = load(r + t / 2 * n + c) >> 16 * (t % 2), y = load(r + (2 + t / 2) * n + c) >> 16 * (t % 2);
      store(tile + 32 * g + 8 * t + 2 * j + h, (x & 255) | (y & 255) << 8 | (x >> 8 & 255) << 16 | (y >> 8 & 255) << 24);
    }
  }
}

void unpack_tile8_plain(const int32_t* tile, int32_t* r, int64_t n) {
  for (int c = 0; c < kTileN; ++c) {
    const int j = c / 16, h = c / 8 % 2, g = c % 8;
    uint32_t rows[4] = {0, 0, 0, 0};
    for (int t = 0; t < 4; ++t) {
      const uint32_t word = load(tile + 32 * g + 8 * t + 2 * j + h);
      rows[t / 2] |= ((word & 255) | (word >> 16 & 255) << 8) << 16 * (t % 2);
      rows[2 + t / 2] |= ((word >> 8 & 255) | (word >> 24) << 8) << 16 * (t % 2);
    }
    for (int i = 0; i < 4; ++i) store(r + i * n + c, rows[i]);
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

// The 8 x 8 transposition of the 32-bit words of v[0..7].
MARLIN_AVX2 inline void transpose8(__m256i v[8]) {
  transpose(v);      // within lanes: v[i] holds word i of v[0..3], of both lanes
  transpose(v + 4);  // and of v[4..7]
  for (int i = 0; i < 4; ++i) {
    const __m256i a = v[i], b = v[i + 4];
    v[i] = _mm256_permute2x128_si256(a, b, 0x20);
    v[i + 4] = _mm256_permute2x128_si256(a, b, 0x31);
  }
}

// 8 bits. Registers are numbered by what their words are: [t / 2][g / 2 % 2], with words (g % 2, t % 2) of g = 0..3 in the
// first lane and of g = 4..7 in the second.
MARLIN_AVX2 void pack_tile8_avx2(const int32_t* r, int64_t n, int32_t* tile) {
  __m256i words[2][2][8];  // [t / 2][g / 2 % 2][2j + h]
  for (int jh = 0; jh < 8; ++jh) {
    for (int half = 0; half < 2; ++half) {
      const __m256i x = load256(r + half * n + 8 * jh), y = load256(r + (2 + half) * n + 8 * jh);
      words[half][0][jh] = _mm256_unpacklo_epi8(x, y);
      words[half][1][jh] = _mm256_unpackhi_epi8(x, y);
    }
  }
  for (int half = 0; half < 2; ++half) {
    for (int pair = 0; pair < 2; ++pair) {
      __m256i* v = words[half][pair];
      transpose8(v);  // v[i] is word i of all eight
      for (int i = 0; i < 8; ++i) {
        const int g = 4 * (i / 4) + 2 * pair + i % 4 / 2, t = 2 * half + i % 2;
        store256(tile + 32 * g + 8 * t, v[i]);
      }
    }
  }
}

MARLIN_AVX2 void unpack_tile8_avx2(const int32_t* tile, int32_t* r, int64_t n) {
  __m256i words[2][2][8];
  for (int half = 0; half < 2; ++half) {
    for (int pair = 0; pair < 2; ++pair) {
      __m256i* v = words[half][pair];
      for (int i = 0; i < 8; ++i) {
        const int g = 4 * (i / 4) + 2 * pair + i % 4 / 2, t = 2 * half + i % 2;
        v[i] = load256(tile + 32 * g + 8 * t);
      }
      transpose8(v);
    }
  }
  // Of two words x0 y0 x1 y1, x2 y2 x3 y3: x0..x3 of both columns, then y0..y3.
  const __m256i split = _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15,  //
                                         0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
  for (int jh = 0; jh < 8; ++jh) {
    for (int half = 0; half < 2; ++half) {
      const __m256i a = _mm256_shuffle_epi8(words[half][0][jh], split);
      const __m256i b = _mm256_shuffle_epi8(words[half][1][jh], split);
      store256(r + half * n + 8 * jh, _mm256_unpacklo_epi64(a, b));
      store256(r + (2 + half) * n + 8 * jh, _mm256_unpackhi_epi64(a, b));
    }
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

// STATEMENT for the tiles [begin, end), which count along tile rows: `at` is the first word of the tile's first row in
// qweight, `at_tile` that of the tile in B.
#define MARLIN_FOR_TILES(bits, begin, end, n, STATEMENT)                                  \
  for (int64_t tile = (begin); tile < (end); ++tile) {                                    \
    const int64_t row = tile / ((n) / kTileN), column = tile % ((n) / kTileN);            \
    const int64_t at = row * (MARLIN_TILE_K * (bits) / 32) * (n) + kTileN * column;       \
    const int64_t at_tile = tile * (MARLIN_TILE_K * kTileN * (bits) / 32);                \
    STATEMENT;                                                                            \
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
void unpack8_plain(const int32_t* B, int32_t* q, int64_t n, int64_t begin, int64_t end) {
  MARLIN_FOR_TILES(8, begin, end, n, unpack_tile8_plain(B + at_tile, q + at, n))
}
#if MARLIN_X86
MARLIN_AVX2 void pack_avx2(const int32_t* q, int32_t* B, int64_t n, int64_t begin, int64_t end) {
  MARLIN_FOR_TILES(4, begin, end, n, pack_tile_avx2(q + at, q + at + n, B + at_tile))
}
MARLIN_AVX2 void unpack_avx2(const int32_t* B, int32_t* q, int64_t n, int64_t begin, int64_t end) {
  MARLIN_FOR_TILES(4, begin, end, n, unpack_tile_avx2(B + at_tile, q + at, q + at + n))
}
MARLIN_AVX2 void pack8_avx2(const int32_t* q, int32_t* B, int64_t n, int64_t begin, int64_t end) {
  MARLIN_FOR_TILES(8, begin, end, n, pack_tile8_avx2(q + at, n, B + at_tile))
}
MARLIN_AVX2 void unpack8_avx2(const int32_t* B, int32_t* q, int64_t n, int64_t begin, int64_t end) {
  MARLIN_FOR_TILES(8, begin, end, n, unpack_tile8_avx2(B + at_tile, q + at, n))
}
MARLIN_AVX512 void pack_avx512(const int32_t* q, int32_t* B, int64_t n, int64_t begin, int64_t end) {
  MARLIN_FOR_TILES(4, begin, end, n, pack_tile_avx512(q + at, q + at + n, B + at_tile))
}
MARLIN_AVX512 void unpack_avx512(const int32_t* B, int32_t* q, int64_t n, int64_t begin, int64_t end) {
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
// qweight, each of whose words serves 32 / bits rows: so many columns of a layer stay in the cache until all are served.
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

#define MARLIN_ARRANGE(NAME, TARGET)                                            \
  TARGET void NAME(const Arrangement& a, int bits, int64_t begin, int64_t end) { \
    for (int64_t at = begin * kStrip; at < std::min(a.padded_n, end * kStrip); at += kStrip) { \
      const int64_t to = std::min(a.padded_n, at + kStrip);                      \
      if (bits == 4) {                                                           \
        arrange_strip<4>(a, at, to);                                             \
      } else {                                                                   \
        arrange_strip<8>(a, at, to);                                             \
      }                                                                          \
    }                                                                            \
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

// ---- Act-order: rows sorted and packed in one pass; and the inverse, compared with the source ----

// Neighbouring columns of a layer, and the same ones of B. Strides are words from one row to the next.
struct Sorting {
  const int32_t *qweight, *perm;
  const uint8_t* fill;
  int64_t k, n, stride, rows, padded_n, b_stride;
};

// Words in a strip's row: a strip is 64 columns of a layer as GPTQ words, its rows side by side in memory.
constexpr int64_t kStripWords = kTileN;

// Where a row's codes lie in a strip: words, and the lowest bit in each.
struct RowPlace {
  const uint32_t* words;
  int shift;
};
template <int bits>
inline RowPlace place_of(const uint32_t* strip, int64_t row) {
  constexpr int kCodes = 32 / bits;
  return {strip + row / kCodes * kStripWords, static_cast<int>(row % kCodes) * bits};
}

// One row of 64 words of which row i of the codes is that at at[i].
template <int bits>
inline __attribute__((always_inline)) void gather_words(const RowPlace* at, uint32_t* words) {
  typedef uint32_t Columns __attribute__((vector_size(32)));  // registers of 128 bits do as well
  for (int c = 0; c < kTileN; c += 8) {
    Columns word = {}, codes;
    for (int i = 0; i < 32 / bits; ++i) {
      std::memcpy(&codes, at[i].words + c, sizeof codes);
      word |= (codes >> at[i].shift & ((1u << bits) - 1)) << (bits * i);
    }
    std::memcpy(words + c, &word, sizeof word);
  }
}
template <int bits>
void gather_plain(const RowPlace* at, uint32_t* words) { gather_words<bits>(at, words); }
#if MARLIN_X86
template <int bits>
MARLIN_AVX2 void gather_avx2(const RowPlace* at, uint32_t* words) { gather_words<bits>(at, words); }

template <int bits>
MARLIN_AVX512 void gather_avx512(const RowPlace* at, uint32_t* words) {
  constexpr int kCodes = 32 / bits;
  __m512i turn[kCodes];
  for (int i = 0; i < kCodes; ++i) turn[i] = _mm512_set1_epi32(bits * i - at[i].shift);  // counts modulo 32
  for (int c = 0; c < kTileN; c += 16) {
    __m512i word = _mm512_setzero_si512();
    for (int i = 0; i < kCodes; ++i) {
      const __m512i mask = _mm512_set1_epi32(static_cast<int>(((1u << bits) - 1) << bits * i));
      // 0xca: where the mask is set the second operand, elsewhere the third.
      word = _mm512_ternarylogic_epi32(mask, _mm512_rolv_epi32(_mm512_loadu_si512(at[i].words + c), turn[i]), word, 0xca);
    }
    _mm512_storeu_si512(words + c, word);
  }
}
#endif

// A row of words for the columns from c0 on, in which every code is padding.
template <int bits>
void padding_words(const Sorting& a, int64_t c0, uint32_t* words) {
  constexpr uint32_t kMask = (1u << bits) - 1;
  for (int64_t c = 0; c < kTileN; ++c) words[c] = (a.fill[c0 + c] & kMask) * (~0u / kMask);
}

// Of the columns from c0 on, those that are the source's; the rest is padding.
inline int64_t own_columns(const Sorting& a, int64_t c0) { return std::max<int64_t>(0, std::min(kTileN, a.n - c0)); }

// The columns from c0 on of the whole source, and a row of padding: a tile takes 16 rows from anywhere, and there they are
// in the nearest cache, while in qweight each lies on a page of its own.
template <int bits>
void copy_strip(const Sorting& a, int64_t c0, uint32_t* strip) {
  const int64_t word_rows = a.k * bits / 32, own = own_columns(a, c0);
  uint32_t padding[kTileN];
  padding_words<bits>(a, c0, padding);
  for (int64_t row = 0; row < word_rows; ++row, strip += kStripWords) {
    if (own == kTileN) {
      std::memcpy(strip, a.qweight + row * a.stride + c0, sizeof(int32_t) * kTileN);
    } else {
      std::memcpy(strip, a.qweight + row * a.stride + c0, sizeof(int32_t) * own);
      std::memcpy(strip + own, padding + own, sizeof(int32_t) * (kTileN - own));
    }
  }
  std::memcpy(strip, padding, sizeof padding);
}

// Tile columns [begin, end). `gather` makes a row of words of a tile; `pack` turns its words [16 bits/32, 64] into the tile.
template <int bits, class Gather, class Pack>
inline __attribute__((always_inline)) void pack_sorted(const Sorting& a, int32_t* B, int64_t begin, int64_t end,
                                                       const Gather& gather, const Pack& pack) {
  constexpr int kCodes = 32 / bits, kWordRows = MARLIN_TILE_K / kCodes;
  std::vector<uint32_t> strip((a.k / kCodes + 1) * kStripWords);
  for (int64_t column = begin; column < end; ++column) {
    copy_strip<bits>(a, kTileN * column, strip.data());
    for (int64_t k0 = 0; k0 < a.rows; k0 += MARLIN_TILE_K) {
      alignas(64) uint32_t words[kWordRows][kTileN];
      for (int row = 0; row < kWordRows; ++row) {
        RowPlace at[kCodes];
        for (int i = 0; i < kCodes; ++i) {
          const int64_t k = k0 + row * kCodes + i;
          at[i] = place_of<bits>(strip.data(), k < a.k ? a.perm[k] : a.k);
        }
        gather(at, words[row]);
      }
      pack(reinterpret_cast<const int32_t*>(words), B + k0 / MARLIN_TILE_K * a.b_stride + column * kTileN * kWordRows);
    }
  }
}

// The first difference between tile column `column` of B and the source, as row * padded_n + column; it is known that there
// is one.
template <int bits>
int64_t locate_difference(const Sorting& a, const int32_t* B, int64_t column) {
  constexpr int kCodes = 32 / bits, kWordRows = MARLIN_TILE_K / kCodes;
  constexpr uint32_t kMask = (1u << bits) - 1;
  const int64_t c0 = kTileN * column;
  int32_t words[kWordRows * kTileN];
  for (int64_t k = 0; k < a.rows; ++k) {
    if (k % MARLIN_TILE_K == 0) {
      const int32_t* tile = B + k / MARLIN_TILE_K * a.b_stride + c0 * kWordRows;
      if (bits == 4) {
        unpack_tile_plain(tile, words, words + kTileN);
      } else {
        unpack_tile8_plain(tile, words, kTileN);
      }
    }
    for (int64_t c = c0; c < c0 + kTileN; ++c) {
      uint32_t expected = a.fill[c] & kMask;
      if (k < a.k && c < a.n) {
        const int64_t row = a.perm[k];
        expected = load(a.qweight + row / kCodes * a.stride + c) >> row % kCodes * bits & kMask;
      }
      const uint32_t found = load(words + k % MARLIN_TILE_K / kCodes * kTileN + c - c0) >> k % kCodes * bits & kMask;
      if (found != expected) return k * a.padded_n + c;
    }
  }
  return c0;  // cannot be
}

// The first difference in the tile columns [begin, end), or -1. `unpack` turns a tile into words [16 bits/32, 64];
// inverse[r] is where the source's row r is stored. Brings what was unpacked back into the source's own order, word by word,
// so that no code of the source is missed.
template <int bits, class Gather, class Unpack>
inline __attribute__((always_inline)) int64_t compare_sorted(const Sorting& a, const int32_t* inverse, const int32_t* B,
                                                             int64_t begin, int64_t end, const Gather& gather,
                                                             const Unpack& unpack) {
  constexpr int kCodes = 32 / bits, kWordRows = MARLIN_TILE_K / kCodes;
  std::vector<uint32_t> strip(a.rows / kCodes * kStripWords);
  int64_t first = -1;
  for (int64_t column = begin; column < end; ++column) {
    const int64_t c0 = kTileN * column, own = own_columns(a, c0);
    for (int64_t k0 = 0; k0 < a.rows; k0 += MARLIN_TILE_K) {
      unpack(B + k0 / MARLIN_TILE_K * a.b_stride + column * kTileN * kWordRows,
             reinterpret_cast<int32_t*>(strip.data() + k0 / kCodes * kStripWords));
    }
    uint32_t padding[kTileN];
    padding_words<bits>(a, c0, padding);
    bool equal = true;
    for (int64_t row = 0; row < a.rows / kCodes; ++row) {
      alignas(64) uint32_t words[kTileN];
      const uint32_t* found = strip.data() + row * kStripWords;
      int64_t of_source = 0;  // columns
      if (row < a.k / kCodes) {
        RowPlace at[kCodes];
        for (int i = 0; i < kCodes; ++i) at[i] = place_of<bits>(strip.data(), inverse[row * kCodes + i]);
        gather(at, words);
        found = words, of_source = own;
        equal &= std::memcmp(found, a.qweight + row * a.stride + c0, sizeof(int32_t) * own) == 0;
      }
      equal &= std::memcmp(found + of_source, padding + of_source, sizeof(int32_t) * (kTileN - of_source)) == 0;
    }
    if (equal) continue;
    const int64_t place = locate_difference<bits>(a, B, column);
    if (first < 0 || place < first) first = place;
  }
  return first;
}

#if MARLIN_X86

// ---- AVX-512, 4 bits ----
//
// A gathered word takes eight loads for the eight codes in it, so that this is bound by loads. Here a strip is first turned
// into rows of 32 bytes: byte b of a row holds the codes of columns b (low nibble) and b + 32 (high). With rows that are 2t,
// 2t + 1 of a tile in X, and 2t + 8, 2t + 9 in Y, the step on nibbles at the top of this file, between X and Y, gives E with
// the bytes of columns 0 .. 31 of the tile and O with those of 32 .. 63:
//
//     E, byte b: (2t, b) | (2t + 8, b) << 4         byte 32 + b: (2t + 1, b) | (2t + 9, b) << 4         O: column b + 32
//
// Word (g, t, j) is made of bytes 16j + g, 16j + g + 8, 32 + 16j + g, 32 + 16j + g + 8 of E, or for j = 2, 3 of O with j - 2.

constexpr int64_t kRowBytes = kTileN / 2;

// Eight rows come out of their words in the order 0, 2, 4, 6, 1, 3, 5, 7.
inline int64_t row_offset(int64_t row) { return (row / 8 * 8 + row % 8 / 2 + row % 2 * 4) * kRowBytes; }

struct RowIndices {
  alignas(64) uint8_t rows[2][64];     // two rows of bytes out of the words of columns 0 .. 15 and 16 .. 31
  alignas(64) uint8_t columns[2][64];  // and back, from four rows: the words of 16 columns
  alignas(64) uint8_t pack[2][64];     // [g / 4]: lane g % 4 holds the words j = 0 .. 3, from (E, O)
  alignas(64) uint8_t unpack[2][64];   // [E or O], from the registers of g = 0 .. 3 and g = 4 .. 7
};

constexpr RowIndices row_indices() {
  RowIndices indices{};
  for (int t = 0; t < 4; ++t) {
    for (int c = 0; c < 32; ++c) {
      const int in_words = 64 * (c / 16) + 4 * (c % 16) + t;  // byte t of column c
      const int in_rows = 32 * t + c;
      indices.rows[t / 2][in_rows % 64] = static_cast<uint8_t>(in_words);
      indices.columns[c / 16][in_words % 64] = static_cast<uint8_t>(in_rows);
    }
  }
  for (int g = 0; g < 8; ++g) {
    for (int j = 0; j < 4; ++j) {
      for (int byte = 0; byte < 4; ++byte) {
        const int in_words = 16 * (g % 4) + 4 * j + byte;
        const int in_rows = 32 * (byte / 2) + 16 * (j % 2) + g + 8 * (byte % 2);
        indices.pack[g / 4][in_words] = static_cast<uint8_t>(64 * (j / 2) + in_rows);
        indices.unpack[j / 2][in_rows] = static_cast<uint8_t>(64 * (g / 4) + in_words);
      }
    }
  }
  return indices;
}

constexpr RowIndices kRows = row_indices();

// The 4 x 4 transposition of the 128-bit lanes of v[0..3].
MARLIN_AVX512 inline void transpose_lanes(__m512i v[4]) {
  const __m512i a = _mm512_shuffle_i32x4(v[0], v[1], 0x44), b = _mm512_shuffle_i32x4(v[2], v[3], 0x44);
  const __m512i c = _mm512_shuffle_i32x4(v[0], v[1], 0xee), d = _mm512_shuffle_i32x4(v[2], v[3], 0xee);
  v[0] = _mm512_shuffle_i32x4(a, b, 0x88);
  v[1] = _mm512_shuffle_i32x4(a, b, 0xdd);
  v[2] = _mm512_shuffle_i32x4(c, d, 0x88);
  v[3] = _mm512_shuffle_i32x4(c, d, 0xdd);
}

// A row of 64 words -> eight rows of bytes.
MARLIN_AVX512 inline void words_to_rows(const int32_t* words, uint8_t* rows) {
  __m512i low[2], high[2];  // [columns / 16 % 2]
  for (int i = 0; i < 2; ++i) mix_nibbles(load512(words + 16 * i), load512(words + 32 + 16 * i), &low[i], &high[i]);
  for (int i = 0; i < 2; ++i) {
    const __m512i index = _mm512_load_si512(kRows.rows[i]);
    _mm512_storeu_si512(rows + 64 * i, _mm512_permutex2var_epi8(low[0], index, low[1]));
    _mm512_storeu_si512(rows + 128 + 64 * i, _mm512_permutex2var_epi8(high[0], index, high[1]));
  }
}

MARLIN_AVX512 inline __m512i two_rows(const uint8_t* first, const uint8_t* second) {
  const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(first));
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(second)), 1);
}

MARLIN_AVX512 inline void store_two_rows(__m512i rows, uint8_t* first, uint8_t* second) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(first), _mm512_castsi512_si256(rows));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(second), _mm512_extracti64x4_epi64(rows, 1));
}

MARLIN_AVX512 void pack_sorted_rows(const Sorting& a, int32_t* B, int64_t begin, int64_t end) {
  std::vector<uint8_t> strip((a.k / 8 + 1) * 8 * kRowBytes);
  std::vector<const uint8_t*> from(a.rows, strip.data() + row_offset(a.k));  // of each stored row; padding at the end
  for (int64_t k = 0; k < a.k; ++k) from[k] = strip.data() + row_offset(a.perm[k]);
  const __m512i index[2] = {_mm512_load_si512(kRows.pack[0]), _mm512_load_si512(kRows.pack[1])};
  for (int64_t column = begin; column < end; ++column) {
    const int64_t c0 = kTileN * column, own = own_columns(a, c0);
    int32_t padded[kTileN];
    padding_words<4>(a, c0, reinterpret_cast<uint32_t*>(padded));
    words_to_rows(padded, strip.data() + a.k * kRowBytes);
    for (int64_t row = 0; row < a.k / 8; ++row) {
      const int32_t* words = a.qweight + row * a.stride + c0;
      if (own < kTileN) words = static_cast<const int32_t*>(std::memcpy(padded, words, sizeof(int32_t) * own));
      words_to_rows(words, strip.data() + row * 8 * kRowBytes);
    }
    for (int64_t k0 = 0; k0 < a.rows; k0 += MARLIN_TILE_K) {
      __m512i v[2][4];
      for (int t = 0; t < 4; ++t) {
        const uint8_t* const* rows = from.data() + k0 + 2 * t;
        __m512i even, odd;
        mix_nibbles(two_rows(rows[0], rows[1]), two_rows(rows[8], rows[9]), &even, &odd);
        for (int half = 0; half < 2; ++half) v[half][t] = _mm512_permutex2var_epi8(even, index[half], odd);
      }
      int32_t* tile = B + k0 / MARLIN_TILE_K * a.b_stride + column * MARLIN_TILE_WORDS;
      for (int half = 0; half < 2; ++half) {
        transpose_lanes(v[half]);
        for (int g = 0; g < 4; ++g) store512(tile + 16 * (4 * half + g), v[half][g]);
      }
    }
  }
}

// As compare_sorted: from tiles to stored rows, then eight of them, as the source has them, to its row of words.
MARLIN_AVX512 int64_t compare_sorted_rows(const Sorting& a, const int32_t* inverse, const int32_t* B, int64_t begin,
                                          int64_t end) {
  std::vector<uint8_t> strip(a.rows * kRowBytes);  // in stored order, one after the other
  const __m512i unpack[2] = {_mm512_load_si512(kRows.unpack[0]), _mm512_load_si512(kRows.unpack[1])};
  const __m512i columns[2] = {_mm512_load_si512(kRows.columns[0]), _mm512_load_si512(kRows.columns[1])};
  int64_t first = -1;
  for (int64_t column = begin; column < end; ++column) {
    for (int64_t k0 = 0; k0 < a.rows; k0 += MARLIN_TILE_K) {
      const int32_t* tile = B + k0 / MARLIN_TILE_K * a.b_stride + column * MARLIN_TILE_WORDS;
      uint8_t* to = strip.data() + k0 * kRowBytes;
      __m512i v[2][4];
      for (int half = 0; half < 2; ++half) {
        for (int g = 0; g < 4; ++g) v[half][g] = load512(tile + 16 * (4 * half + g));
        transpose_lanes(v[half]);
      }
      for (int t = 0; t < 4; ++t) {
        const __m512i even = _mm512_permutex2var_epi8(v[0][t], unpack[0], v[1][t]);
        const __m512i odd = _mm512_permutex2var_epi8(v[0][t], unpack[1], v[1][t]);
        __m512i x, y;
        mix_nibbles(even, odd, &x, &y);
        store_two_rows(x, to + 2 * t * kRowBytes, to + (2 * t + 1) * kRowBytes);
        store_two_rows(y, to + (2 * t + 8) * kRowBytes, to + (2 * t + 9) * kRowBytes);
      }
    }
    const int64_t c0 = kTileN * column, own = own_columns(a, c0);
    int32_t padded[kTileN];
    padding_words<4>(a, c0, reinterpret_cast<uint32_t*>(padded));
    uint8_t padding[8 * kRowBytes];
    words_to_rows(padded, padding);
    bool equal = true;
    for (int64_t k = a.k; k < a.rows; ++k) equal &= std::memcmp(strip.data() + k * kRowBytes, padding, kRowBytes) == 0;
    __m512i different = _mm512_setzero_si512();
    for (int64_t row = 0; row < a.k / 8; ++row) {
      const int32_t* words = a.qweight + row * a.stride + c0;
      if (own < kTileN) words = static_cast<const int32_t*>(std::memcpy(padded, words, sizeof(int32_t) * own));
      const uint8_t* from[8];
      for (int i = 0; i < 8; ++i) from[i] = strip.data() + inverse[row * 8 + i] * kRowBytes;
      const __m512i low[2] = {two_rows(from[0], from[2]), two_rows(from[4], from[6])};
      const __m512i high[2] = {two_rows(from[1], from[3]), two_rows(from[5], from[7])};
      for (int i = 0; i < 2; ++i) {
        __m512i x, y;
        mix_nibbles(_mm512_permutex2var_epi8(low[0], columns[i], low[1]),
                    _mm512_permutex2var_epi8(high[0], columns[i], high[1]), &x, &y);
        different = _mm512_or_si512(different, _mm512_xor_si512(x, load512(words + 16 * i)));
        different = _mm512_or_si512(different, _mm512_xor_si512(y, load512(words + 32 + 16 * i)));
      }
    }
    if (equal && _mm512_test_epi32_mask(different, different) == 0) continue;
    const int64_t place = locate_difference<4>(a, B, column);
    if (first < 0 || place < first) first = place;
  }
  return first;
}

#endif  // MARLIN_X86

#define MARLIN_SORTED(ISA, ISA8, TARGET)                                                                              \
  TARGET void pack_sorted_##ISA(const Sorting& a, int bits, int32_t* B, int64_t begin, int64_t end) {                 \
    const auto pack4 = [](const int32_t* words, int32_t* tile) TARGET { pack_tile_##ISA(words, words + kTileN, tile); }; \
    const auto pack8 = [](const int32_t* words, int32_t* tile) TARGET { pack_tile8_##ISA8(words, kTileN, tile); };    \
    if (bits == 4) {                                                                                                  \
      pack_sorted<4>(a, B, begin, end, gather_##ISA<4>, pack4);                                                       \
    } else {                                                                                                          \
      pack_sorted<8>(a, B, begin, end, gather_##ISA<8>, pack8);                                                       \
    }                                                                                                                 \
  }                                                                                                                   \
  TARGET int64_t compare_sorted_##ISA(const Sorting& a, int bits, const int32_t* inverse, const int32_t* B,           \
                                      int64_t begin, int64_t end) {                                                   \
    const auto unpack4 = [](const int32_t* tile, int32_t* r) TARGET { unpack_tile_##ISA(tile, r, r + kTileN); };      \
    const auto unpack8 = [](const int32_t* tile, int32_t* r) TARGET { unpack_tile8_##ISA8(tile, r, kTileN); };        \
    if (bits == 4) return compare_sorted<4>(a, inverse, B, begin, end, gather_##ISA<4>, unpack4);                     \
    return compare_sorted<8>(a, inverse, B, begin, end, gather_##ISA<8>, unpack8);                                    \
  }
MARLIN_SORTED(plain, plain, )
#if MARLIN_X86
MARLIN_SORTED(avx2, avx2, MARLIN_AVX2)

MARLIN_AVX512 void pack_sorted_avx512(const Sorting& a, int bits, int32_t* B, int64_t begin, int64_t end) {
  if (bits == 4) return pack_sorted_rows(a, B, begin, end);
  pack_sorted<8>(a, B, begin, end, gather_avx512<8>,
                 [](const int32_t* words, int32_t* tile) MARLIN_AVX2 { pack_tile8_avx2(words, kTileN, tile); });
}
MARLIN_AVX512 int64_t compare_sorted_avx512(const Sorting& a, int bits, const int32_t* inverse, const int32_t* B,
                                            int64_t begin, int64_t end) {
  if (bits == 4) return compare_sorted_rows(a, inverse, B, begin, end);
  return compare_sorted<8>(a, inverse, B, begin, end, gather_avx512<8>,
                           [](const int32_t* tile, int32_t* r) MARLIN_AVX2 { unpack_tile8_avx2(tile, r, kTileN); });
}
#endif

using PackSorted = void (*)(const Sorting& a, int bits, int32_t* B, int64_t begin, int64_t end);
using CompareSorted = int64_t (*)(const Sorting& a, int bits, const int32_t* inverse, const int32_t* B, int64_t begin,
                                  int64_t end);
#if MARLIN_X86
constexpr PackSorted kPackSorted[] = {nullptr, pack_sorted_plain, pack_sorted_avx2, pack_sorted_avx512};
constexpr CompareSorted kCompareSorted[] = {nullptr, compare_sorted_plain, compare_sorted_avx2, compare_sorted_avx512};
#else
constexpr PackSorted kPackSorted[] = {nullptr, pack_sorted_plain};
constexpr CompareSorted kCompareSorted[] = {nullptr, compare_sorted_plain};
#endif

// inverse[perm[k]] = k; empty unless perm holds each of 0 .. k - 1 once.
std::vector<int32_t> inverted(const int32_t* perm, int64_t k) {
  std::vector<int32_t> inverse(k, -1);
  for (int64_t i = 0; i < k; ++i) {
    if (perm[i] < 0 || perm[i] >= k || inverse[perm[i]] >= 0) return {};
    inverse[perm[i]] = static_cast<int32_t>(i);
  }
  return inverse;
}

// The error of arguments that cannot be, or MARLIN_OK.
int check(const Sorting& a, int bits, const int32_t* B) {
  if (a.qweight == nullptr || a.perm == nullptr || a.fill == nullptr || B == nullptr) return MARLIN_ERROR_NULL;
  if (bits != 4 && bits != 8) return MARLIN_ERROR_BITS;
  const bool fits = a.k > 0 && a.n > 0 && a.k % (32 / bits) == 0 && a.stride >= a.n && a.rows >= a.k &&
                    a.padded_n >= a.n && a.b_stride >= a.padded_n * MARLIN_TILE_K * bits / 32;
  return fits && whole_tiles(a.rows, a.padded_n) ? MARLIN_OK : MARLIN_ERROR_SHAPE;
}

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

int marlin_cpu_pack_sorted(const int32_t* qweight, int64_t stride, const int32_t* perm, const uint8_t* fill, int32_t* B,
                           int64_t b_stride, int64_t k, int64_t n, int64_t rows, int64_t padded_n, int bits, int threads,
                           int isa) {
  using namespace marlin;
  const Sorting a = {qweight, perm, fill, k, n, stride, rows, padded_n, b_stride};
  if (const int error = check(a, bits, B)) return error;
  if (inverted(perm, k).empty()) return MARLIN_ERROR_SHAPE;
  const int chosen = choose_isa(isa);
  if (chosen < 0) return MARLIN_ERROR_ISA;
  const PackSorted function = kPackSorted[chosen];
  parallel(padded_n / kTileN, kLeastTiles / (rows / MARLIN_TILE_K) + 1, threads,
           [&, function](int64_t begin, int64_t end) { function(a, bits, B, begin, end); });
  return MARLIN_OK;
}

int marlin_cpu_compare_sorted(const int32_t* qweight, int64_t stride, const int32_t* perm, const uint8_t* fill,
                              const int32_t* B, int64_t b_stride, int64_t k, int64_t n, int64_t rows, int64_t padded_n,
                              int bits, int threads, int isa, int64_t* difference) {
  using namespace marlin;
  const Sorting a = {qweight, perm, fill, k, n, stride, rows, padded_n, b_stride};
  if (difference == nullptr) return MARLIN_ERROR_NULL;
  if (const int error = check(a, bits, B)) return error;
  const std::vector<int32_t> inverse = inverted(perm, k);
  if (inverse.empty()) return MARLIN_ERROR_SHAPE;
  const int chosen = choose_isa(isa);
  if (chosen < 0) return MARLIN_ERROR_ISA;
  const CompareSorted function = kCompareSorted[chosen];
  constexpr int64_t kNone = INT64_MAX;
  std::atomic<int64_t> first{kNone};
  parallel(padded_n / kTileN, kLeastTiles / (rows / MARLIN_TILE_K) + 1, threads,
           [&, function](int64_t begin, int64_t end) {
             const int64_t found = function(a, bits, inverse.data(), B, begin, end);
             for (int64_t known = first; found >= 0 && found < known && !first.compare_exchange_weak(known, found);) {
             }
           });
  *difference = first == kNone ? -1 : first.load();
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
