// sorted.cpp: act-order. Rows sorted and packed in one pass; and the inverse, compared with the source.
//
// Any row of B may come from anywhere in qweight, but nothing leaves its column. So the work goes along tile columns: a
// strip of 64 columns, all rows of it, stays in the cache while all tiles are made of it.
#include <atomic>
#include <cstring>

#include "tiles.h"

namespace marlin {
namespace {

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
void gather_plain(const RowPlace* at, uint32_t* words) {
  gather_words<bits>(at, words);
}
#if MARLIN_X86
template <int bits>
MARLIN_AVX2 void gather_avx2(const RowPlace* at, uint32_t* words) {
  gather_words<bits>(at, words);
}

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
      const __m512i turned = _mm512_rolv_epi32(_mm512_loadu_si512(at[i].words + c), turn[i]);
      word = _mm512_ternarylogic_epi32(mask, turned, word, 0xca);
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

// The columns from c0 on of the whole source, and a row of padding: a tile takes 16 rows from anywhere, and there they
// are in the nearest cache, while in qweight each lies on a page of its own.
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

// Tile columns [begin, end). `gather` makes a row of words of a tile; `pack` turns the words [16 bits/32, 64] into it.
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

// The first difference between tile column `column` of B and the source, as row * padded_n + column; it is known that
// there is one.
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
// inverse[r] is where the source's row r is stored. Brings what was unpacked back into the source's own order, word by
// word, so that no code of the source is missed.
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

// A gathered word takes eight loads for the eight codes in it: loads are what this waits for. Here a strip is first
// turned into rows of 32 bytes: byte b of a row holds the codes of columns b (low nibble) and b + 32 (high). With rows
// 2t, 2t + 1 of a tile in X, and 2t + 8, 2t + 9 in Y, step 1 of tiles.h, between X and Y, gives E with the bytes of
// columns 0 .. 31 of the tile and O with those of 32 .. 63:
//
//     E, byte b: (2t, b) | (2t + 8, b) << 4      byte 32 + b: (2t + 1, b) | (2t + 9, b) << 4      O: column b + 32
//
// Word (g, t, j) is made of bytes 16j + g, 16j + g + 8, 32 + 16j + g, 32 + 16j + g + 8 of E; for j = 2, 3 of O, with
// j - 2.

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
  const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(second));
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
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

#define MARLIN_SORTED(ISA, TARGET)                                                                               \
  TARGET void pack_sorted_##ISA(const Sorting& a, int bits, int32_t* B, int64_t begin, int64_t end) {            \
    const auto pack4 = [](const int32_t* r, int32_t* tile) TARGET { pack_tile_##ISA(r, r + kTileN, tile); };     \
    const auto pack8 = [](const int32_t* r, int32_t* tile) TARGET { pack_tile8_##ISA(r, kTileN, tile); };        \
    if (bits == 4) {                                                                                             \
      pack_sorted<4>(a, B, begin, end, gather_##ISA<4>, pack4);                                                  \
    } else {                                                                                                     \
      pack_sorted<8>(a, B, begin, end, gather_##ISA<8>, pack8);                                                  \
    }                                                                                                            \
  }                                                                                                              \
  TARGET int64_t compare_sorted_##ISA(const Sorting& a, int bits, const int32_t* inverse, const int32_t* B,      \
                                      int64_t begin, int64_t end) {                                              \
    const auto unpack4 = [](const int32_t* tile, int32_t* r) TARGET { unpack_tile_##ISA(tile, r, r + kTileN); }; \
    const auto unpack8 = [](const int32_t* tile, int32_t* r) TARGET { unpack_tile8_##ISA(tile, r, kTileN); };    \
    if (bits == 4) return compare_sorted<4>(a, inverse, B, begin, end, gather_##ISA<4>, unpack4);                \
    return compare_sorted<8>(a, inverse, B, begin, end, gather_##ISA<8>, unpack8);                               \
  }
MARLIN_SORTED(plain, )
#if MARLIN_X86
MARLIN_SORTED(avx2, MARLIN_AVX2)

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

int marlin_cpu_pack_sorted(const int32_t* qweight, int64_t stride, const int32_t* perm, const uint8_t* fill, int32_t* B,
                           int64_t b_stride, int64_t k, int64_t n, int64_t rows, int64_t padded_n, int bits,
                           int threads, int isa) {
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

}  // extern "C"
