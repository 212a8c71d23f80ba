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

#include "dequant.cuh"
#include "gemm_sm90_wide_epilogue.cuh"
#include "gemm_sm90_wide_scheduler.cuh"
#include "gemm_sm90_wide_shape.cuh"
#include "ptx_sm90.cuh"

namespace marlin {

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
