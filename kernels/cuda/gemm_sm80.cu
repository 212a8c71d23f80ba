// gemm_sm80.cu: the instances of gemm_sm80.cuh.
#include "gemm_sm80.cuh"
#include "instance.h"

namespace marlin {
namespace {

template <typename S>
Instance instance(int id, const char* name) {
  Instance i = {};
  i.id = id;
  i.name = name;
  i.loop = MainLoop::kSm80;
  i.kernels[0] = reinterpret_cast<const void*>(&gemm_sm80_kernel<__half, S>);
  i.kernels[1] = reinterpret_cast<const void*>(&gemm_sm80_kernel<__nv_bfloat16, S>);
  i.bits = S::BITS;
  i.group_size = S::kExtended ? 0 : 128;
  i.zero_points = S::kExtended ? kEither : kNever;
  i.threads = S::kThreads;
  i.block_m = S::kBlockM;
  i.block_n = S::kBlockN;
  i.block_k = S::kBlockK;
  i.stage_bytes = S::kStageBytes;
  i.extra_bytes = S::kExtraBytes;
  i.max_stages = S::kMaxStages;
  i.stage_multiple = 1;
  return i;
}

}  // namespace

std::vector<Instance> sm80_instances() {
  // Sm80Shape<MB, WM, WN, WK, KT>: eight warps each. Few rows leave warps for more of N and K.
  return {
      instance<Sm80Shape<1, 1, 4, 2, 4>>(1, "sm80_m8n256_b4_g128"),
      instance<Sm80Shape<2, 1, 4, 2, 4>>(2, "sm80_m16n256_b4_g128"),
      instance<Sm80Shape<4, 1, 4, 2, 4>>(3, "sm80_m32n256_b4_g128"),
      instance<Sm80Shape<4, 2, 4, 1, 4>>(4, "sm80_m64n256_b4_g128"),
      instance<Sm80Shape<4, 4, 2, 1, 4>>(5, "sm80_m128n128_b4_g128"),

      instance<Sm80Shape<1, 1, 4, 2, 4, 4, true>>(11, "sm80_m8n256_b4_gany"),
      instance<Sm80Shape<2, 1, 4, 2, 4, 4, true>>(12, "sm80_m16n256_b4_gany"),
      instance<Sm80Shape<4, 2, 4, 1, 4, 4, true>>(14, "sm80_m64n256_b4_gany"),
      instance<Sm80Shape<4, 4, 2, 1, 4, 4, true>>(15, "sm80_m128n128_b4_gany"),

      instance<Sm80Shape<1, 1, 4, 2, 4, 8, true>>(21, "sm80_m8n256_b8_gany"),
      instance<Sm80Shape<2, 1, 4, 2, 4, 8, true>>(22, "sm80_m16n256_b8_gany"),
      instance<Sm80Shape<4, 2, 4, 1, 4, 8, true>>(24, "sm80_m64n256_b8_gany"),
      instance<Sm80Shape<4, 4, 2, 1, 4, 8, true>>(25, "sm80_m128n128_b8_gany"),
  };
}

}  // namespace marlin
