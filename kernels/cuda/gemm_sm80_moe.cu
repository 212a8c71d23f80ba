// gemm_sm80_moe.cu: grouped products (grouped.h) with the main loop of gemm_sm80.cuh, for every GPU.
#include "gemm_sm80.cuh"
#include "grouped.cuh"
#include "moe.h"

namespace marlin {
namespace {

// As Sm80Cursor.
template <typename S>
struct GroupedCursor {
  GroupedTile<S> at;
  int n;
  __device__ __forceinline__ GroupedCursor(const GroupedArguments& p, int tile) : at(p, tile), n(at.n), tile_(tile) {}
  __device__ __forceinline__ void next(const GroupedArguments& p) {
    tile_ += p.iterations_per_block == 0 ? gridDim.x : 1;
    at = GroupedTile<S>(p, tile_);
    n = at.n;
  }
  __device__ __forceinline__ int64_t row(const GroupedArguments&) const { return at.row; }
  __device__ __forceinline__ int rows(const GroupedArguments& p) const { return at.rows(p); }
  __device__ __forceinline__ int first_tile_row(const GroupedArguments& p) const { return at.first_tile_row(p); }
  __device__ __forceinline__ int64_t first_group(const GroupedArguments& p) const { return at.first_group(p); }

 private:
  int tile_;
};

template <typename T, typename S>
__global__ void __launch_bounds__(S::kThreads, 1) grouped_sm80_kernel(const __grid_constant__ GroupedArguments given) {
  wait_for_kernel_before();
  let_next_kernel_begin();
  const GroupedArguments p = lay_out(given);  // `early` is false
  if (p.tiles == 0) return;
  gemm_sm80<T, S, GroupedCursor<S>>(p);
}

template <int MB, int WM, int WN, int WK, int KT, int BITS, bool SCALED>
Instance grouped_sm80_instance(int id, const char* name) {
  using S = Sm80Shape<MB, WM, WN, WK, KT, BITS, true, SCALED>;
  Instance i = {};
  i.id = id;
  i.name = name;
  i.loop = MainLoop::kSm80;
  i.invariant = S::WK == 2;
  i.kernels[0] = reinterpret_cast<const void*>(&grouped_sm80_kernel<__half, S>);
  i.kernels[1] = reinterpret_cast<const void*>(&grouped_sm80_kernel<__nv_bfloat16, S>);
  if constexpr (SCALED) {
    using Mixed = Sm80Shape<MB, WM, WN, WK, KT, BITS, true, true, true>;
    i.kernels[2] = reinterpret_cast<const void*>(&grouped_sm80_kernel<__half, Mixed>);
    i.kernels[3] = reinterpret_cast<const void*>(&grouped_sm80_kernel<__nv_bfloat16, Mixed>);
  }
  i.bits = BITS;
  i.group_size = 0;
  i.zero_points = kEither;
  i.rounds_weights = SCALED;
  i.threads = S::kThreads;
  i.blocks_per_sm = 1;
  i.block_m = S::kBlockM;
  i.block_n = S::kBlockN;
  i.block_k = S::kBlockK;
  i.stage_bytes = S::kStageBytes;
  i.extra_bytes = S::kExtraBytes;
  i.max_stages = S::kMaxStages;
  i.stage_multiple = 1;
  i.min_stages = S::kMinStages;
  i.warps_m = S::WM;
  return i;
}

}  // namespace

std::vector<Instance> moe_sm80_instances() {
  return {
      grouped_sm80_instance<2, 1, 4, 2, 4, 4, false>(1001, "moe80_m16n256_b4"),
      grouped_sm80_instance<4, 2, 4, 1, 4, 4, true>(1002, "moe80_m64n256_b4"),
      grouped_sm80_instance<2, 1, 4, 2, 4, 8, false>(1011, "moe80_m16n256_b8"),
      grouped_sm80_instance<4, 2, 4, 1, 4, 8, true>(1012, "moe80_m64n256_b8"),
  };
}

}  // namespace marlin
