// gemm_sm80_shape.cuh: the sizes of an instance of gemm_sm80.cuh: output tile, warps, what a pipeline stage holds.
//
// Inside a block: WM x WN x WK warps. A warp's piece of a step is 64 columns of N (one weight tile wide), 8 MB rows of
//   M and 16 KT rows of K. Warps along WK work on different K of the same outputs (K split inside the block) and are
//   added up through shared memory in the epilogue.
//
// One pipeline stage (one step) in shared memory, filled by cp.async, `stages` of them in a ring:
//   weights      [WK * KT][WN] tiles of 512 bytes, as stored
//   activations  [BLOCK_M][BLOCK_K], 16-byte pieces of a row swizzled: piece p of row r stands at p ^ (r % 8), so the
//                eight rows that ldmatrix gathers lie in different banks
//   scales       [WK][SUB][BLOCK_N] fp16 or bf16, the groups of each warp's piece, as stored
//   zero points  [WK][SUB][BLOCK_N bits / 32] words
#pragma once

#include <type_traits>

#include "../marlin.h"

namespace marlin {

// BLOCKS: thread blocks that share an SM. Two of four warps hide each other's barriers and ends of tiles.
template <int MB_, int WM_, int WN_, int WK_, int KT_, int BITS_ = 4, bool EXTENDED = false, bool SCALED = false,
          bool MIXED = false, int BLOCKS = 1, bool ONE_GROUP = false, int ZEROS = EXTENDED>
struct Sm80Shape {
  static constexpr int BITS = BITS_;
  static constexpr bool kZeros = ZEROS != 0;        // takes zero points
  static constexpr bool kAlwaysZeros = ZEROS == 2;  // and nothing else
  static constexpr bool kScaled = SCALED;           // weights are scaled, and rounded, before they are multiplied
  static constexpr bool kMixed = MIXED;             // scaled: scales are not of the activations' type
  static constexpr bool kOneGroup = ONE_GROUP;      // scaled: for G == 1 alone, where scales enter at the end of a tile
  static constexpr bool kAnyGroups = EXTENDED || SCALED;  // else groups of 128, or one
  static constexpr int MB = MB_;                          // 8-row blocks of M in a warp's piece
  static constexpr int WM = WM_, WN = WN_, WK = WK_;
  static constexpr int KT = KT_;  // 16-row tiles of K in a warp's piece
  static constexpr int kBlocks = BLOCKS;
  static constexpr int kThreads = 32 * WM * WN * WK;
  static constexpr int kConsumers = kThreads;  // threads that multiply
  static constexpr bool kSplitKInWorkspace = true;
  static constexpr int kFixUpItems = MB < 8 ? 2 : 1;  // with more, registers spill
  static constexpr int kBlockM = 8 * MB * WM;
  static constexpr int kBlockN = MARLIN_TILE_N * WN;
  static constexpr int kBlockK = MARLIN_TILE_K * KT * WK;

  // Shared memory, in bytes.
  static constexpr int kTileBytes = BITS * 128;
  static constexpr int kWeightBytes = WK * KT * WN * kTileBytes;
  static constexpr int kActivationBytes = kBlockM * kBlockK * 2;
  // How the block's warps learn that a step has been copied (Sm80Ring).
  static constexpr bool kStepByStep = !SCALED || BLOCKS > 1;
  static constexpr int kMinStages = kStepByStep ? 2 : 3;
  static constexpr int kSubgroups = kAnyGroups ? KT : 1;  // at most
  static constexpr int kScaleBytes = WK * kSubgroups * kBlockN * 2;
  static constexpr int kZeroBytes = kZeros ? WK * kSubgroups * kBlockN * BITS / 8 : 0;
  static constexpr int kStageBytes = kWeightBytes + kActivationBytes + kScaleBytes + kZeroBytes;
  // Where a tile's sums are many, the epilogue works in registers (epilogue_sm80.cuh).
  static constexpr bool kInRegisters = SCALED && WK <= 2;
  // Otherwise they pass through shared memory in rounds of at most two 8-row blocks a warp: 33 KB at most.
  static constexpr int kRoundMB = MB < 2 || MB >= 8 ? 1 : 2;
  static constexpr int kRoundRows = WM * kRoundMB * 8;
  // Four floats of padding: lanes that differ in t write rows 2t of the same columns, 8 banks apart.
  static constexpr int kSumPitch = kBlockN + 4;
  // In registers: an 8-row block of each warp for the other of the two along K; 8 rows of 64 outputs of a warp.
  static constexpr int kExchangeBytes = kThreads * 64;
  static constexpr int kOutputPitch = MARLIN_TILE_N * 2 + 16;
  static constexpr int kSumBytes = !kInRegisters ? WK * kRoundRows * kSumPitch * 4
                                   : WK == 2     ? kExchangeBytes
                                                 : kThreads / 32 * 8 * kOutputPitch;
  static constexpr int kMaxStages = SCALED ? 7 : 8;
  static constexpr int kExtraBytes = kSumBytes + 16 + kMaxStages * 8;  // and one flag, and a barrier for each stage

  static_assert(MB % kRoundMB == 0, "rounds are whole");
  static_assert(KT % WM == 0, "warps along M share the copying of a warp's weights");
  static_assert(kBlockK >= 64, "the swizzle permutes eight 16-byte pieces");
  static_assert(KT == 2 || KT == 4, "fragments alternate between two sets of registers; the swizzle takes 8 pieces");
};

}  // namespace marlin
