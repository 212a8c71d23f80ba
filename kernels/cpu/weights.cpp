// weights.cpp: dequantization of both formats, and their products with activations, for the numeric verification.
//
// Both work a tile (16 x 64) at a time: decode it into 4 KiB of fp32 weights, already rounded to fp16 values, and
// multiply it or write it. Threads take ranges of tile columns, so that no two write the same element and the order of
// the additions, hence the result, does not depend on their number.
#include <cstring>
#include <new>

#include "common.h"

#if MARLIN_X86
#include <immintrin.h>
#endif

namespace marlin {
namespace {

constexpr int kTileN = MARLIN_TILE_N;

// Least work of a thread, in tiles times passes over them: some ten microseconds.
constexpr int64_t kLeastTiles = 256;

enum class Format { kGptq, kMarlin };

struct Layer {
  const int32_t* weights;  // qweight [k/8, n] or B [k/16, 2n]: rows k0 .. k0 + k of the layer
  const uint16_t* scales;  // fp16 [groups, n], the whole layer's, in the format's order of columns
  int64_t k0, k, n, groups, rows_per_group;
};

struct Product {
  const float* x;  // [m, x_columns]
  float* y;        // [m, n]
  int64_t m, x_columns;
};

inline float half_value(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t exponent = half >> 10 & 31, fraction = half & 1023;
  uint32_t bits;
  if (exponent == 0) {
    const float subnormal = static_cast<float>(fraction) * 0x1p-24f;
    std::memcpy(&bits, &subnormal, sizeof bits);
  } else {
    bits = (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
  }
  bits |= sign;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The 16 bits of a float that is an fp16 value.
inline uint16_t half_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude < 0x38800000) {  // below 2^-14: a multiple of 2^-24
    const float positive = value < 0 ? -value : value;
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(positive * 0x1p24f));
  }
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (magnitude == 0x7f800000) return static_cast<uint16_t>(sign | 0x7c00);
  return static_cast<uint16_t>(sign | (magnitude - 0x38000000) >> 13);
}

// Where column c of a run of columns stands in `s` (layout.py, "Scales").
inline int position_grouped(int c) { return 8 * (c % 8) + c / 8; }  // c = i + 8j stands at 8i + j
inline int position_single(int c) {
  // c = 2i + (0, 1, 8, 9, 16, 17, 24, 25)[j] stands at 8i + j: c is 8 * (j / 2) + 2i + j % 2.
  return 8 * (c % 8 / 2) + 2 * (c / 8) + c % 2;
}

// A group's scales as fp32, in the order of the columns, for the tile columns [begin, end).
template <Format format>
class ScaleRow {
 public:
  ScaleRow(const Layer& layer, int64_t begin, int64_t end)
      : layer_(layer), begin_(begin), values_(static_cast<size_t>(kTileN * (end - begin))) {}

  void load(int64_t group) {
    if (group == group_) return;
    group_ = group;
    const uint16_t* from = layer_.scales + group * layer_.n + kTileN * begin_;
    for (size_t i = 0; i < values_.size(); ++i) {
      uint16_t half;
      std::memcpy(&half, from + place(static_cast<int64_t>(i)), sizeof half);
      values_[i] = half_value(half);
    }
  }

  const float* tile(int64_t column) const { return values_.data() + kTileN * (column - begin_); }

 private:
  int64_t place(int64_t i) const {
    if (format == Format::kGptq) return i;
    const int c = static_cast<int>(i % 64);
    return i - c + (layer_.groups > 1 ? position_grouped(c) : c / 32 * 32 + position_single(c % 32));
  }

  const Layer& layer_;
  const int64_t begin_;
  int64_t group_ = -1;
  std::vector<float> values_;
};

namespace plain {
#define MARLIN_TARGET
#define MARLIN_VECTOR_BYTES 16
#include "weights.inl"
}  // namespace plain

#if MARLIN_X86
namespace avx2 {
#define MARLIN_TARGET __attribute__((target("avx2,fma,f16c")))
#define MARLIN_VECTOR_BYTES 32
#define MARLIN_ROUND(v) ((Floats)_mm256_cvtph_ps(_mm256_cvtps_ph((__m256)(v), _MM_FROUND_TO_NEAREST_INT)))
#include "weights.inl"
}  // namespace avx2

namespace avx512 {
#define MARLIN_TARGET __attribute__((target("avx512f,avx512bw,avx512vbmi,fma,f16c")))
#define MARLIN_VECTOR_BYTES 64
#define MARLIN_ROUND(v) ((Floats)_mm512_cvtph_ps(_mm512_cvtps_ph((__m512)(v), _MM_FROUND_TO_NEAREST_INT)))
#include "weights.inl"
}  // namespace avx512
#endif

using MatmulFunction = void (*)(const Layer&, const Product&, int64_t, int64_t);
using DequantizeFunction = void (*)(const Layer&, uint16_t*, int64_t, int64_t);

#if MARLIN_X86
template <Format format>
constexpr MatmulFunction kMatmul[] = {nullptr, plain::matmul<format>, avx2::matmul<format>, avx512::matmul<format>};
template <Format format>
constexpr DequantizeFunction kDequantize[] = {nullptr, plain::dequantize<format>, avx2::dequantize<format>,
                                              avx512::dequantize<format>};
#else
template <Format format>
constexpr MatmulFunction kMatmul[] = {nullptr, plain::matmul<format>};
template <Format format>
constexpr DequantizeFunction kDequantize[] = {nullptr, plain::dequantize<format>};
#endif

bool groups_fit(const Layer& layer) {
  const int64_t rows = layer.rows_per_group;
  return layer.groups > 0 && rows > 0 && rows % MARLIN_TILE_K == 0 && layer.k0 >= 0 && layer.k0 % MARLIN_TILE_K == 0 &&
         layer.k0 + layer.k <= layer.groups * rows;
}

template <Format format>
int run_matmul(const Layer& layer, const Product& product, int threads, int isa) {
  if (!layer.weights || !layer.scales || !product.x || !product.y) return MARLIN_ERROR_NULL;
  if (!whole_tiles(layer.k, layer.n) || !groups_fit(layer)) return MARLIN_ERROR_SHAPE;
  if (product.m <= 0 || product.x_columns < layer.k0 + layer.k) return MARLIN_ERROR_SHAPE;
  const int chosen = choose_isa(isa);
  if (chosen < 0) return MARLIN_ERROR_ISA;
  const MatmulFunction function = kMatmul<format>[chosen];
  const int64_t rows = layer.k / MARLIN_TILE_K;
  parallel(layer.n / kTileN, kLeastTiles / rows, threads,
           [&, function](int64_t begin, int64_t end) { function(layer, product, begin, end); });
  return MARLIN_OK;
}

template <Format format>
int run_dequantize(const Layer& layer, uint16_t* w, int threads, int isa) {
  if (!layer.weights || !layer.scales || !w) return MARLIN_ERROR_NULL;
  if (!whole_tiles(layer.k, layer.n) || !groups_fit(layer)) return MARLIN_ERROR_SHAPE;
  const int chosen = choose_isa(isa);
  if (chosen < 0) return MARLIN_ERROR_ISA;
  const DequantizeFunction function = kDequantize<format>[chosen];
  const int64_t rows = layer.k / MARLIN_TILE_K;
  parallel(layer.n / kTileN, kLeastTiles / rows, threads,
           [&, function](int64_t begin, int64_t end) { function(layer, w, begin, end); });
  return MARLIN_OK;
}

}  // namespace
}  // namespace marlin

extern "C" {

int marlin_cpu_dequantize_gptq(const int32_t* qweight, const uint16_t* scales, uint16_t* w, int64_t k, int64_t n,
                               int64_t groups, int threads, int isa) {
  if (groups <= 0 || k % groups != 0) return MARLIN_ERROR_SHAPE;
  return marlin::run_dequantize<marlin::Format::kGptq>({qweight, scales, 0, k, n, groups, k / groups}, w, threads, isa);
}

int marlin_cpu_dequantize_marlin(const int32_t* B, const uint16_t* s, uint16_t* w, int64_t k, int64_t n, int64_t groups,
                                 int threads, int isa) {
  if (groups <= 0 || k % groups != 0) return MARLIN_ERROR_SHAPE;
  return marlin::run_dequantize<marlin::Format::kMarlin>({B, s, 0, k, n, groups, k / groups}, w, threads, isa);
}

int marlin_cpu_matmul_gptq(const float* x, int64_t m, int64_t x_columns, const int32_t* qweight, const uint16_t* scales,
                           float* y, int64_t k0, int64_t k, int64_t n, int64_t groups, int64_t rows_per_group,
                           int threads, int isa) {
  return marlin::run_matmul<marlin::Format::kGptq>({qweight, scales, k0, k, n, groups, rows_per_group},
                                                   {x, y, m, x_columns}, threads, isa);
}

int marlin_cpu_matmul_marlin(const float* x, int64_t m, int64_t x_columns, const int32_t* B, const uint16_t* s,
                             float* y, int64_t k0, int64_t k, int64_t n, int64_t groups, int64_t rows_per_group,
                             int threads, int isa) {
  return marlin::run_matmul<marlin::Format::kMarlin>({B, s, k0, k, n, groups, rows_per_group}, {x, y, m, x_columns},
                                                     threads, isa);
}

}  // extern "C"
