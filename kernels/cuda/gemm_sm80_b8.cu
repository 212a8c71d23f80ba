// gemm_sm80_b8.cu: the instances of gemm_sm80.cuh for 8 bits.
#include "gemm_sm80_instance.cuh"

namespace marlin {

std::vector<Instance> sm80_b8_instances() {
  return {
      sm80_instance<1, 1, 4, 2, 4, 8, true>(42, "sm80_m8n256_b8_gany"),
      sm80_instance<2, 1, 4, 2, 4, 8, true>(44, "sm80_m16n256_b8_gany"),
      sm80_instance<4, 1, 4, 2, 4, 8, true, true>(46, "sm80_m32n256_b8_gany"),
      sm80_instance<4, 2, 4, 1, 4, 8, true, true>(49, "sm80_m64n256_b8_gany"),
      sm80_instance<4, 4, 2, 1, 4, 8, true, true>(51, "sm80_m128n128_b8_gany"),
      sm80_instance<8, 2, 4, 1, 4, 8, true, true>(53, "sm80_m128n256_b8_gany"),
  };
}

}  // namespace marlin
