// gemm_sm90_wide_b8_zeros.cu: the instances of gemm_sm90_wide.cuh for 8 bits with zero points, in groups of any size.
#include "gemm_sm90_wide_instance.cuh"

namespace marlin {

std::vector<Instance> sm90_wide_b8_zeros_instances() { return {MARLIN_SM90_WIDE(330, "b8_ganyz", 8, true)}; }

}  // namespace marlin
