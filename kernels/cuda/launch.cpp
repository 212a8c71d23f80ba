// launch.cpp: a product is planned (plan.h) and launched; what the library says about its instances and plans.
#include <algorithm>
#include <cstring>

#include "arguments.cuh"
#include "gemm_sm90_wide.h"
#include "plan.h"
#include "tensor_maps.h"

namespace marlin {
namespace {

int check_rows(int64_t M) {
  constexpr int64_t kLimit = int64_t{1} << 30;
  return M <= 0 || M > kLimit ? MARLIN_CUDA_ERROR_SHAPE : MARLIN_OK;
}

// A launch of gemm_sm90_wide.cuh.
int launch_wide(const Plan& plan, int kernel, const marlin_cuda_weights_t& w, const marlin_cuda_product_t& x) {
  constexpr int kRaster = 8;         // 8 tiles of 256 rows: activations and weights of a wave fit into L2
  constexpr int kPatience = 200000;  // clocks: the sharers of a tile run at the same time, unless the GPU is shared
  const Instance& instance = *plan.instance;
  const Schedule& s = plan.schedule;
  const int group_size = static_cast<int>(w.K / w.G);
  const int tiles_n = static_cast<int>((w.N + instance.block_n - 1) / instance.block_n);
  const int split_tiles = s.tiles_m * tiles_n - s.whole_tiles;
  WideArguments p = {};
  p.s = static_cast<const uint16_t*>(w.s);
  p.bias = x.bias;
  p.C = x.C;
  p.counters = static_cast<unsigned*>(x.workspace);
  p.partials = reinterpret_cast<float*>(static_cast<char*>(x.workspace) + MARLIN_CUDA_COUNTER_BYTES);
  p.weights_once = s.tiles_m == 1;
  p.early = x.early != 0;
  p.M = static_cast<int>(x.M);
  p.out_features = static_cast<int>(w.out_features);
  p.bf16_scales = w.scale_dtype == MARLIN_CUDA_BF16;
  p.step_groups = w.G == 1 ? 0 : group_size < kWideStep ? kWideStep / group_size : 1;
  p.group_shift = w.G > 1 && group_size == 2 * kWideStep;
  p.steps = s.steps;
  p.stages = plan.stages;
  p.tiles_m = s.tiles_m;
  p.raster = kRaster;
  p.whole_tiles = s.whole_tiles;
  p.whole_rounds = s.whole_tiles / s.blocks;
  p.whole_rest = s.whole_tiles % s.blocks;
  p.ranges = s.ranges;
  p.patience = kPatience;
  p.by_steps = Divisor(s.steps);
  p.by_split_steps = Divisor(std::max(1, split_tiles * s.steps));
  p.by_ranges = Divisor(std::max(1, s.ranges));
  p.by_group = Divisor(kRaster * tiles_n);
  p.by_raster = Divisor(kRaster);
  p.by_last_height = Divisor(std::max(1, s.tiles_m % kRaster));

  CUtensorMap activations_map, weights_map, scales_map = {}, zeros_map = {};
  MARLIN_RETURN_IF_ERROR(describe_activations(&activations_map, instance, w, x.A, x.M, x.lda));
  MARLIN_RETURN_IF_ERROR(describe_weights(&weights_map, instance, w, 1));
  MARLIN_RETURN_IF_ERROR(describe_scales(&scales_map, &zeros_map, instance, w, 1, p.step_groups));
  void* parameters[] = {&p, &activations_map, &weights_map, &scales_map, &zeros_map};
  cudaLaunchConfig_t launch = {};
  launch.gridDim = dim3(s.blocks);
  launch.blockDim = dim3(instance.threads);
  launch.dynamicSmemBytes = shared_bytes(instance, plan.stages);
  launch.stream = static_cast<cudaStream_t>(x.stream);
  cudaLaunchAttribute attribute = early_launch();
  launch.attrs = &attribute;
  launch.numAttrs = p.early;
  return cudaLaunchKernelExC(&launch, instance.kernels[kernel], parameters);
}

// A launch of gemm_sm80.cuh or gemm_sm90.cuh.
int launch_few(const Plan& plan, int kernel, const marlin_cuda_weights_t& w, const marlin_cuda_product_t& x) {
  const Instance& instance = *plan.instance;
  const Schedule& s = plan.schedule;
  const int group_size = static_cast<int>(w.K / w.G);
  GemmArguments arguments;
  arguments.A = x.A;
  arguments.B = static_cast<const uint4*>(w.B);
  arguments.s = static_cast<const uint16_t*>(w.s);
  arguments.zeros = w.zeros;
  arguments.bias = x.bias;
  arguments.C = x.C;
  arguments.arrived = static_cast<unsigned*>(x.workspace);
  arguments.partials = reinterpret_cast<float*>(static_cast<char*>(x.workspace) + MARLIN_CUDA_COUNTER_BYTES);
  arguments.M = static_cast<int>(x.M);
  arguments.N = static_cast<int>(w.N);
  arguments.K = static_cast<int>(w.K);
  arguments.in_features = static_cast<int>(w.in_features);
  arguments.out_features = static_cast<int>(w.out_features);
  arguments.bf16_scales = w.scale_dtype == MARLIN_CUDA_BF16;
  arguments.lda = x.lda;
  arguments.groups = static_cast<int>(w.G);
  arguments.group_shift = 31;
  if (w.G > 1)
    for (arguments.group_shift = 4; 1 << arguments.group_shift < group_size;) arguments.group_shift++;
  arguments.steps = s.steps;
  arguments.tiles_m = s.tiles_m;
  arguments.iterations = s.iterations;
  arguments.iterations_per_block = s.iterations_per_block;
  const int next = s.iterations_per_block == 0 ? s.blocks : 1;  // tiles
  arguments.next_n = next / s.tiles_m;
  arguments.next_m = next % s.tiles_m;
  arguments.stages = plan.stages;
  // A cluster of one block would be launched without clusters, where a kernel that lets the next one begin stops at a
  // cluster's barrier with an illegal instruction. It has a whole tile, as blocks without clusters may have.
  const bool shares = s.split <= kMostSplitK && s.split > 1;
  arguments.split_k = shares ? s.split : 0;
  arguments.parts = plan.parts;
  arguments.early = x.early != 0 && instance.loop == MainLoop::kSm90;

  CUtensorMap weights_map, activations_map;
  if (instance.loop == MainLoop::kSm90) {
    MARLIN_RETURN_IF_ERROR(describe_weights(&weights_map, instance, w, 1));
    MARLIN_RETURN_IF_ERROR(describe_activations(&activations_map, instance, w, x.A, x.M, x.lda));
  }
  void* parameters[] = {&arguments, &weights_map, &activations_map};
  cudaLaunchConfig_t launch = {};
  launch.gridDim = dim3(s.blocks);
  launch.blockDim = dim3(instance.threads);
  launch.dynamicSmemBytes = shared_bytes(instance, plan.stages);
  launch.stream = static_cast<cudaStream_t>(x.stream);
  cudaLaunchAttribute attributes[2];
  launch.attrs = attributes;
  if (instance.loop == MainLoop::kSm90 && shares) attributes[launch.numAttrs++] = cluster_of(s.split);
  if (arguments.early) attributes[launch.numAttrs++] = early_launch();
  return cudaLaunchKernelExC(&launch, instance.kernels[kernel], parameters);
}

}  // namespace
}  // namespace marlin

size_t marlin_cuda_workspace_bytes(int device) {
  using namespace marlin;
  Device facts;
  return find_device(device, &facts) == MARLIN_OK ? workspace_bytes(facts) : 0;
}

int marlin_cuda_instance_count(void) { return static_cast<int>(marlin::all_instances().size()); }

int marlin_cuda_instance(int index, marlin_cuda_instance_t* found) {
  using namespace marlin;
  if (found == nullptr) return MARLIN_CUDA_ERROR_NULL;
  if (index < 0 || index >= marlin_cuda_instance_count()) return MARLIN_CUDA_ERROR_VARIANT;
  const Instance& i = all_instances()[index];
  std::memset(found, 0, sizeof(*found));
  found->id = i.id;
  found->capability = i.loop == MainLoop::kSm80 ? 80 : 90;
  found->bits = i.bits;
  found->group_size = i.group_size;
  found->zero_points = i.zero_points;
  found->block_m = i.block_m;
  found->block_n = i.block_n;
  found->block_k = i.block_k;
  found->clusters = i.loop != MainLoop::kSm80;
  found->rounds_weights = i.rounds_weights;
  std::strncpy(found->name, i.name, sizeof(found->name) - 1);
  return MARLIN_OK;
}

int marlin_cuda_plan(const marlin_cuda_weights_t* weights, int64_t M, int device, int variant,
                     marlin_cuda_plan_t* found) {
  using namespace marlin;
  if (found == nullptr) return MARLIN_CUDA_ERROR_NULL;
  MARLIN_RETURN_IF_ERROR(check_weights(weights));
  MARLIN_RETURN_IF_ERROR(check_rows(M));
  Device facts;
  MARLIN_RETURN_IF_ERROR(find_device(device, &facts));
  DeviceGuard guard(device);
  MARLIN_RETURN_IF_ERROR(guard.error());
  Plan plan;
  MARLIN_RETURN_IF_ERROR(find_plan(M, *weights, facts, device, variant, &plan));
  const Problem problem = {M, weights->N, weights->K, weights->G, weights->zeros != nullptr};
  const CostModel model = cost_model(plan.instance->loop, facts);
  found->instance = plan.instance->id;
  found->stages = plan.stages;
  found->split = plan.schedule.split;
  found->blocks = plan.schedule.blocks;
  found->parts = plan.cut;
  found->rows = static_cast<int32_t>(plan.rows);
  found->us = plan.prediction.us;
  found->gemm_us = predict_gemm(model, problem, plan.prediction);
  found->dense_us = predict_dense(model, problem, weights->bits);
  return MARLIN_OK;
}

int marlin_cuda_choose(const marlin_cuda_weights_t* weights, int64_t M, int device) {
  marlin_cuda_plan_t plan;
  MARLIN_RETURN_IF_ERROR(marlin_cuda_plan(weights, M, device, 0, &plan));
  return plan.gemm_us <= plan.dense_us ? MARLIN_CUDA_USE_GEMM : MARLIN_CUDA_USE_DEQUANTIZE;
}

int marlin_cuda_gemm(const marlin_cuda_weights_t* weights, const marlin_cuda_product_t* product) {
  using namespace marlin;
  if (weights == nullptr || product == nullptr) return MARLIN_CUDA_ERROR_NULL;
  const marlin_cuda_weights_t& w = *weights;
  const marlin_cuda_product_t& x = *product;
  const int device = x.device, dtype = x.dtype;
  if (x.A == nullptr || w.B == nullptr || w.s == nullptr || x.C == nullptr || x.workspace == nullptr)
    return MARLIN_CUDA_ERROR_NULL;
  MARLIN_RETURN_IF_ERROR(check_rows(x.M));
  MARLIN_RETURN_IF_ERROR(check_weights(&w));
  if (x.lda < w.in_features || x.lda % 8 != 0 || w.in_features % 8 != 0) return MARLIN_CUDA_ERROR_STRIDE;
  if (dtype != MARLIN_CUDA_FP16 && dtype != MARLIN_CUDA_BF16) return MARLIN_CUDA_ERROR_DTYPE;
  if (!aligned16(x.A) || !aligned16(w.B) || !aligned16(w.s) || !aligned16(w.zeros) || !aligned16(x.bias) ||
      !aligned16(x.C) || !aligned16(x.workspace))
    return MARLIN_CUDA_ERROR_ALIGNMENT;
  Device facts;
  MARLIN_RETURN_IF_ERROR(find_device(device, &facts));
  if (x.workspace_bytes < workspace_bytes(facts)) return MARLIN_CUDA_ERROR_WORKSPACE;
  DeviceGuard guard(device);
  MARLIN_RETURN_IF_ERROR(guard.error());
  Plan plan;
  MARLIN_RETURN_IF_ERROR(find_plan(x.M, w, facts, device, x.variant, &plan));
  marlin_cuda_product_t piece = x;  // the rows of a launch; but in some batch-invariant products all of them
  for (int64_t first = 0; first < x.M; first += plan.rows) {
    if (x.M - first < plan.rows) MARLIN_RETURN_IF_ERROR(find_plan(x.M - first, w, facts, device, x.variant, &plan));
    piece.M = plan.rows;
    piece.A = static_cast<const uint16_t*>(x.A) + first * x.lda;
    piece.C = static_cast<uint16_t*>(x.C) + first * w.out_features;
    const Instance& instance = *plan.instance;
    // With one group scales are not multiplied before the end, where any type will do.
    int kernel = dtype;
    if (w.G == 1 && instance.kernels[kOneGroup] != nullptr)
      kernel += kOneGroup;
    else if (w.G > 1 && instance.rounds_weights && w.scale_dtype != dtype)
      kernel += kOtherScales;
    MARLIN_RETURN_IF_ERROR(allow_shared_memory(instance, kernel, facts, device));
    const auto launch = instance.loop == MainLoop::kSm90Wide ? launch_wide : launch_few;
    MARLIN_RETURN_IF_ERROR(launch(plan, kernel, w, piece));
  }
  return MARLIN_OK;
}
