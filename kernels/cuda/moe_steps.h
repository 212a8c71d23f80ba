// moe_steps.h: the steps of a mixture of experts around its two grouped products.
//
// Each token has `top_k` experts. A choice is one of them: number t * top_k + j for the j-th of token t. Choices are
// sorted by expert, and a choice that is here is a row of every matrix in between:
//
//   route    sorts: rows[r] is the choice of row r, places[c] the row of choice c (-1: its expert is not here)
//   gather   A[r] = the token of row r, its columns in the order of the expert's stored rows, zeros beyond
//   (product: gate and up)
//   activate H[r] = up * activation(gate), its columns in the order of the second product's stored rows, zeros beyond
//   (product: down)
//   sum      out[t] = the sum of weights[t, j] * Y[places[t * top_k + j]]
#pragma once

#include <cuda_runtime.h>

#include "../marlin_cuda.h"
#include "grouped.h"

namespace marlin {

constexpr int kMostPositions = 1024;  // experts on one device
constexpr int kMostFused = 1024;      // choices that every block of `gather` sorts for itself

// Which experts, and where `route` leaves what it found.
struct Routing {
  const void* ids;          // [choices] the expert of each choice, 32 or 64 bits
  const int32_t* position;  // [experts] the position of each expert, -1 for one that is not here; or null: it is the id
  int experts, positions;
  bool wide_ids;
  int choices, top_k;
  int block_m;
  int32_t *rows, *places;            // [choices]
  int32_t *first_row, *first_block;  // [positions + 1]
  RowBlock* blocks;
};

struct Gather {
  const void* x;  // [tokens, pitch]
  int64_t pitch;
  const int32_t* perm;  // [experts of the set, in_features] or null
  const float* scale;   // [choices] what a row is multiplied by, or null
  void* A;              // [choices, K]
  int in_features, K;
  int first, last;  // positions whose rows are gathered
  bool vectors;     // rows of x can be read 16 bytes at a time
};

struct Activate {
  const void *gate, *up;  // [choices, pitch]; up is null for experts without a gate
  int64_t pitch;
  int step;             // from one column to the next
  const int32_t* perm;  // [experts of the set, in_features] or null
  void* H;              // [choices, K]
  int in_features, K;
  int first, last;
  int kind;  // MARLIN_CUDA_SILU and so on
  float limit, alpha, beta;
  bool vectors;
};

struct Sum {
  const void* Y;         // [choices, columns]
  const float* weights;  // [choices] or null: ones
  void* out;             // [tokens, columns]
  int tokens, columns;
};

// Launches; `early`: as programmatic dependent launches (grouped.cuh).
struct Launcher {
  cudaStream_t stream;
  int multiprocessors;
  bool early;
};

// With `gather`, for few choices: both in one kernel.
int launch_route(const Launcher& launcher, const Routing& routing, const Gather* gather, int dtype);
int launch_gather(const Launcher& launcher, const Routing& routing, const Gather& gather, int dtype);
int launch_activate(const Launcher& launcher, const Routing& routing, const Activate& activate, int dtype);
int launch_sum(const Launcher& launcher, const Routing& routing, const Sum& sum, int dtype);

int launch(const Launcher& launcher, const void* kernel, dim3 grid, int threads, size_t shared, void** parameters);

}  // namespace marlin
