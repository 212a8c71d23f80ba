// epilogue_sm80.cuh: the end of an output tile of gemm_sm80.cuh where a thread has many sums: they stay in registers.
// epilogue.cuh has another, through shared memory.
//
// A thread's sums are sum[4][MB][4], as mma.m16n8k16 leaves the transposed product: of sub-tile j and 8-row block i rows
// 2t, 2t + 1 of column g (registers 0 and 1) and of column g + 8 (2 and 3), with g = lane / 4 and t = lane % 4.
#pragma once

#include "epilogue.cuh"
#include "gemm_sm80_shape.cuh"

namespace marlin {

// Adds up the two warps along K: each keeps half of the 8-row blocks, in sum[..][0 .. MB / 2], and hands over the other.
template <typename S>
__device__ __forceinline__ void add_along_k(float (&sum)[4][S::MB][4], float* shared, int wk) {
  constexpr int kHalf = S::MB / 2;
  float4* const to = reinterpret_cast<float4*>(shared) + threadIdx.x;
  const float4* const from = reinterpret_cast<const float4*>(shared) + (threadIdx.x ^ S::kThreads / 2);
#pragma unroll
  for (int i = 0; i < kHalf; i++) {
    if (i > 0) __syncthreads();
#pragma unroll
    for (int j = 0; j < 4; j++) {
      float4 given;
      given.x = wk == 0 ? sum[j][i + kHalf][0] : sum[j][i][0];
      given.y = wk == 0 ? sum[j][i + kHalf][1] : sum[j][i][1];
      given.z = wk == 0 ? sum[j][i + kHalf][2] : sum[j][i][2];
      given.w = wk == 0 ? sum[j][i + kHalf][3] : sum[j][i][3];
      to[j * S::kThreads] = given;
#pragma unroll
      for (int c = 0; c < 4; c++) sum[j][i][c] = wk == 0 ? sum[j][i][c] : sum[j][i + kHalf][c];
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const float4 v = from[j * S::kThreads];
      sum[j][i][0] += v.x;
      sum[j][i][1] += v.y;
      sum[j][i][2] += v.z;
      sum[j][i][3] += v.w;
    }
  }
}

// C = sums + bias of MINE 8-row blocks of a warp, `rows` rows by `columns` columns, at row0 and column0. `shared`: the
// warp's own 8 rows.
template <typename T, typename S, int MINE>
__device__ __forceinline__ void store_tile(const GemmArguments& p, const T* bias, float (&sum)[4][S::MB][4],
                                           unsigned char* shared, int row0, int rows, int column0, int columns) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  if (bias != nullptr) {
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int column = 16 * j + 8 * h + g;
        const float v = column < columns ? to_float(bias[column0 + column]) : 0.0f;
#pragma unroll
        for (int i = 0; i < MINE; i++) sum[j][i][2 * h] += v, sum[j][i][2 * h + 1] += v;
      }
  }
  const bool whole = p.out_features % 8 == 0;
  const int piece = lane % 8;  // of eight columns, of row lane / 8 + 4 half
  T* to = static_cast<T*>(p.C) + static_cast<int64_t>(row0 + lane / 8) * p.out_features + column0 + piece * 8;
#pragma unroll
  for (int i = 0; i < MINE; i++) {
    if (i * 8 >= rows) break;
    if (i > 0) __syncwarp();
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        union {
          T value[2];
          uint32_t bits;
        } pair;
        pair.value[0] = from_float<T>(sum[j][i][2 * h]);
        pair.value[1] = from_float<T>(sum[j][i][2 * h + 1]);
        // Row g, columns 2t and 2t + 1 now.
        *reinterpret_cast<uint32_t*>(shared + g * S::kOutputPitch + (16 * j + 8 * h + 2 * t) * 2) =
            movmatrix(pair.bits);
      }
    __syncwarp();
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const unsigned char* const from = shared + (lane / 8 + 4 * half) * S::kOutputPitch + piece * 16;
      if (i * 8 + half * 4 + lane / 8 < rows) {
        if (whole) {
          if (piece * 8 < columns) *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
        } else {  // rows start anywhere, and the last eight may be fewer
#pragma unroll 1
          for (int n = 0; n < min(8, columns - piece * 8); n++) to[n] = reinterpret_cast<const T*>(from)[n];
        }
      }
      to += 4 * static_cast<int64_t>(p.out_features);
    }
  }
}

// As finish_output_tile.
template <typename T, typename S, typename P>
__device__ __forceinline__ void finish_in_registers(const P& p, float (&sum)[4][S::MB][4], float* shared,
                                                    unsigned* is_last, int tile, int step_begin, int step_end) {
  constexpr int kMine = S::MB / S::WK;  // 8-row blocks of a warp, once those along K are added up
  const int warp = threadIdx.x / 32;
  const int wn = warp % S::WN, wm = warp / S::WN % S::WM, wk = warp / (S::WN * S::WM);
  const typename P::template Tile<S> at(p, tile);
  const int row = wm * (8 * S::MB) + wk * (8 * kMine), column = wn * MARLIN_TILE_N;
  const int rows = at.rows(p) - row, columns = p.out_features - at.column() - column;
  unsigned char* const mine = reinterpret_cast<unsigned char*>(shared) + warp * 8 * S::kOutputPitch;
  if constexpr (S::WK > 1) {
    add_along_k<S>(sum, shared, wk);
    __syncthreads();  // read: other warps write there
  }
  if (step_begin > 0 || step_end < p.steps) {
    const Sharers sharers = sharers_of<S>(p, tile);
    constexpr int kTileFloats = S::kBlockM * S::kBlockN;
    const auto partial_of = [&](int block) {
      return reinterpret_cast<float4*>(p.partials + sharers.slot(block) * kTileFloats) + threadIdx.x;
    };
    // Loads under way together, as many as there are registers for: a load from L2 takes some 600 cycles.
    constexpr int kAtOnce = kMine < 4 ? kMine : S::WK == 1 && S::MB == 8 ? 2 : 4;  // 8-row blocks
    float4* const to = partial_of(blockIdx.x);
#pragma unroll
    for (int i = 0; i < kMine; i++)
#pragma unroll
      for (int j = 0; j < 4; j++)
        if (i / kAtOnce * kAtOnce * 8 < rows)
          __stcg(to + (i * 4 + j) * S::kThreads, make_float4(sum[j][i][0], sum[j][i][1], sum[j][i][2], sum[j][i][3]));
    if (!arrive_last(p, sharers, is_last, threadIdx.x, [] { __syncthreads(); })) return;
#pragma unroll
    for (int i = 0; i < kMine; i++)
#pragma unroll
      for (int j = 0; j < 4; j++)
#pragma unroll
        for (float& x : sum[j][i]) x = 0.0f;
#pragma unroll 1
    for (int block = sharers.first; block <= sharers.last; block++) {
      const float4* const from = partial_of(block);
#pragma unroll
      for (int first = 0; first < kMine; first += kAtOnce) {
        if (first * 8 >= rows) break;
        float4 v[kAtOnce][4];
#pragma unroll
        for (int i = 0; i < kAtOnce; i++)
#pragma unroll
          for (int j = 0; j < 4; j++) v[i][j] = __ldcg(from + ((first + i) * 4 + j) * S::kThreads);
#pragma unroll
        for (int i = 0; i < kAtOnce; i++)
#pragma unroll
          for (int j = 0; j < 4; j++) {
            sum[j][first + i][0] += v[i][j].x;
            sum[j][first + i][1] += v[i][j].y;
            sum[j][first + i][2] += v[i][j].z;
            sum[j][first + i][3] += v[i][j].w;
          }
      }
    }
  }
  store_tile<T, S, kMine>(p, at.template bias<T>(p), sum, mine, at.row + row, rows, at.column() + column, columns);
}

}  // namespace marlin
