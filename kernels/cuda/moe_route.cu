// moe_route.cu: choices of experts sorted, and their rows of activations gathered (moe_steps.h).
#include <algorithm>

#include "moe_steps.cuh"

namespace marlin {
namespace {

constexpr int kRouteThreads = 1024;  // of the one block that sorts many choices
constexpr unsigned kAll = 0xffffffff;

// ---- Sorting ----

// In shared memory, all of a block's.
struct RouteMemory {
  int* counts;                   // [warps][positions] choices, of the warp; then what stands before the warp's first
  int *first_row, *first_block;  // [positions + 1]
  int* rows;                     // [kMostFused], where every block sorts
};

__device__ __forceinline__ RouteMemory route_memory(int* shared, int warps, int positions) {
  RouteMemory m;
  m.counts = shared;
  m.first_row = m.counts + warps * positions;
  m.first_block = m.first_row + positions + 1;
  m.rows = m.first_block + positions + 1;
  return m;
}

// A stable counting sort by one block. Each warp takes neighbouring choices, 32 at a time; lanes with the same expert
// find each other, and the lowest counts on for all. `keeps`: rows stay in shared memory. `writes`: results go to memory.
__device__ __forceinline__ void sort_choices(const Routing& p, const RouteMemory& m, bool keeps, bool writes) {
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, threads = blockDim.x, warps = threads / 32;
  const int P = p.positions;
  const int each = (p.choices + 32 * warps - 1) / (32 * warps) * 32, begin = warp * each;
  const int end = min(begin + each, p.choices);
  for (int i = tid; i < warps * P; i += threads) m.counts[i] = 0;
  __syncthreads();
  int* const mine = m.counts + warp * P;
  // Many at a time: a choice and its expert's position come from L2.
  constexpr int kAtOnce = 8;
  int position[kAtOnce];
  const auto load = [&](int at) {
#pragma unroll
    for (int i = 0; i < kAtOnce; i++) {
      const int c = at + 32 * i + lane;
      position[i] = c < end ? position_of(p, c) : -1;
    }
  };
  const bool once = each <= 32 * kAtOnce;  // what is loaded stays
  for (int at = begin; at < end; at += 32 * kAtOnce) {
    load(at);
#pragma unroll
    for (int i = 0; i < kAtOnce; i++)
      if (position[i] >= 0) atomicAdd(mine + position[i], 1);
  }
  __syncthreads();
  for (int i = tid; i < P; i += threads) {
    int sum = 0;
    for (int w = 0; w < warps; w++) {
      const int count = m.counts[w * P + i];
      m.counts[w * P + i] = sum;
      sum += count;
    }
    m.first_row[i + 1] = sum;
  }
  __syncthreads();
  if (warp == 0) {  // running sums: each lane takes neighbouring positions
    const int share = (P + 31) / 32, first = min(lane * share, P), last = min(first + share, P);
    int rows = 0, blocks = 0;
    for (int i = first; i < last; i++) {
      const int count = m.first_row[i + 1];
      rows += count;
      blocks += (count + p.block_m - 1) / p.block_m;
    }
    int rows_before = rows, blocks_before = blocks;  // with this lane's, first
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int r = __shfl_up_sync(kAll, rows_before, d), b = __shfl_up_sync(kAll, blocks_before, d);
      if (lane >= d) rows_before += r, blocks_before += b;
    }
    rows_before -= rows, blocks_before -= blocks;
    if (lane == 0) m.first_row[0] = m.first_block[0] = 0;
    for (int i = first; i < last; i++) {
      const int count = m.first_row[i + 1];
      rows_before += count;
      blocks_before += (count + p.block_m - 1) / p.block_m;
      m.first_row[i + 1] = rows_before;
      m.first_block[i + 1] = blocks_before;
    }
  }
  __syncthreads();
  for (int at = begin; at < end; at += 32 * kAtOnce) {
    if (!once) load(at);
#pragma unroll
    for (int i = 0; i < kAtOnce; i++) {
      if (at + 32 * i >= end) break;
      const int c = at + 32 * i + lane, expert = position[i];
      const unsigned same = __match_any_sync(kAll, expert);
      int row = -1;
      if (expert >= 0) row = m.first_row[expert] + mine[expert] + __popc(same & ((1u << lane) - 1));
      __syncwarp();
      if (expert >= 0 && lane == __ffs(same) - 1) mine[expert] += __popc(same);
      __syncwarp();
      if (c < end) {
        if (writes) p.places[c] = row;
        if (row >= 0) {
          if (keeps) m.rows[row] = c;
          if (writes) p.rows[row] = c;
        }
      }
    }
  }
  if (writes) {
    for (int i = tid; i <= P; i += threads) {
      p.first_row[i] = m.first_row[i];
      p.first_block[i] = m.first_block[i];
    }
    for (int i = warp; i < P; i += warps) {
      const int first = m.first_block[i], last = m.first_block[i + 1];
      for (int b = first + lane; b < last; b += 32)
        *reinterpret_cast<int4*>(p.blocks + b) = make_int4(i, first, m.first_row[i], m.first_row[i + 1]);
    }
  }
  __syncthreads();
}

__global__ void __launch_bounds__(kRouteThreads) route_kernel(const __grid_constant__ Routing p) {
  extern __shared__ int shared[];
  wait_for_kernel_before();
  let_next_kernel_begin();
  sort_choices(p, route_memory(shared, blockDim.x / 32, p.positions), false, true);
}

// ---- Rows of A ----

// Row `row`, the choice `choice` of the expert at `position`, by all threads of the block.
template <typename T>
__device__ __forceinline__ void gather_row(const Gather& g, int top_k, int row, int choice, int position) {
  const T* const from = static_cast<const T*>(g.x) + choice / top_k * g.pitch;
  uint4* const to = reinterpret_cast<uint4*>(static_cast<T*>(g.A) + static_cast<int64_t>(row) * g.K);
  const int32_t* const perm =
      g.perm == nullptr ? nullptr : g.perm + static_cast<int64_t>(position - g.first) * g.in_features;
  const float scale = g.scale == nullptr ? 1.0f : g.scale[choice];
  for (int i = threadIdx.x; i < g.K / 8; i += blockDim.x) {
    union {
      T value[8];
      uint4 bits;
    } v;
    if (g.vectors && perm == nullptr) {
      v.bits = i * 8 < g.in_features ? reinterpret_cast<const uint4*>(from)[i] : make_uint4(0, 0, 0, 0);
    } else {
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const int k = i * 8 + j;
        v.value[j] = k < g.in_features ? from[perm == nullptr ? k : perm[k]] : from_float<T>(0.0f);
      }
    }
    if (g.scale != nullptr) {
#pragma unroll
      for (int j = 0; j < 8; j++) v.value[j] = from_float<T>(to_float(v.value[j]) * scale);
    }
    to[i] = v.bits;
  }
}

// Every block sorts the (few) choices for itself, and the first one writes what it found.
template <typename T>
__global__ void __launch_bounds__(kStepThreads)
    route_and_gather_kernel(const __grid_constant__ Routing p, const __grid_constant__ Gather g) {
  extern __shared__ int shared[];
  wait_for_kernel_before();
  let_next_kernel_begin();
  const RouteMemory m = route_memory(shared, kStepThreads / 32, p.positions);
  sort_choices(p, m, true, blockIdx.x == 0);
  for (int row = blockIdx.x; row < m.first_row[p.positions]; row += gridDim.x) {
    const int choice = m.rows[row];
    gather_row<T>(g, p.top_k, row, choice, g.perm == nullptr ? 0 : position_of(p, choice));
  }
}

template <typename T>
__global__ void __launch_bounds__(kStepThreads)
    gather_kernel(const __grid_constant__ Routing p, const __grid_constant__ Gather g) {
  wait_for_kernel_before();
  let_next_kernel_begin();
  const int begin = __ldcg(p.first_row + g.first), end = __ldcg(p.first_row + g.last);
  if (g.vectors && g.perm == nullptr && g.scale == nullptr) {
    constexpr int kAtOnce = 4;  // rows whose loads are under way together
    for (int row = begin + blockIdx.x * kAtOnce; row < end; row += gridDim.x * kAtOnce) {
      const T* from[kAtOnce];
#pragma unroll
      for (int r = 0; r < kAtOnce; r++)
        from[r] = static_cast<const T*>(g.x) + __ldcg(p.rows + min(row + r, end - 1)) / p.top_k * g.pitch;
      for (int i = threadIdx.x; i < g.K / 8; i += kStepThreads) {
        uint4 v[kAtOnce];
#pragma unroll
        for (int r = 0; r < kAtOnce; r++)
          v[r] = i * 8 < g.in_features ? reinterpret_cast<const uint4*>(from[r])[i] : make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int r = 0; r < kAtOnce; r++)
          if (row + r < end)
            reinterpret_cast<uint4*>(static_cast<T*>(g.A) + static_cast<int64_t>(row + r) * g.K)[i] = v[r];
      }
    }
    return;
  }
  for (int row = begin + blockIdx.x; row < end; row += gridDim.x) {
    const int choice = __ldcg(p.rows + row);
    gather_row<T>(g, p.top_k, row, choice, g.perm == nullptr ? 0 : position_of(p, choice));
  }
}

size_t route_bytes(int warps, int positions, int rows) {
  return (static_cast<size_t>(warps) * positions + 2 * (positions + 1) + rows) * sizeof(int);
}

}  // namespace

int launch_route(const Launcher& launcher, const Routing& routing, const Gather* gather, int dtype) {
  if (gather != nullptr) {
    const int blocks = std::min(routing.choices, launcher.multiprocessors);
    void* parameters[] = {const_cast<Routing*>(&routing), const_cast<Gather*>(gather)};
    const void* kernel = of_type(dtype, &route_and_gather_kernel<__half>, &route_and_gather_kernel<__nv_bfloat16>);
    return launch(launcher, kernel, dim3(blocks), kStepThreads,
                  route_bytes(kStepThreads / 32, routing.positions, kMostFused), parameters);
  }
  // Few warps where there are many experts: the counts of all of them must fit.
  const int threads = routing.positions <= 512 ? kRouteThreads : kRouteThreads / 2;
  const size_t bytes = route_bytes(threads / 32, routing.positions, 0);
  if (bytes > 48 * 1024) {
    MARLIN_RETURN_IF_ERROR(cudaFuncSetAttribute(reinterpret_cast<const void*>(&route_kernel),
                                                cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
  }
  void* parameters[] = {const_cast<Routing*>(&routing)};
  return launch(launcher, reinterpret_cast<const void*>(&route_kernel), dim3(1), threads, bytes, parameters);
}

int launch_gather(const Launcher& launcher, const Routing& routing, const Gather& gather, int dtype) {
  void* parameters[] = {const_cast<Routing*>(&routing), const_cast<Gather*>(&gather)};
  const void* kernel = of_type(dtype, &gather_kernel<__half>, &gather_kernel<__nv_bfloat16>);
  const int blocks = std::min(routing.choices, 8 * launcher.multiprocessors);
  return launch(launcher, kernel, dim3(blocks), kStepThreads, 0, parameters);
}

}  // namespace marlin
