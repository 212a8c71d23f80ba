// repack.cu: GPTQ <-> Marlin, Marlin -> 16-bit weights, and activations in another order of columns. In the first
// three one warp does one tile at a time; every kernel here is bound by memory, and shared memory is only the place
// where a tile is turned so that both its reads and its writes are whole 128-byte lines.
#include <atomic>

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

// out[m, k] = A[m, perm[k]], eight columns a thread.
__global__ void __launch_bounds__(kThreads) gather_kernel(const uint16_t* A, const int32_t* perm, uint4* out, int64_t M,
                                                          int64_t lda, int in_features, int eights) {
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
constexpr int kGatherThreads = 1024;
template <int ROWS>
__global__ void __launch_bounds__(kGatherThreads)
    gather_rows_kernel(const uint16_t* A, const int32_t* perm, uint4* out, int64_t M, int64_t lda, int in_features,
                       int eights) {
  constexpr int kWords = (ROWS + 1) / 2;  // of a column
  extern __shared__ __align__(16) unsigned char held[];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * ROWS;
  const uint16_t* rows[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; r++) rows[r] = A + (first + r < M ? first + r : M - 1) * lda;

  const bool aligned = lda % 8 == 0 && reinterpret_cast<uintptr_t>(A) % 16 == 0;
  const int whole = aligned ? in_features / 8 : 0;
  for (int eight = threadIdx.x; eight < whole; eight += kGatherThreads) {
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
  for (int k = 8 * whole + threadIdx.x; k < in_features; k += kGatherThreads)
#pragma unroll
    for (int r = 0; r < ROWS; r++) reinterpret_cast<uint16_t*>(held)[k * ROWS + r] = rows[r][k];
  __syncthreads();

  for (int eight = threadIdx.x; eight < eights; eight += kGatherThreads) {
    int columns[8];
    if (eight * 8 + 8 <= in_features) {
      reinterpret_cast<int4*>(columns)[0] = reinterpret_cast<const int4*>(perm)[2 * eight];
      reinterpret_cast<int4*>(columns)[1] = reinterpret_cast<const int4*>(perm)[2 * eight + 1];
    } else {
#pragma unroll
      for (int i = 0; i < 8; i++) columns[i] = eight * 8 + i < in_features ? perm[eight * 8 + i] : 0;
    }
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

// Launches it if so many rows are enough for all SMs and fit into shared memory.
template <int ROWS>
bool gather_rows(const uint16_t* A, const int32_t* perm, uint4* out, int64_t M, int64_t lda, int in_features,
                 int eights, const Device& facts, int device, cudaStream_t stream, int* result) {
  const int64_t shared = (static_cast<int64_t>(in_features) * ROWS * 2 + 15) / 16 * 16;
  if ((ROWS > 1 && M < int64_t{ROWS} * facts.multiprocessors) || shared > facts.shared_bytes_per_block) return false;
  static std::atomic<bool> allowed[kMaxDevices];  // more than 48 KB of shared memory
  if (!allowed[device].load(std::memory_order_relaxed)) {
    *result = cudaFuncSetAttribute(gather_rows_kernel<ROWS>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   facts.shared_bytes_per_block);
    if (*result != cudaSuccess) return true;
    allowed[device].store(true, std::memory_order_relaxed);
  }
  gather_rows_kernel<ROWS><<<static_cast<unsigned>((M + ROWS - 1) / ROWS), kGatherThreads, shared, stream>>>(
      A, perm, out, M, lda, in_features, eights);
  *result = cudaGetLastError();
  return true;
}

int check_shape(int64_t K, int64_t N, int bits) {
  marlin_cuda_weights_t w = {};
  w.K = w.in_features = K;
  w.N = w.out_features = N;
  w.G = 1;
  w.bits = bits;
  return check_weights(&w);
}

// Blocks enough to fill every SM with eight of them, or one tile for each warp.
int blocks_for(int64_t tiles, const Device& facts) {
  const int64_t wanted = (tiles + kWarps - 1) / kWarps;
  const int64_t most = int64_t{8} * facts.multiprocessors;
  return static_cast<int>(wanted < most ? wanted : most);
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
