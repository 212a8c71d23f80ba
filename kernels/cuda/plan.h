// plan.h: which instance runs a product, and how.
#pragma once

#include "cost_model.h"
#include "device.h"
#include "instance.h"

namespace marlin {

struct Plan {
  const Instance* instance;
  Schedule schedule;
  int stages;
  Prediction prediction;
  int64_t rows;  // of each launch: M, or fewer
  int parts;     // as in GemmArguments
  int cut;       // batch-invariant: the parts of K, in either way; else 0
};

// `variant` of marlin_cuda_product_t: bits 0 .. 11 the instance's id, 12 .. 15 the stages, 16 .. 19 the Split; 0:
// choose. Or MARLIN_CUDA_BATCH_INVARIANT.
struct Variant {
  int id, stages, split;
  explicit Variant(int v) : id(v & 0xfff), stages(v >> 12 & 0xf), split(v >> 16 & 0xf) {}
};

// All instances of this library, in ascending order of ids.
const std::vector<Instance>& all_instances();

// What the model predicts with for these instances on this device.
CostModel cost_model(MainLoop loop, const Device& facts);

int least_stages(const Instance& instance);

int shared_bytes(const Instance& instance, int stages);

// Lets a kernel of the instance use more than 48 KB of shared memory, once per device, which is current.
int allow_shared_memory(const Instance& instance, int kernel, const Device& facts, int device);

// Attributes of a launch: clusters of `size` blocks; a launch before the kernel before it has ended.
cudaLaunchAttribute cluster_of(int size);
cudaLaunchAttribute early_launch();

// The fastest of what `variant` leaves open. `device` is current. With MARLIN_PRINT_PLAN=1 in the environment it is
// printed to stderr when it is made; each thread remembers its latest.
int find_plan(int64_t M, const marlin_cuda_weights_t& weights, const Device& facts, int device, int variant,
              Plan* plan);

// Bytes of workspace for any product: the counters, and two tiles of sums for each block of the largest instance.
size_t workspace_bytes(const Device& facts);

}  // namespace marlin
