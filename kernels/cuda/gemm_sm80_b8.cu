// gemm_sm80_b8.cu: the instances of gemm_sm80.cuh for 8 bits without zero points.
#include "gemm_sm80_instance.cuh"

namespace marlin {
namespace {

template <int MB, int WM, int WN, int WK, int KT, int BLOCKS = 1>
Instance of_8_bits(int id, const char* name) {
  return sm80_instance<MB, WM, WN, WK, KT, 8, true, true, BLOCKS, kNever>(id, name);
}

}  // namespace

std::vector<Instance> sm80_b8_instances() {
  return {
      of_8_bits<2, 1, 2, 2, 4, 3>(43, "sm80_m16n128_b8_gany"), of_8_bits<4, 1, 2, 2, 4, 2>(45, "sm80_m32n128_b8_gany"),
      of_8_bits<8, 1, 2, 2, 4, 2>(48, "sm80_m64n128_b8_gany"), of_8_bits<8, 1, 4, 2, 2>(50, "sm80_m64n256k64_b8_gany"),
      of_8_bits<8, 2, 4, 1, 4>(53, "sm80_m128n256_b8_gany"),
  };
}

}  // namespace marlin
