// grouped.cuh: which part of a grouped product a thread block does (grouped.h), for the main loops of the products with
// one matrix of weights.
//
// Output tiles are numbered expert by expert; within an expert as elsewhere, along N with M fastest, so that the blocks
// of rows that use the same weights come together. A tile's rows may run over into those of the next expert: they are
// multiplied like the others (a row of A changes only its own row of C) and not stored.
#pragma once

#include "grouped.h"
#include "ptx.cuh"
#include "tile_scheduler.cuh"

namespace marlin {

// Written by a kernel before this one, perhaps after this one had begun: read past L1.
__device__ __forceinline__ RowBlock load_block(const RowBlock* from) {
  const int4 v = __ldcg(reinterpret_cast<const int4*>(from));
  return {v.x, v.y, v.z, v.w};
}

// Tile `tile` of the list from `begin` on: its number along N, its first row, and the expert.
template <int BLOCK_M>
struct GroupedPlace {
  int n, row, end, expert;
  __device__ __forceinline__ GroupedPlace(const RowList& list, int tiles_n, int begin, int tile) {
    // As many tiles before an expert as its first block says; the block of the same number is one of the expert's.
    const RowBlock block = load_block(list.blocks + begin + tile / tiles_n);
    const int count = (block.end - block.begin + BLOCK_M - 1) / BLOCK_M;
    const int within = tile - (block.first - begin) * tiles_n;
    n = within / count;
    row = block.begin + (within - n * count) * BLOCK_M;
    end = block.end;
    expert = block.position - list.first;
  }
};

// As OutputTile. Beyond the last tile, where copies may look though nothing is left to do, it is the last.
template <typename S>
struct GroupedTile : GroupedPlace<S::kBlockM> {
  using Place = GroupedPlace<S::kBlockM>;
  __device__ __forceinline__ GroupedTile(const GroupedArguments& p, int tile)
      : Place(p.list, p.tiles_n, p.list_begin, min(tile, p.tiles - 1)) {}
  __device__ __forceinline__ int column() const { return this->n * S::kBlockN; }
  __device__ __forceinline__ int rows(const GroupedArguments&) const { return min(S::kBlockM, this->end - this->row); }
  __device__ __forceinline__ int first_tile_row(const GroupedArguments& p) const {
    return this->expert * (p.K / MARLIN_TILE_K);
  }
  __device__ __forceinline__ int64_t first_group(const GroupedArguments& p) const {
    return static_cast<int64_t>(this->expert) * p.groups;
  }
  template <typename T>
  __device__ __forceinline__ const T* bias(const GroupedArguments& p) const {
    return p.bias == nullptr ? nullptr
                             : static_cast<const T*>(p.bias) + static_cast<int64_t>(this->expert) * p.out_features;
  }
};

// What the host could not know: how many tiles, and whether blocks take whole ones in turn or equal ranges of all steps.
// Equal ranges take fewer steps and then an exchange of sums. All blocks come to the same answer.
__device__ __forceinline__ GroupedArguments lay_out(const GroupedArguments& given) {
  GroupedArguments p = given;
  p.list_begin = __ldcg(p.list.first_block + p.list.first);
  p.tiles = (__ldcg(p.list.first_block + p.list.last) - p.list_begin) * p.tiles_n;
  const int blocks = gridDim.x;
  p.iterations = p.tiles * p.steps;
  const int whole = (p.tiles + blocks - 1) / blocks * p.steps, shared = (p.iterations + blocks - 1) / blocks;
  // And blocks that are apart in K share less in L2: steps take some 6% longer.
  p.iterations_per_block = shared + shared / 16 + p.exchange < whole ? shared : 0;
  p.split_k = 0;
  p.parts = 1;
  return p;
}

}  // namespace marlin
