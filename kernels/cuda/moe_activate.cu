// moe_activate.cu: the activation between the two grouped products, and the sum after them (moe_steps.h).
#include <algorithm>

#include "moe_steps.cuh"

namespace marlin {
namespace {

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
__global__ void __launch_bounds__(kStepThreads)
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
  const int together = max(1, kStepThreads / pieces), mine = threadIdx.x / pieces;
  const int i = blockIdx.y * kStepThreads + threadIdx.x - (together > 1 ? mine * pieces : 0);
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
__global__ void __launch_bounds__(kStepThreads)
    sum_kernel(const __grid_constant__ Routing p, const __grid_constant__ Sum s) {
  wait_for_kernel_before();
  let_next_kernel_begin();
  const int pieces = (s.columns + 7) / 8;
  const bool vectors = s.columns % 8 == 0;
  for (int token = blockIdx.x; token < s.tokens; token += gridDim.x) {
    for (int i = blockIdx.y * kStepThreads + threadIdx.x; i < pieces; i += gridDim.y * kStepThreads) {
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

// Blocks along x for rows, along y for the pieces of a row.
int launch_rows(const Launcher& launcher, const void* kernel, int rows, int pieces, void** parameters) {
  const int most = 8 * launcher.multiprocessors,
            parts = std::max(1, std::min((pieces + kStepThreads - 1) / kStepThreads, 64));
  const dim3 grid(std::min(rows, std::max(1, most / parts)), parts);
  return launch(launcher, kernel, grid, kStepThreads, 0, parameters);
}

}  // namespace

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
