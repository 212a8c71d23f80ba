// gemm.cu: which instance of which kernel runs, how the work is split, and the launch.
#include <algorithm>
#include <atomic>
#include <cmath>

#include "device.h"
#include "gemm.cuh"
#include "hopper.cuh"

namespace marlin {
namespace {

// One instance of a kernel template, and the numbers of it that the host needs.
struct Config {
  const void* kernels[2];  // by dtype
  bool hopper;             // takes tensor maps and clusters, runs on capability 9.0 only
  int threads, block_m, block_n, block_k;
  int stage_bytes, extra_bytes;  // of shared memory: each pipeline stage, and beside the stages
  int most_stages, stage_multiple;
  int line_bytes;  // hopper: of the lines that weights are copied as
  int bits;
  int group;      // rows that share a scale; 128 is also for G == 1; 0: any number
  bool extended;  // takes zero points, 8 bits and groups below 128
};

template <typename S>
Config generic() {
  return {{reinterpret_cast<const void*>(&gemm_kernel<__half, S>),
           reinterpret_cast<const void*>(&gemm_kernel<__nv_bfloat16, S>)},
          false,
          S::kThreads,
          S::kBlockM,
          S::kBlockN,
          S::kBlockK,
          S::kStageBytes,
          S::kExtraBytes,
          S::kMaxStages,
          1,
          0,
          S::BITS,
          S::kExtended ? 0 : MARLIN_CUDA_GROUP_SIZE,
          S::kExtended};
}

template <typename S>
Config hopper() {
  return {{reinterpret_cast<const void*>(&hopper_kernel<__half, S>),
           reinterpret_cast<const void*>(&hopper_kernel<__nv_bfloat16, S>)},
          true,
          S::kThreads,
          S::kBlockM,
          S::kBlockN,
          S::kBlockK,
          S::kStageBytes,
          S::kExtraBytes,
          S::kMaxStages,
          S::WK,
          S::kLineBytes,
          S::BITS,
          S::GROUP,
          S::kExtended};
}

// The Hopper kernel for the extended weights of BITS and GROUP; with 4 bits, wide slabs also for more rows.
#define MARLIN_HOPPER(BITS, GROUP)                          \
  hopper<HopperShape<1, 2, 1, 2, true, BITS, GROUP>>(),     \
      hopper<HopperShape<1, 4, 1, 2, true, BITS, GROUP>>(), \
      hopper<HopperShape<2, 2, 1, 2, true, BITS, GROUP>>(), \
      hopper<HopperShape<4, 2, 1, 2, true, BITS, GROUP>>(), \
      hopper<HopperShape<8, 2, 1, 2, true, BITS, GROUP>>(), \
      hopper<HopperShape<8, 2, 2, 1, true, BITS, GROUP>>(), \
      hopper<HopperShape<16, 1, 2, 1, true, BITS, GROUP>>()
#define MARLIN_HOPPER_WIDE(GROUP) \
  hopper<HopperShape<2, 4, 1, 2, true, 4, GROUP>>(), hopper<HopperShape<4, 4, 1, 2, true, 4, GROUP>>()

// A path for another architecture is another kind here: a kernel that takes GemmArguments, its entries in this table,
// and its question beside `has_hopper`.
const Config kConfigs[] = {
    // GemmShape<MB, WM, WN, WK, KT>: eight warps each. Few rows leave warps for more of N and K.
    generic<GemmShape<1, 1, 4, 2, 4>>(),  // 1:    8 x 256
    generic<GemmShape<2, 1, 4, 2, 4>>(),  // 2:   16 x 256
    generic<GemmShape<4, 1, 4, 2, 4>>(),  // 3:   32 x 256
    generic<GemmShape<4, 2, 4, 1, 4>>(),  // 4:   64 x 256
    generic<GemmShape<4, 4, 2, 1, 4>>(),  // 5:  128 x 128
    // HopperShape<MB, J, WN, WK>: two warpgroups that multiply. Wide slabs read activations less often, narrow ones
    // make more tiles and smaller sums; which is better depends on N (see lay_out).
    hopper<HopperShape<1, 2, 1, 2>>(),   // 6:    8 x 128
    hopper<HopperShape<1, 4, 1, 2>>(),   // 7:    8 x 256
    hopper<HopperShape<2, 2, 1, 2>>(),   // 8:   16 x 128
    hopper<HopperShape<2, 4, 1, 2>>(),   // 9:   16 x 256
    hopper<HopperShape<4, 2, 1, 2>>(),   // 10:  32 x 128
    hopper<HopperShape<4, 4, 1, 2>>(),   // 11:  32 x 256
    hopper<HopperShape<8, 2, 1, 2>>(),   // 12:  64 x 128
    hopper<HopperShape<8, 2, 2, 1>>(),   // 13:  64 x 256
    hopper<HopperShape<16, 1, 2, 1>>(),  // 14: 128 x 128
    // The extended ones: the generic kernel again, on every GPU.
    generic<GemmShape<1, 1, 4, 2, 4, 4, true>>(),  // 15:    8 x 256
    generic<GemmShape<2, 1, 4, 2, 4, 4, true>>(),  // 16:   16 x 256
    generic<GemmShape<4, 2, 4, 1, 4, 4, true>>(),  // 17:   64 x 256
    generic<GemmShape<4, 4, 2, 1, 4, 4, true>>(),  // 18:  128 x 128
    generic<GemmShape<1, 1, 4, 2, 4, 8, true>>(),  // 19:    8 x 256, and so on with 8 bits
    generic<GemmShape<2, 1, 4, 2, 4, 8, true>>(),  // 20:   16 x 256
    generic<GemmShape<4, 2, 4, 1, 4, 8, true>>(),  // 21:   64 x 256
    generic<GemmShape<4, 4, 2, 1, 4, 8, true>>(),  // 22:  128 x 128
    // The extended ones on Hopper.
    MARLIN_HOPPER(4, 128), MARLIN_HOPPER_WIDE(128),  // 23 .. 31
    MARLIN_HOPPER(4, 64), MARLIN_HOPPER_WIDE(64),    // 32 .. 40
    MARLIN_HOPPER(4, 32), MARLIN_HOPPER_WIDE(32),    // 41 .. 49
    MARLIN_HOPPER(4, 16), MARLIN_HOPPER_WIDE(16),    // 50 .. 58
    MARLIN_HOPPER(8, 128),                           // 59 .. 65
    MARLIN_HOPPER(8, 64),                            // 66 .. 72
    MARLIN_HOPPER(8, 32),                            // 73 .. 79
    MARLIN_HOPPER(8, 16),                            // 80 .. 86
};
constexpr int kConfigCount = sizeof(kConfigs) / sizeof(kConfigs[0]);
constexpr int kSomeHopper = 13;  // the index of a Hopper one
constexpr int kMostRows = 128;  // the largest block_m

// Whether the Hopper kernel can run: on capability 9.0, if the library was built for sm_90a. Built for less, the kernel
// is a stub, which shows by its registers: it needs hardly any, the kernel itself 168. `device` is current.
bool has_hopper(const Device& facts, int device) {
  if (facts.capability != 90) return false;
  static std::atomic<int> known[kMaxDevices];  // 0: not asked yet, 1: no, 2: yes
  if (known[device].load(std::memory_order_relaxed) == 0) {
    constexpr int kMoreThanAStub = 64;
    cudaFuncAttributes attributes = {};
    const Config& c = kConfigs[kSomeHopper];
    const bool built =
        cudaFuncGetAttributes(&attributes, c.kernels[0]) == cudaSuccess && attributes.numRegs > kMoreThanAStub;
    if (!built) cudaGetLastError();  // no kernel image: not the caller's concern, the generic kernel runs
    known[device].store(built ? 2 : 1, std::memory_order_relaxed);
  }
  return known[device].load(std::memory_order_relaxed) == 2;
}

// How tiles are given to blocks.
constexpr int kMostCluster = 8;  // 1 .. 8: a tile to each cluster of that many blocks (hopper), part of its K to each
constexpr int kSplitRanges = 9;  // equal ranges of units, tiles shared through the workspace
constexpr int kSplitWhole = 10;  // whole tiles in turn
constexpr int kSplits = kSplitWhole + 1;
static_assert(kSplitRanges == kMostCluster + 1 && kSplitWhole == kSplitRanges + 1, "splits are numbered without gaps");

constexpr int kMaxBlocks = MARLIN_CUDA_COUNTER_BYTES / sizeof(unsigned);

// `variant` of marlin_cuda_gemm: bits 0..7 the configuration (its number above), bits 8..11 the stages, bits 12..15 the
// split; 0: choose.
struct Variant {
  int config, stages, split;
  explicit Variant(int v) : config(v & 0xff), stages(v >> 8 & 0xf), split(v >> 12 & 0xf) {}
};

// What one call runs.
struct Plan {
  const Config* config;
  int stages, split, blocks;
  int steps, slabs_m, units, units_per_block;
  double microseconds;  // predicted
  double slowdown;      // of the tensor cores by small groups and zero points, predicted
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int stages_of(const Config& c, const Device& facts) {
  const int most = std::min(c.most_stages, (facts.shared_bytes_per_block - c.extra_bytes) / c.stage_bytes);
  return most - most % c.stage_multiple;
}

int shared_bytes_of(const Config& c, int stages) { return stages * c.stage_bytes + c.extra_bytes; }

// A kernel may use more than 48 KB of shared memory only after it was told so, once per device. `device` is current.
int allow_shared_memory(const Config& c, int dtype, const Device& facts, int device) {
  static std::atomic<bool> done[kMaxDevices][kConfigCount][2];
  std::atomic<bool>& mine = done[device][&c - kConfigs][dtype];
  if (mine.load(std::memory_order_relaxed)) return MARLIN_OK;
  MARLIN_RETURN_IF_ERROR(cudaFuncSetAttribute(c.kernels[dtype], cudaFuncAttributeMaxDynamicSharedMemorySize,
                                              facts.shared_bytes_per_block));
  mine.store(true, std::memory_order_relaxed);
  return MARLIN_OK;
}

void set_cluster(cudaLaunchConfig_t* launch, cudaLaunchAttribute* attribute, int size) {
  attribute->id = cudaLaunchAttributeClusterDimension;
  attribute->val.clusterDim.x = size;
  attribute->val.clusterDim.y = 1;
  attribute->val.clusterDim.z = 1;
  launch->attrs = attribute;
  launch->numAttrs = 1;
}

// How many clusters of `size` blocks the device holds at once. A cluster lives inside one group of 16 or 18 SMs, some
// of which a chip may lack, so this is less than SMs / size and is asked of the driver (once). 0 when it will not say.
int resident_clusters(const Config& c, int size, const Device& facts, int device) {
  if (size == 1) return facts.multiprocessors;
  static std::atomic<int> known[kMaxDevices][kConfigCount][kMostCluster + 1];  // the answer + 1
  std::atomic<int>& mine = known[device][&c - kConfigs][size];
  if (mine.load(std::memory_order_relaxed) == 0) {
    int count = 0;
    if (allow_shared_memory(c, 0, facts, device) == MARLIN_OK) {
      cudaLaunchConfig_t launch = {};
      launch.gridDim = dim3(facts.multiprocessors / size * size);
      launch.blockDim = dim3(c.threads);
      launch.dynamicSmemBytes = shared_bytes_of(c, stages_of(c, facts));
      cudaLaunchAttribute attribute = {};
      set_cluster(&launch, &attribute, size);
      if (cudaOccupancyMaxActiveClusters(&count, c.kernels[0], &launch) != cudaSuccess) {
        cudaGetLastError();  // not the caller's concern
        count = 0;
      }
    }
    mine.store(count + 1, std::memory_order_relaxed);
  }
  return mine.load(std::memory_order_relaxed) - 1;
}

// Lays out `split` for one configuration and predicts its time; false if it cannot be done, or, unless `forced`, should
// not.
//
// The prediction is good enough to order the candidates, no more. Its constants for Hopper were fitted to 4160 timings
// on one H100 80GB (4 layers, 8 kinds of weights, 1 to 512 rows, each configuration and split; docs/kernels.md): there
// its choice was 0.9% slower than the best on average and 11% at most.
//   time = launch + (reading ^ 4 + stepping ^ 4) ^ (1/4) + time to add up partial sums
//   reading = time to read memory, stepping = steps of the busiest SM * time of a step: the longer hides the other,
//   but not where they are about equal
bool lay_out(const Config& c, int split, bool forced, int64_t M, const marlin_cuda_weights_t& w, const Device& facts,
             int device, Plan* plan) {
  constexpr double kLaunch = 3.5;     // us, with the end of a tile
  constexpr double kMemory = 3.2e6;   // bytes per us from device memory
  constexpr double kStep = 0.09;      // us of a step: for its chain of dependent instructions,
  constexpr double kColumn = 6.3e-4;  //   for each column of the tile,
  constexpr double kOutput = 3.6e-5;  //   for each output,
  constexpr double kGroup = 0.076, kGroupOutput = 2.7e-6;  // for each further group in it, and each output,
  constexpr double kZeroPoints = 0.023;                    // and for the zero points of each group
  constexpr double kGenericStep = 0.4, kGenericProduct = 0.7e-6;  // the generic kernel's step: us, and us a product,
  constexpr double kSm = 61.9e3;                                  // but no more bytes per us into an SM
  constexpr double kClusterRank = 0.56;                           // us for each block of a cluster
  constexpr double kClusterKb = 0.023;                            // us for each KB of a tile's sums, in a cluster
  constexpr double kWave = 4.4;                                   // us for each further wave of blocks
  constexpr double kShared = 0.44, kSharedKb = 0.043;  // us when blocks share tiles through the workspace, and for each
                                                       // KB of a tile's sums and block that shares it
  constexpr double kMisaligned = 1.3, kMisalignedKb = 0.19;  // us when ranges end inside tiles, a block then has two
                                                             // tiles' ends, and for each KB of sums

  const int64_t N = w.N, K = w.K;
  const int64_t steps = ceil_div(K, c.block_k), slabs_m = ceil_div(M, c.block_m), slabs_n = ceil_div(N, c.block_n);
  const int64_t tiles = slabs_m * slabs_n, units = tiles * steps;
  if (units > 0x3fffffff) return false;
  const int64_t rows = std::min<int64_t>(M, c.block_m);
  const double tile_kb = c.block_m * c.block_n * 4 / 1024.0;
  const double weight_bytes = c.bits / 8.0;
  const double group_bytes = 2 + (w.zeros == nullptr ? 0 : weight_bytes);  // for each column
  const int64_t groups = w.G == 1 ? 1 : std::max<int64_t>(1, c.block_k * w.G / K);  // in a step
  const double step_bytes = c.block_k * (c.block_n * weight_bytes + rows * 2) + groups * c.block_n * group_bytes;
  const double reading = (K * N * weight_bytes + w.G * N * group_bytes + M * K * 2.0 + M * N * 2.0) / kMemory;

  int64_t blocks, per_block = steps, busiest;  // a cluster's range is its tile's
  double ends = 0;
  if (split <= kMostCluster) {
    if (!c.hopper || split > steps) return false;
    const int64_t resident = resident_clusters(c, split, facts, device);
    if (resident < 1) return false;
    const int64_t waves = ceil_div(tiles, resident);
    blocks = tiles * split;
    busiest = waves * ceil_div(steps, split);
    ends = kClusterRank * split + (split > 1 ? kClusterKb * tile_kb : 0) + kWave * (waves - 1);
  } else {
    if (split == kSplitWhole) {
      blocks = std::min<int64_t>(tiles, facts.multiprocessors);
      per_block = 0;
      busiest = ceil_div(tiles, blocks) * steps;
    } else {
      // Ranges scatter the blocks over the matrices; with many rows, activations then fall out of L2.
      constexpr int kMostSlabs = 4;
      if (slabs_m > kMostSlabs && !forced) return false;
      busiest = per_block = ceil_div(units, facts.multiprocessors);
      blocks = ceil_div(units, per_block);
      if (per_block % steps != 0) {
        const bool aligned = steps % per_block == 0;
        const double sharing = static_cast<double>(ceil_div(steps, per_block) + (aligned ? 0 : 1));
        ends = kShared + kSharedKb * tile_kb * sharing + (aligned ? 0 : kMisaligned + kMisalignedKb * tile_kb);
      }
    }
    if (blocks > kMaxBlocks) return false;
  }
  const double outputs = static_cast<double>(c.block_m) * c.block_n;
  const double plain = kStep + kColumn * c.block_n + kOutput * outputs;
  const double step =
      c.hopper ? plain + (groups - 1) * (kGroup + kGroupOutput * outputs) + (w.zeros ? groups * kZeroPoints : 0)
               : std::max(step_bytes / kSm, kGenericStep + kGenericProduct * outputs * c.block_k);
  const double stepping = busiest * step, reading2 = reading * reading, stepping2 = stepping * stepping;
  *plan = Plan{&c,
               stages_of(c, facts),
               split,
               static_cast<int>(blocks),
               static_cast<int>(steps),
               static_cast<int>(slabs_m),
               static_cast<int>(units),
               static_cast<int>(per_block),
               kLaunch + std::sqrt(std::sqrt(reading2 * reading2 + stepping2 * stepping2)) + ends,
               c.hopper ? step / plain : 1};
  return blocks <= 0x7fffffff;
}

// Whether only the extended instances take these weights.
bool needs_extended(const marlin_cuda_weights_t& w) {
  return w.bits != 4 || w.zeros != nullptr || (w.G > 1 && w.K / w.G != MARLIN_CUDA_GROUP_SIZE);
}

// Takes the fastest of what `variant` leaves open. `device` is current.
int make_plan(int64_t M, const marlin_cuda_weights_t& weights, const Device& facts, int device, int variant,
              Plan* best) {
  const Variant wanted(variant);
  if (variant < 0 || variant >> 16 != 0 || wanted.config > kConfigCount || wanted.split >= kSplits)
    return MARLIN_CUDA_ERROR_VARIANT;
  const bool hopper_built = has_hopper(facts, device), extended = needs_extended(weights);
  // Of those that fit the weights, the candidates; a variant may also ask for the others.
  const int64_t group = weights.G == 1 ? MARLIN_CUDA_GROUP_SIZE : weights.K / weights.G;
  const auto fits = [&](const Config& c) {
    return c.bits == weights.bits && (c.group == 0 || c.group == group) && (c.extended || !extended);
  };
  const auto candidate = [&](const Config& c) {
    return fits(c) && c.hopper == hopper_built && c.extended == extended && stages_of(c, facts) >= 2 * c.stage_multiple;
  };
  int block_m = kMostRows;  // the smallest that takes all rows, or the largest
  for (const Config& c : kConfigs)
    if (candidate(c) && c.block_m >= M) block_m = std::min(block_m, c.block_m);
  bool found = false;
  for (int i = 0; i < kConfigCount; i++) {
    const Config& c = kConfigs[i];
    if (!fits(c) || (c.hopper && !hopper_built) || stages_of(c, facts) < 2 * c.stage_multiple) continue;
    if (wanted.config == 0 ? !candidate(c) || c.block_m != block_m : wanted.config != i + 1) continue;
    for (int split = 1; split < kSplits; split++) {
      Plan plan;
      if ((wanted.split != 0 && wanted.split != split) ||
          !lay_out(c, split, wanted.split != 0, M, weights, facts, device, &plan))
        continue;
      if (!found || plan.microseconds < best->microseconds) *best = plan;
      found = true;
    }
  }
  if (!found) return MARLIN_CUDA_ERROR_VARIANT;
  if (wanted.stages != 0) {
    if (wanted.stages < 2 * best->config->stage_multiple || wanted.stages > best->stages ||
        wanted.stages % best->config->stage_multiple != 0)
      return MARLIN_CUDA_ERROR_VARIANT;
    best->stages = wanted.stages;
  }
  return MARLIN_OK;
}

// The same, looked up where this thread asked lately: a model has a few shapes of layers, and a plan is the best of
// dozens of candidates.
int find_plan(int64_t M, const marlin_cuda_weights_t& weights, const Device& facts, int device, int variant,
              Plan* best) {
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
    *best = mine.plan;
    return MARLIN_OK;
  }
  MARLIN_RETURN_IF_ERROR(make_plan(M, weights, facts, device, variant, best));
  mine = {M, weights.N, weights.K, weights.G, weights.bits, zeros, device, variant, *best};
  return MARLIN_OK;
}

int check_rows(int64_t M) {
  constexpr int64_t kLimit = int64_t{1} << 30;
  return M <= 0 || M > kLimit ? MARLIN_CUDA_ERROR_SHAPE : MARLIN_OK;
}

// A tensor as the copy engine sees it, the innermost dimension first, and the box that one copy takes.
struct Layout {
  CUtensorMapDataType type;
  cuuint32_t rank;
  cuuint64_t sizes[3];    // in elements
  cuuint64_t pitches[2];  // bytes between neighbours of all dimensions but the innermost
  cuuint32_t box[3];
  CUtensorMapSwizzle swizzle;
};

int describe(CUtensorMap* map, const void* data, const Layout& layout) {
  using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                              const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                              CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  // Taken from the driver at run time, so that the library also loads where there is none.
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
  }();
  if (encode == nullptr) return cudaErrorInsufficientDriver;
  const cuuint32_t every[3] = {1, 1, 1};
  const CUresult result = encode(map, layout.type, layout.rank, const_cast<void*>(data), layout.sizes, layout.pitches,
                                 layout.box, every, CU_TENSOR_MAP_INTERLEAVE_NONE, layout.swizzle,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? MARLIN_OK : cudaErrorInvalidValue;
}

// The same for every shape: the counters, and two tiles of sums for each block of the largest configuration.
size_t workspace_bytes(const Device& facts) {
  size_t tile = 0;
  for (const Config& c : kConfigs)
    if (!c.hopper || facts.capability == 90)
      tile = std::max(tile, static_cast<size_t>(c.block_m) * c.block_n * sizeof(float));
  return MARLIN_CUDA_COUNTER_BYTES + 2 * tile * facts.multiprocessors;
}

}  // namespace
}  // namespace marlin

size_t marlin_cuda_workspace_bytes(int device) {
  using namespace marlin;
  Device facts;
  return find_device(device, &facts) == MARLIN_OK ? workspace_bytes(facts) : 0;
}

int marlin_cuda_choose(const marlin_cuda_weights_t* weights, int64_t M, int device) {
  using namespace marlin;
  MARLIN_RETURN_IF_ERROR(check_weights(weights));
  MARLIN_RETURN_IF_ERROR(check_rows(M));
  // Fitted like the constants of lay_out. Dequantizing reads half a byte (or one) and writes two for each weight.
  // cuBLAS reaches 690 TFLOP/s on large products, the Hopper kernel 540 with groups of 128 (2 M N K flops, in flops per
  // us). The generic kernel uses mma.sync, which has about half of the rate on Hopper and most of it elsewhere.
  constexpr double kLaunches = 4.0, kDequantize = 2.45e6, kCublas = 690e6, kHopper = 540e6, kGeneric = 250e6;
  Device facts;
  MARLIN_RETURN_IF_ERROR(find_device(device, &facts));
  DeviceGuard guard(device);
  MARLIN_RETURN_IF_ERROR(guard.error());
  Plan plan;
  MARLIN_RETURN_IF_ERROR(find_plan(M, *weights, facts, device, 0, &plan));
  const double size = static_cast<double>(weights->N) * weights->K, flops = 2.0 * M * size;
  const double rate = plan.config->hopper ? kHopper / plan.slowdown : kGeneric;
  const double own = std::max(plan.microseconds, flops / rate);
  const double other = kLaunches + (2 + weights->bits / 8.0) * size / kDequantize + flops / kCublas;
  return own <= other ? MARLIN_CUDA_USE_GEMM : MARLIN_CUDA_USE_DEQUANTIZE;
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
  const Config& c = *plan.config;
  MARLIN_RETURN_IF_ERROR(allow_shared_memory(c, dtype, facts, device));

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
  arguments.subgroups = w.G == 1 || group_size >= 64 ? 1 : 64 / group_size;
  arguments.steps = plan.steps;
  arguments.slabs_m = plan.slabs_m;
  arguments.units = plan.units;
  arguments.units_per_block = plan.units_per_block;
  arguments.stages = plan.stages;
  arguments.cluster = plan.split <= kMostCluster ? plan.split : 0;

  CUtensorMap weights_map, activations_map;
  if (c.hopper) {
    // A row of tiles as lines, of elements of 8 bytes; what matters is that the order of bytes stays.
    const auto line = static_cast<cuuint32_t>(c.line_bytes), row_bytes = static_cast<cuuint32_t>(w.N * 2 * w.bits);
    const Layout tiles = {CU_TENSOR_MAP_DATA_TYPE_INT64,
                          3,
                          {line / 8, row_bytes / line, static_cast<cuuint64_t>(w.K / MARLIN_TILE_K)},
                          {line, row_bytes},
                          {line / 8, static_cast<cuuint32_t>(c.block_n * 2 * c.bits) / line,
                           static_cast<cuuint32_t>(c.block_k / MARLIN_TILE_K)},
                          line == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE};
    const Layout rows = {CU_TENSOR_MAP_DATA_TYPE_UINT16,
                         2,
                         {static_cast<cuuint64_t>(w.in_features), static_cast<cuuint64_t>(x.M)},
                         {static_cast<cuuint64_t>(x.lda * 2)},
                         {64, static_cast<cuuint32_t>(c.block_m)},
                         CU_TENSOR_MAP_SWIZZLE_128B};
    MARLIN_RETURN_IF_ERROR(describe(&weights_map, w.B, tiles));
    MARLIN_RETURN_IF_ERROR(describe(&activations_map, x.A, rows));
  }
  void* parameters[] = {&arguments, &weights_map, &activations_map};
  cudaLaunchConfig_t launch = {};
  launch.gridDim = dim3(plan.blocks);
  launch.blockDim = dim3(c.threads);
  launch.dynamicSmemBytes = shared_bytes_of(c, plan.stages);
  launch.stream = static_cast<cudaStream_t>(x.stream);
  cudaLaunchAttribute attribute = {};
  if (arguments.cluster > 1) set_cluster(&launch, &attribute, arguments.cluster);
  return cudaLaunchKernelExC(&launch, c.kernels[dtype], parameters);
}
