#include "cost_model.h"

#include <algorithm>
#include <cmath>

namespace marlin {
namespace {

constexpr int64_t kMaxIterations = 0x3fffffff;  // they are counted in 32 bits
constexpr int64_t kMaxCounters = 2048;          // blocks that may share tiles: MARLIN_CUDA_COUNTER_BYTES / 4

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Fitted to 4160 timings on one H100 80GB (4 layers, 8 kinds of weights, 1 to 512 rows, each instance and split): there
// the choice was 0.9% slower than the best on average and 11% at most.
CostModel sm90_on_h100() {
  CostModel m = {};
  m.launch = 3.5;
  m.memory = 3.2e6;
  m.step = 0.09;
  m.step_column = 6.3e-4;
  m.step_output = 3.6e-5;
  m.sm_bytes = 1e30;
  m.group = 0.076;
  m.group_output = 2.7e-6;
  m.zero_points = 0.023;
  m.cluster_rank = 0.56;
  m.cluster_kb = 0.023;
  m.wave = 4.4;
  m.shared = 0.44;
  m.shared_kb = 0.043;
  m.misaligned = 1.3;
  m.misaligned_kb = 0.19;
  m.stream_k = 1;
  m.product_flops = 540e6;  // with groups of 128
  m.dense_launches = 5.0;
  m.dense_memory = 2.45e6;
  m.dense_flops = 690e6;
  return m;
}

// Fitted to 832 timings on an H100 80GB (6 layers, 4 kinds of weights, 128 to 2048 rows, each tile and split; they are in
// benchmarks/cost_model): there the choice was 0.2% slower than the best on average and 4% at most.
CostModel sm90_wide_on_h100() {
  CostModel m = sm90_on_h100();
  m.launch = 3.0;
  m.clock = 1754;
  const double floors[3][2][2] = {{{500, 631}, {559, 589}}, {{550, 826}, {710, 954}}, {{550, 997}, {1131, 1072}}};
  std::copy(&floors[0][0][0], &floors[0][0][0] + 12, &m.step_floor[0][0][0]);
  m.tile_end = 1000;
  m.tile_end_output = 0.05;
  m.exchange = 2930;
  m.exchange_output = 0.295;
  m.exchange_misaligned = 2.0;
  m.stream_k = 1.06;
  m.product_flops = 732e6;
  m.dense_flops = 670e6;  // cuBLAS's and this kernel's times lie within 3% of each other on large products
  return m;
}

// Fitted to 2880 timings on an H200 (benchmarks/cost_model: 6 layers, 4 kinds of weights, 1 to 64 rows, each instance and
// split): there the choice was 0.5% slower than the best on average and 6% at most.
CostModel sm90_on_h200() {
  CostModel m = sm90_on_h100();
  m.launch = 3.62;
  m.memory = 4.186e6;
  m.step = 0.1262;
  m.step_column = 4.955e-4;
  m.step_output = 3.658e-5;
  m.group = 0.09288;
  m.group_output = 6.6e-9;
  m.zero_points = 0.01469;
  m.cluster_rank = 0.4438;
  m.cluster_kb = 0.03272;
  m.wave = 3.253;
  m.shared = 0.5052;
  m.shared_kb = 0.02723;
  m.misaligned = 0.004541;
  m.misaligned_kb = 0.22;
  return m;
}

// Fitted to 1056 timings on an H200 (6 layers, 4 kinds of weights, 128 to 8192 rows; of products that power limits some
// tiles and splits, each behind 50 ms of its own): there the choice was 0.2% slower than the best on average and 4% at
// most. There the tile that copies least is ahead by some 2%, and ranges for a last wave that is not full by as much
// again, while L2 holds the activations.
CostModel sm90_wide_on_h200() {
  CostModel m = sm90_wide_on_h100();
  m.launch = 2.225;
  m.memory = 3.351e6;
  m.clock = 1637;
  m.step_floor[1][0][1] = 853;
  m.step_floor[1][1][0] = 702;
  m.step_floor[1][1][1] = 887;
  m.step_floor[2][0][1] = 890;
  m.step_floor[2][1][0] = 754;
  m.step_floor[2][1][1] = 1028;
  m.stream_k = 0.9842;
  m.beyond_l2 = 0.877;
  m.product_flops = 919e6;
  m.copied_kb = 4.77e-4;
  return m;
}

bool has_memory_of_h200(const Gpu& gpu) {
  constexpr double kH100 = 3.35e6, kH200 = 4.9e6;  // bytes per us, from the clock and width of the memory's bus
  return gpu.memory > (kH100 + kH200) / 2;
}

// Fitted to gemm_sm80 forced on an H200 (benchmarks/cost_model).
CostModel sm80_on_h200() {
  CostModel m = {};
  m.launch = 0.5514;
  m.memory = 4.425e+06;
  m.step = 0.3844;
  m.step_weights = 0.019;
  m.step_column = 3.421e-07;
  m.step_output = 2.102e-06;
  m.step_product = 3.018e-07;
  m.sm_bytes = 3.64e+04;
  m.shared = 3.463;
  m.shared_kb = 0.01708;
  m.whole_kb = 0.009252;
  m.misaligned = 1.657;
  m.misaligned_kb = 0.006574;
  m.stream_k = 1.013;
  m.any_groups = 0.1758;
  m.group = 0.009535;
  m.group_output = 7.409e-07;
  m.zero_points = 0.01688;
  m.product_flops = 380e6;
  m.dense_launches = 4.0;
  m.dense_memory = 3.58e6;  // as far from the datasheet's as on an H100
  m.dense_flops = 690e6;
  return m;
}

int64_t groups_in_step(const TileShape& tile, const Problem& x) {
  return x.G == 1 ? 1 : std::max<int64_t>(1, tile.block_k * x.G / x.K);
}

double tile_kb(const TileShape& tile) { return tile.block_m * tile.block_n * 4 / 1024.0; }

}  // namespace

CostModel sm90_model(const Gpu& gpu) { return has_memory_of_h200(gpu) ? sm90_on_h200() : sm90_on_h100(); }
CostModel sm90_wide_model(const Gpu& gpu) {
  return has_memory_of_h200(gpu) ? sm90_wide_on_h200() : sm90_wide_on_h100();
}

CostModel sm80_model(const Gpu& gpu) {
  CostModel m = sm80_on_h200();
  constexpr double kClock = 1755, kMemory = 4.9e6;  // of that H200: cycles and bytes per us
  m.memory *= gpu.memory / kMemory;
  m.dense_memory *= gpu.memory / kMemory;
  if (gpu.capability == 90) return m;
  const double slower = kClock / gpu.clock;
  for (double* time : {&m.step, &m.step_weights, &m.step_product, &m.any_groups, &m.group, &m.group_output,
                       &m.zero_points, &m.shared, &m.shared_kb, &m.whole_kb, &m.misaligned, &m.misaligned_kb})
    *time *= slower;
  m.sm_bytes /= slower;
  // Products of 16-bit numbers, summed in fp32, that an SM's tensor cores do in a cycle by mma.sync: 1024 on an A100 and
  // (a guess) a B200; 512 on an A10 or L4. GeForce cards do half of that, which cannot be told from here.
  const double products = gpu.capability == 80 || gpu.capability / 10 == 10 ? 1024 : 512;
  m.step_product = std::max(m.step_product, 1 / (products * gpu.clock));
  const double flops = 2 * products * gpu.clock * gpu.multiprocessors;
  constexpr double kReached = 0.7;  // of the datasheet's, by large products, in this kernel and in cuBLAS about alike
  m.product_flops = m.dense_flops = kReached * flops;
  return m;
}

namespace {

bool make_wide_schedule(const TileShape& tile, const Problem& x, int split, int multiprocessors, Schedule* schedule) {
  const int64_t steps = ceil_div(x.K, tile.block_k), tiles_m = ceil_div(x.M, tile.block_m);
  const int64_t tiles = tiles_m * ceil_div(x.N, tile.block_n);
  if (tiles * steps > kMaxIterations) return false;
  Schedule s = {};
  s.split = split;
  s.steps = static_cast<int>(steps);
  s.tiles_m = static_cast<int>(tiles_m);
  s.iterations = static_cast<int>(tiles * steps);
  if (split == 1 || split == kDataParallel) {
    s.split = kDataParallel;
    s.waves = ceil_div(tiles, multiprocessors);
    s.blocks = static_cast<int>(ceil_div(tiles, s.waves));  // the fewest that take as many waves: less power
    s.whole_tiles = static_cast<int>(tiles);
    s.busiest = s.waves * steps;
  } else {
    constexpr int64_t kFewestSteps = 2;  // of a part, or the exchange costs more than it gains
    const int64_t rest = tiles % multiprocessors;
    const int64_t most = std::min<int64_t>(multiprocessors, rest * (steps / kFewestSteps));
    const int64_t parts = split == kStreamK ? most : rest * split;
    if (rest == 0 || parts <= rest || parts > most) return false;
    // Positions times ranges are divided in 31 bits, and each of the split tiles has at most 12 counters.
    if ((rest * steps + 1) * parts >= int64_t{1} << 31 || rest * 12 > kMaxCounters) return false;
    s.whole_tiles = static_cast<int>(tiles - rest);
    s.ranges = static_cast<int>(parts);
    s.blocks = s.whole_tiles > 0 ? multiprocessors : s.ranges;
    s.waves = tiles / multiprocessors;
    s.busiest = s.waves * steps + ceil_div(rest * steps, parts);
  }
  *schedule = s;
  return true;
}

Prediction predict_wide(const CostModel& m, const TileShape& tile, double reading, const Schedule& schedule,
                        const Problem& x) {
  const double outputs = static_cast<double>(tile.block_m) * tile.block_n;
  const double flops_per_cycle = 4096;
  const double tensor = 2 * outputs * tile.block_k / flops_per_cycle;
  const double floor = m.step_floor[tile.block_n / 64 - 2][tile.bits == 8][x.zeros];
  const double step = std::pow(std::pow(tensor, 5) + std::pow(floor, 5), 0.2);
  const double end = m.tile_end + m.tile_end_output * outputs;
  double cycles = static_cast<double>(schedule.busiest) * step + static_cast<double>(schedule.waves) * end;
  if (schedule.ranges > 0) {
    const int64_t tiles = schedule.iterations / schedule.steps - schedule.whole_tiles;
    const double sharers = static_cast<double>(schedule.ranges) / static_cast<double>(tiles);
    const bool aligned = schedule.ranges % tiles == 0;
    if (!aligned) {
      // Ranges are at different places of K at a time, so L2 should hold all activations: two halves of 25 MB.
      constexpr double kFits = 20e6, kSpills = 55e6;
      const double beyond = (x.M * x.K * 2.0 - kFits) / (kSpills - kFits);
      const double range = std::ceil(static_cast<double>(tiles * schedule.steps) / schedule.ranges) * step;
      cycles = cycles * m.stream_k + range * m.beyond_l2 * std::clamp(beyond, 0.0, 1.0);
    }
    cycles += (aligned ? 1 : m.exchange_misaligned) *
              (m.exchange + m.exchange_output * outputs * (1 - 1 / (sharers + (aligned ? 0 : 1))));
    cycles += m.tile_end + m.tile_end_output * outputs / sharers;
  }
  // Large products are limited by power, to as many flops in a time, fewer where more is copied for them. Where two of
  // the three are about equal, each hides the others only in part.
  const double flops = 2.0 * x.M * static_cast<double>(x.N) * static_cast<double>(x.K);
  const double copied = tile.block_k * (tile.block_m * 2 + tile.block_n * tile.bits / 8.0) / 1024 * (32768 / outputs);
  const double power = flops / m.product_flops * (1 + m.copied_kb * copied);
  const double fourths = std::pow(cycles / m.clock, 4) + std::pow(power, 4) + std::pow(reading, 4);
  return {m.launch + std::pow(fourths, 0.25), step / tensor};
}

}  // namespace

bool make_schedule(const TileShape& tile, const Problem& x, int split, bool forced, int multiprocessors,
                   int resident_tiles, Schedule* schedule) {
  if (tile.wide) return make_wide_schedule(tile, x, split, multiprocessors, schedule);
  const int64_t steps = ceil_div(x.K, tile.block_k), tiles_m = ceil_div(x.M, tile.block_m);
  const int64_t tiles = tiles_m * ceil_div(x.N, tile.block_n), iterations = tiles * steps;
  if (iterations > kMaxIterations) return false;
  int64_t blocks, per_block = steps, waves = 1, busiest;  // a cluster's range is its tile's
  const int64_t resident = static_cast<int64_t>(multiprocessors) * tile.blocks;
  if (!tile.clusters) resident_tiles = static_cast<int>(resident / split);
  if (split <= kMostSplitK) {
    if (split > steps || resident_tiles < 1 || (split == 1 && !tile.clusters)) return false;
    waves = ceil_div(tiles, resident_tiles);
    blocks = tiles * split;
    busiest = waves * ceil_div(steps, split);
    if (!tile.clusters && (waves > 1 || blocks > kMaxCounters)) return false;  // the workspace is for those resident
  } else {
    if (split == kDataParallel) {
      blocks = std::min<int64_t>(tiles, resident);
      per_block = 0;
      busiest = ceil_div(tiles, blocks) * steps;
    } else {
      // Ranges scatter the blocks over the matrices; with many rows, activations then fall out of L2.
      const int most_tiles_m = tile.clusters ? 4 : 64;
      if (tiles_m > most_tiles_m && !forced) return false;
      busiest = per_block = ceil_div(iterations, resident);
      blocks = ceil_div(iterations, per_block);
    }
    if (blocks > kMaxCounters) return false;
  }
  if (blocks > 0x7fffffff) return false;
  *schedule = {split,
               static_cast<int>(blocks),
               static_cast<int>(steps),
               static_cast<int>(tiles_m),
               static_cast<int>(iterations),
               static_cast<int>(per_block),
               waves,
               busiest,
               0,
               0,
               static_cast<int>(std::min<int64_t>(tile.blocks, ceil_div(blocks, multiprocessors)))};
  return true;
}

Prediction predict(const CostModel& m, const TileShape& tile, const Problem& x, const Schedule& schedule) {
  const double weight_bytes = tile.bits / 8.0;
  const double group_bytes = 2 + (x.zeros ? weight_bytes : 0);  // for each column
  const double reading =
      (x.K * x.N * weight_bytes + x.G * x.N * group_bytes + x.M * x.K * 2.0 + x.M * x.N * 2.0) / m.memory;
  if (tile.wide) return predict_wide(m, tile, reading, schedule, x);

  const double rows = static_cast<double>(std::min<int64_t>(x.M, tile.block_m));
  const int64_t groups = groups_in_step(tile, x);
  const double step_bytes =
      schedule.per_sm * (tile.block_k * (tile.block_n * weight_bytes + rows * 2) + groups * tile.block_n * group_bytes);
  const double outputs = static_cast<double>(tile.block_m) * tile.block_n;
  constexpr double kTwoStages = 1.3;  // times longer: nothing is under way while a step is waited for (a guess)
  // Blocks that share an SM hide each other's chains of instructions, and take their products in turn.
  const double plain =
      (m.step + schedule.per_sm *
                    (m.step_column * tile.block_n + m.step_output * outputs + m.step_product * outputs * tile.block_k +
                     m.step_weights * tile.decodes * tile.block_n * tile.block_k * weight_bytes / 1024)) *
      (tile.stages == 2 ? kTwoStages : 1);
  const double of_group = (tile.scaled ? 0 : m.group) + m.group_output * outputs;
  const double grouped = plain + (tile.any_groups && !tile.scaled ? m.any_groups : 0) + (groups - 1) * of_group +
                         (x.zeros ? schedule.per_sm * groups * m.zero_points : 0);
  const double stepping =
      schedule.busiest * std::max(step_bytes / m.sm_bytes, grouped) * (schedule.split == kStreamK ? m.stream_k : 1);

  double ends = 0;
  const int64_t steps = schedule.steps, per_block = schedule.iterations_per_block;
  if (schedule.split <= kMostSplitK && !tile.clusters) {
    ends = m.shared + m.shared_kb * tile_kb(tile) * schedule.split * schedule.per_sm;
  } else if (schedule.split == kDataParallel) {
    const int64_t tiles = schedule.iterations / steps;
    ends = m.whole_kb * tile_kb(tile) * static_cast<double>(ceil_div(tiles, schedule.blocks) - 1);
  } else if (schedule.split <= kMostSplitK) {
    ends = m.cluster_rank * schedule.split + (schedule.split > 1 ? m.cluster_kb * tile_kb(tile) : 0) +
           m.wave * static_cast<double>(schedule.waves - 1);
  } else if (schedule.split == kStreamK && per_block % steps != 0) {
    const bool aligned = steps % per_block == 0;
    const double sharing = static_cast<double>(ceil_div(steps, per_block) + (aligned ? 0 : 1));
    ends = m.shared + m.shared_kb * tile_kb(tile) * sharing * (tile.clusters ? 1 : schedule.per_sm) +
           (aligned ? 0 : m.misaligned + m.misaligned_kb * tile_kb(tile));
  }
  const double reading2 = reading * reading, stepping2 = stepping * stepping;
  return {m.launch + std::sqrt(std::sqrt(reading2 * reading2 + stepping2 * stepping2)) + ends, grouped / plain};
}

double predict_gemm(const CostModel& m, const Problem& x, const Prediction& prediction) {
  const double flops = 2.0 * x.M * static_cast<double>(x.N) * static_cast<double>(x.K);
  return std::max(prediction.us, flops * prediction.slowdown / m.product_flops);
}

double predict_dense(const CostModel& m, const Problem& x, int bits) {
  const double size = static_cast<double>(x.N) * static_cast<double>(x.K);
  return m.dense_launches + (2 + bits / 8.0) * size / m.dense_memory + 2.0 * x.M * size / m.dense_flops;
}

}  // namespace marlin

#ifdef MARLIN_COST_MODEL_LIBRARY
// For the tests and benchmarks/cost_model, which compile this file by itself.
extern "C" {
// The constants of a loop (0: gemm_sm80, 1: gemm_sm90, 2: gemm_sm90_wide) on a Hopper GPU with that memory, bytes per us.
void marlin_cost_model_constants(int loop, double memory, marlin::CostModel* model) {
  const marlin::Gpu gpu = {90, 132, 1755, memory};
  *model = loop == 0 ? marlin::sm80_model(gpu) : loop == 1 ? marlin::sm90_model(gpu) : marlin::sm90_wide_model(gpu);
}

// The predicted times in us of many schedules; infinite where the library would not lay the work out so. `clusters`: how
// many clusters of 1 .. kMostSplitK blocks the GPU holds at once.
void marlin_cost_model_predict(const marlin::CostModel* model, const marlin::TileShape* tiles,
                               const marlin::Problem* problems, const int* splits, int count, int multiprocessors,
                               const int* clusters, double* us) {
  for (int i = 0; i < count; i++) {
    marlin::Schedule schedule;
    const int resident = splits[i] <= marlin::kMostSplitK ? clusters[splits[i] - 1] : 0;
    const bool can =
        marlin::make_schedule(tiles[i], problems[i], splits[i], false, multiprocessors, resident, &schedule);
    us[i] = can ? marlin::predict(*model, tiles[i], problems[i], schedule).us : INFINITY;
  }
}
}
#endif
