// gemm_sm80_instance.cuh: an Instance of gemm_sm80.cuh. They stand in three translation units, which are compiled at
// the same time.
#pragma once

#include "gemm_sm80.cuh"
#include "instance.h"

namespace marlin {

// MB, WM, WN, WK, KT and so on of Sm80Shape: eight warps, or four where blocks share an SM.
template <int MB, int WM, int WN, int WK, int KT, int BITS = 4, bool EXTENDED = false, bool SCALED = false,
          int BLOCKS = 1, int ZEROS = EXTENDED ? (SCALED ? kAlways : kEither) : kNever>
Instance sm80_instance(int id, const char* name) {
  using S = Sm80Shape<MB, WM, WN, WK, KT, BITS, EXTENDED, SCALED, false, BLOCKS, false, ZEROS>;
  Instance i = {};
  i.id = id;
  i.name = name;
  i.loop = MainLoop::kSm80;
  i.kernels[0] = reinterpret_cast<const void*>(&gemm_sm80_kernel<__half, S>);
  i.kernels[1] = reinterpret_cast<const void*>(&gemm_sm80_kernel<__nv_bfloat16, S>);
  if constexpr (SCALED) {
    using Mixed = Sm80Shape<MB, WM, WN, WK, KT, BITS, EXTENDED, true, true, BLOCKS, false, ZEROS>;
    i.kernels[2] = reinterpret_cast<const void*>(&gemm_sm80_kernel<__half, Mixed>);
    i.kernels[3] = reinterpret_cast<const void*>(&gemm_sm80_kernel<__nv_bfloat16, Mixed>);
    if constexpr (ZEROS == kNever) {
      using OneGroup = Sm80Shape<MB, WM, WN, WK, KT, BITS, EXTENDED, true, false, BLOCKS, true, kNever>;
      i.kernels[kOneGroup] = reinterpret_cast<const void*>(&gemm_sm80_kernel<__half, OneGroup>);
      i.kernels[kOneGroup + 1] = reinterpret_cast<const void*>(&gemm_sm80_kernel<__nv_bfloat16, OneGroup>);
    }
  }
  i.bits = S::BITS;
  i.group_size = S::kAnyGroups ? 0 : 128;
  i.zero_points = static_cast<ZeroPoints>(ZEROS);
  i.rounds_weights = S::kScaled;
  i.invariant = S::kScaled && S::WK == 2 && S::KT == 4;
  i.threads = S::kThreads;
  i.blocks_per_sm = S::kBlocks;
  i.block_m = S::kBlockM;
  i.block_n = S::kBlockN;
  i.block_k = S::kBlockK;
  i.stage_bytes = S::kStageBytes;
  i.extra_bytes = S::kExtraBytes;
  i.max_stages = S::kMaxStages;
  i.stage_multiple = 1;
  i.min_stages = S::kMinStages;
  i.warps_m = S::WM;
  return i;
}

}  // namespace marlin
