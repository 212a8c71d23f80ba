// gemm_sm90_b4.cu: the instances of gemm_sm90.cuh for 4 bits in groups of 128, without and with zero points.
#include "gemm_sm90_instance.cuh"

namespace marlin {

std::vector<Instance> sm90_b4_instances() {
  // Sm90Shape<MB, J, WN, WK>: two consumer warpgroups. Wide tiles read activations less often, narrow ones make more
  // tiles and smaller sums; which is better depends on N (cost_model.h).
  return {
      sm90_instance<Sm90Shape<1, 2, 1, 2>>(100, "sm90_m8n128_b4_g128"),
      sm90_instance<Sm90Shape<1, 4, 1, 2>>(101, "sm90_m8n256_b4_g128"),
      sm90_instance<Sm90Shape<2, 2, 1, 2>>(102, "sm90_m16n128_b4_g128"),
      sm90_instance<Sm90Shape<2, 4, 1, 2>>(103, "sm90_m16n256_b4_g128"),
      sm90_instance<Sm90Shape<4, 2, 1, 2>>(104, "sm90_m32n128_b4_g128"),
      sm90_instance<Sm90Shape<4, 4, 1, 2>>(105, "sm90_m32n256_b4_g128"),
      sm90_instance<Sm90Shape<8, 2, 1, 2>>(106, "sm90_m64n128_b4_g128"),
      sm90_instance<Sm90Shape<8, 2, 2, 1>>(107, "sm90_m64n256_b4_g128"),

      MARLIN_SM90_B4(110, "b4_g128z", 128),
  };
}

}  // namespace marlin
