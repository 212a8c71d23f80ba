// tile_scheduler.cuh: which part of a product a thread block does. The kernels are persistent: about one block an SM.
//
// C is cut into output tiles of BLOCK_M x BLOCK_N, numbered with M fastest; along K a tile is cut into steps of
// BLOCK_K, its iterations. There are three ways to share them out; the host chooses (cost_model.h):
//
//   Stream-K. All iterations of all tiles, in the order (tile along N, tile along M, step), form one line, which is cut
//   into equal ranges, one for each block. 5 tiles of 4 steps on 7 blocks:
//
//          tile 0   tile 1   tile 2   tile 3   tile 4      The number is the block that does the iteration: 20 of
//   step 0   0        1        2        4        5         them, three for each block, two left for the last. Block 0
//   step 1   0        1        3        4        5         does most of tile 0, block 1 ends it and begins tile 1, and
//   step 2   0        2        3        4        6         so on: a block has at most one tile that it shares with
//   step 3   1        2        3        5        6         earlier blocks and one that it shares with later ones.
//
//   A tile that one block did alone is written to C at once. Otherwise each of its blocks leaves its fp32 sums in the
//   workspace and counts itself; the block that counts last adds all of them, in ascending K, and writes C (the fix-up,
//   epilogue.cuh). No block ever waits for another, so nothing depends on what else is running; and the order of
//   addition is fixed by the shape, so equal inputs give equal bits.
//
//   Data-parallel. Where there are many tiles, a block takes whole ones in turn, block b the tiles b, b + blocks, and
//   so on: neighbours in time are neighbours in the matrices and find each other's weights and activations in L2.
//
//   Cluster split-K (gemm_sm90). Where there are few tiles, the blocks of a cluster share one, each an equal part of
//   its steps, and add up through distributed shared memory.
//
// Batch-invariant products. A row's bits do not depend on the rows beside it where the order of its sums does not: K
// is cut into the same parts for any number of rows, in turn with cluster split-K by as many blocks or, where there are
// many tiles, data-parallel with `parts`: a block does a whole tile a part at a time and adds these up likewise.
#pragma once

#include "arguments.cuh"
#include "ptx.cuh"

namespace marlin {

// Where an output tile begins. The last four are there for products that have more than one matrix of weights
// (grouped.cuh).
template <typename S>
struct OutputTile {
  int n, row;  // its number along N, its first row

  __device__ __forceinline__ OutputTile(const GemmArguments& p, int tile) {
    n = tile / p.tiles_m;
    row = (tile - n * p.tiles_m) * S::kBlockM;
  }
  __device__ __forceinline__ int column() const { return n * S::kBlockN; }
  __device__ __forceinline__ int rows(const GemmArguments& p) const { return min(S::kBlockM, p.M - row); }
  __device__ __forceinline__ int first_tile_row(const GemmArguments&) const { return 0; }  // of 16 rows of K, in B
  __device__ __forceinline__ int64_t first_group(const GemmArguments&) const { return 0; }
  template <typename T>
  __device__ __forceinline__ const T* bias(const GemmArguments& p) const {
    return static_cast<const T*>(p.bias);
  }
};

// With `early`, a kernel began without waiting, and waits here, before it reads activations or writes anything.
__device__ __forceinline__ void wait_for_activations(const GemmArguments& p) {
  if (p.early) wait_for_kernel_before();
}

// The iterations of one block, and which output tiles they belong to.
struct TileScheduler {
  int begin, end;  // data-parallel: numbered from 0 in each block

  __device__ __forceinline__ explicit TileScheduler(const GemmArguments& p) {
    const int block = blockIdx.x, blocks = gridDim.x;
    if (p.iterations_per_block == 0) {
      begin = 0;
      end = (p.iterations / p.steps - block + blocks - 1) / blocks * p.steps;
    } else {
      begin = block * p.iterations_per_block;
      end = min(begin + p.iterations_per_block, p.iterations);
    }
  }
  // The first step of a part of a tile, of `parts` about equal ones. A part may be empty where they are many; the last
  // is not.
  __device__ __forceinline__ static int part_begin(const GemmArguments& p, int part, int parts) {
    return part * p.steps / parts;
  }
  // The block's part of the tile that it shares.
  __device__ __forceinline__ void split_tile(const GemmArguments& p) {
    const int first = blockIdx.x / p.split_k * p.steps, rank = blockIdx.x % p.split_k;
    begin = first + part_begin(p, rank, p.split_k);
    end = first + part_begin(p, rank + 1, p.split_k);
  }
  __device__ __forceinline__ static int tile(const GemmArguments& p, int iteration) {
    const int n = iteration / p.steps;
    return p.iterations_per_block == 0 ? n * gridDim.x + blockIdx.x : n;
  }
};

}  // namespace marlin
