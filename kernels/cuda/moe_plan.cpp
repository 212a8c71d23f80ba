// moe_plan.cpp: what a mixture of experts needs: rows of an output tile, and where what is in between goes.
#include <algorithm>
#include <cstring>

#include "moe.h"

namespace marlin {
namespace {

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

int64_t up_to(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

}  // namespace

double rows_of_expert(const marlin_cuda_moe_t& x) {
  const double here = static_cast<double>(x.tokens) * x.top_k * x.positions / x.experts;
  return here / std::max(1.0, std::min<double>(x.positions, here));
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

int64_t inner_features(const marlin_cuda_experts_t& set, const marlin_cuda_moe_t& x) {
  return set.gate.weights.out_features / (x.joined == MARLIN_CUDA_NOT_JOINED ? 1 : 2);
}

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
  const bool sm90 = !wanted.portable && has_sm90_instances(facts);
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

}  // namespace marlin
