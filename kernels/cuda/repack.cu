// repack.cu: GPTQ <-> Marlin, and Marlin -> 16-bit weights. One warp does one tile at a time; every kernel here is
// bound by memory, and shared memory is only the place where a tile is turned so that both its reads and its writes are
// whole 128-byte lines.
#include "dequant.cuh"
#include "device.h"

namespace marlin {
namespace {

constexpr int kWarps = 8;  // per block; enough loads in flight with 16 bytes a lane
constexpr int kThreads = 32 * kWarps;

// GPTQ packs eight neighbours along K into a word, lowest nibble first: a tile is two rows of 64 words.
//
// Marlin word (lane, j), nibble p is row 2t + 8 (p & 1) + (p >> 2), column 16 j + g + 8 ((p >> 1) & 1) of the tile. So
// from GPTQ word [p & 1][column] it takes nibble 2t + (p >> 2): of four GPTQ words the neighbouring nibbles 2t, 2t+1.
__global__ void __launch_bounds__(kThreads) repack_kernel(const uint4* qweight, uint4* B, int64_t tiles, int tiles_n) {
  __shared__ uint32_t words[kWarps][2][MARLIN_TILE_N];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int g = lane / 4, t = lane % 4;
  const int row = lane / 16, four = lane % 16;  // what this lane copies of a tile of qweight
  for (int64_t tile = static_cast<int64_t>(blockIdx.x) * kWarps + warp; tile < tiles;
       tile += static_cast<int64_t>(gridDim.x) * kWarps) {
    const int64_t tile_k = tile / tiles_n;
    const int tile_n = static_cast<int>(tile - tile_k * tiles_n);
    reinterpret_cast<uint4*>(words[warp][row])[four] =
        qweight[((tile_k * 2 + row) * tiles_n + tile_n) * (MARLIN_TILE_N / 4) + four];
    __syncwarp();
    uint32_t out[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      out[j] = 0;
#pragma unroll
      for (int p = 0; p < 4; p++) {  // nibbles p and p + 4
        const uint32_t pair = words[warp][p & 1][16 * j + g + 8 * (p >> 1)] >> (8 * t);
        out[j] |= (pair & 0xf) << (4 * p) | (pair >> 4 & 0xf) << (4 * p + 16);
      }
    }
    B[tile * 32 + lane] = make_uint4(out[0], out[1], out[2], out[3]);
    __syncwarp();
  }
}

// The inverse: GPTQ word [r][column] takes nibbles 2t and 2t + 1 from lane 4 (column % 8) + t, word j = column / 16,
// nibbles p and p + 4 with p = r + 2 (column / 8 % 2).
__global__ void __launch_bounds__(kThreads) unpack_kernel(const uint4* B, uint4* qweight, int64_t tiles, int tiles_n) {
  __shared__ uint32_t words[kWarps][4][32 + 4];  // [word][lane], padded
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row = lane / 16, four = lane % 16;
  for (int64_t tile = static_cast<int64_t>(blockIdx.x) * kWarps + warp; tile < tiles;
       tile += static_cast<int64_t>(gridDim.x) * kWarps) {
    const int64_t tile_k = tile / tiles_n;
    const int tile_n = static_cast<int>(tile - tile_k * tiles_n);
    const uint4 v = B[tile * 32 + lane];
    words[warp][0][lane] = v.x;
    words[warp][1][lane] = v.y;
    words[warp][2][lane] = v.z;
    words[warp][3][lane] = v.w;
    __syncwarp();
    uint32_t out[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int column = 4 * four + i;
      const int p = row + 2 * (column / 8 % 2);
      out[i] = 0;
#pragma unroll
      for (int t = 0; t < 4; t++) {
        const uint32_t w = words[warp][column / 16][4 * (column % 8) + t] >> (4 * p);
        out[i] |= ((w & 0xf) | (w >> 16 & 0xf) << 4) << (8 * t);
      }
    }
    qweight[((tile_k * 2 + row) * tiles_n + tile_n) * (MARLIN_TILE_N / 4) + four] =
        make_uint4(out[0], out[1], out[2], out[3]);
    __syncwarp();
  }
}

template <typename T>
__device__ __forceinline__ uint32_t round_pair(float low, float high);
template <>
__device__ __forceinline__ uint32_t round_pair<__half>(float low, float high) {
  const __half2 v = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&v);
}
template <>
__device__ __forceinline__ uint32_t round_pair<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&v);
}

// W[k, n] = (code - 8) * scale. The product of a 4-bit and an 11-bit number is exact in fp32, so the one rounding is
// the last. A lane's fragments hold pairs along K; movmatrix turns them into pairs along N.
template <typename T>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(const uint4* B, const __half* s, uint4* W, int64_t tiles,
                                                              int tiles_n, int tiles_k_per_group, bool per_channel) {
  // [row][column / 2], padded by 16 bytes: the eight rows a warp writes at once lie 4 banks apart.
  constexpr int kPitch = MARLIN_TILE_N / 2 + 4;
  __shared__ __align__(16) uint32_t turned[kWarps][MARLIN_TILE_K][kPitch];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int g = lane / 4, t = lane % 4;
  for (int64_t tile = static_cast<int64_t>(blockIdx.x) * kWarps + warp; tile < tiles;
       tile += static_cast<int64_t>(gridDim.x) * kWarps) {
    const int64_t tile_k = tile / tiles_n;
    const int tile_n = static_cast<int>(tile - tile_k * tiles_n);
    const uint4 q = B[tile * 32 + lane];
    const uint32_t words[4] = {q.x, q.y, q.z, q.w};
    const __half* row_of_scales = s + (tile_k / tiles_k_per_group * tiles_n + tile_n) * MARLIN_TILE_N;
    __half scale[8];  // of the columns g + 8 i
    if (per_channel) {
#pragma unroll
      for (int i = 0; i < 8; i++) scale[i] = row_of_scales[scale_index(g + 8 * i, true)];
    } else {
      *reinterpret_cast<uint4*>(scale) = *reinterpret_cast<const uint4*>(row_of_scales + 8 * g);
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
#pragma unroll
      for (int p = 0; p < 4; p++) {  // nibbles p and p + 4: rows 2t, 2t+1 (+8 if p is odd)
        const float f = __half2float(scale[2 * j + (p >> 1)]);
        const float low = f * static_cast<float>(static_cast<int>(words[j] >> (4 * p) & 0xf) - MARLIN_ZERO_POINT);
        const float high = f * static_cast<float>(static_cast<int>(words[j] >> (4 * p + 16) & 0xf) - MARLIN_ZERO_POINT);
        // Lane (g, t) had column g, rows 2t, 2t+1; it gets row g, columns 2t, 2t+1.
        turned[warp][8 * (p & 1) + g][8 * j + 4 * (p >> 1) + t] = movmatrix(round_pair<T>(low, high));
      }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; i++) {  // four rows of 128 bytes at a time
      const int row = 4 * i + lane / 8;
      W[((tile_k * MARLIN_TILE_K + row) * tiles_n + tile_n) * (MARLIN_TILE_N / 8) + lane % 8] =
          *reinterpret_cast<const uint4*>(&turned[warp][row][lane % 8 * 4]);
    }
    __syncwarp();
  }
}

bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

int check_shape(int64_t K, int64_t N) {
  constexpr int64_t kLimit = int64_t{1} << 31;
  if (K <= 0 || N <= 0 || K % MARLIN_CUDA_K_MULTIPLE != 0 || N % MARLIN_CUDA_N_MULTIPLE != 0 || K >= kLimit ||
      N >= kLimit)
    return MARLIN_CUDA_ERROR_SHAPE;
  return MARLIN_OK;
}

// Blocks enough to fill every SM with eight of them, or one tile for each warp.
int blocks_for(int64_t tiles, const Device& facts) {
  const int64_t wanted = (tiles + kWarps - 1) / kWarps;
  const int64_t most = int64_t{8} * facts.multiprocessors;
  return static_cast<int>(wanted < most ? wanted : most);
}

template <typename Kernel>
int repack(Kernel kernel, const void* from, void* to, int64_t K, int64_t N, int device, void* stream) {
  if (from == nullptr || to == nullptr) return MARLIN_CUDA_ERROR_NULL;
  MARLIN_RETURN_IF_ERROR(check_shape(K, N));
  if (!aligned16(from) || !aligned16(to)) return MARLIN_CUDA_ERROR_ALIGNMENT;
  Device facts;
  MARLIN_RETURN_IF_ERROR(find_device(device, &facts));
  DeviceGuard guard(device);
  MARLIN_RETURN_IF_ERROR(guard.error());
  const int tiles_n = static_cast<int>(N / MARLIN_TILE_N);
  const int64_t tiles = K / MARLIN_TILE_K * tiles_n;
  kernel<<<blocks_for(tiles, facts), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const uint4*>(from), static_cast<uint4*>(to), tiles, tiles_n);
  return cudaGetLastError();
}

}  // namespace
}  // namespace marlin

int marlin_cuda_repack(const void* qweight, void* B, int64_t K, int64_t N, int device, void* stream) {
  return marlin::repack(marlin::repack_kernel, qweight, B, K, N, device, stream);
}

int marlin_cuda_unpack(const void* B, void* qweight, int64_t K, int64_t N, int device, void* stream) {
  return marlin::repack(marlin::unpack_kernel, B, qweight, K, N, device, stream);
}

int marlin_cuda_dequantize(const void* B, const void* s, void* W, int64_t K, int64_t N, int64_t G, int dtype,
                           int device, void* stream) {
  using namespace marlin;
  if (B == nullptr || s == nullptr || W == nullptr) return MARLIN_CUDA_ERROR_NULL;
  MARLIN_RETURN_IF_ERROR(check_shape(K, N));
  if (G != 1 && (K % MARLIN_CUDA_GROUP_SIZE != 0 || G != K / MARLIN_CUDA_GROUP_SIZE)) return MARLIN_CUDA_ERROR_GROUPS;
  if (dtype != MARLIN_CUDA_FP16 && dtype != MARLIN_CUDA_BF16) return MARLIN_CUDA_ERROR_DTYPE;
  if (!aligned16(B) || !aligned16(s) || !aligned16(W)) return MARLIN_CUDA_ERROR_ALIGNMENT;
  Device facts;
  MARLIN_RETURN_IF_ERROR(find_device(device, &facts));
  DeviceGuard guard(device);
  MARLIN_RETURN_IF_ERROR(guard.error());
  const int tiles_n = static_cast<int>(N / MARLIN_TILE_N);
  const int64_t tiles = K / MARLIN_TILE_K * tiles_n;
  const auto kernel = dtype == MARLIN_CUDA_FP16 ? dequantize_kernel<__half> : dequantize_kernel<__nv_bfloat16>;
  kernel<<<blocks_for(tiles, facts), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const uint4*>(B), static_cast<const __half*>(s), static_cast<uint4*>(W), tiles, tiles_n,
      static_cast<int>(K / MARLIN_TILE_K / G), G == 1);
  return cudaGetLastError();
}
