// cost_model.h: how a product may be laid out over the SMs, and how long it should take. Plain C++, no CUDA: the tests
// and benchmarks/cost_model compile it by itself.
#pragma once

#include <cstdint>

namespace marlin {

// How output tiles are given to blocks (tile_scheduler.cuh).
enum Split : int {
  kMostSplitK = 8,     // 1 .. 8: a tile to that many blocks (sm90: of a cluster), an equal part of its K to each
  kStreamK = 9,        // equal ranges of iterations, tiles shared through the workspace
  kDataParallel = 10,  // whole tiles in turn
  kSplits = 11,
};

// An instance, as far as the model needs it.
struct TileShape {
  bool clusters;  // whether blocks that split a tile along K are a cluster; else they use the workspace
  bool wide;      // sm90_wide: output tiles are split in another way (make_schedule)
  int block_m, block_n, block_k;
  int bits;
  int stages;       // of the pipeline
  int blocks;       // that an SM runs at once
  int decodes;      // times that a block decodes each weight: its warps along M
  bool scaled;      // sm80: weights are scaled before they are multiplied, so groups cost no sums of their own;
  bool any_groups;  //   else, whether groups may be smaller than 128 rows
};

struct Problem {
  int64_t M, N, K, G;
  bool zeros;  // whether zero points are stored
};

struct Schedule {
  int split, blocks;
  int steps, tiles_m, iterations, iterations_per_block;  // as in GemmArguments
  int64_t waves;                                         // of clusters, or of whole tiles, one after the other
  int64_t busiest;                                       // iterations of the SM that has most
  int whole_tiles, ranges;                               // as in WideArguments
  int per_sm;                                            // blocks of the busiest SM, at once
};

// Lays out `split`; false if it cannot be done, or, unless `forced`, should not. `resident_tiles`: how many times `split`
// blocks, of a cluster, the device holds at once.
//
// Wide tiles: as many whole ones as fill all SMs some times, then 2 .. 8: each of the rest is cut into that many equal
// parts, and kStreamK: the rest into one for each SM. No blocks but those that run at the same time share a tile.
bool make_schedule(const TileShape& tile, const Problem& problem, int split, bool forced, int multiprocessors,
                   int resident_tiles, Schedule* schedule);

// The constants, for one main loop on one kind of GPU. us: microseconds; KB: 1024 bytes.
struct CostModel {
  double launch;         // us: a launch, with the end of a tile
  double memory;         // bytes per us from device memory
  double step;           // us of a step: for its chain of dependent instructions, and for each block on the SM
  double step_column;    //   for each column of the tile,
  double step_output;    //   for each output,
  double step_product;   //   for each product of two numbers,
  double step_weights;   //   and for each KB of weights, each time that they are decoded;
  double sm_bytes;       // but no more bytes per us into an SM
  double any_groups;     // sm80: us of a step where sums may have to be scaled inside of it;
  double group;          // us for each further group in a step,
  double group_output;   //   and for each output (sm80: only these where weights are scaled);
  double zero_points;    // us for the zero points of each group
  double cluster_rank;   // us for each block of a cluster
  double cluster_kb;     // us for each KB of a tile's sums, in a cluster
  double wave;           // us for each further wave of clusters
  double shared;         // us when blocks share tiles through the workspace,
  double shared_kb;      //   and for each KB of a tile's sums and block that shares it (sm80: and block of the SM)
  double whole_kb;       // us for each KB of sums of each further whole tile
  double misaligned;     // us when ranges end inside tiles: a block then has two tiles' ends,
  double misaligned_kb;  //   and for each KB of sums
  double clock;          // sm90_wide: cycles per us of the tensor cores, at 4096 flops a cycle,
  // and cycles that a step takes however few its rows: by 128, 192 or 256 columns, 4 or 8 bits, without zero points or with
  double step_floor[3][2][2];
  double tile_end;             //   and cycles at the end of a tile,
  double tile_end_output;      //     and for each of its outputs;
  double exchange;             //   cycles to exchange sums,
  double exchange_output;      //     and for each output that a block exchanges,
  double exchange_misaligned;  // and so many times that where ranges end inside of tiles
  double stream_k;             // steps of ranges are so many times as long: blocks that are apart in K share less in L2
  double beyond_l2;            //   and longer by up to this part, as activations outgrow L2
  double product_flops;        // flops per us of large products, 2 M N K
  double copied_kb;       // sm90_wide: longer by this part for each KB that a block copies for 2^15 outputs in a step
  double dense_launches;  // us: dequantizing and then cuBLAS, its launches,
  double dense_memory;    //   bytes per us read and written by dequantizing,
  double dense_flops;     //   flops per us of cuBLAS
};

struct Gpu {
  int capability;  // 10 major + minor
  int multiprocessors;
  double clock;   // cycles per us
  double memory;  // bytes per us, the most
};

// Few rows and many rows on compute capability 9.0. An H100 and an H200 differ in their memory, and were measured both:
// a GPU has the constants of the one whose memory is nearer to its own.
CostModel sm90_model(const Gpu& gpu);
CostModel sm90_wide_model(const Gpu& gpu);

// A GPU on which nothing was measured has the H200's constants, scaled by its clock and memory, and no more products a
// cycle than its tensor cores do by their datasheet.
CostModel sm80_model(const Gpu& gpu);

struct Prediction {
  double us;
  double slowdown;  // of the tensor cores by small groups and zero points
};

// Good enough to order the candidates, no more:
//   time = launch + (reading ^ 4 + stepping ^ 4) ^ (1/4) + time to add up partial sums
//   reading = time to read memory, stepping = steps of the busiest SM * time of a step: the longer hides the other,
//   but not where they are about equal
// A step of a wide tile takes the cycles of its products or a floor, which add up likewise (power 5).
Prediction predict(const CostModel& model, const TileShape& tile, const Problem& problem, const Schedule& schedule);

// Of a product by any means: at least what the tensor cores need; and of dequantizing, then cuBLAS.
double predict_gemm(const CostModel& model, const Problem& problem, const Prediction& prediction);
double predict_dense(const CostModel& model, const Problem& problem, int bits);

}  // namespace marlin
