// gemm_sm80.cuh: the main loop with mma.sync and cp.async, for every GPU from sm_80 up. gemm_sm90.cuh has another for
// compute capability 9.0; how work is shared out (tile_scheduler.cuh) and ended (epilogue.cuh) is the same for both.
//
// Why the layout is as it is
//   A weight tile is 16 rows of K by 64 columns of N, 512 bytes. Lane l of a warp owns bytes 16 l .. 16 l + 15: one
//   16-byte load gives it, of each of the four 16x16 sub-tiles, exactly the eight codes that mma.m16n8k16 expects of
//   that lane (dequant.cuh). So weights go from memory to tensor cores without any exchange between lanes.
//
// What is multiplied
//   The transpose: C^T = W^T A^T. Weights are the left operand (16 columns of N by 16 of K), activations the right one
//   (16 of K by 8 rows of M). The reason is the 8: M comes in steps of eight instead of sixteen, so decoding one to
//   eight tokens costs half the tensor work, and the stored tile fits either way.
//
// How scales are applied, in one of two ways
//   Few rows (exact): codes enter as exact integers. A group's sum is kept in `part`; when the group ends, part * scale
//   is added to `sum` in fp32. For 8 rows of M and a weight tile's columns that is 16 fused multiply-adds for a group of
//   128 rows where scaling the weights themselves would take 128 packed multiplications, nothing is rounded to 16 bits,
//   and bf16 activations need no bf16 scales.
//   Many rows (SCALED): the decoded weights are multiplied by their scales in 16 bits, rounded once, to what
//   marlin_cuda_dequantize gives. One set of sums then takes all of a thread's registers: a warp's piece is 64 x 64
//   outputs, each weight is decoded for 64 rows, and groups of any size cost the same.
//   With one group (G == 1) sums are scaled in fp32 at the end of a tile, in both.
//
// Eight bits, zero points, groups of 16, 32 and 64
//   kZeros: a register for each of a lane's columns takes the zero point away. A warp's piece of a step, 16 KT rows,
//   has up to KT rows of scales and of zero points; in the exact way sums are scaled after each group.
//
// Padding, act-order
//   Rows from in_features on meet activations of zero, which the copies put there; columns from out_features on are not
//   stored. With act-order, A's columns are brought into the order of the stored rows beforehand (gather.cu).
//
// The sizes of an instance are in gemm_sm80_shape.cuh, the copies into shared memory in gemm_sm80_copies.cuh.
//
// Fragments are loaded one 16-row tile ahead of the arithmetic, also across steps: the barrier that ends a step stands
//   before the last products of it, which hide what it costs. With many rows weights are decoded one sub-tile ahead
//   besides: two warps of a scheduler, which a barrier puts in step, do not hide the chain word, decode, scale, product.
#pragma once

#include "dequant.cuh"
#include "epilogue_sm80.cuh"
#include "gemm_sm80_copies.cuh"

namespace marlin {

// What a lane holds of 16 rows of K: its words of weights, its fragments of activations, scales and zero points of its
// columns g + 8 i, as stored.
template <typename S>
struct Sm80Fragments {
  uint32_t words[S::BITS];
  uint32_t b[S::MB][2];
  uint32_t scales[4];
  uint32_t zeros[S::BITS / 4];
};

template <typename T, typename S, typename Cursor = Sm80Cursor<S>, typename P>
__device__ __forceinline__ void gemm_sm80(const P& p) {
  constexpr int MB = S::MB, WM = S::WM, WN = S::WN, WK = S::WK, KT = S::KT;
  constexpr int kLogKT = KT == 4 ? 2 : 1;
  extern __shared__ __align__(128) unsigned char shared[];
  float* const sums = reinterpret_cast<float*>(shared + p.stages * S::kStageBytes);
  unsigned* const is_last = reinterpret_cast<unsigned*>(reinterpret_cast<unsigned char*>(sums) + S::kSumBytes);
  uint32_t stages = shared_address(shared);
  asm volatile("" : "+r"(stages));  // or nvcc makes the address anew, from a special register, in every step

  const int tid = threadIdx.x;
  const int lane = tid % 32, warp = tid / 32;
  const int wn = warp % WN, wm = warp / WN % WM, wk = warp / (WN * WM);
  const int g = lane / 4, t = lane % 4;

  TileScheduler schedule(p);
  if (p.split_k > 0) schedule.split_tile(p);
  // log2 of the 16-row tiles of a warp's piece that share a row of scales.
  const int sub_shift = S::kAnyGroups ? min(p.group_shift - 4, kLogKT) : kLogKT;

  Sm80Ring<S> ring(p.stages, shared_address(is_last) + 16);
  Sm80Copies<T, S, Cursor, P> copies(p, schedule, ring, stages);
  for (int i = 0; i < ring.ahead(); i++) copies.whole_step();

  // ---- What a lane reads of a stage. -------------------------------------------------------------------------------
  constexpr int kFirstPiece = KT * 2;  // 16-byte pieces of a row of activations that a warp's piece takes
  // With 8 bits a lane has 32 bytes. Of eight lanes that are served at once, four read the others' halves, or two would
  // meet in each bank.
  const uint32_t weights_at =
      stages + (wk * KT * WN + wn) * S::kTileBytes + (S::BITS == 4 ? lane * 16 : lane * 32 + lane / 4 % 2 * 16);
  // ldmatrix: lane l names row l % 8 of matrix l / 8. Matrices 0 and 1 are the halves of K of one 8-row block, 2 and 3
  // those of the next block.
  const uint32_t row_at = stages + S::kWeightBytes + (wm * MB * 8 + (lane / 16) * 8 + lane % 8) * (S::kBlockK * 2) +
                          wk * kFirstPiece / 8 * 128;
  const uint32_t half_at = ((lane / 8 % 2 + wk * kFirstPiece % 8) ^ (lane % 8)) * 16;
  const uint32_t scales_at =
      stages + S::kWeightBytes + S::kActivationBytes + wk * S::kSubgroups * (S::kBlockN * 2) + wn * 128 + g * 16;
  const uint32_t zeros_at = stages + S::kWeightBytes + S::kActivationBytes + S::kScaleBytes +
                            wk * S::kSubgroups * (S::kBlockN * S::BITS / 8) + wn * (8 * S::BITS) + g * S::BITS;

  Sm80Fragments<S> fragments[2];
  const bool bf16_ones = S::kScaled ? std::is_same<T, __nv_bfloat16>::value : p.bf16_scales;
#pragma unroll
  for (int i = 0; i < 4; i++)  // one group: 1.0
    fragments[0].scales[i] = fragments[1].scales[i] = bf16_ones ? 0x3f803f80 : 0x3c003c00;

  auto load = [&](Sm80Fragments<S>& f, uint32_t stage, int kt) {
    const uint32_t words_at = stage + weights_at + kt * (WN * S::kTileBytes);
    const uint4 q = load_shared16(words_at);
    f.words[0] = q.x, f.words[1] = q.y, f.words[2] = q.z, f.words[3] = q.w;
    if constexpr (S::BITS ==
                  8) {  // the lane's other 16 bytes; in lanes 4 .. 7, 12 .. 15 and so on the first come second
      const uint4 r = load_shared16(words_at ^ 16);
      const bool swapped = lane & 4;
      f.words[0] = swapped ? r.x : q.x, f.words[1] = swapped ? r.y : q.y;
      f.words[2] = swapped ? r.z : q.z, f.words[3] = swapped ? r.w : q.w;
      f.words[4] = swapped ? q.x : r.x, f.words[5] = swapped ? q.y : r.y;
      f.words[6] = swapped ? q.z : r.z, f.words[7] = swapped ? q.w : r.w;
    }
    const uint32_t at = stage + row_at + (kt * 32 ^ half_at);
#pragma unroll
    for (int i = 0; i + 1 < MB; i += 2) ldmatrix4(f.b[i], f.b[i + 1], at + i * 8 * (S::kBlockK * 2));
    if (MB % 2) ldmatrix2(f.b[MB - 1], at + (MB - 1) * 8 * (S::kBlockK * 2));
    const int sub = kt >> sub_shift;
    if (!S::kOneGroup && (S::kAnyGroups || kt == KT - 1) && p.groups > 1) {
      const uint4 s = load_shared16(stage + scales_at + (S::kAnyGroups ? sub * (S::kBlockN * 2) : 0));
      f.scales[0] = s.x, f.scales[1] = s.y, f.scales[2] = s.z, f.scales[3] = s.w;
    }
    if constexpr (S::kZeros) {
      if (S::kAlwaysZeros || p.zeros != nullptr) {
#pragma unroll
        for (int i = 0; i < S::BITS / 4; i++)
          asm volatile("ld.shared.u32 %0, [%1];"
                       : "=r"(f.zeros[i])
                       : "r"(stage + zeros_at + sub * (S::kBlockN * S::BITS / 8) + 4 * i));
      }
    }
  };

  float sum[4][MB][4];                    // outputs: [sub-tile][8-row block][register of the fragment]
  float part[S::kScaled ? 1 : 4][MB][4];  // exact: the same, of the current group, not yet scaled
  auto clear = [](auto& v) {
#pragma unroll
    for (auto& j : v)
#pragma unroll
      for (auto& b : j)
#pragma unroll
        for (float& x : b) x = 0.0f;
  };
  // Exact: a group's sums are complete: scales and adds them.
  auto scale_part = [&](const Sm80Fragments<S>& f) {
    if constexpr (!S::kScaled) {
#pragma unroll
      for (int j = 0; j < 4; j++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const float scale = scale_to_float(static_cast<uint16_t>(f.scales[j] >> 16 * h), p.bf16_scales);
#pragma unroll
          for (int i = 0; i < MB; i++) {
            sum[j][i][2 * h] += scale * part[j][i][2 * h];
            sum[j][i][2 * h + 1] += scale * part[j][i][2 * h + 1];
          }
        }
      clear(part);
    }
  };

  // Extended: what takes the zero points of the sub-tiles' columns g and g + 8 away.
  uint32_t zero[S::kZeros ? 4 : 1];
  if constexpr (S::kZeros) {
#pragma unroll
    for (int i = 0; i < S::BITS / 4; i++)
      fragments[0].zeros[i] = fragments[1].zeros[i] = S::BITS == 4 ? 0x88888888 : 0x80808080;
#pragma unroll
    for (int j = 0; j < 4; j++) zero[j] = Decoder<ScaledFrom<T, S::kMixed>, S::BITS>::zeros(0x10001 << (S::BITS - 1));
  }

  using Integer = ScaledFrom<T, S::kMixed>;  // what codes are decoded to
  const auto decode = [&](uint32_t (&a)[4], const Sm80Fragments<S>& f, int j) {
    if constexpr (S::kZeros && S::kScaled)  // registers are scarce: made anew
      zero[j] = Decoder<Integer, S::BITS>::zeros(zeros_of<S::BITS>(f.zeros, j));
    if constexpr (S::kZeros)
      Decoder<Integer, S::BITS>::word(f.words + j * (S::BITS / 4), zero[j], a);
    else
      Decoder<Integer, S::BITS>::word(f.words + j * (S::BITS / 4), a);
    if constexpr (S::kScaled && !S::kOneGroup) scale_fragment<T, S::kMixed>(a, f.scales[j]);
  };
  // Decoded one sub-tile ahead, where registers suffice: of the sub-tile that is multiplied and of the next.
  constexpr bool kDecodesAhead = S::kScaled && !(S::kMixed && S::BITS == 8);
  uint32_t a[2][4];
  auto multiply = [&](const Sm80Fragments<S>& f, const Sm80Fragments<S>& next, int kt) {
    if constexpr (S::kZeros && !S::kScaled) {
      if (p.zeros != nullptr && (kt & ((1 << sub_shift) - 1)) == 0) {
#pragma unroll
        for (int j = 0; j < 4; j++) zero[j] = Decoder<Integer, S::BITS>::zeros(zeros_of<S::BITS>(f.zeros, j));
      }
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
      if constexpr (kDecodesAhead)
        decode(a[(j + 1) % 2], j < 3 ? f : next, (j + 1) % 4);
      else
        decode(a[j % 2], f, j);
#pragma unroll
      for (int i = 0; i < MB; i++) mma<T>(S::kScaled ? sum[j][i] : part[S::kScaled ? 0 : j][i], a[j % 2], f.b[i]);
    }
  };

  // One group: a lane's scales are every second of two runs of eight (scale_index). In kernels for one group alone they
  // are on their way while the tile is multiplied.
  const bool one_group = S::kOneGroup || p.groups == 1;
  uint4 tile_scales[2];
  const auto load_scales = [&](const typename P::template Tile<S>& at) {
    const int column = at.column() + wn * MARLIN_TILE_N;
    const uint4* const from = reinterpret_cast<const uint4*>(p.s + at.first_group(p) * p.N + column) + g / 2;
#pragma unroll
    for (int i = 0; i < 2; i++) tile_scales[i] = column < p.N ? from[4 * i] : make_uint4(0, 0, 0, 0);
  };

  int iteration = schedule.begin;
  while (iteration < schedule.end) {
    const int tile = TileScheduler::tile(p, iteration);
    if constexpr (S::kOneGroup) load_scales(typename P::template Tile<S>(p, tile));
    const int step_begin = iteration % p.steps;
    const int step_end = min(p.steps, step_begin + schedule.end - iteration);
    clear(sum);
    clear(part);
    ring.advance();
    load(fragments[0], ring.slot * S::kStageBytes, 0);
    if constexpr (kDecodesAhead) decode(a[0], fragments[0], 0);

    for (int step = step_begin; step < step_end; step++) {
      const int k = (step * WK + wk) * (KT * 16);
      // Whether the group does not go on in the warp's next piece, or this is the block's last step of the tile.
      const bool ends = step + 1 == step_end || (k >> p.group_shift) != ((k + WK * KT * 16) >> p.group_shift);
#pragma unroll
      for (int kt = 0; kt < KT; kt++) {
        const Sm80Fragments<S>& f = fragments[kt % 2];
        Sm80Fragments<S>& next = fragments[(kt + 1) % 2];
        const bool last = kt + 1 == KT;
        if (!last) {
          load(next, ring.slot * S::kStageBytes, kt + 1);
          copies.part(kt);
          if (kt == KT - 2) ring.ask();
        } else if (step + 1 < step_end) {
          ring.advance();
          load(next, ring.slot * S::kStageBytes, 0);
        }
        multiply(f, next, kt);
        if constexpr (!S::kScaled) {
          if (last ? ends : S::kAnyGroups && (kt + 1 & ((1 << sub_shift) - 1)) == 0) scale_part(f);
        }
      }
    }

    const typename P::template Tile<S> at(p, tile);
    if (one_group) {
      if constexpr (!S::kOneGroup) load_scales(at);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const uint4& q = tile_scales[i / 4];
        const uint32_t pair = i % 4 == 0 ? q.x : i % 4 == 1 ? q.y : i % 4 == 2 ? q.z : q.w;
        const float scale = scale_to_float(static_cast<uint16_t>(pair >> 16 * (g % 2)), p.bf16_scales);
#pragma unroll
        for (int b = 0; b < MB; b++) {
          sum[i / 2][b][i % 2 * 2] *= scale;
          sum[i / 2][b][i % 2 * 2 + 1] *= scale;
        }
      }
    }
    if constexpr (S::kInRegisters) {
      finish_in_registers<T, S>(p, sum, sums, is_last, tile, step_begin, step_end);
    } else {
      finish_output_tile<T, S>(
          p, sums, is_last, tile, step_begin, step_end, tid,
          [&](int round, float* to) {
#pragma unroll
            for (int j = 0; j < 4; j++)
#pragma unroll
              for (int i = 0; i < MB; i++) {
                if (i / S::kRoundMB != round) continue;
#pragma unroll
                for (int c = 0; c < 4; c++) {
                  const int row = (wm * S::kRoundMB + i % S::kRoundMB) * 8 + 2 * t + c % 2;
                  const int column = wn * 64 + j * 16 + c / 2 * 8 + g;
                  to[(wk * S::kRoundRows + row) * S::kSumPitch + column] = sum[j][i][c];
                }
              }
          },
          [] { __syncthreads(); });
    }
    iteration += step_end - step_begin;
  }
}

template <typename T, typename S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks) gemm_sm80_kernel(const GemmArguments p) {
  gemm_sm80<T, S>(p);
}

}  // namespace marlin
