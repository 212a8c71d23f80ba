// moe_steps.cuh: what the kernels of the steps have in common (moe_steps.h).
#pragma once

#include "device.h"
#include "epilogue.cuh"
#include "grouped.cuh"
#include "moe_steps.h"

namespace marlin {

constexpr int kStepThreads = 256;

// The position of the expert of choice c, -1 if it is not here.
__device__ __forceinline__ int position_of(const Routing& p, int c) {
  const int64_t id = p.wide_ids ? static_cast<const int64_t*>(p.ids)[c] : static_cast<const int32_t*>(p.ids)[c];
  if (id < 0 || id >= p.experts) return -1;
  const int position = p.position == nullptr ? static_cast<int>(id) : p.position[id];
  return position < p.positions ? position : -1;
}

template <typename Kernel>
const void* of_type(int dtype, Kernel half, Kernel bfloat) {
  return reinterpret_cast<const void*>(dtype == MARLIN_CUDA_BF16 ? bfloat : half);
}

}  // namespace marlin
