// gemm_sm90_wide_scheduler.cuh: which output tiles and steps of gemm_sm90_wide.cuh a block does.
#pragma once

#include "gemm_sm90_wide.h"

namespace marlin {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Groups of `raster` tiles along M; in a group M first, then N: what runs at the same time shares activations and
// weights in L2. What says nothing here is for products that have more than one matrix of weights (grouped.cuh).
struct WidePlace {
  int m, n;
  template <typename S>
  __device__ __forceinline__ int row() const {
    return m * S::kBlockM;
  }
  __device__ __forceinline__ int end_row(const WideArguments& p) const { return p.M; }
  __device__ __forceinline__ int first_tile_row(const WideArguments&) const { return 0; }  // of 16 rows of K, in B
  __device__ __forceinline__ int first_group(const WideArguments&) const { return 0; }
  __device__ __forceinline__ const uint16_t* scales(const WideArguments& p) const { return p.s; }
  __device__ __forceinline__ const void* bias(const WideArguments& p) const { return p.bias; }

  template <typename S>
  __device__ __forceinline__ static WidePlace of(const WideArguments& p, const WideParts& work);
  __device__ __forceinline__ WidePlace(const WideArguments& p, int tile) {
    const int group = p.by_group.quotient(tile), first = group * p.raster;
    const int rest = tile - group * p.by_group.divisor;
    const Divisor& by_height = first + p.raster <= p.tiles_m ? p.by_raster : p.by_last_height;
    n = by_height.quotient(rest);
    m = first + rest - n * by_height.divisor;
  }
};

// The first of the steps of range `r`, counted over all split tiles.
__device__ __forceinline__ int range_start(const WideArguments& p, int r) {
  return p.by_ranges.quotient(r * p.by_split_steps.divisor);
}
// The range that has step `at`, likewise counted.
__device__ __forceinline__ int range_of(const WideArguments& p, int at) {
  return p.by_split_steps.quotient((at + 1) * p.ranges - 1);
}

// The parts of a block: whole output tiles, then what of split ones is in its range.
struct WideParts {
  int tile, begin, count;  // of the current part: its steps are begin .. begin + count - 1
  int at, end;             // what remains of the range

  __device__ __forceinline__ explicit WideParts(const WideArguments& p) : tile(0), begin(0), count(0), at(0), end(0) {
    next_whole_ = blockIdx.x;
    if (static_cast<int>(blockIdx.x) < p.ranges) {
      at = range_start(p, blockIdx.x);
      end = range_start(p, blockIdx.x + 1);
    }
  }
  __device__ __forceinline__ int parts(const WideArguments& p) const {
    int n = p.whole_rounds + (static_cast<int>(blockIdx.x) < p.whole_rest);
    if (end > at) n += p.by_steps.quotient(end - 1) - p.by_steps.quotient(at) + 1;
    return n;
  }
  __device__ __forceinline__ void next(const WideArguments& p) {
    if (next_whole_ < p.whole_tiles) {
      tile = next_whole_;
      begin = 0;
      count = p.steps;
      next_whole_ += gridDim.x;
    } else {
      const int split = p.by_steps.quotient(at);
      tile = p.whole_tiles + split;
      begin = at - split * p.steps;
      count = min(p.steps - begin, end - at);
      at += count;
    }
  }

 private:
  int next_whole_;
};

template <typename S>
__device__ __forceinline__ WidePlace WidePlace::of(const WideArguments& p, const WideParts& work) {
  return WidePlace(p, work.tile);
}

#endif  // sm_90a

}  // namespace marlin
