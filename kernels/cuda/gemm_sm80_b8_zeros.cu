// gemm_sm80_b8_zeros.cu: the instances of gemm_sm80.cuh for 8 bits with zero points.
#include "gemm_sm80_instance.cuh"

namespace marlin {

std::vector<Instance> sm80_b8_zeros_instances() {
  return {
      sm80_instance<2, 1, 2, 2, 4, 8, true, true, 3>(63, "sm80_m16n128_b8_ganyz"),
      sm80_instance<4, 1, 4, 2, 4, 8, true, true>(66, "sm80_m32n256_b8_ganyz"),
      sm80_instance<8, 1, 4, 2, 2, 8, true, true>(70, "sm80_m64n256k64_b8_ganyz"),
      sm80_instance<8, 2, 4, 1, 4, 8, true, true>(73, "sm80_m128n256_b8_ganyz"),
  };
}

}  // namespace marlin
