// gemm_sm90_wide_b4.cu: the instances of gemm_sm90_wide.cuh for 4 bits, in groups of any size.
#include "gemm_sm90_wide_instance.cuh"

namespace marlin {

std::vector<Instance> sm90_wide_b4_instances() {
  return {MARLIN_SM90_WIDE(300, "b4", 4, false), wide_instance<20, 1, 4, false>(301, "sm90_wide_m160n128_b4"),
          wide_instance<24, 1, 4, false>(302, "sm90_wide_m192n128_b4")};
}

}  // namespace marlin
