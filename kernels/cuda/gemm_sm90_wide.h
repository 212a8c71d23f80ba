// gemm_sm90_wide.h: what the host and the kernel of gemm_sm90_wide.cuh share.
#pragma once

#include <cstdint>

namespace marlin {

constexpr int kWideStep = 64;                  // rows of K in a step
constexpr int kWidePartialFloats = 256 * 128;  // sums that a block leaves for one output tile, at most
constexpr int kWideSlices = 4;                 // parts of an output tile that its sharers add up apart

// Divides numbers below 2^31 by one that is known on the host: two instructions instead of some thirty, and a block
// divides several times before it copies anything. quotient = (n * multiplier / 2^32 + n) / 2^shift, with
// multiplier = 2^32 (2^shift - divisor) / divisor + 1 for the least shift whose power is not below the divisor
// (Granlund and Montgomery 1994).
struct Divisor {
  int divisor;
  uint32_t multiplier, shift;

  Divisor() = default;
  explicit Divisor(int d) : divisor(d), shift(0) {
    while ((uint64_t{1} << shift) < static_cast<uint64_t>(d)) shift++;
    multiplier = static_cast<uint32_t>((((uint64_t{1} << shift) - d) << 32) / d + 1);
  }
#ifdef __CUDACC__
  __device__ __forceinline__ int quotient(int n) const { return (__umulhi(n, multiplier) + n) >> shift; }
#endif
};

struct WidePlace;
struct WideParts;

struct WideArguments {
  using Parts = WideParts;  // what a block does of the product, and where an output tile is (gemm_sm90_wide.cuh)
  using Place = WidePlace;
  static constexpr bool kSplits = true;  // blocks may share an output tile

  const uint16_t* s;   // [G, N] permuted scales
  const void* bias;    // [out_features] or null
  void* C;             // [M, out_features]
  float* partials;     // [ranges, 2, kWidePartialFloats] sums of output tiles that several blocks share
  unsigned* counters;  // [split tiles, warpgroups, kWideSlices], zero between calls
  int M, out_features;
  bool bf16_scales;
  bool weights_once;  // one block reads them: L2 need not keep them
  bool early;         // the kernel before may still run, but weights, scales and zero points are there
  int step_groups;    // groups that the 64 rows of a step meet: 1, 2 or 4; 0: one group for all of K
  int group_shift;    // log2 of the steps that share a group: 1 with groups of 128, else 0
  int steps;          // along K: K / 64
  int stages;         // of the pipeline in shared memory, at least kWideMinStages
  int tiles_m;        // output tiles along M,
  int raster;         //   of which so many are taken together
  // K split. Output tiles 0 .. whole_tiles - 1 are done whole: block b takes b, b + blocks, ..., which are whole_rounds,
  // and one more for the first whole_rest blocks. The steps of the other tiles are cut into `ranges` equal ranges, and
  // block b takes the b-th.
  int whole_tiles, whole_rounds, whole_rest, ranges;
  int patience;  // clocks that a block with nothing else to do waits for the other sharers of an output tile
  // By: steps; the steps of all split tiles; ranges; raster * tiles along N; raster; tiles_m % raster, or any.
  Divisor by_steps, by_split_steps, by_ranges, by_group, by_raster, by_last_height;
};

// A block holds two stages while it waits for the next.
constexpr int kWideMinStages = 3;

}  // namespace marlin
