// gemm_sm80_b4_groups.cu: the instances of gemm_sm80.cuh for 4 bits with zero points, and with exact codes any groups.
#include "gemm_sm80_instance.cuh"

namespace marlin {

std::vector<Instance> sm80_b4_groups_instances() {
  return {
      sm80_instance<1, 1, 4, 2, 4, 4, true>(22, "sm80_m8n256_b4_ganyz"),
      sm80_instance<2, 1, 2, 2, 4, 4, true, true, 3>(23, "sm80_m16n128_b4_ganyz"),
      sm80_instance<4, 1, 2, 2, 4, 4, true, true, 3>(25, "sm80_m32n128_b4_ganyz"),
      sm80_instance<8, 1, 4, 2, 4, 4, true, true>(29, "sm80_m64n256_b4_ganyz"),
      sm80_instance<8, 1, 4, 2, 2, 4, true, true>(30, "sm80_m64n256k64_b4_ganyz"),
  };
}

}  // namespace marlin
