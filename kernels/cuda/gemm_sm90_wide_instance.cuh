// gemm_sm90_wide_instance.cuh: an Instance of gemm_sm90_wide.cuh. They stand in several translation units,
// gemm_sm90_wide_*.cu, because they take long to compile.
#pragma once

#include "gemm_sm90_wide.cuh"
#include "instance.h"

namespace marlin {

// P: the arguments, of products with one matrix of weights or with several (grouped.h).
template <int MB, int J, int WN, int BITS, bool ZEROS, typename P = WideArguments>
Instance wide_instance(int id, const char* name) {
  using S = WideShape<MB, J, WN, BITS, ZEROS, false>;
  using Mixed = WideShape<MB, J, WN, BITS, ZEROS, true>;
  static_assert(S::kStageBytes == Mixed::kStageBytes && S::kExtraBytes == Mixed::kExtraBytes, "");
  Instance i = {};
  i.id = id;
  i.name = name;
  i.loop = MainLoop::kSm90Wide;
  i.kernels[0] = reinterpret_cast<const void*>(&gemm_sm90_wide_kernel<__half, S, P>);
  i.kernels[1] = reinterpret_cast<const void*>(&gemm_sm90_wide_kernel<__nv_bfloat16, S, P>);
  i.kernels[2] = reinterpret_cast<const void*>(&gemm_sm90_wide_kernel<__half, Mixed, P>);
  i.kernels[3] = reinterpret_cast<const void*>(&gemm_sm90_wide_kernel<__nv_bfloat16, Mixed, P>);
  i.rounds_weights = true;
  i.bits = BITS;
  i.group_size = 0;
  i.zero_points = ZEROS ? kAlways : kNever;
  i.threads = S::kThreads;
  i.block_m = S::kBlockM;
  i.block_n = S::kBlockN;
  i.block_k = S::kBlockK;
  i.stage_bytes = S::kStageBytes;
  i.extra_bytes = S::kExtraBytes;
  i.max_stages = S::kMaxStages;
  i.stage_multiple = 1;
  i.line_bytes = S::kLineBytes;
  return i;
}

// 256 rows or columns halve what is read from L2 for each product, and 256 rows also what is decoded; 128 x 128 fills the
// SMs where there are few tiles, and 192 columns those that 128 and 256 columns leave idle.
#define MARLIN_SM90_WIDE(ID, SUFFIX, BITS, ZEROS)                                 \
  wide_instance<16, 1, 2, BITS, ZEROS>(ID + 0, "sm90_wide_m128n128_" SUFFIX),     \
      wide_instance<32, 1, 2, BITS, ZEROS>(ID + 1, "sm90_wide_m256n128_" SUFFIX), \
      wide_instance<16, 2, 2, BITS, ZEROS>(ID + 2, "sm90_wide_m128n256_" SUFFIX), \
      wide_instance<16, 1, 3, BITS, ZEROS>(ID + 3, "sm90_wide_m128n192_" SUFFIX)

}  // namespace marlin
