// repack.cu: GPTQ <-> Marlin, codes in order of rows <-> codes in order of tensor-core fragments.
#include "dequant.cuh"
#include "warp_tiles.h"

namespace marlin {
namespace {

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

// The same for 8 bits. GPTQ packs four neighbours along K into a word: a tile is four rows of 64 words. Marlin word
// (lane, 2 j + h), byte p is row 2t + 8 (p & 1) + (p >> 1), column 16 j + g + 8 h: of two GPTQ words the neighbouring
// bytes 2t and 2t+1 (mod 4), interleaved.
__global__ void __launch_bounds__(kThreads) repack8_kernel(const uint4* qweight, uint4* B, int64_t tiles, int tiles_n) {
  __shared__ uint32_t words[kWarps][4][MARLIN_TILE_N];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int g = lane / 4, t = lane % 4;
  for (int64_t tile = static_cast<int64_t>(blockIdx.x) * kWarps + warp; tile < tiles;
       tile += static_cast<int64_t>(gridDim.x) * kWarps) {
    const int64_t tile_k = tile / tiles_n;
    const int tile_n = static_cast<int>(tile - tile_k * tiles_n);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int row = 2 * i + lane / 16, four = lane % 16;
      reinterpret_cast<uint4*>(words[warp][row])[four] =
          qweight[((tile_k * 4 + row) * tiles_n + tile_n) * (MARLIN_TILE_N / 4) + four];
    }
    __syncwarp();
    uint32_t out[8];
#pragma unroll
    for (int w = 0; w < 8; w++) {
      const int column = w / 2 * 16 + g + 8 * (w % 2);
      const uint32_t upper = words[warp][t / 2][column] >> (16 * (t & 1));      // rows 2t, 2t+1
      const uint32_t lower = words[warp][2 + t / 2][column] >> (16 * (t & 1));  // rows 2t+8, 2t+9
      out[w] = __byte_perm(upper, lower, 0x5140);
    }
    B[tile * 64 + 2 * lane] = make_uint4(out[0], out[1], out[2], out[3]);
    B[tile * 64 + 2 * lane + 1] = make_uint4(out[4], out[5], out[6], out[7]);
    __syncwarp();
  }
}

// The inverse: GPTQ word [r][column] takes rows 4r .. 4r+3, bytes p and p + 2 (p = r / 2) of lanes 4 (column % 8) + t
// and the next, t = 2 (r & 1).
__global__ void __launch_bounds__(kThreads) unpack8_kernel(const uint4* B, uint4* qweight, int64_t tiles, int tiles_n) {
  __shared__ uint32_t words[kWarps][8][32 + 4];  // [word][lane], padded
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int64_t tile = static_cast<int64_t>(blockIdx.x) * kWarps + warp; tile < tiles;
       tile += static_cast<int64_t>(gridDim.x) * kWarps) {
    const int64_t tile_k = tile / tiles_n;
    const int tile_n = static_cast<int>(tile - tile_k * tiles_n);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const uint4 v = B[tile * 64 + 2 * lane + i];
      words[warp][4 * i][lane] = v.x;
      words[warp][4 * i + 1][lane] = v.y;
      words[warp][4 * i + 2][lane] = v.z;
      words[warp][4 * i + 3][lane] = v.w;
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int r = 2 * i + lane / 16, four = lane % 16;
      uint32_t out[4];
#pragma unroll
      for (int c = 0; c < 4; c++) {
        const int column = 4 * four + c;
        const uint32_t* from = words[warp][column / 16 * 2 + column / 8 % 2] + 4 * (column % 8) + 2 * (r & 1);
        out[c] = __byte_perm(from[0], from[1], r / 2 == 0 ? 0x6420 : 0x7531);
      }
      qweight[((tile_k * 4 + r) * tiles_n + tile_n) * (MARLIN_TILE_N / 4) + four] =
          make_uint4(out[0], out[1], out[2], out[3]);
    }
    __syncwarp();
  }
}

int check_shape(int64_t K, int64_t N, int bits) {
  marlin_cuda_weights_t w = {};
  w.K = w.in_features = K;
  w.N = w.out_features = N;
  w.G = 1;
  w.bits = bits;
  return check_weights(&w);
}

template <typename Kernel>
int repack(Kernel kernel, const void* from, void* to, int64_t K, int64_t N, int bits, int device, void* stream) {
  if (from == nullptr || to == nullptr) return MARLIN_CUDA_ERROR_NULL;
  MARLIN_RETURN_IF_ERROR(check_shape(K, N, bits));
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

int marlin_cuda_repack(const void* qweight, void* B, int64_t K, int64_t N, int bits, int device, void* stream) {
  const auto kernel = bits == 8 ? marlin::repack8_kernel : marlin::repack_kernel;
  return marlin::repack(kernel, qweight, B, K, N, bits, device, stream);
}

int marlin_cuda_unpack(const void* B, void* qweight, int64_t K, int64_t N, int bits, int device, void* stream) {
  const auto kernel = bits == 8 ? marlin::unpack8_kernel : marlin::unpack_kernel;
  return marlin::repack(kernel, B, qweight, K, N, bits, device, stream);
}
