// gather.cu: activations in another order of columns, that of the stored rows of weights with act-order.
#include <atomic>

#include "device.h"
#include "ptx.cuh"

namespace marlin {
namespace {

constexpr int kThreads = 256;

// out[m, k] = A[m, perm[k]], eight columns a thread.
__global__ void __launch_bounds__(kThreads) gather_kernel(const uint16_t* A, const int32_t* perm, uint4* out, int64_t M,
                                                          int64_t lda, int in_features, int eights) {
  let_next_kernel_begin();
  const int eight = blockIdx.x * kThreads + threadIdx.x;
  if (eight >= eights) return;
  int from[8];
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const int k = eight * 8 + i;
    from[i] = k >= in_features ? -1 : perm == nullptr ? k : perm[k];
  }
  for (int64_t m = blockIdx.y; m < M; m += gridDim.y) {
    uint32_t v[8];
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = from[i] < 0 ? 0 : A[m * lda + from[i]];
    out[m * eights + eight] = make_uint4(v[0] | v[1] << 16, v[2] | v[3] << 16, v[4] | v[5] << 16, v[6] | v[7] << 16);
  }
}

// Two halves: the lower or the upper ones of a and b.
template <bool UPPER>
__device__ __forceinline__ uint32_t halves(uint32_t a, uint32_t b) {
  return __byte_perm(a, b, UPPER ? 0x7632 : 0x5410);
}

// The same for many rows. A block holds ROWS of them in shared memory, the ROWS values of a column next to each other:
// rows come and go in pieces of 16 bytes, and what is fetched from anywhere is fetched from there, for all rows at once.
// Which columns are fetched is known before they are there.
template <int ROWS>
constexpr int kMostThreads = ROWS == 4 ? 512 : 1024;  // registers for two blocks of an SM

__device__ __forceinline__ void read_columns(const int32_t* perm, int eight, int in_features, int (&columns)[8]) {
  if (eight * 8 + 8 <= in_features) {
    reinterpret_cast<int4*>(columns)[0] = reinterpret_cast<const int4*>(perm)[2 * eight];
    reinterpret_cast<int4*>(columns)[1] = reinterpret_cast<const int4*>(perm)[2 * eight + 1];
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) columns[i] = eight * 8 + i < in_features ? perm[eight * 8 + i] : 0;
  }
}

template <int ROWS>
__global__ void __launch_bounds__(kMostThreads<ROWS>)
    gather_rows_kernel(const uint16_t* A, const int32_t* perm, uint4* out, int64_t M, int64_t lda, int in_features,
                       int eights) {
  let_next_kernel_begin();
  constexpr int kWords = (ROWS + 1) / 2;  // of a column
  extern __shared__ __align__(16) unsigned char held[];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * ROWS;
  const uint16_t* rows[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; r++) rows[r] = A + (first + r < M ? first + r : M - 1) * lda;

  int next[8];
  read_columns(perm, threadIdx.x, in_features, next);
  const bool aligned = lda % 8 == 0 && reinterpret_cast<uintptr_t>(A) % 16 == 0;
  const int whole = aligned ? in_features / 8 : 0;
  for (int eight = threadIdx.x; eight < whole; eight += blockDim.x) {
    uint32_t v[ROWS][4];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const uint4 q = reinterpret_cast<const uint4*>(rows[r])[eight];
      v[r][0] = q.x, v[r][1] = q.y, v[r][2] = q.z, v[r][3] = q.w;
    }
    uint4* const to = reinterpret_cast<uint4*>(held) + eight * ROWS;
    if constexpr (ROWS == 1) {
      to[0] = make_uint4(v[0][0], v[0][1], v[0][2], v[0][3]);
    } else if constexpr (ROWS == 2) {
#pragma unroll
      for (int i = 0; i < 2; i++)
        to[i] =
            make_uint4(halves<false>(v[0][2 * i], v[1][2 * i]), halves<true>(v[0][2 * i], v[1][2 * i]),
                       halves<false>(v[0][2 * i + 1], v[1][2 * i + 1]), halves<true>(v[0][2 * i + 1], v[1][2 * i + 1]));
    } else {
#pragma unroll
      for (int i = 0; i < 4; i++)
        to[i] = make_uint4(halves<false>(v[0][i], v[1][i]), halves<false>(v[2][i], v[3][i]),
                           halves<true>(v[0][i], v[1][i]), halves<true>(v[2][i], v[3][i]));
    }
  }
  for (int k = 8 * whole + threadIdx.x; k < in_features; k += blockDim.x)
#pragma unroll
    for (int r = 0; r < ROWS; r++) reinterpret_cast<uint16_t*>(held)[k * ROWS + r] = rows[r][k];
  __syncthreads();

  for (int eight = threadIdx.x; eight < eights; eight += blockDim.x) {
    int columns[8];
#pragma unroll
    for (int i = 0; i < 8; i++) columns[i] = next[i];
    read_columns(perm, eight + blockDim.x, in_features, next);
    uint32_t v[8][kWords];  // of each column
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const int k = eight * 8 + i, from = columns[i];
      if constexpr (ROWS == 4) {
        const uint2 q = reinterpret_cast<const uint2*>(held)[from];
        v[i][0] = q.x, v[i][1] = q.y;
      } else if constexpr (ROWS == 2) {
        v[i][0] = reinterpret_cast<const uint32_t*>(held)[from];
      } else {
        v[i][0] = reinterpret_cast<const uint16_t*>(held)[from];
      }
#pragma unroll
      for (int w = 0; w < kWords; w++) v[i][w] = k < in_features ? v[i][w] : 0;
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      if (first + r >= M) break;
      uint32_t pairs[4];
#pragma unroll
      for (int i = 0; i < 4; i++)
        pairs[i] = r % 2 == 0 ? halves<false>(v[2 * i][r / 2], v[2 * i + 1][r / 2])
                              : halves<true>(v[2 * i][r / 2], v[2 * i + 1][r / 2]);
      out[(first + r) * eights + eight] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
  }
}

// Launches it if so many rows are enough for all SMs and fit into shared memory. With four, two blocks of an SM take
// turns: one waits for its rows while the other stores what it has gathered.
template <int ROWS>
bool gather_rows(const uint16_t* A, const int32_t* perm, uint4* out, int64_t M, int64_t lda, int in_features,
                 int eights, const Device& facts, int device, cudaStream_t stream, int* result) {
  constexpr int kBlocks = ROWS == 4 ? 2 : 1;  // for each SM
  const int64_t shared = (static_cast<int64_t>(in_features) * ROWS * 2 + 15) / 16 * 16;
  const bool fills = M * 16 >= int64_t{15} * ROWS * kBlocks * facts.multiprocessors;
  if ((ROWS > 1 && !fills) || shared * kBlocks > facts.shared_bytes_per_block) return false;
  static std::atomic<bool> allowed[kMaxDevices];  // more than 48 KB of shared memory
  if (!allowed[device].load(std::memory_order_relaxed)) {
    *result = cudaFuncSetAttribute(gather_rows_kernel<ROWS>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   facts.shared_bytes_per_block);
    if (*result != cudaSuccess) return true;
    allowed[device].store(true, std::memory_order_relaxed);
  }
  const int turns = (eights + kMostThreads<ROWS> - 1) / kMostThreads<ROWS>;
  const int threads = ((eights + turns - 1) / turns + 31) / 32 * 32;
  gather_rows_kernel<ROWS><<<static_cast<unsigned>((M + ROWS - 1) / ROWS), threads, shared, stream>>>(
      A, perm, out, M, lda, in_features, eights);
  *result = cudaGetLastError();
  return true;
}

}  // namespace
}  // namespace marlin

int marlin_cuda_gather(const void* A, const void* perm, void* out, int64_t M, int64_t lda, int64_t in_features,
                       int64_t K, int device, void* stream) {
  using namespace marlin;
  constexpr int64_t kLimit = int64_t{1} << 30;
  if (A == nullptr || out == nullptr) return MARLIN_CUDA_ERROR_NULL;
  if (M <= 0 || M > kLimit || in_features <= 0 || in_features > K || K > kLimit || K % 8 != 0)
    return MARLIN_CUDA_ERROR_SHAPE;
  if (!aligned16(perm) || !aligned16(out)) return MARLIN_CUDA_ERROR_ALIGNMENT;
  Device facts;
  MARLIN_RETURN_IF_ERROR(find_device(device, &facts));
  DeviceGuard guard(device);
  MARLIN_RETURN_IF_ERROR(guard.error());
  const int eights = static_cast<int>(K / 8);
  constexpr int64_t kManyRows = 64;
  if (perm != nullptr && M >= kManyRows) {
    int result = cudaSuccess;
    const auto rows = [&](auto gather) {
      return gather(static_cast<const uint16_t*>(A), static_cast<const int32_t*>(perm), static_cast<uint4*>(out), M,
                    lda, static_cast<int>(in_features), eights, facts, device, static_cast<cudaStream_t>(stream),
                    &result);
    };
    if (rows(gather_rows<4>) || rows(gather_rows<2>) || rows(gather_rows<1>)) return result;
  }
  // A block keeps its piece of perm for every row that it does: a few rows each where there are many.
  const int blocks = (eights + kThreads - 1) / kThreads;
  const int64_t wanted = (int64_t{16} * facts.multiprocessors + blocks - 1) / blocks;
  const dim3 grid(blocks, static_cast<unsigned>(M < wanted ? M : wanted < 65535 ? wanted : 65535));
  gather_kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const uint16_t*>(A), static_cast<const int32_t*>(perm), static_cast<uint4*>(out), M, lda,
      static_cast<int>(in_features), eights);
  return cudaGetLastError();
}
