// moe_steps.cu: the steps of a mixture of experts around its two grouped products (moe_steps.h).
#include <algorithm>

#include "device.h"
#include "epilogue.cuh"
#include "grouped.cuh"
#include "moe_steps.h"

namespace marlin {
namespace {

constexpr int kThreads = 256;
constexpr int kRouteThreads = 1024;  // of the one block that sorts many choices
constexpr unsigned kAll = 0xffffffff;

// ---- Sorting ----

// The position of the expert of choice c, -1 if it is not here.
__device__ __forceinline__ int position_of(const Routing& p, int c) {
  const int64_t id = p.wide_ids ? static_cast<const int64_t*>(p.ids)[c] : static_cast<const int32_t*>(p.ids)[c];
  if (id < 0 || id >= p.experts) return -1;
  const int position = p.position == nullptr ? static_cast<int>(id) : p.position[id];
  return position < p.positions ? position : -1;
}

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
__global__ void __launch_bounds__(kThreads)
    route_and_gather_kernel(const __grid_constant__ Routing p, const __grid_constant__ Gather g) {
  extern __shared__ int shared[];
  wait_for_kernel_before();
  let_next_kernel_begin();
  const RouteMemory m = route_memory(shared, kThreads / 32, p.positions);
  sort_choices(p, m, true, blockIdx.x == 0);
  for (int row = blockIdx.x; row < m.first_row[p.positions]; row += gridDim.x) {
    const int choice = m.rows[row];
    gather_row<T>(g, p.top_k, row, choice, g.perm == nullptr ? 0 : position_of(p, choice));
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
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
      for (int i = threadIdx.x; i < g.K / 8; i += kThreads) {
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

// ---- Activation ----

__device__ __forceinline__ float activated(const Activate& a, float gate, float up) {
  if (gate > a.limit) gate = a.limit;  // NaN stays
  float v;
  switch (a.kind) {
    case MARLIN_CUDA_SILU:
      v = __fdividef(gate, 1.0f + __expf(-a.alpha * gate));  // a quotient by infinity is 0
      break;
    case MARLIN_CUDA_GELU:
      v = 0.5f * gate * (1.0f + erff(gate * 0.70710678f));
      break;
    case MARLIN_CUDA_GELU_TANH:
      v = 0.5f * gate * (1.0f + tanhf(0.79788456f * (gate + 0.044715f * gate * gate * gate)));
      break;
    case MARLIN_CUDA_RELU:
      v = fmaxf(gate, 0.0f);
      break;
    default:  // MARLIN_CUDA_RELU_SQUARED
      v = fmaxf(gate, 0.0f);
      v *= v;
  }
  if (a.up == nullptr) return v;
  if (up > a.limit) up = a.limit;
  if (up < -a.limit) up = -a.limit;
  return v * (up + a.beta);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    activate_kernel(const __grid_constant__ Routing p, const __grid_constant__ Activate a) {
  wait_for_kernel_before();
  let_next_kernel_begin();
  const int begin = __ldcg(p.first_row + a.first), end = __ldcg(p.first_row + a.last);
  const int pieces = a.K / 8;
  union Eight {
    T value[8];
    uint4 bits;
  };
  // A thread has eight columns and every so many rows: blocks have several rows where these are short.
  const int together = max(1, kThreads / pieces), mine = threadIdx.x / pieces;
  const int i = blockIdx.y * kThreads + threadIdx.x - (together > 1 ? mine * pieces : 0);
  if (i >= pieces || mine >= together) return;
  const bool inside = i * 8 < a.in_features;
  const int stride = gridDim.x * together;
  const auto at = [&](const void* matrix, int row) { return static_cast<const T*>(matrix) + row * a.pitch; };
  const auto store = [&](int row, const Eight& v) {
    reinterpret_cast<uint4*>(static_cast<T*>(a.H) + static_cast<int64_t>(row) * a.K)[i] = v.bits;
  };
  int row = begin + blockIdx.x * together + (together > 1 ? mine : 0);
  if (a.vectors && a.perm == nullptr) {
    constexpr int kAtOnce = 2;  // rows whose loads are under way together
    for (; row < end; row += kAtOnce * stride) {
      Eight g[kAtOnce], u[kAtOnce];
#pragma unroll
      for (int r = 0; r < kAtOnce; r++) {
        g[r].bits = u[r].bits = make_uint4(0, 0, 0, 0);
        if (!inside || row + r * stride >= end) continue;
        g[r].bits = __ldcg(reinterpret_cast<const uint4*>(at(a.gate, row + r * stride)) + i);
        if (a.up != nullptr) u[r].bits = __ldcg(reinterpret_cast<const uint4*>(at(a.up, row + r * stride)) + i);
      }
#pragma unroll
      for (int r = 0; r < kAtOnce; r++) {
        if (row + r * stride >= end) break;
        Eight v;
#pragma unroll
        for (int j = 0; j < 8; j++)
          v.value[j] = from_float<T>(inside ? activated(a, to_float(g[r].value[j]), to_float(u[r].value[j])) : 0.0f);
        store(row + r * stride, v);
      }
    }
    return;
  }
  for (; row < end; row += stride) {
    const T *const gate = at(a.gate, row), *const up = a.up == nullptr ? gate : at(a.up, row);
    const int32_t* perm = nullptr;
    if (a.perm != nullptr)
      perm = a.perm + static_cast<int64_t>(position_of(p, __ldcg(p.rows + row)) - a.first) * a.in_features;
    Eight v;
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const int k = i * 8 + j;
      float f = 0.0f;
      if (k < a.in_features) {
        const int64_t column = static_cast<int64_t>(perm == nullptr ? k : perm[k]) * a.step;
        f = activated(a, to_float(gate[column]), to_float(up[column]));
      }
      v.value[j] = from_float<T>(f);
    }
    store(row, v);
  }
}

// ---- Sum ----

template <typename T>
__global__ void __launch_bounds__(kThreads)
    sum_kernel(const __grid_constant__ Routing p, const __grid_constant__ Sum s) {
  wait_for_kernel_before();
  let_next_kernel_begin();
  const int pieces = (s.columns + 7) / 8;
  const bool vectors = s.columns % 8 == 0;
  for (int token = blockIdx.x; token < s.tokens; token += gridDim.x) {
    for (int i = blockIdx.y * kThreads + threadIdx.x; i < pieces; i += gridDim.y * kThreads) {
      float sum[8] = {};
      // Some choices at a time, their loads under way together.
      constexpr int kAtOnce = 4;
      for (int first = 0; first < p.top_k; first += kAtOnce) {
        int row[kAtOnce];
        float weight[kAtOnce];
#pragma unroll
        for (int j = 0; j < kAtOnce; j++) {
          const int choice = token * p.top_k + first + j;
          const bool is = first + j < p.top_k;
          row[j] = is ? __ldcg(p.places + choice) : -1;
          weight[j] = s.weights == nullptr || !is ? 1.0f : s.weights[choice];
        }
        union {
          T value[8];
          uint4 bits;
        } v[kAtOnce];
#pragma unroll
        for (int j = 0; j < kAtOnce; j++) {
          const T* const from = static_cast<const T*>(s.Y) + static_cast<int64_t>(row[j]) * s.columns + i * 8;
          if (row[j] < 0) continue;
          if (vectors) {
            v[j].bits = __ldcg(reinterpret_cast<const uint4*>(from));
          } else {
#pragma unroll
            for (int c = 0; c < 8; c++) v[j].value[c] = i * 8 + c < s.columns ? from[c] : from_float<T>(0.0f);
          }
        }
#pragma unroll
        for (int j = 0; j < kAtOnce; j++) {
          if (row[j] < 0) continue;
#pragma unroll
          for (int c = 0; c < 8; c++) sum[c] = fmaf(weight[j], to_float(v[j].value[c]), sum[c]);
        }
      }
      T* const to = static_cast<T*>(s.out) + static_cast<int64_t>(token) * s.columns + i * 8;
      if (vectors) {
        union {
          T value[8];
          uint4 bits;
        } v;
#pragma unroll
        for (int c = 0; c < 8; c++) v.value[c] = from_float<T>(sum[c]);
        *reinterpret_cast<uint4*>(to) = v.bits;
      } else {
#pragma unroll
        for (int c = 0; c < 8; c++)
          if (i * 8 + c < s.columns) to[c] = from_float<T>(sum[c]);
      }
    }
  }
}

size_t route_bytes(int warps, int positions, int rows) {
  return (static_cast<size_t>(warps) * positions + 2 * (positions + 1) + rows) * sizeof(int);
}

template <typename Kernel>
const void* of_type(int dtype, Kernel half, Kernel bfloat) {
  return reinterpret_cast<const void*>(dtype == MARLIN_CUDA_BF16 ? bfloat : half);
}

}  // namespace

int launch(const Launcher& launcher, const void* kernel, dim3 grid, int threads, size_t shared, void** parameters) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = launcher.stream;
  cudaLaunchAttribute attribute = {};
  if (launcher.early) {
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  return cudaLaunchKernelExC(&config, kernel, parameters);
}

namespace {

// Blocks along x for rows, along y for the pieces of a row.
int launch_rows(const Launcher& launcher, const void* kernel, int rows, int pieces, void** parameters) {
  const int most = 8 * launcher.multiprocessors, parts = std::max(1, std::min((pieces + kThreads - 1) / kThreads, 64));
  const dim3 grid(std::min(rows, std::max(1, most / parts)), parts);
  return launch(launcher, kernel, grid, kThreads, 0, parameters);
}

}  // namespace

int launch_route(const Launcher& launcher, const Routing& routing, const Gather* gather, int dtype) {
  if (gather != nullptr) {
    const int blocks = std::min(routing.choices, launcher.multiprocessors);
    void* parameters[] = {const_cast<Routing*>(&routing), const_cast<Gather*>(gather)};
    const void* kernel = of_type(dtype, &route_and_gather_kernel<__half>, &route_and_gather_kernel<__nv_bfloat16>);
    return launch(launcher, kernel, dim3(blocks), kThreads, route_bytes(kThreads / 32, routing.positions, kMostFused),
                  parameters);
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
  return launch(launcher, kernel, dim3(blocks), kThreads, 0, parameters);
}

int launch_activate(const Launcher& launcher, const Routing& routing, const Activate& activate, int dtype) {
  void* parameters[] = {const_cast<Routing*>(&routing), const_cast<Activate*>(&activate)};
  const void* kernel = of_type(dtype, &activate_kernel<__half>, &activate_kernel<__nv_bfloat16>);
  return launch_rows(launcher, kernel, routing.choices, activate.K / 8, parameters);
}

int launch_sum(const Launcher& launcher, const Routing& routing, const Sum& sum, int dtype) {
  void* parameters[] = {const_cast<Routing*>(&routing), const_cast<Sum*>(&sum)};
  const void* kernel = of_type(dtype, &sum_kernel<__half>, &sum_kernel<__nv_bfloat16>);
  return launch_rows(launcher, kernel, sum.tokens, (sum.columns + 7) / 8, parameters);
}

}  // namespace marlin
