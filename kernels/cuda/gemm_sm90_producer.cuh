// gemm_sm90_producer.cuh: the thread of gemm_sm90.cuh that copies weights, scales, zero points and activations.
#pragma once

#include <algorithm>

#include "gemm_sm90_shape.cuh"
#include "ptx_sm90.cuh"
#include "tile_scheduler.cuh"

namespace marlin {

// Where the producer is: a step of an output tile.
template <typename S, typename P>
struct CopyPlace {
  int step, line, tile_row, row;        // of the tile: its first line of weights, row of tiles, row of activations
  int column, scale_bytes, zero_bytes;  // and its columns, of one group
  int64_t group;                        // its first

  __device__ __forceinline__ CopyPlace(const P& p, int iteration) : step(iteration % p.steps) { enter(p, iteration); }
  // To the step of `iteration`, the one after this.
  __device__ __forceinline__ void next(const P& p, int iteration) {
    if (++step < p.steps) return;
    step = 0;
    enter(p, iteration);
  }

 private:
  __device__ __forceinline__ void enter(const P& p, int iteration) {
    const typename P::template Tile<S> at(p, TileScheduler::tile(p, iteration));
    column = at.column();
    line = column / S::kLineColumns;
    tile_row = at.first_tile_row(p);
    row = at.row;
    const int columns = min(S::kBlockN, p.N - column);
    scale_bytes = columns * 2;
    zero_bytes = S::kExtended && p.zeros != nullptr ? columns * S::BITS / 8 : 0;
    group = at.first_group(p);
  }
};

// The producer: one thread fills stage after stage with the block's iterations, as far ahead as the ring is long.
template <typename S, typename P>
__device__ __forceinline__ void fill_ring(const P& p, const TileScheduler& schedule, const Ring<S>& ring,
                                          const CUtensorMap* weights_map, const CUtensorMap* activations_map) {
  using Place = CopyPlace<S, P>;
  const auto copy_activations = [&](const Place& at, uint32_t stage, uint32_t full) {
    copy_box(stage, activations_map, at.step * S::kBlockK, at.row, full);
    copy_box(stage + S::kBoxBytes, activations_map, at.step * S::kBlockK + 64, at.row, full);
  };
  const auto copy_rest = [&](const Place& at, uint32_t stage, uint32_t full) {
    mbarrier_expect(full, S::kActivationBytes + S::kWeightBytes + S::kSubgroups * (at.scale_bytes + at.zero_bytes));
    copy_weights(stage + S::kActivationBytes, weights_map, at.line, at.tile_row + at.step * S::KT, full);
    const uint32_t scales = stage + S::kActivationBytes + S::kWeightBytes;
    const uint32_t zeros = scales + S::kSubgroups * S::kScaleBytes;
#pragma unroll
    for (int i = 0; i < S::kSubgroups; i++) {
      // With one scale for each column there is group 0 alone; beyond K any group will do.
      const int64_t group = at.group + min(at.step * S::kSubgroups + i, p.groups - 1);
      copy_bytes(scales + i * S::kScaleBytes, p.s + group * p.N + at.column, at.scale_bytes, full);
      if (S::kExtended && p.zeros != nullptr)
        copy_bytes(zeros + i * S::kZeroBytes,
                   static_cast<const char*>(p.zeros) + (group * p.N + at.column) * S::BITS / 8, at.zero_bytes, full);
    }
  };
  int slot = 0, iteration = schedule.begin;
  uint32_t parity = 1;  // the first pass over the ring waits for nothing
  if (p.early) {        // in the first pass activations come later
    const int first = min(schedule.end - iteration, p.stages);
    const auto pass = [&](auto copy) {
      Place at(p, iteration);
#pragma unroll 1
      for (int i = 0; i < first; i++) {
        copy(at, ring.stages + i * S::kStageBytes, ring.full + 8 * i);
        at.next(p, iteration + i + 1);
      }
    };
    pass(copy_rest);
    wait_for_activations(p);
    pass(copy_activations);
    iteration += first;
    parity = 0;  // there is a second pass only if the ring was filled
  }
  Place at(p, iteration);
  while (iteration < schedule.end) {
    const uint32_t stage = ring.stages + slot * S::kStageBytes, full = ring.full + 8 * slot;
    mbarrier_wait(ring.empty + 8 * slot, parity);
    copy_rest(at, stage, full);
    copy_activations(at, stage, full);
    at.next(p, ++iteration);
    if (++slot == p.stages) {
      slot = 0;
      parity ^= 1;
    }
  }
}

}  // namespace marlin
