// tensor_maps.cpp: tensors as the copy engine sees them (tensor_maps.h).
#include "tensor_maps.h"

#include <algorithm>

namespace marlin {
namespace {

// The innermost dimension first, and the box that one copy takes.
struct Layout {
  CUtensorMapDataType type;
  cuuint32_t rank;
  cuuint64_t sizes[3];    // in elements
  cuuint64_t pitches[2];  // bytes between neighbours of all dimensions but the innermost
  cuuint32_t box[3];
  CUtensorMapSwizzle swizzle;
};

int describe(CUtensorMap* map, const void* data, const Layout& layout) {
  using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                              const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                              CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  // Taken from the driver at run time, so that the library also loads where there is none.
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
  }();
  if (encode == nullptr) return cudaErrorInsufficientDriver;
  const cuuint32_t every[3] = {1, 1, 1};
  const CUresult result = encode(map, layout.type, layout.rank, const_cast<void*>(data), layout.sizes, layout.pitches,
                                 layout.box, every, CU_TENSOR_MAP_INTERLEAVE_NONE, layout.swizzle,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? MARLIN_OK : cudaErrorInvalidValue;
}

}  // namespace

// Rows of tiles of `bits` as lines, of elements of 8 bytes; what matters is that the order of bytes stays.
int describe_weights(CUtensorMap* map, const Instance& instance, const marlin_cuda_weights_t& w, int64_t matrices) {
  const auto line = static_cast<cuuint32_t>(instance.line_bytes), row_bytes = static_cast<cuuint32_t>(w.N * 2 * w.bits);
  const Layout tiles = {CU_TENSOR_MAP_DATA_TYPE_INT64,
                        3,
                        {line / 8, row_bytes / line, static_cast<cuuint64_t>(matrices * (w.K / MARLIN_TILE_K))},
                        {line, row_bytes},
                        {line / 8, static_cast<cuuint32_t>(instance.block_n * 2 * instance.bits) / line,
                         static_cast<cuuint32_t>(instance.block_k / MARLIN_TILE_K)},
                        line == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE};
  return describe(map, w.B, tiles);
}

int describe_activations(CUtensorMap* map, const Instance& instance, const marlin_cuda_weights_t& w, const void* A,
                         int64_t rows, int64_t lda) {
  const Layout layout = {CU_TENSOR_MAP_DATA_TYPE_UINT16,
                         2,
                         {static_cast<cuuint64_t>(w.in_features), static_cast<cuuint64_t>(rows)},
                         {static_cast<cuuint64_t>(lda * 2)},
                         {64, static_cast<cuuint32_t>(instance.block_m)},
                         CU_TENSOR_MAP_SWIZZLE_128B};
  return describe(map, A, layout);
}

int describe_scales(CUtensorMap* scales_map, CUtensorMap* zeros_map, const Instance& instance,
                    const marlin_cuda_weights_t& w, int64_t matrices, int step_groups) {
  const auto groups = static_cast<cuuint64_t>(matrices * w.G), columns = static_cast<cuuint64_t>(w.N);
  const auto box_rows = static_cast<cuuint32_t>(std::max(1, step_groups)),
             box_columns = static_cast<cuuint32_t>(instance.block_n);
  if (w.G > 1)
    MARLIN_RETURN_IF_ERROR(describe(scales_map, w.s,
                                    {CU_TENSOR_MAP_DATA_TYPE_UINT16,
                                     2,
                                     {columns, groups},
                                     {columns * 2},
                                     {box_columns, box_rows},
                                     CU_TENSOR_MAP_SWIZZLE_NONE}));
  if (w.zeros != nullptr) {
    const auto words = static_cast<cuuint32_t>(32 / w.bits);  // columns in each
    MARLIN_RETURN_IF_ERROR(describe(zeros_map, w.zeros,
                                    {CU_TENSOR_MAP_DATA_TYPE_INT32,
                                     2,
                                     {columns / words, groups},
                                     {columns / words * 4},
                                     {box_columns / words, box_rows},
                                     CU_TENSOR_MAP_SWIZZLE_NONE}));
  }
  return MARLIN_OK;
}

}  // namespace marlin
