// layouts.cpp: the packings of other formats <-> GPTQ's words: rows and columns of words exchanged (compressed-tensors,
// AWQ's gemv), and AWQ's gemm, whose words hold eight columns of a row where GPTQ's hold eight rows of a column.
#include <cstring>
#include <utility>

#include "common.h"

namespace marlin {
namespace {

// ---- Lanes ----

// So many words are worked on as one: as many as the instructions' registers hold.
template <int lanes>
struct RunOf {
  typedef uint32_t type __attribute__((vector_size(4 * lanes)));
};
template <int lanes>
using Run = typename RunOf<lanes>::type;

// From lane `first` on, those of `a` and of `b` by turns.
template <int first, typename Lanes, size_t... lane>
inline __attribute__((always_inline)) void by_turns(const Lanes& a, const Lanes& b, Lanes& out,
                                                    std::index_sequence<lane...>) {
  constexpr size_t lanes = sizeof...(lane);
#if defined(__clang__)
  out = __builtin_shufflevector(a, b, (first + lane / 2 + lane % 2 * lanes)...);
#else
  out = __builtin_shuffle(a, b, Lanes{uint32_t(first + lane / 2 + lane % 2 * lanes)...});
#endif
}

// `rows` becomes its transpose, [lanes][height], row after row: rows half of all apart are merged by turns, as often as
// the height can be halved.
template <int lanes, int height>
inline __attribute__((always_inline)) void transpose_lanes(Run<lanes> (&rows)[height]) {
  constexpr auto all = std::make_index_sequence<lanes>();
  for (int merged = 1; merged < height; merged *= 2) {
    Run<lanes> by_two[height];
    for (int i = 0; i < height / 2; ++i) {
      by_turns<0>(rows[i], rows[i + height / 2], by_two[2 * i], all);
      by_turns<lanes / 2>(rows[i], rows[i + height / 2], by_two[2 * i + 1], all);
    }
    std::memcpy(rows, by_two, sizeof by_two);
  }
}

// ---- Rows and columns exchanged ----

constexpr int64_t kSquare = 16;  // words of a square that is exchanged as a whole: its rows are cache lines

template <int lanes>
inline __attribute__((always_inline)) void transpose_square(const int32_t* in, int32_t* out, int64_t rows,
                                                            int64_t columns) {
  for (int64_t c = 0; c < kSquare; c += lanes) {
    for (int64_t r = 0; r < kSquare; r += lanes) {
      Run<lanes> words[lanes];
      for (int i = 0; i < lanes; ++i) std::memcpy(&words[i], in + (r + i) * columns + c, sizeof words[i]);
      transpose_lanes<lanes>(words);
      for (int i = 0; i < lanes; ++i) std::memcpy(out + (c + i) * rows + r, &words[i], sizeof words[i]);
    }
  }
}

// `out` [columns, rows] of `in` [rows, columns], for rows [begin, end) of squares.
template <int lanes>
inline __attribute__((always_inline)) void transpose_squares(const int32_t* in, int32_t* out, int64_t rows,
                                                             int64_t columns, int64_t begin, int64_t end) {
  for (int64_t c0 = begin * kSquare; c0 < std::min(columns, end * kSquare); c0 += kSquare) {
    const int64_t width = std::min(kSquare, columns - c0);
    for (int64_t r0 = 0; r0 < rows; r0 += kSquare) {
      const int64_t height = std::min(kSquare, rows - r0);
      if (height == kSquare && width == kSquare) {
        transpose_square<lanes>(in + r0 * columns + c0, out + c0 * rows + r0, rows, columns);
      } else {
        for (int64_t r = 0; r < height; ++r)
          for (int64_t c = 0; c < width; ++c)
            store(out + (c0 + c) * rows + r0 + r, load(in + (r0 + r) * columns + c0 + c));
      }
    }
  }
}

// ---- AWQ's gemm ----

constexpr int kCodes = 8;                                  // of 4 bits, in a word
constexpr int kColumn[kCodes] = {0, 2, 4, 6, 1, 3, 5, 7};  // whose code stands in each place of AWQ's words

// The parts of `a` above and of `b` below `shift` in each stretch of 2 * shift bits change places.
template <int shift, typename Lanes>
inline __attribute__((always_inline)) void exchange(Lanes& a, Lanes& b, uint32_t mask) {
  const Lanes swapped = (a >> shift ^ b) & mask;
  b ^= swapped;
  a ^= swapped << shift;
}

// Nibble j of word i and nibble i of word j change places, in each column of eight words.
template <typename Lanes>
inline __attribute__((always_inline)) void exchange_nibbles(Lanes (&words)[kCodes]) {
  for (int i = 0; i < 4; ++i) exchange<16>(words[i], words[i + 4], 0x0000ffff);
  for (int i = 0; i < 2; ++i) {
    exchange<8>(words[i], words[i + 2], 0x00ff00ff);
    exchange<8>(words[i + 4], words[i + 6], 0x00ff00ff);
  }
  for (int i = 0; i < kCodes; i += 2) exchange<4>(words[i], words[i + 1], 0x0f0f0f0f);
}

// Rows [begin, end) of eight codes: `in` AWQ's words, `out` GPTQ's, of n columns.
template <int lanes>
inline __attribute__((always_inline)) void awq_rows(const int32_t* in, int32_t* out, int64_t n, int64_t begin,
                                                    int64_t end) {
  const int64_t width = n / kCodes;
  for (int64_t row = begin; row < end; ++row) {
    const int32_t* from = in + row * kCodes * width;
    int32_t* to = out + row * n;
    for (int64_t c0 = 0; c0 < width; c0 += lanes) {
      const int64_t count = std::min<int64_t>(lanes, width - c0);
      Run<lanes> words[kCodes] = {}, own[kCodes];
      if (count == lanes) {
        for (int i = 0; i < kCodes; ++i) std::memcpy(&words[i], from + i * width + c0, sizeof words[i]);
      } else {
        for (int i = 0; i < kCodes; ++i) std::memcpy(&words[i], from + i * width + c0, sizeof(int32_t) * count);
      }
      exchange_nibbles(words);
      for (int i = 0; i < kCodes; ++i) own[kColumn[i]] = words[i];
      transpose_lanes<lanes>(own);
      if (count == lanes) {
        std::memcpy(to + c0 * kCodes, own, sizeof own);
      } else {
        std::memcpy(to + c0 * kCodes, own, sizeof(int32_t) * kCodes * count);
      }
    }
  }
}

// The inverse: `in` GPTQ's words, `out` AWQ's.
template <int lanes>
inline __attribute__((always_inline)) void gptq_rows(const int32_t* in, int32_t* out, int64_t n, int64_t begin,
                                                     int64_t end) {
  const int64_t width = n / kCodes;
  for (int64_t row = begin; row < end; ++row) {
    const int32_t* from = in + row * n;
    int32_t* to = out + row * kCodes * width;
    for (int64_t c0 = 0; c0 < width; c0 += lanes) {
      const int64_t count = std::min<int64_t>(lanes, width - c0);
      uint32_t own[lanes][kCodes] = {}, rows[kCodes][lanes];
      std::memcpy(own, from + c0 * kCodes, sizeof(int32_t) * kCodes * count);
      for (int64_t c = 0; c < lanes; ++c)
        for (int i = 0; i < kCodes; ++i) rows[i][c] = own[c][kColumn[i]];
      Run<lanes> words[kCodes];
      std::memcpy(words, rows, sizeof words);
      exchange_nibbles(words);
      for (int i = 0; i < kCodes; ++i) std::memcpy(to + i * width + c0, &words[i], sizeof(int32_t) * count);
    }
  }
}

#define MARLIN_LAYOUTS(ISA, LANES, TARGET)                                                                   \
  TARGET void transpose_##ISA(const int32_t* in, int32_t* out, int64_t rows, int64_t columns, int64_t begin, \
                              int64_t end) {                                                                 \
    transpose_squares<LANES>(in, out, rows, columns, begin, end);                                            \
  }                                                                                                          \
  TARGET void awq_##ISA(const int32_t* in, int32_t* out, int64_t n, int64_t begin, int64_t end) {            \
    awq_rows<LANES>(in, out, n, begin, end);                                                                 \
  }                                                                                                          \
  TARGET void gptq_##ISA(const int32_t* in, int32_t* out, int64_t n, int64_t begin, int64_t end) {           \
    gptq_rows<LANES>(in, out, n, begin, end);                                                                \
  }
MARLIN_LAYOUTS(plain, 4, )
#if MARLIN_X86
MARLIN_LAYOUTS(avx2, 4, MARLIN_AVX2)
MARLIN_LAYOUTS(avx512, 16, MARLIN_AVX512)
#endif

using TransposeFunction = void (*)(const int32_t* in, int32_t* out, int64_t rows, int64_t columns, int64_t begin,
                                   int64_t end);
using RowsFunction = void (*)(const int32_t* in, int32_t* out, int64_t n, int64_t begin, int64_t end);
#if MARLIN_X86
constexpr TransposeFunction kTranspose[] = {nullptr, transpose_plain, transpose_avx2, transpose_avx512};
constexpr RowsFunction kAwq[] = {nullptr, awq_plain, awq_avx2, awq_avx512};
constexpr RowsFunction kGptq[] = {nullptr, gptq_plain, gptq_avx2, gptq_avx512};
#else
constexpr TransposeFunction kTranspose[] = {nullptr, transpose_plain};
constexpr RowsFunction kAwq[] = {nullptr, awq_plain};
constexpr RowsFunction kGptq[] = {nullptr, gptq_plain};
#endif

constexpr int64_t kLeastWords = 1 << 14;

int convert_rows(const RowsFunction* functions, const int32_t* in, int32_t* out, int64_t k, int64_t n, int threads,
                 int isa) {
  if (in == nullptr || out == nullptr) return MARLIN_ERROR_NULL;
  if (k <= 0 || n <= 0 || k % kCodes || n % kCodes) return MARLIN_ERROR_SHAPE;
  const int chosen = choose_isa(isa);
  if (chosen < 0) return MARLIN_ERROR_ISA;
  const RowsFunction function = functions[chosen];
  parallel(k / kCodes, kLeastWords / n + 1, threads,
           [=](int64_t begin, int64_t end) { function(in, out, n, begin, end); });
  return MARLIN_OK;
}

}  // namespace
}  // namespace marlin

extern "C" {

int marlin_cpu_transpose(const int32_t* in, int32_t* out, int64_t rows, int64_t columns, int threads, int isa) {
  using namespace marlin;
  if (in == nullptr || out == nullptr) return MARLIN_ERROR_NULL;
  if (rows <= 0 || columns <= 0) return MARLIN_ERROR_SHAPE;
  const int chosen = choose_isa(isa);
  if (chosen < 0) return MARLIN_ERROR_ISA;
  const TransposeFunction function = kTranspose[chosen];
  parallel((columns + kSquare - 1) / kSquare, kLeastWords / (rows * kSquare) + 1, threads,
           [=](int64_t begin, int64_t end) { function(in, out, rows, columns, begin, end); });
  return MARLIN_OK;
}

int marlin_cpu_awq_to_gptq(const int32_t* awq, int32_t* gptq, int64_t k, int64_t n, int threads, int isa) {
  return marlin::convert_rows(marlin::kAwq, awq, gptq, k, n, threads, isa);
}

int marlin_cpu_gptq_to_awq(const int32_t* gptq, int32_t* awq, int64_t k, int64_t n, int threads, int isa) {
  return marlin::convert_rows(marlin::kGptq, gptq, awq, k, n, threads, isa);
}

}  // extern "C"
