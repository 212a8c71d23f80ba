// gemm_sm90_instance.cuh: an Instance of gemm_sm90.cuh. The instances stand in several translation units,
// gemm_sm90_*.cu, because they take long to compile.
#pragma once

#include "gemm_sm90.cuh"
#include "instance.h"

namespace marlin {

// What all instances of a shape have, whatever kernel runs its main loop.
template <typename S>
Instance instance_of_shape(int id, const char* name) {
  Instance i = {};
  i.id = id;
  i.name = name;
  i.loop = MainLoop::kSm90;
  i.invariant = S::WK == 2;
  i.bits = S::BITS;
  i.group_size = S::GROUP;
  i.zero_points = S::kExtended ? kEither : kNever;
  i.threads = S::kThreads;
  i.block_m = S::kBlockM;
  i.block_n = S::kBlockN;
  i.block_k = S::kBlockK;
  i.stage_bytes = S::kStageBytes;
  i.extra_bytes = S::kExtraBytes;
  i.max_stages = S::kMaxStages;
  i.stage_multiple = S::WK;
  i.line_bytes = S::kLineBytes;
  return i;
}

template <typename S>
Instance sm90_instance(int id, const char* name) {
  Instance i = instance_of_shape<S>(id, name);
  i.kernels[0] = reinterpret_cast<const void*>(&gemm_sm90_kernel<__half, S>);
  i.kernels[1] = reinterpret_cast<const void*>(&gemm_sm90_kernel<__nv_bfloat16, S>);
  i.parts_in_turn = S::kPartsInTurn;
  return i;
}

// The extended weights of BITS and GROUP, numbered from ID; with 4 bits, wide tiles also for more rows.
#define MARLIN_SM90(ID, SUFFIX, BITS, GROUP)                                                   \
  sm90_instance<Sm90Shape<1, 2, 1, 2, true, BITS, GROUP>>(ID + 0, "sm90_m8n128_" SUFFIX),      \
      sm90_instance<Sm90Shape<1, 4, 1, 2, true, BITS, GROUP>>(ID + 1, "sm90_m8n256_" SUFFIX),  \
      sm90_instance<Sm90Shape<2, 2, 1, 2, true, BITS, GROUP>>(ID + 2, "sm90_m16n128_" SUFFIX), \
      sm90_instance<Sm90Shape<4, 2, 1, 2, true, BITS, GROUP>>(ID + 4, "sm90_m32n128_" SUFFIX), \
      sm90_instance<Sm90Shape<8, 2, 1, 2, true, BITS, GROUP>>(ID + 6, "sm90_m64n128_" SUFFIX), \
      sm90_instance<Sm90Shape<8, 2, 2, 1, true, BITS, GROUP>>(ID + 7, "sm90_m64n256_" SUFFIX)
#define MARLIN_SM90_B4(ID, SUFFIX, GROUP)                                                   \
  MARLIN_SM90(ID, SUFFIX, 4, GROUP),                                                        \
      sm90_instance<Sm90Shape<2, 4, 1, 2, true, 4, GROUP>>(ID + 3, "sm90_m16n256_" SUFFIX), \
      sm90_instance<Sm90Shape<4, 4, 1, 2, true, 4, GROUP>>(ID + 5, "sm90_m32n256_" SUFFIX)

}  // namespace marlin
