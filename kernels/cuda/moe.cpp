// moe.cpp: a mixture of experts: which instances run its grouped products, where what is in between goes, and the
// launches (moe_steps.h).
#include "moe.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>

#include "cost_model.h"
#include "device.h"
#include "moe_steps.h"
#include "plan.h"
#include "tensor_maps.h"

namespace marlin {
namespace {

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

// ---- What a call needs ----

struct MoePlan {
  marlin_cuda_moe_layout_t layout;
  int64_t first_block, blocks;  // offsets, as in the layout
  int choices;
  MainLoop few;     // the loop of this device
  bool one_gather;  // gate and up read the same rows
};

bool has(const marlin_cuda_stack_t& stack) { return stack.weights.B != nullptr; }

// How many rows an expert has that has any, if choices fall evenly.
double rows_of_expert(const marlin_cuda_moe_t& x) {
  const double here = static_cast<double>(x.tokens) * x.top_k * x.positions / x.experts;
  return here / std::max(1.0, std::min<double>(x.positions, here));
}

// Rows of an output tile. Few rows wait for the memory; tiles that are less than full cost little more than full ones, so
// small tiles pay only where they leave less empty.
int choose_block_m(const marlin_cuda_moe_t& x, bool sm90) {
  const double rows = rows_of_expert(x);
  if (!sm90) return rows <= 20 ? 16 : 64;
  if (rows <= 5) return 8;
  if (rows <= 12) return 16;
  if (rows <= 27) return 32;
  return rows <= 45 ? 64 : 128;
}

int check_stack(const marlin_cuda_stack_t& stack, bool pointers) {
  const marlin_cuda_weights_t& w = stack.weights;
  MARLIN_RETURN_IF_ERROR(check_weights(&w));
  if (!pointers) return MARLIN_OK;
  if (w.B == nullptr || w.s == nullptr) return MARLIN_CUDA_ERROR_NULL;
  if (!aligned16(w.B) || !aligned16(w.s) || !aligned16(w.zeros) || !aligned16(stack.bias))
    return MARLIN_CUDA_ERROR_ALIGNMENT;
  return MARLIN_OK;
}

// Columns of what the second product reads, before they are brought into the order of stored rows.
int64_t inner_features(const marlin_cuda_experts_t& set, const marlin_cuda_moe_t& x) {
  return set.gate.weights.out_features / (x.joined == MARLIN_CUDA_NOT_JOINED ? 1 : 2);
}

int64_t up_to(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

int make_moe_plan(const marlin_cuda_experts_t* sets, int count, const marlin_cuda_moe_t& x, const Device& facts,
                  MoePlan* plan) {
  constexpr int64_t kLimit = int64_t{1} << 24;
  if (x.tokens <= 0 || x.top_k <= 0 || x.tokens * x.top_k > kLimit) return MARLIN_CUDA_ERROR_SHAPE;
  if (x.dtype != MARLIN_CUDA_FP16 && x.dtype != MARLIN_CUDA_BF16) return MARLIN_CUDA_ERROR_DTYPE;
  if (count <= 0 || x.positions <= 0 || x.positions > kMostPositions || x.experts <= 0)
    return MARLIN_CUDA_ERROR_EXPERTS;
  const marlin_cuda_experts_t& like = sets[0];
  const bool two = has(like.up);
  if (x.joined < MARLIN_CUDA_NOT_JOINED || x.joined > MARLIN_CUDA_ALTERNATING || (two && x.joined != 0) ||
      x.activation < MARLIN_CUDA_SILU || x.activation > MARLIN_CUDA_RELU_SQUARED)
    return MARLIN_CUDA_ERROR_EXPERTS;
  int64_t gathered = 0, hidden = 0;
  bool one_gather = true;
  int at = 0;
  for (int i = 0; i < count; i++) {
    const marlin_cuda_experts_t& set = sets[i];
    const marlin_cuda_weights_t &gate = set.gate.weights, &up = set.up.weights, &down = set.down.weights;
    MARLIN_RETURN_IF_ERROR(check_stack(set.gate, false));
    MARLIN_RETURN_IF_ERROR(check_stack(set.down, false));
    const int64_t inner = inner_features(set, x);
    if (two) MARLIN_RETURN_IF_ERROR(check_stack(set.up, false));
    if (set.first != at || set.last <= set.first || has(set.up) != two ||
        gate.in_features != like.gate.weights.in_features || gate.out_features != like.gate.weights.out_features ||
        down.out_features != like.down.weights.out_features || (down.perm == nullptr && down.in_features != inner) ||
        gate.out_features % (x.joined == 0 ? 1 : 2) != 0)
      return MARLIN_CUDA_ERROR_EXPERTS;
    if (two && (up.in_features != gate.in_features || up.out_features != gate.out_features))
      return MARLIN_CUDA_ERROR_EXPERTS;
    at = set.last;
    gathered = std::max(gathered, std::max(gate.K, two ? up.K : 0));
    hidden = std::max(hidden, down.K);
    if (two && gate.perm != up.perm) one_gather = false;
  }
  if (at != x.positions || x.ldx < like.gate.weights.in_features) return MARLIN_CUDA_ERROR_EXPERTS;

  const MoeVariant wanted(x.variant);
  const bool sm90 =
      !wanted.portable && std::any_of(moe_instances().begin(), moe_instances().end(),
                                      [&](const Instance& i) { return i.loop == MainLoop::kSm90 && runs(i, facts); });
  plan->few = sm90 ? MainLoop::kSm90 : MainLoop::kSm80;
  plan->choices = static_cast<int>(x.tokens * x.top_k);
  plan->one_gather = one_gather;
  marlin_cuda_moe_layout_t& layout = plan->layout;
  std::memset(&layout, 0, sizeof(layout));
  layout.block_m = wanted.block_m != 0 ? wanted.block_m : choose_block_m(x, sm90);
  if (wanted.invariant) layout.block_m = sm90 ? std::min(layout.block_m, 64) : 16;  // weights enter in one way
  layout.rounds_weights = sm90 ? layout.block_m > 64 || wanted.rounding : layout.block_m > 16;
  layout.gathered_columns = gathered;
  layout.hidden_columns = hidden;
  const int64_t n = plan->choices;
  const int64_t most_blocks = std::min<int64_t>(n, x.positions + n / layout.block_m);
  int64_t end = 0;
  const auto take = [&](int64_t bytes) {
    const int64_t at_byte = end;
    end += up_to(bytes, 256);
    return at_byte;
  };
  layout.rows = take(4 * n);
  layout.places = take(4 * n);
  layout.first_row = take(4 * (x.positions + 1));
  plan->first_block = take(4 * (x.positions + 1));
  plan->blocks = take(static_cast<int64_t>(sizeof(RowBlock)) * most_blocks);
  layout.gathered = layout.down = take(2 * n * std::max(gathered, like.down.weights.out_features));
  layout.gathered_up = one_gather ? layout.gathered : take(2 * n * gathered);
  layout.gate = take(2 * n * like.gate.weights.out_features);
  layout.up = two ? take(2 * n * like.up.weights.out_features) : layout.gate;
  layout.hidden = take(2 * n * hidden);
  layout.bytes = end;
  return MARLIN_OK;
}

// ---- One grouped product ----

struct Product {
  const marlin_cuda_stack_t* stack;
  int first, last;  // positions
  const void* A;
  int64_t lda;
  void* C;
  bool early;
};

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

}  // namespace
}  // namespace marlin

int marlin_cuda_moe_layout(const marlin_cuda_experts_t* sets, int count, const marlin_cuda_moe_t* call,
                           marlin_cuda_moe_layout_t* layout) {
  using namespace marlin;
  if (sets == nullptr || call == nullptr || layout == nullptr) return MARLIN_CUDA_ERROR_NULL;
  Device facts;
  MARLIN_RETURN_IF_ERROR(find_device(call->device, &facts));
  MoePlan plan;
  MARLIN_RETURN_IF_ERROR(make_moe_plan(sets, count, *call, facts, &plan));
  *layout = plan.layout;
  return MARLIN_OK;
}

int marlin_cuda_moe(const marlin_cuda_experts_t* sets, int count, const marlin_cuda_moe_t* call) {
  using namespace marlin;
  if (sets == nullptr || call == nullptr) return MARLIN_CUDA_ERROR_NULL;
  const marlin_cuda_moe_t& x = *call;
  Device facts;
  MARLIN_RETURN_IF_ERROR(find_device(x.device, &facts));
  MoePlan plan;
  MARLIN_RETURN_IF_ERROR(make_moe_plan(sets, count, x, facts, &plan));
  const marlin_cuda_moe_layout_t& layout = plan.layout;
  if (x.x == nullptr || x.ids == nullptr || x.out == nullptr || x.scratch == nullptr || x.workspace == nullptr ||
      (x.weights == nullptr && x.weights_on_input))
    return MARLIN_CUDA_ERROR_NULL;
  const bool two = has(sets[0].up);
  for (int i = 0; i < count; i++) {
    MARLIN_RETURN_IF_ERROR(check_stack(sets[i].gate, true));
    MARLIN_RETURN_IF_ERROR(check_stack(sets[i].down, true));
    if (two) MARLIN_RETURN_IF_ERROR(check_stack(sets[i].up, true));
  }
  if (!aligned16(x.out) || !aligned16(x.scratch) || !aligned16(x.workspace)) return MARLIN_CUDA_ERROR_ALIGNMENT;
  if (x.scratch_bytes < static_cast<size_t>(layout.bytes)) return MARLIN_CUDA_ERROR_SCRATCH;
  if (x.workspace_bytes < marlin_cuda_workspace_bytes(x.device)) return MARLIN_CUDA_ERROR_WORKSPACE;
  DeviceGuard guard(x.device);
  MARLIN_RETURN_IF_ERROR(guard.error());

  const MoeVariant wanted(x.variant);
  const Launcher launcher = {static_cast<cudaStream_t>(x.stream), facts.multiprocessors,
                             plan.few == MainLoop::kSm90 && !wanted.one_by_one};
  char* const scratch = static_cast<char*>(x.scratch);
  Routing routing = {};
  routing.ids = x.ids;
  routing.position = x.position;
  routing.experts = x.experts;
  routing.positions = x.positions;
  routing.wide_ids = x.wide_ids != 0;
  routing.choices = plan.choices;
  routing.top_k = x.top_k;
  routing.block_m = layout.block_m;
  routing.rows = reinterpret_cast<int32_t*>(scratch + layout.rows);
  routing.places = reinterpret_cast<int32_t*>(scratch + layout.places);
  routing.first_row = reinterpret_cast<int32_t*>(scratch + layout.first_row);
  routing.first_block = reinterpret_cast<int32_t*>(scratch + plan.first_block);
  routing.blocks = reinterpret_cast<RowBlock*>(scratch + plan.blocks);
  const RowList list = {routing.blocks, routing.first_block, 0, 0};

  const auto gather_for = [&](const marlin_cuda_experts_t& set, const marlin_cuda_stack_t& stack, int64_t to) {
    Gather g = {};
    g.x = x.x;
    g.pitch = x.ldx;
    g.perm = static_cast<const int32_t*>(stack.weights.perm);
    g.scale = x.weights_on_input ? x.weights : nullptr;
    g.A = scratch + to;
    g.in_features = static_cast<int>(stack.weights.in_features);
    g.K = static_cast<int>(layout.gathered_columns);
    g.first = set.first;
    g.last = set.last;
    g.vectors = aligned16(x.x) && x.ldx % 8 == 0 && g.in_features % 8 == 0;
    return g;
  };
  const bool fused = plan.choices <= kMostFused && count == 1 && plan.one_gather;
  if (fused) {
    const Gather g = gather_for(sets[0], sets[0].gate, layout.gathered);
    MARLIN_RETURN_IF_ERROR(launch_route(launcher, routing, &g, x.dtype));
  } else {
    MARLIN_RETURN_IF_ERROR(launch_route(launcher, routing, nullptr, x.dtype));
    for (int i = 0; i < count; i++) {
      MARLIN_RETURN_IF_ERROR(
          launch_gather(launcher, routing, gather_for(sets[i], sets[i].gate, layout.gathered), x.dtype));
      if (!plan.one_gather)
        MARLIN_RETURN_IF_ERROR(
            launch_gather(launcher, routing, gather_for(sets[i], sets[i].up, layout.gathered_up), x.dtype));
    }
  }
  const auto multiply = [&](const marlin_cuda_experts_t& set, const marlin_cuda_stack_t& stack, int64_t from,
                            int64_t lda, int64_t to, bool early) {
    return launch_product({&stack, set.first, set.last, scratch + from, lda, scratch + to, early}, plan, x, list, facts,
                          launcher);
  };
  for (int i = 0; i < count; i++) {
    MARLIN_RETURN_IF_ERROR(
        multiply(sets[i], sets[i].gate, layout.gathered, layout.gathered_columns, layout.gate, false));
    if (two)
      MARLIN_RETURN_IF_ERROR(
          multiply(sets[i], sets[i].up, layout.gathered_up, layout.gathered_columns, layout.up, false));
  }
  for (int i = 0; i < count; i++) {
    const marlin_cuda_weights_t& down = sets[i].down.weights;
    Activate a = {};
    const auto* const gate = reinterpret_cast<const uint16_t*>(scratch + layout.gate);
    a.gate = gate;
    a.pitch = sets[i].gate.weights.out_features;
    a.step = x.joined == MARLIN_CUDA_ALTERNATING ? 2 : 1;
    a.up = two                                   ? scratch + layout.up
           : x.joined == MARLIN_CUDA_JOINED      ? static_cast<const void*>(gate + inner_features(sets[i], x))
           : x.joined == MARLIN_CUDA_ALTERNATING ? gate + 1
                                                 : nullptr;
    a.perm = static_cast<const int32_t*>(down.perm);
    a.H = scratch + layout.hidden;
    a.in_features = static_cast<int>(down.in_features);
    a.K = static_cast<int>(layout.hidden_columns);
    a.first = sets[i].first;
    a.last = sets[i].last;
    a.kind = x.activation;
    a.limit = x.limit;
    a.alpha = x.alpha;
    a.beta = x.beta;
    a.vectors = a.step == 1 && a.in_features % 8 == 0 && a.pitch % 8 == 0;
    MARLIN_RETURN_IF_ERROR(launch_activate(launcher, routing, a, x.dtype));
  }
  // The list has been there since before the first product, which had ended when the activation began.
  for (int i = 0; i < count; i++)
    MARLIN_RETURN_IF_ERROR(multiply(sets[i], sets[i].down, layout.hidden, layout.hidden_columns, layout.down, true));
  Sum sum = {};
  sum.Y = scratch + layout.down;
  sum.weights = x.weights_on_input ? nullptr : x.weights;
  sum.out = x.out;
  sum.tokens = static_cast<int>(x.tokens);
  sum.columns = static_cast<int>(sets[0].down.weights.out_features);
  return launch_sum(launcher, routing, sum, x.dtype);
}
