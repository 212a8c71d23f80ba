#include "plan.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>

#include "gemm_sm90_wide.h"

namespace marlin {
namespace {

// What was found out about one device, for each instance.
struct DeviceState {
  struct Facts {
    std::atomic<bool> shared_memory[kKernels] = {};   // allowed, by kernel
    std::atomic<int> clusters[kMostSplitK + 1] = {};  // how many are resident + 1; 0: not asked yet
  };
  std::deque<Facts> instances{all_instances().size()};
};

DeviceState& state_of(int device) {
  static std::once_flag made[kMaxDevices];
  static DeviceState* states[kMaxDevices];  // never freed: other threads may launch while the process ends
  std::call_once(made[device], [&] { states[device] = new DeviceState; });
  return *states[device];
}

DeviceState::Facts& facts_of(const Instance& instance, int device) {
  return state_of(device).instances[&instance - all_instances().data()];
}

// If so many blocks share an SM.
int most_stages(const Instance& i, const Device& facts, int blocks) {
  constexpr int kReserved = 1024;  // for each block of an SM
  const int bytes = (facts.shared_bytes_per_block + kReserved) / blocks - kReserved;
  const int most = std::min(i.max_stages, (bytes - i.extra_bytes) / i.stage_bytes);
  return most - most % i.stage_multiple;
}

// Fewer than the instance is made for where shared memory is small.
int blocks_per_sm(const Instance& i, const Device& facts) {
  int blocks = i.loop == MainLoop::kSm80 ? i.blocks_per_sm : 1;
  while (blocks > 1 && most_stages(i, facts, blocks) < least_stages(i)) blocks--;
  return blocks;
}

int most_stages(const Instance& i, const Device& facts) { return most_stages(i, facts, blocks_per_sm(i, facts)); }

// Whether it can run here.
bool runs(const Instance& i, const Device& facts) {
  return (i.loop == MainLoop::kSm80 || facts.capability == 90) && most_stages(i, facts) >= least_stages(i);
}

bool has_sm90(const Device& facts) {
  return std::any_of(all_instances().begin(), all_instances().end(),
                     [&](const Instance& i) { return i.loop == MainLoop::kSm90 && runs(i, facts); });
}

// How many clusters of `size` blocks the device holds at once. A cluster lives inside one group of 16 or 18 SMs, some
// of which a chip may lack, so this is less than SMs / size and is asked of the driver (once). 0 when it will not say.
int resident_clusters(const Instance& i, int size, const Device& facts, int device) {
  if (size == 1) return facts.multiprocessors;
  std::atomic<int>& mine = facts_of(i, device).clusters[size];
  if (mine.load(std::memory_order_relaxed) == 0) {
    int count = 0;
    if (allow_shared_memory(i, 0, facts, device) == MARLIN_OK) {
      cudaLaunchConfig_t launch = {};
      launch.gridDim = dim3(facts.multiprocessors / size * size);
      launch.blockDim = dim3(i.threads);
      launch.dynamicSmemBytes = shared_bytes(i, most_stages(i, facts));
      cudaLaunchAttribute attribute = cluster_of(size);
      launch.attrs = &attribute;
      launch.numAttrs = 1;
      if (cudaOccupancyMaxActiveClusters(&count, i.kernels[0], &launch) != cudaSuccess) {
        cudaGetLastError();  // not the caller's concern
        count = 0;
      }
    }
    mine.store(count + 1, std::memory_order_relaxed);
  }
  return mine.load(std::memory_order_relaxed) - 1;
}

bool lay_out(const Instance& i, int split, bool forced, const Problem& problem, const Device& facts, int device,
             Plan* plan) {
  const bool wide = i.loop == MainLoop::kSm90Wide;
  const TileShape tile = {i.loop == MainLoop::kSm90,
                          wide,
                          i.block_m,
                          i.block_n,
                          i.block_k,
                          i.bits,
                          most_stages(i, facts),
                          blocks_per_sm(i, facts),
                          i.warps_m,
                          i.rounds_weights,
                          i.group_size == 0};
  const bool cluster = split <= kMostSplitK && tile.clusters;
  Schedule schedule;
  if (!make_schedule(tile, problem, split, forced, facts.multiprocessors,
                     cluster ? resident_clusters(i, split, facts, device) : 0, &schedule))
    return false;
  *plan = {&i, schedule, most_stages(i, facts), predict(cost_model(i.loop, facts), tile, problem, schedule), problem.M,
           1,  0};
  return true;
}

// Whether an instance takes these weights.
bool takes(const Instance& i, const marlin_cuda_weights_t& w, const Device& facts) {
  const int64_t group = w.G == 1 ? MARLIN_CUDA_GROUP_SIZE : w.K / w.G;
  const bool zeros = w.zeros != nullptr;
  return runs(i, facts) && i.bits == w.bits && (i.group_size == 0 || i.group_size == group) &&
         (i.zero_points == kEither || (i.zero_points == kAlways) == zeros);
}

// The rows of the smallest tile, of the candidates, that holds M; or of the largest.
template <typename Candidate>
int block_rows(int64_t M, Candidate candidate) {
  int least = 0, most = 0;
  for (const Instance& i : all_instances())
    if (candidate(i)) {
      if (i.block_m >= M && (least == 0 || i.block_m < least)) least = i.block_m;
      most = std::max(most, i.block_m);
    }
  return least != 0 ? least : most;
}

int make_plan(int64_t M, const marlin_cuda_weights_t& weights, const Device& facts, int device, int variant,
              Plan* best);

// ---- Batch-invariant products ----

// The fastest way that cuts K into `parts`. All instances that are `invariant` add up a row's products in the same order
// then, in gemm_sm90 whether a cluster shares a tile or a block does one part after the other. In gemm_sm80 blocks leave
// their sums in the workspace, so no more tiles can be shared than run at the same time: further rows take further
// launches.
bool cut_into(int parts, int64_t M, const marlin_cuda_weights_t& weights, const Device& facts, int device, Plan* best) {
  constexpr double kPartEnd = 4.5;  // us: a part's sums go to L2 and come back (4096 x 4096, 512 rows, on an H100)
  const MainLoop loop = has_sm90(facts) ? MainLoop::kSm90 : MainLoop::kSm80;
  const auto candidate = [&](const Instance& i) { return i.invariant && i.loop == loop && takes(i, weights, facts); };
  const int block_m = block_rows(M, candidate);
  bool found = false;
  for (const Instance& i : all_instances()) {
    if (!candidate(i) || (i.block_m != block_m && loop == MainLoop::kSm90)) continue;
    const auto offer = [&](int split, int64_t rows, int parts_in_turn) {
      const Problem problem = {rows, weights.N, weights.K, weights.G, weights.zeros != nullptr};
      Plan plan;
      if (!lay_out(i, split, true, problem, facts, device, &plan)) return;
      plan.cut = parts;
      plan.parts = parts_in_turn;
      plan.prediction.us +=
          kPartEnd * static_cast<double>((parts_in_turn - 1) * plan.schedule.busiest / plan.schedule.steps);
      plan.prediction.us *= static_cast<double>((M + rows - 1) / rows);
      if (!found || plan.prediction.us < best->prediction.us) *best = plan;
      found = true;
    };
    if (loop == MainLoop::kSm90) {
      offer(parts, M, 1);  // a cluster for each tile
      if (parts == 1 || i.parts_in_turn) offer(kDataParallel, M, parts);
    } else if (parts == 1) {
      offer(kDataParallel, M, 1);
    } else {
      const int64_t tiles_n = (weights.N + i.block_n - 1) / i.block_n;
      const int64_t rows = facts.multiprocessors * blocks_per_sm(i, facts) / (tiles_n * parts) * i.block_m;
      if (rows > 0) offer(parts, std::min(M, rows), 1);
    }
  }
  return found;
}

// K is cut into the number of parts that loses least, at the worst of some numbers of rows up to 64, on what would be
// chosen freely. It depends on the weights' sizes and kind, and on the GPU.
int make_invariant_plan(int64_t M, const marlin_cuda_weights_t& weights, const Device& facts, int device, Plan* best) {
  int parts = 0;
  double least = 0;
  for (int tried = 1; tried <= kMostSplitK; tried++) {
    double worst = 0;
    for (const int64_t rows : {1, 16, 32, 64}) {
      Plan cut, freely;
      if (!cut_into(tried, rows, weights, facts, device, &cut)) {
        worst = -1;
        break;
      }
      MARLIN_RETURN_IF_ERROR(make_plan(rows, weights, facts, device, 0, &freely));
      worst = std::max(worst, cut.prediction.us / freely.prediction.us);
    }
    if (worst < 0 || (parts != 0 && worst >= least)) continue;
    parts = tried;
    least = worst;
  }
  return parts != 0 && cut_into(parts, M, weights, facts, device, best) ? MARLIN_OK : MARLIN_CUDA_ERROR_VARIANT;
}

int make_plan(int64_t M, const marlin_cuda_weights_t& weights, const Device& facts, int device, int variant,
              Plan* best) {
  if (variant == MARLIN_CUDA_BATCH_INVARIANT) return make_invariant_plan(M, weights, facts, device, best);
  const Variant wanted(variant);
  if (variant < 0 || variant >> 20 != 0 || wanted.split >= kSplits) return MARLIN_CUDA_ERROR_VARIANT;
  // Up to so many rows memory is the limit, and codes stay exact integers.
  constexpr int64_t kFewRows = 64;
  const MainLoop loop = !has_sm90(facts) ? MainLoop::kSm80 : M > kFewRows ? MainLoop::kSm90Wide : MainLoop::kSm90;
  const bool zeros = weights.zeros != nullptr;
  const Problem problem = {M, weights.N, weights.K, weights.G, zeros};
  // Of those that fit the weights, the candidates; a variant may also ask for the others.
  const auto fits = [&](const Instance& i) { return takes(i, weights, facts); };
  const auto candidate = [&](const Instance& i) { return fits(i) && i.loop == loop; };
  const int block_m = block_rows(M, candidate);  // sm90 takes these alone
  bool found = false;
  for (const Instance& i : all_instances()) {
    if (wanted.id == 0 ? !candidate(i) || (i.block_m != block_m && loop == MainLoop::kSm90)
                       : !fits(i) || i.id != wanted.id)
      continue;
    for (int split = 1; split < kSplits; split++) {
      Plan plan;
      if ((wanted.split != 0 && wanted.split != split) ||
          !lay_out(i, split, wanted.split != 0, problem, facts, device, &plan))
        continue;
      if (!found || plan.prediction.us < best->prediction.us) *best = plan;
      found = true;
    }
  }
  if (!found) return MARLIN_CUDA_ERROR_VARIANT;
  if (wanted.stages != 0) {
    const int multiple = best->instance->stage_multiple;
    if (wanted.stages < least_stages(*best->instance) || wanted.stages > best->stages || wanted.stages % multiple != 0)
      return MARLIN_CUDA_ERROR_VARIANT;
    best->stages = wanted.stages;
  }
  return MARLIN_OK;
}

void print_plan(int64_t M, const marlin_cuda_weights_t& w, const Plan& plan) {
  static const bool wanted = [] {
    const char* value = std::getenv("MARLIN_PRINT_PLAN");
    return value != nullptr && std::strcmp(value, "") != 0 && std::strcmp(value, "0") != 0;
  }();
  if (!wanted) return;
  const Schedule& s = plan.schedule;
  char split[64];
  if (plan.parts > 1)
    std::snprintf(split, sizeof(split), "data-parallel, K in %d parts", plan.parts);
  else if (s.split <= kMostSplitK)
    std::snprintf(split, sizeof(split), "split-K by %d", s.split);
  else
    std::snprintf(split, sizeof(split), "%s", s.split == kStreamK ? "stream-K" : "data-parallel");
  std::fprintf(stderr,
               "marlin: M %lld N %lld K %lld, %d bits, %lld groups%s: %s, %d blocks, %s, %d steps a tile, %d stages, "
               "%.1f us predicted\n",
               static_cast<long long>(M), static_cast<long long>(w.N), static_cast<long long>(w.K), w.bits,
               static_cast<long long>(w.G), w.zeros == nullptr ? "" : " with zero points", plan.instance->name,
               s.blocks, split, s.steps, plan.stages, plan.prediction.us);
}

}  // namespace

const std::vector<Instance>& all_instances() {
  static const std::vector<Instance> all = [] {
    std::vector<Instance> found = sm80_b4_instances();
    const auto add = [&](const std::vector<Instance>& more) { found.insert(found.end(), more.begin(), more.end()); };
    add(sm80_b4_groups_instances());
    add(sm80_b8_instances());
    add(sm80_b8_zeros_instances());
#ifdef MARLIN_HAS_SM90
    add(sm90_b4_instances());
    add(sm90_b4_groups_instances());
    add(sm90_b8_instances());
    add(sm90_wide_b4_instances());
    add(sm90_wide_b4_zeros_instances());
    add(sm90_wide_b8_instances());
    add(sm90_wide_b8_zeros_instances());
#endif
    std::sort(found.begin(), found.end(), [](const Instance& a, const Instance& b) { return a.id < b.id; });
    return found;
  }();
  return all;
}

CostModel cost_model(MainLoop loop, const Device& facts) {
  const Gpu gpu = {facts.capability, facts.multiprocessors, facts.clock, facts.memory};
  if (loop == MainLoop::kSm80) return sm80_model(gpu);
  return loop == MainLoop::kSm90Wide ? sm90_wide_model(gpu) : sm90_model(gpu);
}

int least_stages(const Instance& i) {
  if (i.loop == MainLoop::kSm90Wide) return kWideMinStages;
  return i.loop == MainLoop::kSm80 ? i.min_stages : 2 * i.stage_multiple;
}

int shared_bytes(const Instance& i, int stages) { return stages * i.stage_bytes + i.extra_bytes; }

int allow_shared_memory(const Instance& i, int kernel, const Device& facts, int device) {
  std::atomic<bool>& mine = facts_of(i, device).shared_memory[kernel];
  if (mine.load(std::memory_order_relaxed)) return MARLIN_OK;
  MARLIN_RETURN_IF_ERROR(cudaFuncSetAttribute(i.kernels[kernel], cudaFuncAttributeMaxDynamicSharedMemorySize,
                                              facts.shared_bytes_per_block));
  mine.store(true, std::memory_order_relaxed);
  return MARLIN_OK;
}

cudaLaunchAttribute cluster_of(int size) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = size;
  attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  return attribute;
}

cudaLaunchAttribute early_launch() {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  return attribute;
}

// A model has a few shapes of layers, and a plan is the best of dozens of candidates: each thread looks its latest up.
int find_plan(int64_t M, const marlin_cuda_weights_t& weights, const Device& facts, int device, int variant,
              Plan* plan) {
  constexpr int kPlans = 64;  // 2 ^ 6: the place is the upper six bits of a hash
  struct Known {
    int64_t M, N, K, G;
    int32_t bits, zeros, device, variant;
    Plan plan;
  };
  thread_local Known known[kPlans] = {};  // M == 0: not taken
  const int32_t zeros = weights.zeros != nullptr;
  const uint64_t mixed = ((M * 31 + weights.N) * 31 + weights.K) * 31 + weights.G * 7 + weights.bits + zeros;
  Known& mine = known[(mixed * 0x9e3779b97f4a7c15) >> (64 - 6)];
  if (mine.M == M && mine.N == weights.N && mine.K == weights.K && mine.G == weights.G && mine.bits == weights.bits &&
      mine.zeros == zeros && mine.device == device && mine.variant == variant) {
    *plan = mine.plan;
    return MARLIN_OK;
  }
  MARLIN_RETURN_IF_ERROR(make_plan(M, weights, facts, device, variant, plan));
  print_plan(M, weights, *plan);
  mine = {M, weights.N, weights.K, weights.G, weights.bits, zeros, device, variant, *plan};
  return MARLIN_OK;
}

size_t workspace_bytes(const Device& facts) {
  size_t tile = 0;
  for (const Instance& i : all_instances())
    if (i.loop == MainLoop::kSm80 || facts.capability == 90)
      tile = std::max(tile, i.loop == MainLoop::kSm90Wide
                                ? kWidePartialFloats * sizeof(float)
                                : blocks_per_sm(i, facts) * static_cast<size_t>(i.block_m) * i.block_n * sizeof(float));
  return MARLIN_CUDA_COUNTER_BYTES + 2 * tile * facts.multiprocessors;
}

}  // namespace marlin
