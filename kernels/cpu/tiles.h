// tiles.h: GPTQ qweight <-> Marlin B, a tile (16 x 64 weights) at a time, for each instruction set.
//
// 4 bits, a tile of 512 bytes. layout.py defines a tile nibble by nibble; read as bytes it is simpler. Of a tile row,
// r0 and r1 are the two rows of qweight (k = 0..7 and 8..15), of which the tile takes 64 words each. Byte t of a qweight
// word holds rows 2t (low nibble) and 2t+1 (high). So with
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
// 8 bits, a tile of 1024 bytes. Of the tile's four rows of qweight words, r0 .. r3 (k = 0..3, 4..7, 8..11, 12..15),
// word (g, t, j, h) takes column 16j + g + 8h and of it rows 2t, 2t+8, 2t+1, 2t+9. So the bytes of r0 and r2,
// interleaved, are the words t = 0 and t = 1 of their column, those of r1 and r3 the words t = 2 and t = 3. What is
// left is to bring words from the order (j, h), g, t into the order g, t, (j, h).
#ifndef MARLIN_CPU_TILES_H_
#define MARLIN_CPU_TILES_H_

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
        store(tile + 16 * g + 4 * t + j,
              (low0 >> s & 255) | (low1 >> s & 255) << 8 | (high0 >> s & 255) << 16 | (high1 >> s & 255) << 24);
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
      store(tile + 32 * g + 8 * t + 2 * j + h,
            (x & 255) | (y & 255) << 8 | (x >> 8 & 255) << 16 | (y >> 8 & 255) << 24);
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

MARLIN_AVX2 inline __m256i load256(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
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

// 8 bits. Registers are numbered by what their words are: [t / 2][g / 2 % 2], with words (g % 2, t % 2) of g = 0..3 in
// the first lane and of g = 4..7 in the second.
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

}  // namespace
}  // namespace marlin

#endif  // MARLIN_CPU_TILES_H_
