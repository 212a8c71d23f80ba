// gemm_sm80_b4.cu: the instances of gemm_sm80.cuh for 4 bits without zero points; with exact codes, groups of 128.
#include "gemm_sm80_instance.cuh"

namespace marlin {

std::vector<Instance> sm80_b4_instances() {
  return {
      sm80_instance<1, 1, 2, 4, 4>(1, "sm80_m8n128_b4_g128"),
      sm80_instance<1, 1, 4, 2, 4>(2, "sm80_m8n256_b4_g128"),
      sm80_instance<2, 1, 4, 2, 4>(4, "sm80_m16n256_b4_g128"),
      sm80_instance<4, 1, 2, 2, 4, 4, false, true, 3>(5, "sm80_m32n128_b4_gany"),
      sm80_instance<4, 1, 4, 2, 4, 4, false, true>(6, "sm80_m32n256_b4_gany"),
      sm80_instance<8, 1, 2, 2, 4, 4, false, true, 2>(8, "sm80_m64n128_b4_gany"),
      sm80_instance<8, 1, 4, 2, 4, 4, false, true>(9, "sm80_m64n256_b4_gany"),
      sm80_instance<8, 1, 4, 2, 2, 4, false, true>(10, "sm80_m64n256k64_b4_gany"),
      sm80_instance<8, 2, 4, 1, 4, 4, false, true>(12, "sm80_m128n256_b4_gany"),
      sm80_instance<2, 1, 2, 2, 4, 4, false, true, 3>(13, "sm80_m16n128_b4_gany"),
  };
}

}  // namespace marlin
