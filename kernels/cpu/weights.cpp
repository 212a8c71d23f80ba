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

using Layer = marlin_cpu_layer_t;

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

inline float bfloat_value(uint16_t bits16) {
  const uint32_t bits = static_cast<uint32_t>(bits16) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint16_t bfloat_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>(bits >> 16);
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

// A group's scales and zero points as fp32, in the order of the columns, for the tile columns [begin, end).
template <Format format>
class GroupRow {
 public:
  GroupRow(const Layer& layer, int64_t begin, int64_t end)
      : layer_(layer),
        begin_(begin),
        scales_(static_cast<size_t>(kTileN * (end - begin))),
        zeros_(scales_.size(), static_cast<float>(1 << (layer.bits - 1))) {}

  void load(int64_t group) {
    if (group == group_) return;
    group_ = group;
    const int64_t first = group * layer_.n + kTileN * begin_;
    for (size_t i = 0; i < scales_.size(); ++i) {
      uint16_t bits;
      std::memcpy(&bits, layer_.scales + first + place(static_cast<int64_t>(i)), sizeof bits);
      scales_[i] = layer_.bf16 ? bfloat_value(bits) : half_value(bits);
      if (layer_.zeros) zeros_[i] = layer_.zeros[first + static_cast<int64_t>(i)];
    }
  }

  const float* scales(int64_t column) const { return scales_.data() + kTileN * (column - begin_); }
  const float* zeros(int64_t column) const { return zeros_.data() + kTileN * (column - begin_); }

 private:
  int64_t place(int64_t i) const {
    if (format == Format::kGptq) return i;
    const int c = static_cast<int>(i % 64);
    return i - c + (layer_.groups > 1 ? position_grouped(c) : c / 32 * 32 + position_single(c % 32));
  }

  const Layer& layer_;
  const int64_t begin_;
  int64_t group_ = -1;
  std::vector<float> scales_, zeros_;
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

// The functions of each instruction set, for one width of the codes and one type of the weights.
template <Format format, int bits, bool bf16>
struct Functions {
#if MARLIN_X86
  static constexpr MatmulFunction kMatmul[] = {nullptr, plain::matmul<format, bits, bf16>,
                                               avx2::matmul<format, bits, bf16>, avx512::matmul<format, bits, bf16>};
  static constexpr DequantizeFunction kDequantize[] = {nullptr, plain::dequantize<format, bits, bf16>,
                                                       avx2::dequantize<format, bits, bf16>,
                                                       avx512::dequantize<format, bits, bf16>};
#else
  static constexpr MatmulFunction kMatmul[] = {nullptr, plain::matmul<format, bits, bf16>};
  static constexpr DequantizeFunction kDequantize[] = {nullptr, plain::dequantize<format, bits, bf16>};
#endif
};

template <Format format>
MatmulFunction matmul_of(const Layer& layer, int isa) {
  if (layer.bits == 4)
    return (layer.bf16 ? Functions<format, 4, true>::kMatmul : Functions<format, 4, false>::kMatmul)[isa];
  return (layer.bf16 ? Functions<format, 8, true>::kMatmul : Functions<format, 8, false>::kMatmul)[isa];
}

template <Format format>
DequantizeFunction dequantize_of(const Layer& layer, int isa) {
  if (layer.bits == 4)
    return (layer.bf16 ? Functions<format, 4, true>::kDequantize : Functions<format, 4, false>::kDequantize)[isa];
  return (layer.bf16 ? Functions<format, 8, true>::kDequantize : Functions<format, 8, false>::kDequantize)[isa];
}

int check(const Layer* layer) {
  if (!layer || !layer->weights || !layer->scales) return MARLIN_ERROR_NULL;
  if (layer->bits != 4 && layer->bits != 8) return MARLIN_ERROR_BITS;
  const int64_t rows = layer->rows_per_group;
  const bool groups_fit = layer->groups > 0 && rows > 0 && rows % MARLIN_TILE_K == 0 && layer->k0 >= 0 &&
                          layer->k0 % MARLIN_TILE_K == 0 && layer->k0 + layer->k <= layer->groups * rows;
  return whole_tiles(layer->k, layer->n) && groups_fit ? MARLIN_OK : MARLIN_ERROR_SHAPE;
}

template <Format format>
int run_matmul(const Layer* layer, const Product& product, int threads, int isa) {
  if (!product.x || !product.y) return MARLIN_ERROR_NULL;
  if (const int error = check(layer)) return error;
  if (product.m <= 0 || product.x_columns < layer->k0 + layer->k) return MARLIN_ERROR_SHAPE;
  const int chosen = choose_isa(isa);
  if (chosen < 0) return MARLIN_ERROR_ISA;
  const MatmulFunction function = matmul_of<format>(*layer, chosen);
  parallel(layer->n / kTileN, kLeastTiles / (layer->k / MARLIN_TILE_K), threads,
           [&, function](int64_t begin, int64_t end) { function(*layer, product, begin, end); });
  return MARLIN_OK;
}

template <Format format>
int run_dequantize(const Layer* layer, uint16_t* w, int threads, int isa) {
  if (!w) return MARLIN_ERROR_NULL;
  if (const int error = check(layer)) return error;
  const int chosen = choose_isa(isa);
  if (chosen < 0) return MARLIN_ERROR_ISA;
  const DequantizeFunction function = dequantize_of<format>(*layer, chosen);
  parallel(layer->n / kTileN, kLeastTiles / (layer->k / MARLIN_TILE_K), threads,
           [&, function](int64_t begin, int64_t end) { function(*layer, w, begin, end); });
  return MARLIN_OK;
}

}  // namespace
}  // namespace marlin

extern "C" {

int marlin_cpu_dequantize_gptq(const marlin_cpu_layer_t* layer, uint16_t* w, int threads, int isa) {
  return marlin::run_dequantize<marlin::Format::kGptq>(layer, w, threads, isa);
}

int marlin_cpu_dequantize_marlin(const marlin_cpu_layer_t* layer, uint16_t* w, int threads, int isa) {
  return marlin::run_dequantize<marlin::Format::kMarlin>(layer, w, threads, isa);
}

int marlin_cpu_matmul_gptq(const float* x, int64_t m, int64_t x_columns, const marlin_cpu_layer_t* layer, float* y,
                           int threads, int isa) {
  return marlin::run_matmul<marlin::Format::kGptq>(layer, {x, y, m, x_columns}, threads, isa);
}

int marlin_cpu_matmul_marlin(const float* x, int64_t m, int64_t x_columns, const marlin_cpu_layer_t* layer, float* y,
                             int threads, int isa) {
  return marlin::run_matmul<marlin::Format::kMarlin>(layer, {x, y, m, x_columns}, threads, isa);
}

}  // extern "C"
