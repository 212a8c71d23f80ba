// gemm_sm90_moe_instance.cuh: grouped products (grouped.h) with the main loops of gemm_sm90.cuh and gemm_sm90_wide.cuh.
// The instances stand in several translation units, gemm_sm90_moe_*.cu, because they take long to compile.
#pragma once

#include "gemm_sm90_instance.cuh"
#include "gemm_sm90_wide_instance.cuh"
#include "grouped.cuh"
#include "moe.h"

namespace marlin {

template <typename T, typename S>
__global__ void __launch_bounds__(S::kThreads, 1)
    grouped_sm90_kernel(const __grid_constant__ GroupedArguments given, const __grid_constant__ CUtensorMap weights_map,
                        const __grid_constant__ CUtensorMap activations_map) {
  extern __shared__ __align__(128) unsigned char shared[];
  const Ring<S> ring(shared, given.stages);
  const int tid = threadIdx.x;
  if (tid == S::kConsumers) {
    prefetch_map(&weights_map);
    prefetch_map(&activations_map);
    for (int i = 0; i < given.stages; i++) {
      mbarrier_init(ring.full + 8 * i, 1);             // the producer, with the bytes to expect
      mbarrier_init(ring.empty + 8 * i, 128 * S::WN);  // the threads that read a stage
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  if (!given.early) wait_for_kernel_before();
  let_next_kernel_begin();
  const GroupedArguments p = lay_out(given);
  if (p.tiles == 0) {
    wait_for_activations(p);
    return;
  }
  const TileScheduler schedule(p);

  // The exchange (with lane 0, of the same value) tells the compiler that `warp` is the same in all lanes.
  const int warp = __shfl_sync(0xffffffff, tid / 32, 0);
  if (warp >= S::kConsumers / 32) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(S::kProducerRegisters));
    if (tid == S::kConsumers) fill_ring<S>(p, schedule, ring, &weights_map, &activations_map);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(S::kConsumerRegisters));
    wait_for_activations(p);
    multiply<T, S>(p, schedule, ring, warp);
  }
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// As WideParts: block b takes the tiles b, b + blocks, ...
struct GroupedWideParts {
  int tile, begin, count;
  int list_begin;

  __device__ __forceinline__ explicit GroupedWideParts(const GroupedWideArguments& p) : begin(0), count(p.steps) {
    if (!p.early) wait_for_kernel_before();
    list_begin = __ldcg(p.list.first_block + p.list.first);
    const int tiles = (__ldcg(p.list.first_block + p.list.last) - list_begin) * p.tiles_n, blocks = gridDim.x;
    parts_ = (tiles - static_cast<int>(blockIdx.x) + blocks - 1) / blocks;
    tile = static_cast<int>(blockIdx.x) - blocks;
  }
  __device__ __forceinline__ int parts(const GroupedWideArguments&) const { return parts_; }
  __device__ __forceinline__ void next(const GroupedWideArguments&) { tile += gridDim.x; }

 private:
  int parts_;
};

struct GroupedWidePlace {
  int n, row_, end, expert;
  template <typename S>
  __device__ __forceinline__ static GroupedWidePlace of(const GroupedWideArguments& p, const GroupedWideParts& work) {
    const GroupedPlace<S::kBlockM> at(p.list, p.tiles_n, work.list_begin, work.tile);
    return {at.n, at.row, at.end, at.expert};
  }
  template <typename S>
  __device__ __forceinline__ int row() const {
    return row_;
  }
  __device__ __forceinline__ int end_row(const GroupedWideArguments&) const { return end; }
  __device__ __forceinline__ int first_tile_row(const GroupedWideArguments& p) const { return expert * p.tile_rows; }
  __device__ __forceinline__ int first_group(const GroupedWideArguments& p) const { return expert * p.groups; }
  __device__ __forceinline__ const uint16_t* scales(const GroupedWideArguments& p) const {
    return p.s + static_cast<int64_t>(expert) * p.groups * p.N;
  }
  __device__ __forceinline__ const void* bias(const GroupedWideArguments& p) const {
    return p.bias == nullptr ? nullptr
                             : static_cast<const uint16_t*>(p.bias) + static_cast<int64_t>(expert) * p.out_features;
  }
};

#endif  // sm_90a

template <typename S>
Instance grouped_instance(int id, const char* name) {
  Instance i = instance_of_shape<S>(id, name);
  i.kernels[0] = reinterpret_cast<const void*>(&grouped_sm90_kernel<__half, S>);
  i.kernels[1] = reinterpret_cast<const void*>(&grouped_sm90_kernel<__nv_bfloat16, S>);
  return i;
}

// Few rows of each expert: the weights of BITS and GROUP, numbered from ID.
#define MARLIN_GROUPED(ID, SUFFIX, ...)                                                      \
  grouped_instance<Sm90Shape<1, 2, 1, 2, __VA_ARGS__>>(ID + 0, "moe90_m8n128_" SUFFIX),      \
      grouped_instance<Sm90Shape<2, 2, 1, 2, __VA_ARGS__>>(ID + 1, "moe90_m16n128_" SUFFIX), \
      grouped_instance<Sm90Shape<4, 2, 1, 2, __VA_ARGS__>>(ID + 2, "moe90_m32n128_" SUFFIX), \
      grouped_instance<Sm90Shape<8, 2, 1, 2, __VA_ARGS__>>(ID + 3, "moe90_m64n128_" SUFFIX), \
      grouped_instance<Sm90Shape<8, 2, 2, 1, __VA_ARGS__>>(ID + 4, "moe90_m64n256_" SUFFIX)

// Many.
#define MARLIN_GROUPED_WIDE(ID, SUFFIX, BITS, ZEROS)                                                     \
  wide_instance<16, 1, 2, BITS, ZEROS, GroupedWideArguments>(ID + 0, "moe90_wide_m128n128_" SUFFIX),     \
      wide_instance<16, 2, 2, BITS, ZEROS, GroupedWideArguments>(ID + 1, "moe90_wide_m128n256_" SUFFIX), \
      wide_instance<8, 2, 2, BITS, ZEROS, GroupedWideArguments>(ID + 2, "moe90_wide_m64n256_" SUFFIX)

}  // namespace marlin
