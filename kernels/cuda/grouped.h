// grouped.h: what the host and the kernels of a grouped product share: rows of A, sorted by expert, times the weights of
// the expert that each belongs to.
//
// Only the device knows how many rows an expert has. So a list in memory says what there is to do (moe_route.cu makes
// it), the grid is as large as the device, and each block finds its part of the list.
#pragma once

#include "arguments.cuh"
#include "gemm_sm90_wide.h"

namespace marlin {

// Up to BLOCK_M rows of one expert. An expert's blocks of rows stand together.
struct RowBlock {
  int position;    // the expert's number, in the order in which rows are sorted
  int first;       // in the list, of its blocks
  int begin, end;  // all rows of the expert
};

// The part of the list that a product takes: the blocks of some neighbouring experts, whose weights are stacked.
struct RowList {
  const RowBlock* blocks;
  const int* first_block;  // [positions + 1]: of each expert, in the list
  int first, last;         // positions: the experts are first .. last - 1
};

template <typename S>
struct GroupedTile;
struct GroupedWidePlace;
struct GroupedWideParts;

// gemm_sm80.cuh and gemm_sm90.cuh; `early`: the list is there, too. M, iterations, iterations_per_block, split_k and what goes with them are made by the
// kernel; A, s, zeros, bias and B have all experts, one after the other.
struct GroupedArguments : GemmArguments {
  template <typename S>
  using Tile = GroupedTile<S>;
  RowList list;
  int tiles_n;
  int exchange;  // steps that are as long as the exchange of sums where blocks share tiles: kWhole, kShared or between
  int list_begin;  // made by the kernel: the first block of rows,
  int tiles;       //   and how many output tiles there are
  static constexpr int kShared = -(1 << 24), kWhole = 1 << 24;
};

// gemm_sm90_wide.cuh: whole output tiles only.
struct GroupedWideArguments : WideArguments {
  using Parts = GroupedWideParts;
  using Place = GroupedWidePlace;
  static constexpr bool kSplits = false;
  RowList list;
  int tiles_n, N;
  int tile_rows, groups;  // of one expert: K / 16, G
};

}  // namespace marlin
