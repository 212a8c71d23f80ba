// sorted.cpp: act-order. Rows sorted and packed in one pass; and the inverse, compared with the source.
//
// Any row of B may come from anywhere in qweight, but nothing leaves its column. So the work goes along tile columns: a
// strip of 64 columns, all rows of it, stays in the cache while all tiles are made of it. Where rows turn out to be in
// their own order, and nothing is padded, tiles are made of qweight as it lies.
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

  bool in_order() const {
    if (k != rows || n != padded_n) return false;
    for (int64_t i = 0; i < k; ++i) {
      if (perm[i] != i) return false;
    }
    return true;
  }
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

// Tile columns [begin, end). `gather` makes a row of words of a tile; `pack` turns the words [16 bits/32, 64], of which
// it is told how far apart the rows are, into it.
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
      pack(reinterpret_cast<const int32_t*>(words), kTileN,
           B + k0 / MARLIN_TILE_K * a.b_stride + column * kTileN * kWordRows);
    }
  }
}

// As pack_sorted, for rows in their own order.
template <int bits, class Pack>
inline __attribute__((always_inline)) void pack_in_order(const Sorting& a, int32_t* B, int64_t begin, int64_t end,
                                                         const Pack& pack) {
  constexpr int64_t kWordRows = MARLIN_TILE_K * bits / 32;
  for (int64_t row = 0; row < a.rows / MARLIN_TILE_K; ++row) {
    for (int64_t c0 = begin * kTileN; c0 < end * kTileN; c0 += kTileN) {
      pack(a.qweight + row * kWordRows * a.stride + c0, a.stride, B + row * a.b_stride + c0 * kWordRows);
    }
  }
}

// The first difference between tile column `column` of B and the source, as row * padded_n + column, or -1.
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
  return -1;
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
             reinterpret_cast<int32_t*>(strip.data() + k0 / kCodes * kStripWords), kTileN);
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

// As compare_sorted, for rows in their own order.
template <int bits, class Unpack>
inline __attribute__((always_inline)) int64_t compare_in_order(const Sorting& a, const int32_t* B, int64_t begin,
                                                               int64_t end, const Unpack& unpack) {
  constexpr int64_t kWordRows = MARLIN_TILE_K * bits / 32;
  typedef uint32_t Columns __attribute__((vector_size(32)));
  for (int64_t row = 0; row < a.rows / MARLIN_TILE_K; ++row) {
    Columns different = {}, found, expected;
    for (int64_t c0 = begin * kTileN; c0 < end * kTileN; c0 += kTileN) {
      alignas(64) int32_t words[kWordRows * kTileN];
      unpack(B + row * a.b_stride + c0 * kWordRows, words, kTileN);
      for (int64_t r = 0; r < kWordRows; ++r) {
        const int32_t* own = a.qweight + (row * kWordRows + r) * a.stride + c0;
        for (int64_t c = 0; c < kTileN; c += 8) {
          std::memcpy(&found, words + r * kTileN + c, sizeof found);
          std::memcpy(&expected, own + c, sizeof expected);
          different |= found ^ expected;
        }
      }
    }
    bool equal = true;
    for (int i = 0; i < 8; ++i) equal &= different[i] == 0;
    if (equal) continue;
    int64_t first = INT64_MAX;  // the rows above are equal
    for (int64_t column = begin; column < end; ++column) {
      const int64_t place = locate_difference<bits>(a, B, column);
      if (place >= 0 && place < first) first = place;
    }
    return first;
  }
  return -1;
}

#if MARLIN_X86

#include "sorted_avx512.inl"

#endif  // MARLIN_X86

#define MARLIN_SORTED(ISA, TARGET)                                                                                    \
  TARGET void pack_sorted_##ISA(const Sorting& a, int bits, int32_t* B, int64_t begin, int64_t end) {                 \
    if (bits == 4) {                                                                                                  \
      pack_sorted<4>(a, B, begin, end, gather_##ISA<4>, MARLIN_PACK4(ISA, TARGET));                                   \
    } else {                                                                                                          \
      pack_sorted<8>(a, B, begin, end, gather_##ISA<8>, MARLIN_PACK8(ISA, TARGET));                                   \
    }                                                                                                                 \
  }                                                                                                                   \
  TARGET int64_t compare_sorted_##ISA(const Sorting& a, int bits, const int32_t* inverse, const int32_t* B,           \
                                      int64_t begin, int64_t end) {                                                   \
    if (bits == 4) return compare_sorted<4>(a, inverse, B, begin, end, gather_##ISA<4>, MARLIN_UNPACK4(ISA, TARGET)); \
    return compare_sorted<8>(a, inverse, B, begin, end, gather_##ISA<8>, MARLIN_UNPACK8(ISA, TARGET));                \
  }
// ISA8 is what does 8 bits.
#define MARLIN_IN_ORDER(ISA, TARGET, ISA8, TARGET8)                                                                  \
  TARGET void pack_in_order_##ISA(const Sorting& a, int bits, int32_t* B, int64_t begin, int64_t end) {              \
    if (bits == 4) return pack_in_order<4>(a, B, begin, end, MARLIN_PACK4(ISA, TARGET));                             \
    pack_in_order<8>(a, B, begin, end, MARLIN_PACK8(ISA8, TARGET8));                                                 \
  }                                                                                                                  \
  TARGET int64_t compare_in_order_##ISA(const Sorting& a, int bits, const int32_t*, const int32_t* B, int64_t begin, \
                                        int64_t end) {                                                               \
    if (bits == 4) return compare_in_order<4>(a, B, begin, end, MARLIN_UNPACK4(ISA, TARGET));                        \
    return compare_in_order<8>(a, B, begin, end, MARLIN_UNPACK8(ISA8, TARGET8));                                     \
  }
#define MARLIN_PACK4(ISA, TARGET) \
  [](const int32_t* r, int64_t stride, int32_t* tile) TARGET { pack_tile_##ISA(r, r + stride, tile); }
#define MARLIN_PACK8(ISA, TARGET) \
  [](const int32_t* r, int64_t stride, int32_t* tile) TARGET { pack_tile8_##ISA(r, stride, tile); }
#define MARLIN_UNPACK4(ISA, TARGET) \
  [](const int32_t* tile, int32_t* r, int64_t stride) TARGET { unpack_tile_##ISA(tile, r, r + stride); }
#define MARLIN_UNPACK8(ISA, TARGET) \
  [](const int32_t* tile, int32_t* r, int64_t stride) TARGET { unpack_tile8_##ISA(tile, r, stride); }

MARLIN_SORTED(plain, )
MARLIN_IN_ORDER(plain, , plain, )
#if MARLIN_X86
MARLIN_SORTED(avx2, MARLIN_AVX2)
MARLIN_IN_ORDER(avx2, MARLIN_AVX2, avx2, MARLIN_AVX2)
MARLIN_IN_ORDER(avx512, MARLIN_AVX512, avx2, MARLIN_AVX2)

MARLIN_AVX512 void pack_sorted_avx512(const Sorting& a, int bits, int32_t* B, int64_t begin, int64_t end) {
  if (bits == 4) return pack_sorted_rows(a, B, begin, end);
  pack_sorted<8>(a, B, begin, end, gather_avx512<8>, MARLIN_PACK8(avx2, MARLIN_AVX2));
}
MARLIN_AVX512 int64_t compare_sorted_avx512(const Sorting& a, int bits, const int32_t* inverse, const int32_t* B,
                                            int64_t begin, int64_t end) {
  if (bits == 4) return compare_sorted_rows(a, inverse, B, begin, end);
  return compare_sorted<8>(a, inverse, B, begin, end, gather_avx512<8>, MARLIN_UNPACK8(avx2, MARLIN_AVX2));
}
#endif

using PackSorted = void (*)(const Sorting& a, int bits, int32_t* B, int64_t begin, int64_t end);
using CompareSorted = int64_t (*)(const Sorting& a, int bits, const int32_t* inverse, const int32_t* B, int64_t begin,
                                  int64_t end);
// [in order][isa]
#if MARLIN_X86
constexpr PackSorted kPackSorted[2][4] = {{nullptr, pack_sorted_plain, pack_sorted_avx2, pack_sorted_avx512},
                                          {nullptr, pack_in_order_plain, pack_in_order_avx2, pack_in_order_avx512}};
constexpr CompareSorted kCompareSorted[2][4] = {
    {nullptr, compare_sorted_plain, compare_sorted_avx2, compare_sorted_avx512},
    {nullptr, compare_in_order_plain, compare_in_order_avx2, compare_in_order_avx512}};
#else
constexpr PackSorted kPackSorted[2][2] = {{nullptr, pack_sorted_plain}, {nullptr, pack_in_order_plain}};
constexpr CompareSorted kCompareSorted[2][2] = {{nullptr, compare_sorted_plain}, {nullptr, compare_in_order_plain}};
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
  const PackSorted function = kPackSorted[a.in_order()][chosen];
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
  const CompareSorted function = kCompareSorted[a.in_order()][chosen];
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
