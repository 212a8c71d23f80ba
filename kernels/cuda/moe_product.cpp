// moe_product.cpp: the grouped products of a mixture of experts: which instance runs one, and its launch.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "moe.h"
#include "plan.h"
#include "tensor_maps.h"

namespace marlin {
namespace {

constexpr int kMostInstances = 128;

const std::vector<Instance>& moe_instances() {
  static const std::vector<Instance> all = [] {
    std::vector<Instance> found = moe_sm80_instances();
#ifdef MARLIN_HAS_SM90
    for (const auto& more : {moe_sm90_b4_instances(), moe_sm90_b8_instances(), moe_sm90_wide_instances()})
      found.insert(found.end(), more.begin(), more.end());
#endif
    return found;
  }();
  return all;
}

int stages_of(const Instance& i, const Device& facts) {
  const int most = std::min(i.max_stages, (facts.shared_bytes_per_block - i.extra_bytes) / i.stage_bytes);
  return most - most % i.stage_multiple;
}

bool runs(const Instance& i, const Device& facts) {
  return (i.loop == MainLoop::kSm80 || facts.capability == 90) && stages_of(i, facts) >= least_stages(i);
}

bool fits(const Instance& i, const marlin_cuda_weights_t& w) {
  const int64_t group = w.G == 1 ? MARLIN_CUDA_GROUP_SIZE : w.K / w.G;
  return i.bits == w.bits && (i.group_size == 0 || i.group_size == group) &&
         (i.zero_points == kEither || (i.zero_points == kAlways) == (w.zeros != nullptr));
}

int allow(const Instance& i, int kernel, const Device& facts, int device) {
  static std::atomic<bool> allowed[kMaxDevices][kMostInstances][4];
  std::atomic<bool>& mine = allowed[device][&i - moe_instances().data()][kernel];
  if (mine.load(std::memory_order_relaxed)) return MARLIN_OK;
  MARLIN_RETURN_IF_ERROR(cudaFuncSetAttribute(i.kernels[kernel], cudaFuncAttributeMaxDynamicSharedMemorySize,
                                              facts.shared_bytes_per_block));
  mine.store(true, std::memory_order_relaxed);
  return MARLIN_OK;
}

// Of the instances for these weights and rows, the widest that still fills the device.
int choose_instance(const Product& product, const MoePlan& plan, const marlin_cuda_moe_t& x, const Device& facts,
                    const Instance** chosen) {
  const marlin_cuda_weights_t& w = product.stack->weights;
  const MoeVariant wanted(x.variant);
  const int block_m = plan.layout.block_m;
  const double rows = rows_of_expert(x), active = static_cast<double>(product.last - product.first) / x.positions *
                                                  std::min<double>(x.positions, x.tokens * x.top_k);
  *chosen = nullptr;
  double least = std::numeric_limits<double>::infinity();
  for (const Instance& i : moe_instances()) {
    if (!runs(i, facts) || !fits(i, w) || i.block_m != block_m ||
        i.rounds_weights != (plan.layout.rounds_weights != 0) || (wanted.invariant && !i.invariant) ||
        (wanted.block_n != 0 && i.block_n != wanted.block_n) ||
        (plan.few == MainLoop::kSm80) != (i.loop == MainLoop::kSm80))
      continue;
    const double tiles = active * std::ceil(rows / block_m) * std::ceil(static_cast<double>(w.N) / i.block_n);
    const double waves = i.loop == MainLoop::kSm90Wide ? std::ceil(tiles / facts.multiprocessors)
                                                       : std::max(1.0, tiles / facts.multiprocessors);
    const double time = waves * (i.block_n + 90);
    if (time < least) {
      least = time;
      *chosen = &i;
    }
  }
  return *chosen == nullptr ? MARLIN_CUDA_ERROR_VARIANT : MARLIN_OK;
}

}  // namespace

bool has_sm90_instances(const Device& facts) {
  return std::any_of(moe_instances().begin(), moe_instances().end(),
                     [&](const Instance& i) { return i.loop == MainLoop::kSm90 && runs(i, facts); });
}

int launch(const Launcher& launcher, const void* kernel, dim3 grid, int threads, size_t shared, void** parameters) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = launcher.stream;
  cudaLaunchAttribute attribute = {};
  if (launcher.early) {
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  return cudaLaunchKernelExC(&config, kernel, parameters);
}

int launch_product(const Product& product, const MoePlan& plan, const marlin_cuda_moe_t& x, const RowList& blocks,
                   const Device& facts, const Launcher& launcher) {
  const Instance* found;
  MARLIN_RETURN_IF_ERROR(choose_instance(product, plan, x, facts, &found));
  const Instance& i = *found;
  marlin_cuda_weights_t w = product.stack->weights;
  w.in_features = w.K;  // A has been padded
  const int64_t experts = product.last - product.first;
  const int kernel = x.dtype + (i.rounds_weights && w.G > 1 && w.scale_dtype != x.dtype ? 2 : 0);
  MARLIN_RETURN_IF_ERROR(allow(i, kernel, facts, x.device));
  const int stages = stages_of(i, facts), group_size = static_cast<int>(w.K / w.G);
  const int tiles_n = static_cast<int>((w.N + i.block_n - 1) / i.block_n);
  const size_t shared = static_cast<size_t>(stages) * i.stage_bytes + i.extra_bytes;
  RowList list = blocks;
  list.first = product.first;
  list.last = product.last;
  CUtensorMap activations_map = {}, weights_map = {}, scales_map = {}, zeros_map = {};
  if (i.loop != MainLoop::kSm80) {
    MARLIN_RETURN_IF_ERROR(describe_activations(&activations_map, i, w, product.A, plan.choices, product.lda));
    MARLIN_RETURN_IF_ERROR(describe_weights(&weights_map, i, w, experts));
  }
  if (i.loop == MainLoop::kSm90Wide) {
    GroupedWideArguments p = {};
    p.s = static_cast<const uint16_t*>(w.s);
    p.bias = product.stack->bias;
    p.C = product.C;
    p.out_features = static_cast<int>(w.out_features);
    p.bf16_scales = w.scale_dtype == MARLIN_CUDA_BF16;
    p.step_groups = w.G == 1 ? 0 : group_size < kWideStep ? kWideStep / group_size : 1;
    p.group_shift = w.G > 1 && group_size == 2 * kWideStep;
    p.steps = static_cast<int>(w.K / kWideStep);
    p.stages = stages;
    p.list = list;
    p.early = product.early && launcher.early;
    p.tiles_n = tiles_n;
    p.N = static_cast<int>(w.N);
    p.tile_rows = static_cast<int>(w.K / MARLIN_TILE_K);
    p.groups = static_cast<int>(w.G);
    MARLIN_RETURN_IF_ERROR(describe_scales(&scales_map, &zeros_map, i, w, experts, p.step_groups));
    void* parameters[] = {&p, &activations_map, &weights_map, &scales_map, &zeros_map};
    return launch(launcher, i.kernels[kernel], dim3(facts.multiprocessors), i.threads, shared, parameters);
  }
  const MoeVariant wanted(x.variant);
  GroupedArguments p = {};
  p.A = product.A;
  p.B = static_cast<const uint4*>(w.B);
  p.s = static_cast<const uint16_t*>(w.s);
  p.zeros = w.zeros;
  p.bias = product.stack->bias;
  p.C = product.C;
  p.arrived = static_cast<unsigned*>(x.workspace);
  p.partials = reinterpret_cast<float*>(static_cast<char*>(x.workspace) + MARLIN_CUDA_COUNTER_BYTES);
  p.N = static_cast<int>(w.N);
  p.K = static_cast<int>(w.K);
  p.in_features = static_cast<int>(w.K);
  p.out_features = static_cast<int>(w.out_features);
  p.bf16_scales = w.scale_dtype == MARLIN_CUDA_BF16;
  p.lda = product.lda;
  p.groups = static_cast<int>(w.G);
  p.group_shift = 31;
  if (w.G > 1)
    for (p.group_shift = 4; 1 << p.group_shift < group_size;) p.group_shift++;
  p.steps = static_cast<int>((w.K + i.block_k - 1) / i.block_k);
  p.stages = stages;
  p.list = list;
  p.early = product.early && launcher.early;
  p.tiles_n = tiles_n;
  constexpr int kExchange = 10;  // steps
  p.exchange = wanted.split == kStreamK                            ? GroupedArguments::kShared
               : wanted.split == kDataParallel || wanted.invariant ? GroupedArguments::kWhole
                                                                   : kExchange;
  void* parameters[] = {&p, &weights_map, &activations_map};
  return launch(launcher, i.kernels[kernel], dim3(facts.multiprocessors), i.threads, shared, parameters);
}

}  // namespace marlin
