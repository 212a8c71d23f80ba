// epilogue.cuh: the end of an output tile: warps along K are added up, blocks that share the tile too, then bias, the
// conversion to 16 bits, and the store.
#pragma once

#include "ptx.cuh"
#include "tile_scheduler.cuh"

namespace marlin {

template <typename T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

// Four neighbouring outputs of a row of C, of which the first is one of its out_features; `bias` [out_features] or null.
template <typename T>
__device__ __forceinline__ void store_outputs(const GemmArguments& p, const T* bias, int row, int column, float4 v) {
  T* const to = static_cast<T*>(p.C) + static_cast<int64_t>(row) * p.out_features + column;
  if (p.out_features % 4 != 0) {  // rows start anywhere, and the last four may be fewer
    const float values[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (column + i >= p.out_features) break;
      to[i] = from_float<T>(bias == nullptr ? values[i] : values[i] + to_float(bias[column + i]));
    }
    return;
  }
  if (bias != nullptr) {
    bias += column;
    v.x += to_float(bias[0]);
    v.y += to_float(bias[1]);
    v.z += to_float(bias[2]);
    v.w += to_float(bias[3]);
  }
  union {
    T value[4];
    uint2 bits;
  } out;
  out.value[0] = from_float<T>(v.x);
  out.value[1] = from_float<T>(v.y);
  out.value[2] = from_float<T>(v.z);
  out.value[3] = from_float<T>(v.w);
  *reinterpret_cast<uint2*>(to) = out.bits;
}

__device__ __forceinline__ float4 operator+(float4 a, float4 b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// The blocks that share an output tile, `first` to `last`, and where their sums stand in the workspace.
struct Sharers {
  int first, last;
  // Of `block`, in tiles: a block shares at most two tiles with others, it is the first block of one and a later block of
  // the other.
  __device__ __forceinline__ int64_t slot(int block) const {
    return static_cast<int64_t>(block) * 2 + (block == first);
  }
};

template <typename S, typename P>
__device__ __forceinline__ Sharers sharers_of(const P& p, int tile) {
  if (S::kSplitKInWorkspace && p.split_k > 0) return {tile * p.split_k, tile * p.split_k + p.split_k - 1};
  return {tile * p.steps / p.iterations_per_block, ((tile + 1) * p.steps - 1) / p.iterations_per_block};
}

// Counts this block, whose sums are written, and says whether it is the last of its tile.
template <typename P, typename Synchronize>
__device__ __forceinline__ bool arrive_last(const P& p, const Sharers& sharers, unsigned* is_last, int tid,
                                            Synchronize synchronize) {
  synchronize();
  if (tid == 0) {
    __threadfence();  // the block's sums, then the count
    const unsigned before = atomicAdd(p.arrived + sharers.first, 1u);
    const bool last = before == static_cast<unsigned>(sharers.last - sharers.first);
    if (last) p.arrived[sharers.first] = 0;
    *is_last = last;
    __threadfence();  // the count, then the other blocks' sums
  }
  synchronize();
  return *is_last != 0;
}

// The end of a tile, for one block: adds up the warps along K, and writes C or, where several blocks share the tile,
// leaves the sums in the workspace and lets the last block of them write C. In rounds, through `sums`
// [WK][kRoundRows][kSumPitch] in shared memory. `write_sums(round, sums)` puts a thread's share there, `synchronize`
// is a barrier for the `S::kConsumers` threads that take part.
template <typename T, typename S, typename P, typename WriteSums, typename Synchronize>
__device__ __forceinline__ void finish_output_tile(const P& p, float* sums, unsigned* is_last, int tile, int step_begin,
                                                   int step_end, int tid, WriteSums write_sums,
                                                   Synchronize synchronize) {
  const typename P::template Tile<S> at(p, tile);
  const int rows = at.rows(p);
  const int columns = min(S::kBlockN, p.out_features - at.column());
  const bool alone = step_begin == 0 && step_end == p.steps;
  const Sharers sharers = alone ? Sharers{} : sharers_of<S>(p, tile);
  constexpr int kTileFloats = S::kBlockM * S::kBlockN;
  auto partial_of = [&](int block) { return p.partials + sharers.slot(block) * kTileFloats; };
  constexpr int kFours = S::kBlockN / 4;

#pragma unroll
  for (int round = 0; round < S::MB / S::kRoundMB; round++) {
    if (round > 0) synchronize();
    write_sums(round, sums);
    synchronize();
    for (int item = tid; item < S::kRoundRows * kFours; item += S::kConsumers) {
      const int r = item / kFours, column = item % kFours * 4;
      // A round takes kRoundMB 8-row blocks of each warp along M, and these have MB in all.
      const int row = r / (S::kRoundMB * 8) * (S::MB * 8) + round * (S::kRoundMB * 8) + r % (S::kRoundMB * 8);
      if (row >= rows || column >= columns) continue;
      float4 v = *reinterpret_cast<const float4*>(sums + r * S::kSumPitch + column);
#pragma unroll
      for (int w = 1; w < S::WK; w++)
        v = v + *reinterpret_cast<const float4*>(sums + (w * S::kRoundRows + r) * S::kSumPitch + column);
      if (alone)
        store_outputs<T>(p, at.template bias<T>(p), at.row + row, at.column() + column, v);
      else
        __stcg(reinterpret_cast<float4*>(partial_of(blockIdx.x) + row * S::kBlockN + column), v);
    }
  }
  if (alone) {
    synchronize();  // the sums are read: the next tile may overwrite them
    return;
  }
  if (!arrive_last(p, sharers, is_last, tid, synchronize)) return;
  // Loads under way together: a load from L2 takes some 600 cycles.
  constexpr int kAtOnce = 8, kItems = S::kFixUpItems;
  for (int first = tid; first < rows * kFours; first += kItems * S::kConsumers) {
    float4 v[kItems];
#pragma unroll
    for (int n = 0; n < kItems; n++) v[n] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    const auto stored = [&](int item) { return item < rows * kFours && item % kFours * 4 < columns; };
    for (int block = sharers.first; block <= sharers.last; block += kAtOnce) {
      float4 w[kItems][kAtOnce];
#pragma unroll
      for (int n = 0; n < kItems; n++)
#pragma unroll
        for (int i = 0; i < kAtOnce; i++)
          if (block + i <= sharers.last && stored(first + n * S::kConsumers))
            w[n][i] = __ldcg(reinterpret_cast<const float4*>(partial_of(block + i)) + first + n * S::kConsumers);
#pragma unroll
      for (int n = 0; n < kItems; n++)
#pragma unroll
        for (int i = 0; i < kAtOnce; i++)
          if (block + i <= sharers.last) v[n] = v[n] + w[n][i];
    }
#pragma unroll
    for (int n = 0; n < kItems; n++) {
      const int item = first + n * S::kConsumers;
      if (stored(item))
        store_outputs<T>(p, at.template bias<T>(p), at.row + item / kFours, at.column() + item % kFours * 4, v[n]);
    }
  }
}

}  // namespace marlin
