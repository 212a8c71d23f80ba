// gemm_sm80.cu: the instances of gemm_sm80.cuh.
#include "gemm_sm80.cuh"
#include "instance.h"

namespace marlin {
namespace {

template <int MB, int WM, int WN, int WK, int KT, int BITS = 4, bool EXTENDED = false, bool SCALED = false>
Instance instance(int id, const char* name) {
  using S = Sm80Shape<MB, WM, WN, WK, KT, BITS, EXTENDED, SCALED>;
  Instance i = {};
  i.id = id;
  i.name = name;
  i.loop = MainLoop::kSm80;
  i.kernels[0] = reinterpret_cast<const void*>(&gemm_sm80_kernel<__half, S>);
  i.kernels[1] = reinterpret_cast<const void*>(&gemm_sm80_kernel<__nv_bfloat16, S>);
  if constexpr (SCALED) {
    using Mixed = Sm80Shape<MB, WM, WN, WK, KT, BITS, EXTENDED, true, true>;
    i.kernels[2] = reinterpret_cast<const void*>(&gemm_sm80_kernel<__half, Mixed>);
    i.kernels[3] = reinterpret_cast<const void*>(&gemm_sm80_kernel<__nv_bfloat16, Mixed>);
  }
  i.bits = S::BITS;
  i.group_size = S::kAnyGroups ? 0 : 128;
  i.zero_points = S::kExtended ? kEither : kNever;
  i.rounds_weights = S::kScaled;
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
  // MB, WM, WN, WK, KT of Sm80Shape: eight warps each.
  return {
      instance<1, 1, 2, 4, 4>(1, "sm80_m8n128_b4_g128"),
      instance<1, 1, 4, 2, 4>(2, "sm80_m8n256_b4_g128"),
      instance<2, 1, 2, 4, 4>(3, "sm80_m16n128_b4_g128"),
      instance<2, 1, 4, 2, 4>(4, "sm80_m16n256_b4_g128"),
      instance<4, 1, 2, 4, 4, 4, false, true>(5, "sm80_m32n128_b4_gany"),
      instance<4, 1, 4, 2, 4, 4, false, true>(6, "sm80_m32n256_b4_gany"),
      instance<8, 1, 2, 4, 2, 4, false, true>(8, "sm80_m64n128_b4_gany"),
      instance<8, 1, 4, 2, 4, 4, false, true>(9, "sm80_m64n256_b4_gany"),
      instance<8, 1, 4, 2, 2, 4, false, true>(10, "sm80_m64n256k64_b4_gany"),
      instance<8, 2, 2, 2, 4, 4, false, true>(11, "sm80_m128n128_b4_gany"),
      instance<8, 2, 4, 1, 4, 4, false, true>(12, "sm80_m128n256_b4_gany"),

      instance<1, 1, 4, 2, 4, 4, true>(22, "sm80_m8n256_b4_ganyz"),
      instance<2, 1, 4, 2, 4, 4, true>(24, "sm80_m16n256_b4_ganyz"),
      instance<4, 1, 4, 2, 4, 4, true, true>(26, "sm80_m32n256_b4_ganyz"),
      instance<8, 1, 4, 2, 4, 4, true, true>(29, "sm80_m64n256_b4_ganyz"),
      instance<8, 2, 4, 1, 4, 4, true, true>(32, "sm80_m128n256_b4_ganyz"),

      instance<1, 1, 4, 2, 4, 8, true>(42, "sm80_m8n256_b8_gany"),
      instance<2, 1, 4, 2, 4, 8, true>(44, "sm80_m16n256_b8_gany"),
      instance<4, 1, 4, 2, 4, 8, true, true>(46, "sm80_m32n256_b8_gany"),
      instance<4, 2, 4, 1, 4, 8, true, true>(49, "sm80_m64n256_b8_gany"),
      instance<4, 4, 2, 1, 4, 8, true, true>(51, "sm80_m128n128_b8_gany"),
  };
}

}  // namespace marlin
