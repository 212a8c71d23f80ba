// arguments.cuh: what a product's kernel is given. C[M, N] = A[M, K] * W[K, N] + bias, W in Marlin tiles.
#pragma once

#include <vector_types.h>

#include <cstdint>

namespace marlin {

template <typename S>
struct OutputTile;

struct GemmArguments {
  template <typename S>
  using Tile = OutputTile<S>;  // what a block needs to know of an output tile (tile_scheduler.cuh)

  const void* A;      // [M, lda] activations
  const uint4* B;     // [K / 16, N / 64, 32 lanes] packed weights, for 8 bits [.., 64]
  const uint16_t* s;  // [G, N] permuted scales
  const void* zeros;  // [G, N bits / 32] words, permuted, or null
  const void* bias;   // [out_features] or null
  void* C;            // [M, out_features]
  float* partials;    // [blocks, 2, BLOCK_M, BLOCK_N] sums of output tiles that several blocks share
  unsigned* arrived;  // [blocks] how many blocks of a shared tile are done, at its first block; zero between calls
  int M, N, K;
  int in_features, out_features;  // columns of A and of C
  bool bf16_scales;
  int64_t lda;               // elements between rows of A
  int groups;                // G
  int group_shift;           // log2 of the rows in a group; 31 when G == 1
  int steps;                 // along K, in an output tile: ceil(K / BLOCK_K)
  int tiles_m;               // output tiles along M: ceil(M / BLOCK_M)
  int iterations;            // steps of all output tiles
  int iterations_per_block;  // stream-K: block b does iterations b * iterations_per_block and the following;
                             // 0: data-parallel, block b takes the output tiles b, b + blocks, ...
  int stages;                // of the pipeline in shared memory
  int split_k;               // blocks that split an output tile along K, in equal parts; 0: none, as above
  int parts;  // data-parallel, gemm_sm90 (parts_in_turn): whole tiles are done in so many parts along K, and these added
              // up, as a cluster of so many blocks would; else 1
  int next_n, next_m;  // gemm_sm80: from one output tile of a block to its next, along N and (modulo tiles_m) M
  bool early;          // gemm_sm90: the kernel before may still run, but weights, scales and zero points are there
};

}  // namespace marlin
