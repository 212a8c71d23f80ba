// gemm_sm90_wide.cuh: the product for many rows on compute capability 9.0.
//
// gemm_sm90.cuh multiplies exact integer codes and scales the sums of each group in fp32. That takes two sets of sums,
// and every group waits for its last wgmma. With few rows memory is the limit and this is free; with many the tensor
// cores are, and it costs a fifth of them. Here instead:
//
//   * Weights are decoded *and scaled* in registers: (code - zero) * scale, rounded once to the type of the
//     activations, bit for bit what marlin_cuda_dequantize writes. So there is one set of fp32 sums, which nothing
//     touches before the end of an output tile, and a tile can be twice as large: 256 x 128 or 128 x 256.
//   * Two fragments of 16 rows of K are under way: while the tensor cores work on one, the next is decoded. What is
//     decoded was loaded from shared memory a step before. Nothing waits for the last wgmma before the end of the tile.
//   * The size of a group is a number at run time: a stage has the 1, 2 or 4 rows of scales that its 64 rows of K
//     meet, and each 16 of them read theirs. With one group for all of K the operands are the exact integers (their
//     scales are ones, in shared memory) and the scales enter at the end of the tile, in fp32.
//
// Warp specialization: two or three consumer warpgroups, side by side along N, each 64 J columns by all rows of the tile; and
// three producer warps, one lane each: one copies activations, one weights, one scales and zero points. A single lane
// that does all three is too slow for the smallest tile (its copies take longer than 512 cycles of a step's wgmmas).
//
//     producers:  wait vacant[i] -- fill stage i with TMA --> full[i]
//     consumers:  wait full[i] -- 4 times: decode, wgmma --> vacant[i - 1]
//
// A stage is given back one step late, when the wait for older wgmmas shows that all of its own are done.
//
// K split. Blocks are persistent: block b takes the output tiles b, b + blocks, ... of those that are done whole, and
// then its range of the steps of all others (stream-K), which are cut into equal ranges. An output tile that several
// blocks share is exchanged in fragment order, straight from registers, through the workspace (reduce_shared_tile).
#pragma once

#include <type_traits>

#include "dequant.cuh"
#include "gemm_sm90_wide.h"
#include "ptx_sm90.cuh"

namespace marlin {

template <int MB_, int J_, int WN_, int BITS_, bool ZEROS_, bool MIXED_>
struct WideShape {
  static constexpr int MB = MB_;  // 8-row blocks of an output tile: the N of wgmma is 8 MB
  static constexpr int J = J_;    // sub-tiles of 16 columns of each warp: 1 or 2
  static constexpr int WN = WN_;  // consumer warpgroups, side by side along N: 2 or 3
  static constexpr int BITS = BITS_;
  static constexpr bool kZeros = ZEROS_;  // zero points are stored
  static constexpr bool kMixed = MIXED_;  // scales are not of the activations' type, one is fp16 and the other bf16
  static constexpr int kConsumers = 128 * WN, kThreads = kConsumers + 128;
  // Registers by warpgroup: at the start 168 each, what 65536 allow 384 threads, or 128 with 512; 40 + 2 * 232 = 3 * 168
  // and 56 + 3 * 152 = 4 * 128.
  static constexpr int kProducerRegisters = WN == 2 ? 40 : 56, kConsumerRegisters = WN == 2 ? 232 : 152;
  static_assert(WN == 2 || (WN == 3 && MB * J <= 16), "more sums do not fit");
  static constexpr int kBlockM = 8 * MB, kBlockN = 64 * J * WN, kBlockK = kWideStep;
  static constexpr int KT = kBlockK / MARLIN_TILE_K;
  static constexpr int kDepth =
      2;  // fragments along K: one is multiplied while the next is decoded. Four are no faster

  // A stage in shared memory, in bytes; swizzled boxes start at multiples of 1024.
  static constexpr int kActivationBytes = kBlockM * 128;  // [kBlockM][64] 16-bit activations
  static constexpr int kTileBytes = BITS * 128;
  static constexpr int kTileRowBytes = kBlockN / MARLIN_TILE_N * kTileBytes;
  static constexpr int kWeightBytes = KT * kTileRowBytes;  // [KT][kBlockN / 64] tiles
  static constexpr int kScaleBytes = kBlockN * 2;          // of a group
  static constexpr int kZeroBytes = ZEROS_ ? kBlockN * BITS / 8 : 0;
  static constexpr int kMostGroups = KT;  // in a step
  static constexpr int kStageBytes =
      (kActivationBytes + kWeightBytes + kMostGroups * (kScaleBytes + kZeroBytes) + 1023) / 1024 * 1024;
  static constexpr int kMaxStages = 12;
  static constexpr int kLineBytes = BITS == 4 ? 512 : 128;  // of the lines that weights are copied as (weight_offset)
  static constexpr int kLineColumns = kLineBytes * MARLIN_TILE_N / kTileBytes;

  // The end of an output tile goes in four slices of 8-row blocks; a slice is also what one of the sharers of a split
  // tile adds up. A pair of blocks at a time where a warp has one sub-tile, so that stmatrix moves four matrices.
  static constexpr int kSlices = kWideSlices;
  static constexpr int kSliceBlocks = J == 1 ? (MB + 7) / 8 * 2 : (MB + 3) / 4;
  static constexpr int kSliceRows = 8 * kSliceBlocks;
  static constexpr int kQuads = J * kSliceBlocks;  // float4s of a slice in a thread
  static constexpr int kOutPitch = 128 * J;        // bytes of a row of a warpgroup's outputs
  static constexpr int kSliceBytes = kSliceRows * kOutPitch;
  static constexpr int kOutBytes = WN * 2 * kSliceBytes;  // two slices in turn for each warpgroup
  static constexpr int kBarrierBytes = 2 * 8 * kMaxStages;
  static constexpr int kFoundBytes = WN * 4 * 4;  // see reduce_shared_tile
  static constexpr int kExtraBytes = 1024 + kOutBytes + kScaleBytes + kBarrierBytes + kFoundBytes;
  static constexpr int kPartialFloats = kSlices * kSliceRows * kBlockN;  // of one block's share of an output tile

  static_assert(kOutBytes <= 32 * 1024 && kPartialFloats <= kWidePartialFloats, "");
  static_assert(MB <= kSlices * kSliceBlocks && MB <= 32 && (J == 2 || MB % 2 == 0), "");
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// ---- Operands ----

// The fragment of a sub-tile, scaled. `q`: the lane's word (8 bits: two); `scales`: those of its columns g and g + 8;
// `zeros`: the zero points of these, at bits 0 and 16. Decoded integers are exact, and a product is rounded once.
template <typename T, typename S>
__device__ __forceinline__ void scaled_fragment(const uint32_t* q, uint32_t scales, uint32_t zeros, uint32_t (&a)[4]) {
  using Decode = Decoder<ScaledFrom<T, S::kMixed>, S::BITS>;
  if constexpr (S::kZeros) {
    Decode::word(q, Decode::zeros(zeros), a);
  } else if constexpr (S::BITS == 8) {
    Decode::word(q, Decode::zeros(0x10001 << (S::BITS - 1)), a);
  } else {
    Decode::word(q, a);
  }
  scale_fragment<T, S::kMixed>(a, scales);
}

// ---- Which output tiles and steps ----

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

// ---- Shared memory ----

template <typename S>
struct WideMemory {
  uint32_t ring, out, ones, full, vacant, found;  // shared-memory addresses
  __device__ __forceinline__ WideMemory(const unsigned char* shared, int stages) {
    ring = (shared_address(shared) + 1023) / 1024 * 1024;
    out = ring + stages * S::kStageBytes;
    ones = out + S::kOutBytes;
    full = ones + S::kScaleBytes;
    vacant = full + 8 * S::kMaxStages;
    found = vacant + 8 * S::kMaxStages;
  }
};

// ---- Producers ----

// With `early`, a kernel began without waiting, and waits here, before it reads activations or writes anything.
__device__ __forceinline__ void wait_for_activations(const WideArguments& p) {
  if (p.early) wait_for_kernel_before();
}

// One producer lane: calls copy(stage, full, place, step) for every step of the block, as far ahead as the ring
// is long. `copy` tells the barrier how many bytes will land, and starts their copies.
template <typename S, typename P, typename Copy>
__device__ __forceinline__ void produce(const P& p, typename P::Parts work, const WideMemory<S>& memory, Copy copy) {
  int slot = 0;
  uint32_t parity = 1;  // the first pass over the ring waits for nothing
  const int parts = work.parts(p);
#pragma unroll 1
  for (int part = 0; part < parts; part++) {
    work.next(p);
    const auto place = P::Place::template of<S>(p, work);
    const int last = work.begin + work.count;
#pragma unroll 1
    for (int step = work.begin; step < last; step++) {
      mbarrier_wait(memory.vacant + 8 * slot, parity);
      copy(memory.ring + slot * S::kStageBytes, memory.full + 8 * slot, place, step);
      if (++slot == p.stages) {
        slot = 0;
        parity ^= 1;
      }
    }
  }
}

template <typename S, typename P>
__device__ __forceinline__ void produce_activations(const P& p, const typename P::Parts& work,
                                                    const WideMemory<S>& memory, const CUtensorMap* map) {
  wait_for_activations(p);
  produce<S>(p, work, memory, [&](uint32_t stage, uint32_t full, const auto& place, int step) {
    mbarrier_expect(full, S::kActivationBytes);
    copy_box(stage, map, step * S::kBlockK, place.template row<S>(), full);
  });
}

template <typename S, typename P>
__device__ __forceinline__ void produce_weights(const P& p, const typename P::Parts& work, const WideMemory<S>& memory,
                                                const CUtensorMap* map) {
  const uint64_t policy = p.weights_once ? kEvictFirst : kEvictNormal;
  produce<S>(p, work, memory, [&](uint32_t stage, uint32_t full, const auto& place, int step) {
    mbarrier_expect(full, S::kWeightBytes);
    copy_weights(stage + S::kActivationBytes, map, place.n * S::kBlockN / S::kLineColumns,
                 place.first_tile_row(p) + step * S::KT, full, policy);
  });
}

// Scales and zero points of all groups of a step: boxes too, since the copies of bytes (cp.async.bulk without a tensor
// map) that would do cost all warps 30 to 110 cycles each.
template <typename S, typename P>
__device__ __forceinline__ void produce_scales(const P& p, const typename P::Parts& work, const WideMemory<S>& memory,
                                               const CUtensorMap* scales_map, const CUtensorMap* zeros_map) {
  const int groups = p.step_groups;
  const int bytes = groups * S::kScaleBytes + (S::kZeros ? max(groups, 1) * S::kZeroBytes : 0);
  produce<S>(p, work, memory, [&](uint32_t stage, uint32_t full, const auto& place, int step) {
    const uint32_t scales = stage + S::kActivationBytes + S::kWeightBytes;
    const int column0 = place.n * S::kBlockN, group = place.first_group(p) + (step * groups >> p.group_shift);
    mbarrier_expect(full, bytes);
    if (groups > 0) copy_box(scales, scales_map, column0, group, full);
    if constexpr (S::kZeros)
      copy_box(scales + S::kMostGroups * S::kScaleBytes, zeros_map, column0 * S::BITS / 32, group, full);
  });
}

// ---- Consumers ----

// Not to be read or moved before this place: what wgmma writes asynchronously.
template <int J, int MB>
__device__ __forceinline__ void settle(float (&sum)[J][MB][4]) {
#pragma unroll
  for (int j = 0; j < J; j++)
#pragma unroll
    for (int i = 0; i < MB; i++)
#pragma unroll
      for (int c = 0; c < 4; c++) asm volatile("" : "+f"(sum[j][i][c])::"memory");
}

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

template <typename T, typename S, typename P>
__device__ __forceinline__ void consume(const P& p, typename P::Parts work, const WideMemory<S>& memory, int warp) {
  constexpr int MB = S::MB, J = S::J, KT = S::KT, BITS = S::BITS, kDepth = S::kDepth, kWords = J * BITS / 4;
  const int lane = threadIdx.x % 32, wg = warp / 4, g = lane / 4;
  const int first_subtile = warp * J;  // of the J neighbouring sub-tiles that this warp decodes
  const int tile_column = first_subtile / 4, subtile = first_subtile % 4;
  const uint32_t weights_at =
      memory.ring + S::kActivationBytes + tile_column * S::kTileBytes + weight_offset<BITS>(lane, subtile);
  // With one group the scales of every step are the ones.
  const int groups = p.step_groups;
  const uint32_t scales_mask = groups == 0 ? 0 : ~0u;
  const uint32_t scales_at = (groups == 0 ? memory.ones : memory.ring + S::kActivationBytes + S::kWeightBytes) +
                             tile_column * 128 + g * 16 + subtile * 4;
  // The lane's word of zero points for its columns g + 8 i; only those of its sub-tiles count.
  const uint32_t zeros_at = memory.ring + S::kActivationBytes + S::kWeightBytes + S::kMostGroups * S::kScaleBytes +
                            tile_column * (8 * BITS) + g * BITS + (BITS == 8 ? subtile / 2 * 4 : 0);
  const int zero_shift = BITS == 4 ? subtile * 4 : subtile % 2 * 8;

  float sum[J][MB][4];
  // What is decoded next, of a whole step; and the fragments under way.
  uint32_t words[KT][kWords], scales[KT][J], zeros[KT], a[kDepth][J][4];
  const auto load = [&](uint32_t stage, int kt) {
    load_words<kWords>(words[kt], weights_at + stage + kt * S::kTileRowBytes);
    load_words<J>(scales[kt], scales_at + (stage & scales_mask) + kt * groups / KT * S::kScaleBytes);
    if constexpr (S::kZeros) {
      uint32_t packed[1];
      load_words<1>(packed, zeros_at + stage + kt * groups / KT * S::kZeroBytes);
      zeros[kt] = packed[0] >> zero_shift;
    }
  };
  const auto decode = [&](int kt) {
#pragma unroll
    for (int j = 0; j < J; j++) {
      const uint32_t zero = S::kZeros ? zeros_of<BITS>(&zeros[kt], j) : 0;
      scaled_fragment<T, S>(words[kt] + j * (BITS / 4), scales[kt][j], zero, a[kt % kDepth][j]);
    }
  };
  // One lane of each warp gives a stage back.
  const auto release = [&](int which, bool does) { mbarrier_arrive_if(memory.vacant + 8 * which, does && lane == 0); };

  // The current stage: its number, bytes from the first one, the parity that tells it is full, and the lower half of its
  // activations' descriptor. The first wgmma of a step waits for that: nvcc 13.0 would make it from the address of
  // shared memory in every step, 100 cycles, if it could see through the exchange (with lane 0, of the same value).
  int slot = 0;
  uint32_t stage = 0, parity = 0;
  const uint64_t first_operand = operand_descriptor(memory.ring);
  const uint32_t first_operand_low = __shfl_sync(0xffffffff, static_cast<uint32_t>(first_operand), 0);
  const uint32_t operand_high = static_cast<uint32_t>(first_operand >> 32);
  uint32_t operand_low = first_operand_low;

  // A counted loop that nothing follows: with other forms nvcc 13.0 allots this branch 168 registers, in spite of
  // setmaxnreg, and spills.
  const int parts = work.parts(p);
#pragma unroll 1
  for (int part = 0; part < parts; part++) {
    work.next(p);
    const int count = work.count;
    mbarrier_wait(memory.full + 8 * slot, parity);
#pragma unroll
    for (int kt = 0; kt < KT; kt++) load(stage, kt);
    decode(0);
    int before = 0;  // the stage whose last wgmmas may still run
    for (int step = 0; step < count; step++) {
      const uint64_t operand = static_cast<uint64_t>(operand_high) << 32 | operand_low;
      const bool wraps = slot + 1 == p.stages, more = step + 1 < count;
      const int next = wraps ? 0 : slot + 1;
      const uint32_t next_stage = wraps ? 0 : stage + S::kStageBytes, next_parity = parity ^ wraps;
      operand_low = wraps ? first_operand_low : operand_low + S::kStageBytes / 16;
#pragma unroll
      for (int kt = 0; kt < KT; kt++) {
        wgmma_fence();
#pragma unroll
        for (int j = 0; j < J; j++)
          wgmma<T, MB>(sum[j], a[kt % kDepth][j], operand + kt * (MARLIN_TILE_K * 2 / 16), kt > 0 || step > 0);
        wgmma_commit();
        // What was decoded for these wgmmas makes room for the same of the next step: a whole step hides its latency.
        if (more) {
          if (kt == 0) mbarrier_wait(memory.full + 8 * next, next_parity);
          load(next_stage, kt);
        }
        if (kt + 1 < KT || more) {
          wgmma_wait<kDepth - 1>();
          decode((kt + 1) % KT);
        }
        if (kt == kDepth - 2) release(before, step > 0);  // all but the last kDepth - 1 groups of wgmmas are done
      }
      before = slot;
      slot = next;
      stage = next_stage;
      parity = next_parity;
    }
    wgmma_wait<0>();
    release(before, true);
    settle(sum);

    unsigned slices = (1 << S::kSlices) - 1;
    if constexpr (P::kSplits) {
      if (count < p.steps)
        slices =
            reduce_shared_tile<S>(p, sum, work.tile - p.whole_tiles, work.at >= work.end, memory.found, wg, warp % 4);
      if (slices == 0) continue;
    }
    const auto place = P::Place::template of<S>(p, work);
    store_tile<T, S>(p, place, sum, slices, place.n * S::kBlockN + wg * 64 * S::J, memory.out + wg * 2 * S::kSliceBytes,
                     wg, warp % 4);
  }
}

#endif  // sm_90a

template <typename T, typename S, typename P = WideArguments>
__global__ void __launch_bounds__(S::kThreads, 1)
    gemm_sm90_wide_kernel(const __grid_constant__ P p, const __grid_constant__ CUtensorMap activations_map,
                          const __grid_constant__ CUtensorMap weights_map,
                          const __grid_constant__ CUtensorMap scales_map,
                          const __grid_constant__ CUtensorMap zeros_map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(128) unsigned char shared[];
  const int tid = threadIdx.x;
  // The producers, one lane of a warp each, fetch their tensor maps first of all.
  const bool copies_activations = tid == S::kConsumers, copies_weights = tid == S::kConsumers + 32,
             copies_scales = tid == S::kConsumers + 64 && (S::kZeros || p.step_groups > 0);
  if (copies_activations) prefetch_map(&activations_map);
  if (copies_weights) prefetch_map(&weights_map);
  if (copies_scales && p.step_groups > 0) prefetch_map(&scales_map);
  if (copies_scales && S::kZeros) prefetch_map(&zeros_map);
  const WideMemory<S> memory(shared, p.stages);
  if (copies_activations) {
    for (int i = 0; i < p.stages; i++) {
      mbarrier_init(memory.full + 8 * i, S::kZeros || p.step_groups > 0 ? 3 : 2);  // producers
      mbarrier_init(memory.vacant + 8 * i, S::kConsumers / 32);                    // the warps that read a stage
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  if (p.step_groups == 0 && tid < S::kScaleBytes / 4) {
    const uint32_t ones = round_pair(1.0f, 1.0f, T());
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(memory.ones + tid * 4), "r"(ones) : "memory");
  }
  const typename P::Parts work(p);
  __syncthreads();
  let_next_kernel_begin();

  // The exchange (with lane 0, of the same value) tells the compiler that `warp` is the same in all lanes.
  const int warp = __shfl_sync(0xffffffff, tid / 32, 0);
  if (warp >= S::kConsumers / 32) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(S::kProducerRegisters));
    if (copies_activations) produce_activations<S>(p, work, memory, &activations_map);
    if (copies_weights) produce_weights<S>(p, work, memory, &weights_map);
    if (copies_scales) produce_scales<S>(p, work, memory, &scales_map, &zeros_map);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(S::kConsumerRegisters));
    wait_for_activations(p);
    consume<T, S>(p, work, memory, warp);
  }
#endif
}

}  // namespace marlin
