// gemm_sm90_wide_epilogue.cuh: the end of an output tile of gemm_sm90_wide.cuh: its sharers add up, then it is rounded
// and stored.
#pragma once

#include <type_traits>

#include "gemm_sm90_wide_scheduler.cuh"
#include "gemm_sm90_wide_shape.cuh"
#include "ptx_sm90.cuh"

namespace marlin {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ __forceinline__ unsigned load_acquire(const unsigned* from) {
  unsigned v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(from) : "memory");
  return v;
}
__device__ __forceinline__ void store_partial(float4* to, const float (&v)[4]) {
  asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3])
               : "memory");
}
__device__ __forceinline__ void load_partial(float (&v)[4], const float4* from) {
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
               : "l"(from)
               : "memory");
}

// A consumer warpgroup's share of an output tile that `sharers` blocks split along K, this one the `rank`-th of them;
// adds up the slices that fall to it and returns which these are (a bit each). The warpgroups of a block exchange
// apart, and wait only for themselves.
//
// Each of the four slices has an owner among the sharers. A sharer writes the slices of others to its place in the
// workspace, in fragment order (float4s, a thread's neighbours next to each other), and counts itself at each slice. If
// it has nothing else to do it then waits for the others at the slices it owns, so that all sharers add, round and
// store their part of the tile at the same time. It waits `patience` clocks at most: then, or if it has more work, it
// writes its own slices as well and leaves, and whoever counts last at a slice adds it up. So no block needs another
// one to be running, and the order of addition is that of K whoever adds: equal inputs give equal bits.
//
// A counter has the sharers that wrote in its lower half and kOwnerWrote in its upper; the adder sets it to zero.
template <typename S>
__device__ __forceinline__ unsigned reduce_shared_tile(const WideArguments& p, float (&sum)[S::J][S::MB][4],
                                                       int split_tile, bool may_wait, uint32_t found_at, int wg,
                                                       int warp_of_group) {
  constexpr int MB = S::MB, J = S::J, kQuads = S::kQuads;
  constexpr unsigned kOwnerWrote = 0x10000, kAll = 15;
  const int tid = threadIdx.x % 128, lane = tid % 32, block = blockIdx.x;
  const int leader = range_of(p, split_tile * p.steps);
  const int sharers = range_of(p, (split_tile + 1) * p.steps - 1) - leader + 1, rank = block - leader;
  unsigned owned = 0;
#pragma unroll
  for (int i = 0; i < S::kSlices; i++) owned |= static_cast<unsigned>(i * sharers / S::kSlices == rank) << i;

  const auto meet = [&] { asm volatile("bar.sync %0, 128;" ::"r"(1 + wg) : "memory"); };
  // Of range `r`. It may lead one tile and follow in another.
  const auto place_of = [&](int r) {
    const int64_t place = static_cast<int64_t>(r) * 2 + (r == leader);
    return reinterpret_cast<float4*>(p.partials + place * S::kPartialFloats) + wg * (S::kPartialFloats / 4 / S::WN) +
           tid;
  };
  const auto write = [&](unsigned slices) {
    float4* const to = place_of(block);
#pragma unroll
    for (int i = 0; i < S::kSlices; i++)
      if (slices >> i & 1) {
#pragma unroll
        for (int q = 0; q < kQuads; q++)
          if (i * S::kSliceBlocks + q / J < MB)
            store_partial(to + (i * kQuads + q) * 128, sum[q % J][i * S::kSliceBlocks + q / J]);
      }
    meet();
  };
  // Lanes 0 .. 3 of the first warp look after a slice each; this tells all threads what they found.
  const bool looks = warp_of_group == 0 && lane < S::kSlices;
  const auto tell = [&](bool found, int word) {
    const uint32_t at = found_at + (wg * 4 + word) * 4;
    const unsigned mask = __ballot_sync(0xffffffff, found) & kAll;
    if (warp_of_group == 0 && lane == 0) asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(mask) : "memory");
    meet();
    unsigned told;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(told) : "r"(at) : "memory");
    return told;
  };

  const bool own = owned >> lane % 4 & 1;
  const unsigned others = sharers - 1, all_but_me = own ? others : kOwnerWrote + others - 1;
  unsigned* const counter = p.counters + (split_tile * S::WN + wg) * S::kSlices + lane % 4;
  const unsigned written = may_wait ? kAll & ~owned : kAll;
  write(written);
  bool adds = false;
  if (looks && (written >> lane & 1)) {
    __threadfence();  // the block's sums, then the count
    adds = atomicAdd(counter, own ? kOwnerWrote : 1u) == all_but_me;
  }
  __syncwarp();
  if (looks && own && may_wait) {
    const long long start = clock64();
    do adds = load_acquire(counter) == others;
    while (!adds && clock64() - start < p.patience);
  }
  __syncwarp();
  if (adds) __threadfence();  // the count, then the others' sums
  unsigned mine = tell(adds, 0);
  const unsigned late = owned & ~written & ~mine;
  if (late != 0) {
    write(late);
    bool last = false;
    if (looks && (late >> lane & 1)) {
      __threadfence();
      last = atomicAdd(counter, kOwnerWrote) == others;
      if (last) __threadfence();
    }
    mine |= tell(last, 1);
  }
  if (looks && (mine >> lane & 1)) *counter = 0;  // all have been here

#pragma unroll
  for (int i = 0; i < S::kSlices; i++)
    if (mine >> i & 1) {
      const auto fetch = [&](int r, float (&v)[kQuads][4]) {
        const float4* const from = place_of(leader + r) + i * kQuads * 128;
#pragma unroll
        for (int q = 0; q < kQuads; q++)
          if (i * S::kSliceBlocks + q / J < MB) load_partial(v[q], from + q * 128);
      };
      const auto add_to = [&](float (&to)[4], const float (&v)[4]) {
#pragma unroll
        for (int c = 0; c < 4; c++) to[c] += v[c];
      };
      if (rank > 0) {
        float before[kQuads][4];
        fetch(0, before);
#pragma unroll 1
        for (int r = 1; r < rank; r++) {
          float v[kQuads][4];
          fetch(r, v);
#pragma unroll
          for (int q = 0; q < kQuads; q++)
            if (i * S::kSliceBlocks + q / J < MB) add_to(before[q], v[q]);
        }
#pragma unroll
        for (int q = 0; q < kQuads; q++)
          if (i * S::kSliceBlocks + q / J < MB) add_to(sum[q % J][i * S::kSliceBlocks + q / J], before[q]);
      }
#pragma unroll 1
      for (int r = rank + 1; r < sharers; r++) {
        float v[kQuads][4];
        fetch(r, v);
#pragma unroll
        for (int q = 0; q < kQuads; q++)
          if (i * S::kSliceBlocks + q / J < MB) add_to(sum[q % J][i * S::kSliceBlocks + q / J], v[q]);
      }
    }
  return mine;
}

// Rounds and stores the slices of an output tile that `slices` names, of one warpgroup's 64 J columns. Sums pass through
// shared memory, transposed by stmatrix: 16-byte piece c of a row r stands at c ^ (r % 8).
template <typename T, typename S, typename P>
__device__ __forceinline__ void store_tile(const P& p, const typename P::Place& place,
                                           const float (&sum)[S::J][S::MB][4], unsigned slices, int column0,
                                           uint32_t out, int wg, int warp_of_group) {
  constexpr int MB = S::MB, J = S::J, kPieces = 8 * J;
  const int tid = threadIdx.x % 128, lane = tid % 32, g = lane / 4;
  const auto meet = [&] { asm volatile("bar.sync %0, 128;" ::"r"(1 + wg) : "memory"); };

  const int row0 = place.template row<S>(), end_row = place.end_row(p);
  const uint16_t* const scales = place.scales(p);
  const void* const biases = place.bias(p);
  float scale[J][2], bias[J][2];
#pragma unroll
  for (int j = 0; j < J; j++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int column = column0 + (warp_of_group * J + j) * 16 + h * 8 + g;
      const bool inside = column < p.out_features;
      scale[j][h] = 1.0f;
      bias[j][h] = 0.0f;
      if (p.step_groups == 0 && inside)
        scale[j][h] = scale_to_float(scales[column / 64 * 64 + scale_index(column % 64, true)], p.bf16_scales);
      if (biases != nullptr && inside)
        bias[j][h] =
            scale_to_float(static_cast<const uint16_t*>(biases)[column], std::is_same<T, __nv_bfloat16>::value);
    }
  const auto pair = [&](int j, int b, int h) {
    return round_pair(fmaf(sum[j][b][2 * h], scale[j][h], bias[j][h]),
                      fmaf(sum[j][b][2 * h + 1], scale[j][h], bias[j][h]), T());
  };

  meet();  // the tile before has been read
#pragma unroll
  for (int i = 0; i < S::kSlices; i++) {
    if (!(slices >> i & 1)) continue;
    const uint32_t stage = out + (i % 2) * S::kSliceBytes;
#pragma unroll
    for (int k = 0; k < S::kSliceBlocks; k += 2 / J) {
      const int b = i * S::kSliceBlocks + k;
      if (b >= MB) break;
      // Matrices: both halves of a sub-tile, then of the next sub-tile, or of the next 8-row block.
      const uint32_t v[4] = {pair(0, b, 0), pair(0, b, 1), J == 2 ? pair(J - 1, b, 0) : pair(0, b + 2 - J, 0),
                             J == 2 ? pair(J - 1, b, 1) : pair(0, b + 2 - J, 1)};
      const int row = (k + (J == 2 ? 0 : lane / 16)) * 8 + lane % 8;
      const int piece = warp_of_group * 2 * J + lane / 8 % (2 * J);
      asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                       stage + row * S::kOutPitch + (piece ^ (lane % 8)) * 16),
                   "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
                   : "memory");
    }
    meet();
#pragma unroll
    for (int item = 0; item < S::kSliceRows * kPieces / 128; item++) {
      const int r = item * (128 / kPieces) + tid / kPieces, piece = tid % kPieces;
      const int row = row0 + i * S::kSliceRows + r, column = column0 + piece * 8;
      const uint4 v = load_shared16(stage + r * S::kOutPitch + (piece ^ (r % 8)) * 16);
      if (i * S::kSliceRows + r >= S::kBlockM || row >= end_row || column >= p.out_features) continue;
      T* const to = static_cast<T*>(p.C) + static_cast<int64_t>(row) * p.out_features + column;
      if (p.out_features % 8 == 0) {
        *reinterpret_cast<uint4*>(to) = v;
      } else {  // rows start anywhere, and the last eight may be fewer
        const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int c = 0; c < 8; c++)
          if (column + c < p.out_features)
            reinterpret_cast<uint16_t*>(to)[c] = static_cast<uint16_t>(pairs[c / 2] >> (c % 2 * 16));
      }
    }
  }
}

#endif  // sm_90a

}  // namespace marlin
