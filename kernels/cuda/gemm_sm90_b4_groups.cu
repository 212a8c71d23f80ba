// gemm_sm90_b4_groups.cu: the instances of gemm_sm90.cuh for 4 bits in groups of 64, 32 and 16.
#include "gemm_sm90_instance.cuh"

namespace marlin {

std::vector<Instance> sm90_b4_groups_instances() {
  return {
      MARLIN_SM90_B4(120, "b4_g64", 64),
      MARLIN_SM90_B4(130, "b4_g32", 32),
      MARLIN_SM90_B4(140, "b4_g16", 16),
  };
}

}  // namespace marlin
