// gemm_sm90_moe_wide.cu: grouped products with many rows of each expert.
#include "gemm_sm90_moe_instance.cuh"

namespace marlin {

std::vector<Instance> moe_sm90_wide_instances() {
  return {
      MARLIN_GROUPED_WIDE(1300, "b4", 4, false),
      MARLIN_GROUPED_WIDE(1310, "b4_z", 4, true),
      MARLIN_GROUPED_WIDE(1320, "b8", 8, false),
      MARLIN_GROUPED_WIDE(1330, "b8_z", 8, true),
  };
}

}  // namespace marlin
