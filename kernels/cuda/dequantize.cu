// dequantize.cu: Marlin -> 16-bit weights.
#include "dequant.cuh"
#include "warp_tiles.h"

namespace marlin {
namespace {

struct DequantizeArguments {
  const uint4* B;
  const uint16_t* s;
  const uint32_t* zeros;  // or null
  const int32_t* perm;    // or null
  void* W;
  int64_t tiles;
  int tiles_n, tiles_k_per_group;
  int in_features, out_features;
  bool per_channel, bf16_scales;
};

// W[perm[k], n] = (code - zero) * scale. The product of a number of at most 9 bits and one of 11 is exact in fp32, so
// the one rounding is the last. A lane's fragments hold pairs along K; movmatrix turns them into pairs along N.
template <typename T, int BITS>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(const DequantizeArguments p) {
  // [row][column / 2], padded by 16 bytes: the eight rows a warp writes at once lie 4 banks apart.
  constexpr int kPitch = MARLIN_TILE_N / 2 + 4;
  __shared__ __align__(16) uint32_t turned[kWarps][MARLIN_TILE_K][kPitch];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int g = lane / 4, t = lane % 4;
  for (int64_t tile = static_cast<int64_t>(blockIdx.x) * kWarps + warp; tile < p.tiles;
       tile += static_cast<int64_t>(gridDim.x) * kWarps) {
    const int64_t tile_k = tile / p.tiles_n;
    const int tile_n = static_cast<int>(tile - tile_k * p.tiles_n);
    uint32_t words[BITS];
#pragma unroll
    for (int i = 0; i < BITS / 4; i++) {
      const uint4 q = p.B[(tile * 32 + lane) * (BITS / 4) + i];
      words[4 * i] = q.x, words[4 * i + 1] = q.y, words[4 * i + 2] = q.z, words[4 * i + 3] = q.w;
    }
    const int64_t run = tile_k / p.tiles_k_per_group * p.tiles_n + tile_n;  // of 64 columns, of scales and zero points
    const uint16_t* row_of_scales = p.s + run * MARLIN_TILE_N;
    uint16_t scale[8];  // of the columns g + 8 i
    if (p.per_channel) {
#pragma unroll
      for (int i = 0; i < 8; i++) scale[i] = row_of_scales[scale_index(g + 8 * i, true)];
    } else {
      *reinterpret_cast<uint4*>(scale) = *reinterpret_cast<const uint4*>(row_of_scales + 8 * g);
    }
    uint32_t zeros[BITS / 4];
    if (p.zeros != nullptr) {
#pragma unroll
      for (int i = 0; i < BITS / 4; i++) zeros[i] = p.zeros[(run * 8 + g) * (BITS / 4) + i];
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
#pragma unroll
      for (int h = 0; h < 2; h++) {  // column 16 j + g + 8 h
        const int i = 2 * j + h;
        const float f = scale_to_float(scale[i], p.bf16_scales);
        constexpr uint32_t kMask = (1u << BITS) - 1;
        const int zero =
            p.zeros == nullptr ? 1 << (BITS - 1) : static_cast<int>(zeros_of<BITS>(zeros, j) >> 16 * h & kMask);
#pragma unroll
        for (int half = 0; half < 2; half++) {  // rows 2t, 2t+1, or these + 8
          const uint32_t pair = BITS == 4 ? words[j] >> (4 * half + 8 * h) : words[i] >> (8 * half);
          const float low = f * static_cast<float>(static_cast<int>(pair & kMask) - zero);
          const float high = f * static_cast<float>(static_cast<int>(pair >> 16 & kMask) - zero);
          // Lane (g, t) had column g, rows 2t, 2t+1; it gets row g, columns 2t, 2t+1.
          turned[warp][8 * half + g][8 * j + 4 * h + t] = movmatrix(round_pair(low, high, T()));
        }
      }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; i++) {  // four rows of 128 bytes at a time
      const int row = 4 * i + lane / 8, column = tile_n * MARLIN_TILE_N + lane % 8 * 8;
      const int64_t k = tile_k * MARLIN_TILE_K + row;
      if (k >= p.in_features || column >= p.out_features) continue;
      T* const to = static_cast<T*>(p.W) + (p.perm == nullptr ? k : p.perm[k]) * p.out_features + column;
      const uint32_t* const from = &turned[warp][row][lane % 8 * 4];
      if (p.out_features % 8 == 0) {
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
      } else {  // rows start anywhere, and the last eight may be fewer
        const T* const values = reinterpret_cast<const T*>(from);
        for (int c = 0; c < 8 && column + c < p.out_features; c++) to[c] = values[c];
      }
    }
    __syncwarp();
  }
}

}  // namespace
}  // namespace marlin

int marlin_cuda_dequantize(const marlin_cuda_weights_t* weights, void* W, int dtype, int device, void* stream) {
  using namespace marlin;
  MARLIN_RETURN_IF_ERROR(check_weights(weights));
  const marlin_cuda_weights_t& w = *weights;
  if (w.B == nullptr || w.s == nullptr || W == nullptr) return MARLIN_CUDA_ERROR_NULL;
  if (dtype != MARLIN_CUDA_FP16 && dtype != MARLIN_CUDA_BF16) return MARLIN_CUDA_ERROR_DTYPE;
  if (!aligned16(w.B) || !aligned16(w.s) || !aligned16(w.zeros) || !aligned16(w.perm) || !aligned16(W))
    return MARLIN_CUDA_ERROR_ALIGNMENT;
  Device facts;
  MARLIN_RETURN_IF_ERROR(find_device(device, &facts));
  DeviceGuard guard(device);
  MARLIN_RETURN_IF_ERROR(guard.error());
  DequantizeArguments p;
  p.B = static_cast<const uint4*>(w.B);
  p.s = static_cast<const uint16_t*>(w.s);
  p.zeros = static_cast<const uint32_t*>(w.zeros);
  p.perm = static_cast<const int32_t*>(w.perm);
  p.W = W;
  p.tiles_n = static_cast<int>(w.N / MARLIN_TILE_N);
  p.tiles = w.K / MARLIN_TILE_K * p.tiles_n;
  p.tiles_k_per_group = static_cast<int>(w.K / MARLIN_TILE_K / w.G);
  p.in_features = static_cast<int>(w.in_features);
  p.out_features = static_cast<int>(w.out_features);
  p.per_channel = w.G == 1;
  p.bf16_scales = w.scale_dtype == MARLIN_CUDA_BF16;
  using Kernel = void (*)(DequantizeArguments);
  const Kernel kernels[2][2] = {{dequantize_kernel<__half, 4>, dequantize_kernel<__half, 8>},
                                {dequantize_kernel<__nv_bfloat16, 4>, dequantize_kernel<__nv_bfloat16, 8>}};
  kernels[dtype][w.bits == 8]<<<blocks_for(p.tiles, facts), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
  return cudaGetLastError();
}
