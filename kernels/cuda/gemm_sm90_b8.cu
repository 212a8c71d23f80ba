// gemm_sm90_b8.cu: the instances of gemm_sm90.cuh for 8 bits.
#include "gemm_sm90_instance.cuh"

namespace marlin {

std::vector<Instance> sm90_b8_instances() {
  return {
      MARLIN_SM90(150, "b8_g128", 8, 128),
      MARLIN_SM90(160, "b8_g64", 8, 64),
      MARLIN_SM90(170, "b8_g32", 8, 32),
      MARLIN_SM90(180, "b8_g16", 8, 16),
  };
}

}  // namespace marlin
