// moe.cpp: a mixture of experts: its steps launched one after the other.
#include "moe.h"

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
