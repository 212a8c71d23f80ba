// moe.h: a mixture of experts: what a call needs (moe_plan.cpp), and its grouped products with their instances
// (moe_product.cpp). The steps around the products: moe_steps.h.
#pragma once

#include "device.h"
#include "grouped.h"
#include "instance.h"
#include "moe_steps.h"

namespace marlin {

// Of grouped products, in one translation unit each (gemm_sm80_moe.cu, gemm_sm90_moe_*.cu).
std::vector<Instance> moe_sm80_instances();
std::vector<Instance> moe_sm90_b4_instances();
std::vector<Instance> moe_sm90_b8_instances();
std::vector<Instance> moe_sm90_wide_instances();

// `variant` of marlin_cuda_moe_t, taken apart.
struct MoeVariant {
  int block_m, block_n, split;
  bool invariant, one_by_one, portable, rounding;
  explicit MoeVariant(int v)
      : block_m(v & 0x3ff),
        block_n(v >> 10 & 0x3ff),
        split(v >> 20 & 0xf),
        invariant(split == MARLIN_CUDA_BATCH_INVARIANT >> 20),
        one_by_one(v >> 24 & 1),
        portable(v >> 25 & 1),
        rounding(v >> 26 & 1) {}
};

struct MoePlan {
  marlin_cuda_moe_layout_t layout;
  int64_t first_block, blocks;  // offsets, as in the layout
  int choices;
  MainLoop few;     // the loop of this device
  bool one_gather;  // gate and up read the same rows
};

inline bool has(const marlin_cuda_stack_t& stack) { return stack.weights.B != nullptr; }

// Whether a stack is what it may be; `pointers`: its tensors too.
int check_stack(const marlin_cuda_stack_t& stack, bool pointers);

// Columns of what the second product reads, before they are brought into the order of stored rows.
int64_t inner_features(const marlin_cuda_experts_t& set, const marlin_cuda_moe_t& x);

// How many rows an expert has that has any, if choices fall evenly.
double rows_of_expert(const marlin_cuda_moe_t& x);

// Checks the sets of experts and the call, and lays out what is in between.
int make_moe_plan(const marlin_cuda_experts_t* sets, int count, const marlin_cuda_moe_t& x, const Device& facts,
                  MoePlan* plan);

// Whether the kernels for few rows of sm_90 are in this library and run on this device.
bool has_sm90_instances(const Device& facts);

// One grouped product.
struct Product {
  const marlin_cuda_stack_t* stack;
  int first, last;  // positions
  const void* A;
  int64_t lda;
  void* C;
  bool early;
};

int launch_product(const Product& product, const MoePlan& plan, const marlin_cuda_moe_t& x, const RowList& blocks,
                   const Device& facts, const Launcher& launcher);

}  // namespace marlin
