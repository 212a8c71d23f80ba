// gemm.cu: which shape of the kernel runs, on how many blocks, and the launch.
#include "gemm.cuh"

#include <algorithm>
#include <atomic>

#include "device.h"

namespace marlin {
namespace {

// One instance of the kernel template, and the numbers of it that the host needs.
struct Config {
  void (*kernels[2])(GemmArguments);  // by dtype
  int threads, block_m, block_n, block_k, stage_bytes, extra_bytes, resident;
};

template <typename S>
constexpr Config config_of() {
  return {{gemm_kernel<__half, S>, gemm_kernel<__nv_bfloat16, S>},
          S::kThreads,
          S::kBlockM,
          S::kBlockN,
          S::kBlockK,
          S::kStageBytes,
          S::kExtraBytes,
          S::kResident};
}

#ifdef MARLIN_DEV_CONFIGS
#include MARLIN_DEV_CONFIGS
#else
//        GemmShape<MB, WM, WN, WK, KT>
const Config kConfigs[] = {
    config_of<GemmShape<1, 1, 4, 2, 4>>(),
    config_of<GemmShape<2, 1, 4, 2, 4>>(),
    config_of<GemmShape<4, 1, 4, 2, 4>>(),
    config_of<GemmShape<4, 2, 4, 1, 4>>(),
    config_of<GemmShape<4, 4, 2, 1, 4>>(),
};
#endif
constexpr int kConfigCount = sizeof(kConfigs) / sizeof(kConfigs[0]);

constexpr int kMaxStages = 8;
constexpr int kMaxBlocks = MARLIN_CUDA_COUNTER_BYTES / sizeof(unsigned);

// What one call runs.
struct Plan {
  int config;
  int stages;
  int blocks;
  int steps, slabs_m, units, units_per_block;
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// variant_of: bits 0..7 configuration + 1 (0: choose), bits 8..11 stages (0: choose), bit 12: whole tiles per block.
int make_plan(int64_t M, int64_t N, int64_t K, const Device& facts, int variant, Plan* plan) {
  int config = (variant & 0xff) - 1;
  if (config < 0) {
    config = 0;
    while (config + 1 < kConfigCount && kConfigs[config].block_m < M) config++;
  }
  if (config >= kConfigCount || variant < 0) return MARLIN_CUDA_ERROR_VARIANT;
  const Config& c = kConfigs[config];
  int stages = variant >> 8 & 0xf;
  const int shared_bytes = c.resident == 1 ? facts.shared_bytes_per_block
                                           : (facts.shared_bytes_per_block + 1024) / c.resident - 1024;
  const int most_stages = std::min(kMaxStages, (shared_bytes - c.extra_bytes) / c.stage_bytes);
  if (stages == 0) stages = most_stages;
  if (stages == 7 || stages == 5) stages--;
  if (stages < 2 || stages > most_stages) return MARLIN_CUDA_ERROR_VARIANT;

  const int64_t steps = ceil_div(K, c.block_k), slabs_m = ceil_div(M, c.block_m), slabs_n = ceil_div(N, c.block_n);
  const int64_t units = steps * slabs_m * slabs_n;
  if (units > 0x3fffffff) return MARLIN_CUDA_ERROR_SHAPE;
  int64_t per_block = ceil_div(units, facts.multiprocessors * c.resident);
  if (variant >> 12 & 1) per_block = ceil_div(per_block, steps) * steps;
  *plan = Plan{config,
               stages,
               static_cast<int>(ceil_div(units, per_block)),
               static_cast<int>(steps),
               static_cast<int>(slabs_m),
               static_cast<int>(units),
               static_cast<int>(per_block)};
  return plan->blocks <= kMaxBlocks ? MARLIN_OK : MARLIN_CUDA_ERROR_DEVICE;
}

// A kernel may use more than 48 KB of shared memory only after it was told so, once per device.
int allow_shared_memory(const Device& facts, int device, int config, int dtype) {
  static std::atomic<bool> done[kMaxDevices][kConfigCount][2];
  if (done[device][config][dtype].load(std::memory_order_relaxed)) return MARLIN_OK;
  MARLIN_RETURN_IF_ERROR(cudaFuncSetAttribute(reinterpret_cast<const void*>(kConfigs[config].kernels[dtype]),
                                              cudaFuncAttributeMaxDynamicSharedMemorySize,
                                              facts.shared_bytes_per_block));
  done[device][config][dtype].store(true, std::memory_order_relaxed);
  return MARLIN_OK;
}

int check_shape(int64_t M, int64_t N, int64_t K) {
  constexpr int64_t kLimit = int64_t{1} << 30;
  if (M <= 0 || N <= 0 || K <= 0 || M > kLimit || N > kLimit || K > kLimit || K % MARLIN_CUDA_K_MULTIPLE != 0 ||
      N % MARLIN_CUDA_N_MULTIPLE != 0)
    return MARLIN_CUDA_ERROR_SHAPE;
  return MARLIN_OK;
}

bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

size_t workspace_bytes(const Config& c, const Device& facts) {
  return MARLIN_CUDA_COUNTER_BYTES +
         static_cast<size_t>(facts.multiprocessors) * c.resident * 2 * c.block_m * c.block_n * sizeof(float);
}

}  // namespace
}  // namespace marlin

size_t marlin_cuda_gemm_workspace_bytes(int64_t M, int64_t N, int64_t K, int device) {
  using namespace marlin;
  Device facts;
  if (check_shape(M, N, K) != MARLIN_OK || find_device(device, &facts) != MARLIN_OK) return 0;
  size_t bytes = 0;
  for (const Config& c : kConfigs) bytes = std::max(bytes, workspace_bytes(c, facts));
  return bytes;
}

int marlin_cuda_choose(int64_t M, int64_t N, int64_t K, int device) {
  using namespace marlin;
  MARLIN_RETURN_IF_ERROR(check_shape(M, N, K));
  return M > 256 ? MARLIN_CUDA_USE_DEQUANTIZE : MARLIN_CUDA_USE_GEMM;
}

int marlin_cuda_gemm(const void* A, const void* B, const void* s, const void* bias, void* C, void* workspace,
                     size_t workspace_size, int64_t M, int64_t N, int64_t K, int64_t G, int64_t lda, int dtype,
                     int device, void* stream, int variant) {
  using namespace marlin;
  if (A == nullptr || B == nullptr || s == nullptr || C == nullptr || workspace == nullptr)
    return MARLIN_CUDA_ERROR_NULL;
  MARLIN_RETURN_IF_ERROR(check_shape(M, N, K));
  if (G != 1 && (K % MARLIN_CUDA_GROUP_SIZE != 0 || G != K / MARLIN_CUDA_GROUP_SIZE)) return MARLIN_CUDA_ERROR_GROUPS;
  if (lda < K || lda % 8 != 0) return MARLIN_CUDA_ERROR_STRIDE;
  if (dtype != MARLIN_CUDA_FP16 && dtype != MARLIN_CUDA_BF16) return MARLIN_CUDA_ERROR_DTYPE;
  if (!aligned16(A) || !aligned16(B) || !aligned16(s) || !aligned16(bias) || !aligned16(C) || !aligned16(workspace))
    return MARLIN_CUDA_ERROR_ALIGNMENT;
  Device facts;
  MARLIN_RETURN_IF_ERROR(find_device(device, &facts));
  Plan plan;
  MARLIN_RETURN_IF_ERROR(make_plan(M, N, K, facts, variant, &plan));
  const Config& c = kConfigs[plan.config];
  if (workspace_size < workspace_bytes(c, facts)) return MARLIN_CUDA_ERROR_WORKSPACE;

  DeviceGuard guard(device);
  MARLIN_RETURN_IF_ERROR(guard.error());
  MARLIN_RETURN_IF_ERROR(allow_shared_memory(facts, device, plan.config, dtype));
  GemmArguments arguments;
  arguments.A = A;
  arguments.B = static_cast<const uint4*>(B);
  arguments.s = static_cast<const __half*>(s);
  arguments.bias = bias;
  arguments.C = C;
  arguments.arrived = static_cast<unsigned*>(workspace);
  arguments.partials = reinterpret_cast<float*>(static_cast<char*>(workspace) + MARLIN_CUDA_COUNTER_BYTES);
  arguments.M = static_cast<int>(M);
  arguments.N = static_cast<int>(N);
  arguments.K = static_cast<int>(K);
  arguments.lda = lda;
  arguments.groups = static_cast<int>(G);
  arguments.group_shift = G == 1 ? 31 : 7;  // 128 = 1 << 7
  arguments.steps = plan.steps;
  arguments.slabs_m = plan.slabs_m;
  arguments.units = plan.units;
  arguments.units_per_block = plan.units_per_block;
  arguments.stages = plan.stages;
  const int shared_bytes = plan.stages * c.stage_bytes + c.extra_bytes;
  cudaLaunchConfig_t launch = {};
  launch.gridDim = plan.blocks;
  launch.blockDim = c.threads;
  launch.dynamicSmemBytes = shared_bytes;
  launch.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute[1];
  if (variant >> 13 & 1) {
    attribute[0].id = cudaLaunchAttributeAccessPolicyWindow;
    attribute[0].val.accessPolicyWindow.base_ptr = const_cast<void*>(B);
    attribute[0].val.accessPolicyWindow.num_bytes = std::min<size_t>(K * N / 2, 128u << 20);
    attribute[0].val.accessPolicyWindow.hitRatio = 1.0f;
    attribute[0].val.accessPolicyWindow.hitProp = cudaAccessPropertyStreaming;
    attribute[0].val.accessPolicyWindow.missProp = cudaAccessPropertyNormal;
    launch.attrs = attribute;
    launch.numAttrs = 1;
  }
  return cudaLaunchKernelEx(&launch, c.kernels[dtype], arguments);
}
