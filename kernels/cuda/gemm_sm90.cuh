// gemm_sm90.cuh: the main loop for few rows on Hopper (compute capability 9.0), warp-specialised, with TMA and wgmma.
//
// Work is shared out (tile_scheduler.cuh) and ended (epilogue.cuh) as in gemm_sm80.cuh. What differs is inside a block:
//
//   * wgmma: four warps (a warpgroup) multiply 64 columns of N by 8 MB rows of M by 16 rows of K in one instruction.
//     The left operand is registers: the stored tile, decoded, is exactly that fragment. The right operand,
//     activations, is read from shared memory, so no warp loads fragments of it. The instruction is asynchronous: a
//     warp decodes the next words meanwhile.
//   * Two consumer warpgroups multiply; one thread of a third, the producer, does nothing but copy (TMA): one instruction
//     moves a box of weights, or of activations, swizzled for wgmma and with zeros outside of the matrix.
//   * Barriers in shared memory (mbarrier) tell "this stage is full" and "this stage is empty": warps wait for data and
//     never for each other.
//
//     producer:   wait empty[i] -- fill stage i --> full[i]
//     consumers:  wait full[i] -- 8 times: words, decode, wgmma -- scale and add the group's sum --> empty[i]
//
// Where there are few tiles, the blocks of a cluster share one along K. Each adds up a part of its outputs.
//
// A step is 128 rows of K: one group, and two swizzled boxes of 64. Warpgroups: WN along N, WK along K; those along K
// take turns, one stage each. The words of all eight tiles of a step are loaded together where registers allow, and up
// to four tiles are under way at once.
//
// Extended weights (kExtended): the stage has the scales and zero points of each of the step's groups. The size of a
// group is a parameter of the template, so that a step is one straight line of code; as a condition at run time it made
// a step a third longer, since nothing moves across a branch. A group begins with a wgmma that does not add to its
// sums. Meanwhile the sums of the group before are scaled, which have registers of their own where there are few; where
// they take most registers, the end of each group is waited for.
//
// Which columns a warp decodes. A warp of the warpgroup supplies 16 of wgmma's 64 rows, one sub-tile. With J = 4 warp w
// takes the whole tile w of four neighbouring ones, 16 bytes a lane (8 bits: 32), for four wgmmas (sub-tile j of all
// four tiles each); with J = 1 it takes word w of a single tile for one. Sums take 4 J MB registers, twice; J falls as
// M grows to keep them at 128.
#pragma once

#include "dequant.cuh"
#include "epilogue.cuh"
#include "gemm_sm90_producer.cuh"
#include "gemm_sm90_shape.cuh"
#include "ptx_sm90.cuh"
#include "tile_scheduler.cuh"

namespace marlin {

// The scales of two columns for each of J sub-tiles.
template <int J>
__device__ __forceinline__ void load_scales(float (&scale)[2 * J], uint32_t from, bool bf16) {
  uint32_t pairs[J];
  load_words<J>(pairs, from);
#pragma unroll
  for (int j = 0; j < J; j++) {
    scale[2 * j] = scale_to_float(static_cast<uint16_t>(pairs[j]), bf16);
    scale[2 * j + 1] = scale_to_float(static_cast<uint16_t>(pairs[j] >> 16), bf16);
  }
}

template <int N>
struct Constant {
  static constexpr int value = N;
};

// A consumer warpgroup: multiplies the iterations that are its own, and with the others of the block ends the tiles.
template <typename T, typename S, typename P>
__device__ __forceinline__ void multiply(const P& p, const TileScheduler& schedule, const Ring<S>& ring, int warp) {
  constexpr int MB = S::MB, J = S::J, WN = S::WN, WK = S::WK, KT = S::KT, BITS = S::BITS;
  const int tid = threadIdx.x, lane = tid % 32;
  const int wn = warp / 4 % WN, wk = warp / (4 * WN);
  const int g = lane / 4, t = lane % 4;
  const int first_subtile = (wn * 4 + warp % 4) * J;  // of the J neighbouring sub-tiles that this warp decodes
  const int tile_column = first_subtile / 4, subtile = first_subtile % 4;
  const uint32_t weights_at =
      ring.stages + S::kActivationBytes + tile_column * S::kTileBytes + weight_offset<BITS>(lane, subtile);
  const uint32_t scales_at = ring.stages + S::kActivationBytes + S::kWeightBytes + tile_column * 128;
  // The lane's word of zero points for its columns g + 8 i, or with 8 bits its two; only those of the sub-tiles count.
  const uint32_t zeros_at = ring.stages + S::kActivationBytes + S::kWeightBytes + S::kSubgroups * S::kScaleBytes +
                            tile_column * (8 * BITS) + g * BITS + (BITS == 8 ? subtile / 2 * 4 : 0);

  float sum[J][MB][4];              // outputs: [sub-tile][8-row block][register of the fragment]
  float part[S::kParts][J][MB][4];  // the same, of a group, not yet scaled
  uint32_t zero[J];                 // extended: takes the zero points of the sub-tiles' columns g and g + 8 away
  if constexpr (S::kExtended) {
#pragma unroll
    for (int j = 0; j < J; j++) zero[j] = Decoder<T, BITS>::zeros(0x10001 << (BITS - 1));
  }
  // The warpgroups along K take turns. The number of stages is a multiple of WK, so a slot belongs to one warpgroup,
  // which must be: a parity tells one pass over the ring from the next only, and copies may land out of order, so a
  // warpgroup that met a slot one pass early, before its previous copy landed, would take it for full.
  int slot = wk;
  uint32_t parity = 0;
  int mine = schedule.begin + wk;  // this warpgroup's next iteration

  int iteration = schedule.begin, tile_part = 0;
  if (iteration >= schedule.end && p.split_k == 0) return;
  do {  // once also for a part of a cluster's tile that has no steps
    const int tile = TileScheduler::tile(p, iteration);
    const int step_begin = iteration % p.steps;
    const int step_end = min(S::kPartsInTurn ? TileScheduler::part_begin(p, tile_part + 1, p.parts) : p.steps,
                             step_begin + schedule.end - iteration);
    const int end = iteration + step_end - step_begin;
#pragma unroll
    for (int j = 0; j < J; j++)
#pragma unroll
      for (int i = 0; i < MB; i++)
#pragma unroll
        for (int c = 0; c < 4; c++) sum[j][i][c] = 0.0f;

    uint32_t words[S::kTilesAhead][S::kWords];
    uint32_t a[S::kDepth][J][4];
    const auto load_tile = [&](int from_slot, int kt) {
      load_words<S::kWords>(words[kt % S::kTilesAhead],
                            from_slot * S::kStageBytes + weights_at + kt * (S::kWeightBytes / KT));
    };
    const auto load_zeros = [&](int from_slot, int sub) {
      if constexpr (S::kExtended) {
        if (p.zeros == nullptr) return;  // zero[] stays as it was made
        constexpr int kZeroWords = BITS == 8 && J == 4 ? 2 : 1;
        uint32_t packed[kZeroWords];
        load_words<kZeroWords>(packed, from_slot * S::kStageBytes + zeros_at + sub * S::kZeroBytes);
        if (J < 4) packed[0] >>= BITS == 4 ? subtile * 4 : subtile % 2 * 8;
#pragma unroll
        for (int j = 0; j < J; j++) zero[j] = Decoder<T, BITS>::zeros(zeros_of<BITS>(packed, j));
      }
    };
    const auto decode = [&](int kt) {
      const uint32_t* const from = words[kt % S::kTilesAhead];
#pragma unroll
      for (int j = 0; j < J; j++) {
        if constexpr (S::kExtended)
          Decoder<T, BITS>::word(from + j * (BITS / 4), zero[j], a[kt % S::kDepth][j]);
        else
          Decoder<T, 4>::word(from + j, a[kt % S::kDepth][j]);
      }
    };
    const auto load_stage = [&](int from_slot, uint32_t with_parity) {
      mbarrier_wait(ring.full + 8 * from_slot, with_parity);
      load_zeros(from_slot, 0);
#pragma unroll
      for (int kt = 0; kt < S::kTilesAhead; kt++) load_tile(from_slot, kt);
    };
    float scale[2 * J];  // of the columns g + 8 i of the sub-tiles
    const auto load_group = [&](uint32_t stage, int sub) {
      const uint32_t at = stage + scales_at + sub * S::kScaleBytes;
      if (S::kSubgroups > 1 || p.groups > 1) {
        load_scales<J>(scale, at + g * 16 + subtile * 4, p.bf16_scales);
      } else {
#pragma unroll
        for (int i = 0; i < 2 * J; i++) {
          const int column = subtile * 16 + g + 8 * i;
          unsigned short bits;
          asm volatile("ld.shared.u16 %0, [%1];" : "=h"(bits) : "r"(at + scale_index(column, true) * 2));
          scale[i] = scale_to_float(bits, p.bf16_scales);
        }
      }
    };
    // Waits until a group's sums are there; `younger`: how many tiles' wgmmas may still be under way.
    const auto wait_for_group = [&](int sub, auto younger) {
      wgmma_wait<decltype(younger)::value>();
#pragma unroll
      for (int j = 0; j < J; j++)
#pragma unroll
        for (int i = 0; i < MB; i++)
#pragma unroll
          for (int c = 0; c < 4; c++)
            asm volatile("" : "+f"(part[sub % S::kParts][j][i][c])::"memory");  // not to be read earlier
    };
    const auto add_group = [&](int sub) {
#pragma unroll
      for (int j = 0; j < J; j++)
#pragma unroll
        for (int i = 0; i < MB; i++)
#pragma unroll
          for (int c = 0; c < 4; c++) sum[j][i][c] += scale[2 * j + c / 2] * part[sub % S::kParts][j][i][c];
    };
    bool loaded = false;  // the words of this step, and the first of them decoded, by the step before
    for (; mine < end; mine += WK) {
      if (!S::kAhead || !loaded) {
        load_stage(slot, parity);
        decode(0);
      }
      const uint32_t stage = slot * S::kStageBytes;
      const uint64_t operand = operand_descriptor(ring.stages + stage);
#pragma unroll
      for (int kt = 0; kt < KT; kt++) {
        const int sub = kt / S::kGroupTiles;
        const bool starts = kt % S::kGroupTiles == 0;
        if (kt >= S::kDepth) wgmma_wait<S::kDepth - 1>();  // the wgmmas that read a[kt % kDepth] are done
        if (kt > 0) {
          if (starts) load_zeros(slot, sub);
          decode(kt);
        }
        if (starts && sub >= S::kParts) {  // the set of sums is that of an earlier group
          load_group(stage, sub - S::kParts);
          wait_for_group(sub, Constant<S::kBeside>());
          add_group(sub);
        }
        if (kt + S::kTilesAhead < KT) load_tile(slot, kt + S::kTilesAhead);
        wgmma_fence();
#pragma unroll
        for (int j = 0; j < J; j++)
          wgmma<T, MB>(part[sub % S::kParts][j], a[kt % S::kDepth][j],
                       operand + kt / 4 * (S::kBoxBytes / 16) + kt % 4 * 2, !starts);
        wgmma_commit();
      }
      if (S::kParts > 1) {
        load_group(stage, S::kSubgroups - 2);
        wait_for_group(S::kSubgroups - 2, Constant<S::kBeside>());
        add_group(S::kSubgroups - 2);
      }
      load_group(stage, S::kSubgroups - 1);
      int next_slot = slot + WK;
      uint32_t next_parity = parity;
      if (next_slot >= p.stages) {
        next_slot -= p.stages;
        next_parity ^= 1;
      }
      loaded = mine + WK < end;
      if (S::kAhead && loaded) {  // while the last wgmmas run; their stage is still taken, so there are at least two
        load_stage(next_slot, next_parity);
        wgmma_wait<(KT - 1) % S::kDepth>();  // those that read a[0]
        decode(0);
      }
      wait_for_group(S::kSubgroups - 1, Constant<0>());
      mbarrier_arrive(ring.empty + 8 * slot);
      add_group(S::kSubgroups - 1);
      slot = next_slot;
      parity = next_parity;
    }

    iteration = end;
    if (S::kPartsInTurn && p.parts > 1) {
      // What the parts before add up to waits in the block's workspace, as it lies in registers.
      float4* const kept = reinterpret_cast<float4*>(p.partials) +
                           static_cast<int64_t>(blockIdx.x) * (2 * S::kBlockM * S::kBlockN / 4) + tid;
      static_assert(S::kConsumers * J * MB * 4 <= 2 * S::kBlockM * S::kBlockN, "there is room for all sums");
      const bool last = tile_part + 1 == p.parts;  // which is never empty
#pragma unroll
      for (int j = 0; j < J; j++)
#pragma unroll
        for (int b = 0; b < MB; b++) {
          float4* const at = kept + (j * MB + b) * S::kConsumers;
          float4 v = make_float4(sum[j][b][0], sum[j][b][1], sum[j][b][2], sum[j][b][3]);
          if (tile_part > 0) v = __ldcg(at) + v;
          if (!last) __stcg(at, v);
          sum[j][b][0] = v.x;
          sum[j][b][1] = v.y;
          sum[j][b][2] = v.z;
          sum[j][b][3] = v.w;
        }
      tile_part = last ? 0 : tile_part + 1;
      if (!last) continue;
    }

    const auto synchronize = [] { asm volatile("bar.sync 1, %0;" ::"n"(S::kConsumers) : "memory"); };
    // Puts this thread's sums of the 8-row blocks from `first` to `first + COUNT` into to[WK][8 COUNT][kSumPitch].
    const auto write_sums = [&](int first, auto count, float* to) {
      constexpr int kCount = decltype(count)::value;
#pragma unroll
      for (int j = 0; j < J; j++)
#pragma unroll
        for (int b = 0; b < MB; b++) {
          if (b / kCount * kCount != first) continue;
#pragma unroll
          for (int c = 0; c < 4; c++)
            to[((wk * kCount + b % kCount) * 8 + 2 * t + c % 2) * S::kSumPitch + (first_subtile + j) * 16 + c / 2 * 8 +
               g] = sum[j][b][c];
        }
    };
    if (S::kPushes && p.split_k > 0) {
      // Each block of the cluster adds up an equal share of the outputs. All put their sums of a share straight into the
      // shared memory of its owner, [even and odd steps][rank][share], so that nobody waits before or after.
      const typename P::template Tile<S> at(p, tile);
      const int rows = at.rows(p), columns = min(S::kBlockN, p.out_features - at.column());
      constexpr int kFours = S::kBlockN / 4;
      const ClusterShare share(rows * kFours, p.split_k);
      const int rank = blockIdx.x % p.split_k;
      const uint32_t sums = shared_address(ring.sums);
      // Apart for even and odd steps of the tile, which two warpgroups along K take in turn: so it is for whole tiles.
      const int set = WK == 2 ? wk ^ (step_begin & 1) : 0;
      const uint32_t place = sums + (set * p.split_k + rank) * share.items * 16;
      cluster_wait();
#pragma unroll
      for (int b = 0; b < MB; b++)
#pragma unroll
        for (int c = 0; c < 2; c++) {
          const int row = b * 8 + 2 * t + c;
          if (row >= rows) continue;
#pragma unroll
          for (int j = 0; j < J; j++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
              const int column = (first_subtile + j) * 16 + h * 8 + g, item = row * kFours + column / 4;
              const int owner = share.owner(item);
              push_cluster(shared_of_rank(place + (item - owner * share.items) * 16 + column % 4 * 4, owner),
                           sum[j][b][2 * h + c], shared_of_rank(ring.received, owner));
            }
        }
      const int first = rank * share.items, count = min(share.items, rows * kFours - first);
      if (count > 0) mbarrier_wait_for_cluster(ring.received, 0);
      for (int i = tid; i < count; i += S::kConsumers) {
        const int item = first + i, row = item / kFours, column = item % kFours * 4;
        if (column >= columns) continue;
        float4 v[WK];
#pragma unroll
        for (int w = 0; w < WK; w++) v[w] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
        for (int r = 0; r < p.split_k; r++)
#pragma unroll
          for (int w = 0; w < WK; w++)
            v[w] = v[w] + *reinterpret_cast<const float4*>(ring.sums + ((w * p.split_k + r) * share.items + i) * 4);
#pragma unroll
        for (int w = 1; w < WK; w++) v[0] = v[0] + v[w];
        store_outputs<T>(p, at.template bias<T>(p), at.row + row, at.column() + column, v[0]);
      }
    } else if (p.split_k > 0) {
      // The ring is free: this was the block's only tile. Every block puts its sums there; each adds up its share of
      // the outputs, reading the others' shared memory in ascending K.
      synchronize();
      float* const own = reinterpret_cast<float*>(ring.memory);
      write_sums(0, Constant<MB>(), own);
      cluster_synchronize();
      const typename P::template Tile<S> at(p, tile);
      const int rows = at.rows(p), columns = min(S::kBlockN, p.out_features - at.column());
      constexpr int kFours = S::kBlockN / 4;
      uint32_t odd_parts = 0;  // a bit for each part that begins at an odd step
      for (int rank = 0; rank < p.split_k; rank++)
        odd_parts |= static_cast<uint32_t>(TileScheduler::part_begin(p, rank, p.split_k) & 1) << rank;
      for (int item = blockIdx.x % p.split_k * S::kConsumers + tid; item < rows * kFours;
           item += p.split_k * S::kConsumers) {
        const int row = item / kFours, column = item % kFours * 4;
        if (column >= columns) continue;
        // Apart for even and odd steps of the tile, which two warpgroups along K take in turn: so it is for whole tiles.
        float4 v[WK];
#pragma unroll
        for (int w = 0; w < WK; w++) v[w] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        const uint32_t mine_at = ring.stages + (row * S::kSumPitch + column) * 4;
#pragma unroll 4
        for (int rank = 0; rank < p.split_k; rank++) {
          const uint32_t theirs = shared_of_rank(mine_at, rank);
          const uint32_t swaps = WK == 2 ? odd_parts >> rank & 1 : 0;
#pragma unroll
          for (int w = 0; w < WK; w++)
            v[w] = v[w] + load_cluster(theirs + (w ^ swaps) * (S::kBlockM * S::kSumPitch * 4));
        }
#pragma unroll
        for (int w = 1; w < WK; w++) v[0] = v[0] + v[w];
        store_outputs<T>(p, at.template bias<T>(p), at.row + row, at.column() + column, v[0]);
      }
      cluster_synchronize();  // nobody leaves while its shared memory is read
    } else {
      finish_output_tile<T, S>(
          p, ring.sums, ring.is_last, tile, S::kPartsInTurn && p.parts > 1 ? 0 : step_begin, step_end, tid,
          [&](int round, float* to) { write_sums(round * S::kRoundMB, Constant<S::kRoundMB>(), to); }, synchronize);
    }
  } while (iteration < schedule.end);
}

template <typename T, typename S>
__global__ void __launch_bounds__(S::kThreads, 1)
    gemm_sm90_kernel(const GemmArguments p, const __grid_constant__ CUtensorMap weights_map,
                     const __grid_constant__ CUtensorMap activations_map) {
  extern __shared__ __align__(128) unsigned char shared[];
  const Ring<S> ring(shared, p.stages);
  TileScheduler schedule(p);
  if (p.split_k > 0) schedule.split_tile(p);

  const int tid = threadIdx.x;
  if (tid == S::kConsumers) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&weights_map) : "memory");
    asm volatile("prefetch.tensormap [%0];" ::"l"(&activations_map) : "memory");
    for (int i = 0; i < p.stages; i++) {
      mbarrier_init(ring.full + 8 * i, 1);             // the producer, with the bytes to expect
      mbarrier_init(ring.empty + 8 * i, 128 * S::WN);  // the threads that read a stage
    }
    if (S::kPushes && p.split_k > 0) {
      const OutputTile<S> at(p, TileScheduler::tile(p, schedule.begin));
      const int all = at.rows(p) * (S::kBlockN / 4);
      const ClusterShare share(all, p.split_k);
      const int count = min(share.items, all - static_cast<int>(blockIdx.x) % p.split_k * share.items);
      mbarrier_init(ring.received, 1);
      if (count > 0) mbarrier_expect(ring.received, count * 16 * S::WK * p.split_k);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  let_next_kernel_begin();
  if (S::kPushes && p.split_k > 0) cluster_arrive();

  // The exchange (with lane 0, of the same value) tells the compiler that `warp` is the same in all lanes.
  const int warp = __shfl_sync(0xffffffff, tid / 32, 0);
  if (warp >= S::kConsumers / 32) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(S::kProducerRegisters));
    if (tid == S::kConsumers) fill_ring<S>(p, schedule, ring, &weights_map, &activations_map);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(S::kConsumerRegisters));
    wait_for_activations(p);
    multiply<T, S>(p, schedule, ring, warp);
  }
}

}  // namespace marlin
