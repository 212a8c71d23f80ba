// gemm_sm90_wide_b8.cu: the instances of gemm_sm90_wide.cuh for 8 bits, in groups of any size.
#include "gemm_sm90_wide_instance.cuh"

namespace marlin {

std::vector<Instance> sm90_wide_b8_instances() { return {MARLIN_SM90_WIDE(320, "b8_gany", 8, false)}; }

}  // namespace marlin
