// moe.h: a mixture of experts: the steps around its grouped products, and the instances of these.
#pragma once

#include "grouped.h"
#include "instance.h"

namespace marlin {

// Of grouped products, in one translation unit each (gemm_sm80_moe.cu, gemm_sm90_moe_*.cu).
std::vector<Instance> moe_sm80_instances();
std::vector<Instance> moe_sm90_b4_instances();
std::vector<Instance> moe_sm90_b8_instances();
std::vector<Instance> moe_sm90_wide_instances();

}  // namespace marlin
