// gemm_sm90_wide_shape.cuh: sizes of an output tile of gemm_sm90_wide.cuh, of a stage, and where all stands in shared
// memory.
#pragma once

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

#endif  // sm_90a

}  // namespace marlin
