// gemm_sm90_wide_b4_zeros.cu: the instances of gemm_sm90_wide.cuh for 4 bits with zero points, in groups of any size.
#include "gemm_sm90_wide_instance.cuh"

namespace marlin {

std::vector<Instance> sm90_wide_b4_zeros_instances() { return {MARLIN_SM90_WIDE(310, "b4_ganyz", 4, true)}; }

}  // namespace marlin
