// device.cu: the device query, the error strings, and the streaming kernel that benchmarks compare with.
#include <atomic>
#include <cstring>

#include "device.h"

namespace marlin {

int find_device(int device, Device* facts) {
  static Device known[kMaxDevices];
  static std::atomic<bool> ready[kMaxDevices];
  if (device < 0 || device >= kMaxDevices) return MARLIN_CUDA_ERROR_DEVICE;
  if (!ready[device].load(std::memory_order_acquire)) {
    int count = 0;
    MARLIN_RETURN_IF_ERROR(cudaGetDeviceCount(&count));
    if (device >= count) return MARLIN_CUDA_ERROR_DEVICE;
    int major = 0, minor = 0;
    Device found{};
    MARLIN_RETURN_IF_ERROR(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    MARLIN_RETURN_IF_ERROR(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    MARLIN_RETURN_IF_ERROR(cudaDeviceGetAttribute(&found.multiprocessors, cudaDevAttrMultiProcessorCount, device));
    MARLIN_RETURN_IF_ERROR(
        cudaDeviceGetAttribute(&found.shared_bytes_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    int clock_khz = 0, memory_khz = 0, bus_bits = 0;
    MARLIN_RETURN_IF_ERROR(cudaDeviceGetAttribute(&clock_khz, cudaDevAttrClockRate, device));
    MARLIN_RETURN_IF_ERROR(cudaDeviceGetAttribute(&memory_khz, cudaDevAttrMemoryClockRate, device));
    MARLIN_RETURN_IF_ERROR(cudaDeviceGetAttribute(&bus_bits, cudaDevAttrGlobalMemoryBusWidth, device));
    found.clock = clock_khz / 1e3;
    found.memory = 2.0 * memory_khz / 1e3 * bus_bits / 8;  // two transfers a cycle
    found.capability = 10 * major + minor;
    known[device] = found;  // two threads may both write; they write the same
    ready[device].store(true, std::memory_order_release);
  }
  *facts = known[device];
  return facts->capability >= 80 ? MARLIN_OK : MARLIN_CUDA_ERROR_DEVICE;
}

int check_weights(const marlin_cuda_weights_t* w) {
  // Rows, columns and offsets of blocks are 32-bit; products of them are not formed.
  constexpr int64_t kLimit = int64_t{1} << 30;
  if (w == nullptr) return MARLIN_CUDA_ERROR_NULL;
  if (w->bits != 4 && w->bits != 8) return MARLIN_CUDA_ERROR_BITS;
  if (w->K <= 0 || w->N <= 0 || w->K > kLimit || w->N > kLimit || w->K % MARLIN_CUDA_K_MULTIPLE != 0 ||
      w->N % MARLIN_CUDA_N_MULTIPLE != 0 || w->in_features <= 0 || w->in_features > w->K || w->out_features <= 0 ||
      w->out_features > w->N)
    return MARLIN_CUDA_ERROR_SHAPE;
  if (w->G != 1) {
    if (w->G <= 0 || w->K % w->G != 0) return MARLIN_CUDA_ERROR_GROUPS;
    const int64_t size = w->K / w->G;
    if (size != 16 && size != 32 && size != 64 && size != MARLIN_CUDA_GROUP_SIZE) return MARLIN_CUDA_ERROR_GROUPS;
  }
  if (w->scale_dtype != MARLIN_CUDA_FP16 && w->scale_dtype != MARLIN_CUDA_BF16) return MARLIN_CUDA_ERROR_DTYPE;
  return MARLIN_OK;
}

// Eight independent 16-byte loads per thread in flight; the result depends on every bit, so none can be left out.
__global__ void __launch_bounds__(256) stream_read_kernel(const uint4* data, int64_t count, unsigned* sink) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  unsigned bits = 0;
  auto load = [&](int64_t at) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(data + at));
    return v;
  };
  for (; i + 7 * stride < count; i += 8 * stride) {
    uint4 v[8];
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] = load(i + j * stride);
#pragma unroll
    for (int j = 0; j < 8; j++) bits ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
  }
  for (; i < count; i += stride) {
    const uint4 v = load(i);
    bits ^= v.x ^ v.y ^ v.z ^ v.w;
  }
  if (bits == 0x12345678u) *sink = bits;
}

}  // namespace marlin

int marlin_cuda_abi_version(void) { return MARLIN_CUDA_ABI_VERSION; }

const char* marlin_cuda_error_string(int code) {
  switch (code) {
    case MARLIN_OK:
      return "no error";
    case MARLIN_CUDA_ERROR_NULL:
      return "a required pointer is null";
    case MARLIN_CUDA_ERROR_SHAPE:
      return "M, N or K is not positive, too large, or not a multiple of 64 (N and K), or a size without padding "
             "exceeds it";
    case MARLIN_CUDA_ERROR_GROUPS:
      return "the number of groups is none of 1, K / 16, K / 32, K / 64 and K / 128";
    case MARLIN_CUDA_ERROR_STRIDE:
      return "the row stride of A is less than in_features, or one of them is not a multiple of 8";
    case MARLIN_CUDA_ERROR_ALIGNMENT:
      return "a pointer is not aligned to 16 bytes";
    case MARLIN_CUDA_ERROR_DTYPE:
      return "the type is neither fp16 nor bf16";
    case MARLIN_CUDA_ERROR_WORKSPACE:
      return "the workspace is too small";
    case MARLIN_CUDA_ERROR_DEVICE:
      return "no such CUDA device, or its compute capability is below 8.0";
    case MARLIN_CUDA_ERROR_VARIANT:
      return "no such variant of the kernel on this device, or not for these weights";
    case MARLIN_CUDA_ERROR_BITS:
      return "weights have neither 4 nor 8 bits";
    case MARLIN_CUDA_ERROR_EXPERTS:
      return "the experts of a mixture do not fit together, or are more than 1024";
    case MARLIN_CUDA_ERROR_SCRATCH:
      return "the scratch memory is too small";
    default:
      return cudaGetErrorString(static_cast<cudaError_t>(code));
  }
}

int marlin_cuda_device_count(int* count) {
  if (count == nullptr) return MARLIN_CUDA_ERROR_NULL;
  *count = 0;
  return cudaGetDeviceCount(count);
}

int marlin_cuda_device_info(int device, marlin_cuda_device_info_t* info) {
  if (info == nullptr) return MARLIN_CUDA_ERROR_NULL;
  std::memset(info, 0, sizeof(*info));
  int driver = 0, runtime = 0;
  MARLIN_RETURN_IF_ERROR(cudaDriverGetVersion(&driver));
  MARLIN_RETURN_IF_ERROR(cudaRuntimeGetVersion(&runtime));
  info->driver_version = driver;
  info->runtime_version = runtime;
  int count = 0;
  MARLIN_RETURN_IF_ERROR(cudaGetDeviceCount(&count));
  if (device < 0 || device >= count) return MARLIN_CUDA_ERROR_DEVICE;
  cudaDeviceProp properties;
  MARLIN_RETURN_IF_ERROR(cudaGetDeviceProperties(&properties, device));
  info->capability_major = properties.major;
  info->capability_minor = properties.minor;
  info->multiprocessors = properties.multiProcessorCount;
  info->shared_bytes_per_block = static_cast<int32_t>(properties.sharedMemPerBlockOptin);
  info->l2_bytes = properties.l2CacheSize;
  info->memory_bytes = static_cast<int64_t>(properties.totalGlobalMem);
  std::strncpy(info->name, properties.name, sizeof(info->name) - 1);
  return MARLIN_OK;
}

int marlin_cuda_stream_read(const void* data, int64_t bytes, void* sink, int device, void* stream) {
  using namespace marlin;
  if (data == nullptr || sink == nullptr) return MARLIN_CUDA_ERROR_NULL;
  if (bytes <= 0 || bytes % 16 != 0) return MARLIN_CUDA_ERROR_SHAPE;
  Device facts;
  MARLIN_RETURN_IF_ERROR(find_device(device, &facts));
  DeviceGuard guard(device);
  MARLIN_RETURN_IF_ERROR(guard.error());
  // Four blocks of 256 threads on each SM, 128 KB in flight there, read as fast as any number tried.
  stream_read_kernel<<<4 * facts.multiprocessors, 256, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const uint4*>(data), bytes / 16, static_cast<unsigned*>(sink));
  return cudaGetLastError();
}
