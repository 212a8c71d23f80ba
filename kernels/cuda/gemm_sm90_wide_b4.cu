// gemm_sm90_wide_b4.cu: the instances of gemm_sm90_wide.cuh for 4 bits, in groups of any size.
#include "gemm_sm90_wide_instance.cuh"

namespace marlin {

std::vector<Instance> sm90_wide_b4_instances() { return {MARLIN_SM90_WIDE(300, "b4_gany", 4, false)}; }

}  // namespace marlin
