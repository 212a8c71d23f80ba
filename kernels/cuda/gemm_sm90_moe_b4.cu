// gemm_sm90_moe_b4.cu: grouped products with few rows of each expert and 4 bits.
#include "gemm_sm90_moe_instance.cuh"

namespace marlin {

std::vector<Instance> moe_sm90_b4_instances() {
  return {
      MARLIN_GROUPED(1100, "b4_g128", false, 4, 128), MARLIN_GROUPED(1110, "b4_g128z", true, 4, 128),
      MARLIN_GROUPED(1120, "b4_g64z", true, 4, 64),   MARLIN_GROUPED(1130, "b4_g32z", true, 4, 32),
      MARLIN_GROUPED(1140, "b4_g16z", true, 4, 16),
  };
}

}  // namespace marlin
