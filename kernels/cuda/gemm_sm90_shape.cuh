// gemm_sm90_shape.cuh: sizes of an output tile of gemm_sm90.cuh, of a stage, and where all stands in shared memory.
#pragma once

#include <algorithm>

#include "../marlin.h"
#include "ptx_sm90.cuh"

namespace marlin {

template <int MB_, int J_, int WN_, int WK_, bool EXTENDED = false, int BITS_ = 4, int GROUP_ = 128>
struct Sm90Shape {
  static constexpr bool kExtended = EXTENDED;  // takes zero points, 8 bits and groups below 128
  static constexpr int BITS = BITS_;
  static constexpr int GROUP = GROUP_;  // rows of a group in a step: 16, 32, 64 or 128
  static constexpr int MB = MB_, J = J_, WN = WN_, WK = WK_;
  static constexpr bool kSplitKInWorkspace = false;
  static constexpr int kFixUpItems = 1;
  static constexpr int kConsumers = 128 * WN * WK;   // threads that multiply
  static constexpr int kThreads = kConsumers + 128;  // and a warpgroup of which one thread copies
  // Registers are dealt out by warpgroup: few for the one that copies, the rest for those that multiply.
  // 168 each at the start, what 65536 allow 384 threads; 24 + 2 * 240 = 3 * 168.
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  static_assert(WN * WK == 2, "three warpgroups share the registers");
  static constexpr int kBlockM = 8 * MB;
  static constexpr int kBlockN = MARLIN_TILE_N * J * WN;
  static constexpr int kBlockK = 128;
  static constexpr int KT = kBlockK / MARLIN_TILE_K;

  static constexpr int kGroupTiles = GROUP / MARLIN_TILE_K;  // along K
  static constexpr int kSubgroups = KT / kGroupTiles;        // groups in a step

  // With many rows the tensor cores are the limit and a warp prepares the next step before the last wgmmas of this one
  // end; with few, memory is, and a stage is better given back at once.
  static constexpr bool kAhead = MB >= 8;
  // Whole tiles can be done in parts (GemmArguments::parts): there are many only with many rows, in the largest tiles.
  static constexpr bool kPartsInTurn = WK == 2 && MB == 8;

  // Sets of sums of a group: with two, a group's are scaled while the next group is multiplied. And tiles along K under
  // way at once, each with registers of its own for the decoded words; more than the sets of sums allow are of no use,
  // and with them nvcc 13.0 waits for each wgmma (C7513).
  static constexpr int kParts = kSubgroups > 1 && MB* J <= 8 ? 2 : 1;
  static constexpr int kMostDepth = J == 4 ? (MB < 4 ? 3 : 2) : 4;
  static constexpr int kDepth = std::min(kMostDepth, std::max(2, kParts* kGroupTiles));
  // Tiles under way while a set of sums is read: none, or those of the group that has the other set.
  static constexpr int kBeside = std::min((kParts - 1) * kGroupTiles, kDepth - 1);

  // A lane's words of a tile along K, and how many tiles ahead they are loaded: all of a step's, or as many as the
  // registers beside the sums allow.
  static constexpr int kWords = J * BITS / 4;
  static constexpr int kWordRegisters = MB * J < 16 ? 32 : J == 4 ? 8 : 16;
  static constexpr int kTilesAhead = std::min(KT, kWordRegisters / kWords);

  // A stage in shared memory, in bytes. Swizzled boxes start at multiples of 1024.
  static constexpr int kBoxBytes = kBlockM * 128;  // [kBlockM][64] 16-bit activations
  static constexpr int kActivationBytes = 2 * kBoxBytes;
  static constexpr int kTileBytes = BITS * 128;
  static constexpr int kWeightBytes = KT * kBlockN / MARLIN_TILE_N * kTileBytes;  // [KT][kBlockN / 64] tiles
  static constexpr int kScaleBytes = kBlockN * 2;                                 // of a group
  static constexpr int kZeroBytes = EXTENDED ? kBlockN * BITS / 8 : 0;            // of a group
  static constexpr int kStageBytes =
      (kActivationBytes + kWeightBytes + kSubgroups * (kScaleBytes + kZeroBytes) + 1023) / 1024 * 1024;
  // One copy takes a step's weights: a row of tiles as lines of 512 bytes, a tile of 4 bits each, or with 8 bits as
  // swizzled lines of 128 (see weight_offset).
  static constexpr int kLineBytes = BITS == 4 ? 512 : 128;
  static constexpr int kLineColumns = kLineBytes * MARLIN_TILE_N / kTileBytes;

  // For the end of a tile, as in Sm80Shape.
  static constexpr int kSumPitch = kBlockN + 4;
  // The most 8-row blocks, dividing MB, whose sums take 33 KB.
  static constexpr int round_blocks(int blocks) {
    return WK * 8 * blocks * kSumPitch * 4 <= 33 * 1024 ? blocks : round_blocks(blocks / 2);
  }
  static constexpr int kRoundMB = round_blocks(MB);
  static constexpr int kRoundRows = kRoundMB * 8;
  static constexpr int kSumBytes = WK * kRoundRows * kSumPitch * 4;
  static constexpr int kMaxStages = 12;
  static constexpr int kBarrierBytes = (2 * kMaxStages + 1) * 8;
  // How a cluster adds up its sums: with few each block puts its own where they are added, with more these are fetched.
  static constexpr bool kPushes = MB == 1;
  static_assert(!kPushes || WK * (kBlockM * kBlockN + 4 * 7) * 4 <= kSumBytes,
                "a share for each of up to 8 blocks fits");
  static constexpr int kExtraBytes = kSumBytes + 16 + kBarrierBytes + 1024;  // 1024: to align the first stage
  static_assert(MB % kRoundMB == 0, "rounds are whole");
  static_assert(EXTENDED || (BITS == 4 && GROUP == 128), "8 bits and small groups are extensions");
  static_assert(WK * kBlockM * kSumPitch * 4 <= 2 * WK * kStageBytes, "a cluster's sums fit into the shortest ring");
};

// How the outputs of a tile, in items of four, are shared out to the blocks of a cluster: equal ranges.
struct ClusterShare {
  int items;  // of a block, at most

  __device__ __forceinline__ ClusterShare(int all, int blocks)
      : items((all + blocks - 1) / blocks), multiplier_(0xffffffffu / items + 1) {}
  // Whose an item is. Exact while item * items < 2^32; there are at least two items for each block.
  __device__ __forceinline__ int owner(int item) const { return __umulhi(item, multiplier_); }

 private:
  uint32_t multiplier_;
};

// The block's shared memory: the stages, the sums of a tile, and the barriers.
template <typename S>
struct Ring {
  unsigned char* memory;  // the first stage
  float* sums;
  unsigned* is_last;
  uint32_t stages, full, empty, received;  // shared-memory addresses

  __device__ __forceinline__ Ring(unsigned char* shared, int count) {
    stages = (shared_address(shared) + 1023) / 1024 * 1024;
    memory = shared + (stages - shared_address(shared));
    unsigned char* const after = memory + count * S::kStageBytes;
    sums = reinterpret_cast<float*>(after);
    is_last = reinterpret_cast<unsigned*>(after + S::kSumBytes);
    full = shared_address(after + S::kSumBytes + 16);
    empty = full + 8 * S::kMaxStages;
    received = empty + 8 * S::kMaxStages;
  }
};

}  // namespace marlin
