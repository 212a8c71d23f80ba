// gemm_sm90_moe_b8.cu: grouped products with few rows of each expert and 8 bits.
#include "gemm_sm90_moe_instance.cuh"

namespace marlin {

std::vector<Instance> moe_sm90_b8_instances() {
  return {
      MARLIN_GROUPED(1200, "b8_g128", true, 8, 128),
      MARLIN_GROUPED(1210, "b8_g64", true, 8, 64),
      MARLIN_GROUPED(1220, "b8_g32", true, 8, 32),
      MARLIN_GROUPED(1230, "b8_g16", true, 8, 16),
  };
}

}  // namespace marlin
