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
// How scales are applied
//   Codes enter as exact integers. A group's sum is kept in `part`; when the group ends, part * scale is added to
//   `sum` in fp32. For 8 rows of M and a weight tile's columns that is 16 fused multiply-adds for a group of 128 rows
//   where scaling the weights themselves would take 128 packed multiplications, nothing is rounded to 16 bits, and bf16
//   activations need no bf16 scales.
//
// Eight bits, zero points, groups of 16, 32 and 64
//   The extended instances (kExtended) do all of these, with two differences: a register for each of a lane's columns
//   takes the zero point away; and sums are scaled after each group. A warp's piece of a step, 64 rows, has one, two or
//   four rows of scales (`subgroups`).
//
// Padding, act-order
//   Rows from in_features on meet activations of zero, which the copies put there; columns from out_features on are not
//   stored. With act-order, A's columns are brought into the order of the stored rows beforehand (repack.cu).
//
// Inside a block: WM x WN x WK warps. A warp's piece of a step is 64 columns of N (one weight tile wide), 8 MB rows of
//   M and 16 KT rows of K. Warps along WK work on different K of the same outputs (K split inside the block) and are
//   added up through shared memory in the epilogue.
//
// One pipeline stage (one step) in shared memory, filled by cp.async, `stages` of them in a ring:
//   weights      [WK * KT][WN] tiles of 512 bytes, as stored
//   activations  [BLOCK_M][BLOCK_K], 16-byte pieces of a row swizzled: piece p of row r stands at p ^ (r % 8), so the
//                eight rows that ldmatrix gathers lie in different banks
//   scales       [WK][BLOCK_N] fp16 or bf16, the group of each warp's piece, as stored; extended: [WK][4][BLOCK_N]
//   zero points  extended: [WK][4][BLOCK_N bits / 32] words
//   Tiles of 8 bits, 1024 bytes, stand there in two halves: first the first 16 bytes of all lanes, then the others
#pragma once

#include "dequant.cuh"
#include "epilogue.cuh"
#include "tile_scheduler.cuh"

namespace marlin {

template <int MB_, int WM_, int WN_, int WK_, int KT_, int BITS_ = 4, bool EXTENDED = false>
struct Sm80Shape {
  static constexpr int BITS = BITS_;
  static constexpr bool kExtended = EXTENDED;  // 8 bits, zero points, groups below 128; else 4 bits without
  static constexpr int MB = MB_;               // 8-row blocks of M in a warp's piece
  static constexpr int WM = WM_, WN = WN_, WK = WK_;
  static constexpr int KT = KT_;  // 16-row tiles of K in a warp's piece
  static constexpr int kThreads = 32 * WM * WN * WK;
  static constexpr int kConsumers = kThreads;  // threads that multiply
  static constexpr int kBlockM = 8 * MB * WM;
  static constexpr int kBlockN = MARLIN_TILE_N * WN;
  static constexpr int kBlockK = MARLIN_TILE_K * KT * WK;

  // Shared memory, in bytes.
  static constexpr int kTileBytes = BITS * 128;
  static constexpr int kWeightBytes = WK * KT * WN * kTileBytes;
  static constexpr int kActivationBytes = kBlockM * kBlockK * 2;
  static constexpr int kSubgroups = EXTENDED ? 4 : 1;  // at most
  static constexpr int kScaleBytes = WK * kSubgroups * kBlockN * 2;
  static constexpr int kZeroBytes = EXTENDED ? WK * kSubgroups * kBlockN * BITS / 8 : 0;
  static constexpr int kStageBytes = kWeightBytes + kActivationBytes + kScaleBytes + kZeroBytes;
  // The sums of a tile pass through shared memory in rounds of at most two 8-row blocks a warp: 32 KB at most.
  static constexpr int kRoundMB = MB < 2 ? 1 : 2;
  static constexpr int kRoundRows = WM * kRoundMB * 8;
  // Four floats of padding: lanes that differ in t write rows 2t of the same columns, 8 banks apart.
  static constexpr int kSumPitch = kBlockN + 4;
  static constexpr int kSumBytes = WK * kRoundRows * kSumPitch * 4;
  static constexpr int kExtraBytes = kSumBytes + 16;  // and one flag
  static constexpr int kMaxStages = 8;

  static_assert(MB % kRoundMB == 0, "rounds are whole");
  static_assert(KT % WM == 0, "warps along M share the copying of a warp's weights");
  static_assert(kBlockK >= 64, "the swizzle permutes eight 16-byte pieces");
  static_assert(KT == 4, "a warp's piece is 64 rows: four groups at most");
  static_assert(EXTENDED || BITS == 4, "8 bits are an extension");
};

// The oldest step has landed when at most stages - 2 groups of copies are under way. The instruction takes an
// immediate; for depths between the cases it waits for one group more than it must.
__device__ __forceinline__ void wait_for_oldest(int stages) {
  if (stages >= 8) {
    cp_async_wait<6>();
  } else if (stages >= 6) {
    cp_async_wait<4>();
  } else if (stages >= 4) {
    cp_async_wait<2>();
  } else if (stages >= 3) {
    cp_async_wait<1>();
  } else {
    cp_async_wait<0>();
  }
}

template <typename T, typename S>
__global__ void __launch_bounds__(S::kThreads, 1) gemm_sm80_kernel(const GemmArguments p) {
  constexpr int MB = S::MB, WM = S::WM, WN = S::WN, WK = S::WK, KT = S::KT;
  extern __shared__ __align__(128) unsigned char shared[];
  float* const sums = reinterpret_cast<float*>(shared + p.stages * S::kStageBytes);
  unsigned* const is_last = reinterpret_cast<unsigned*>(reinterpret_cast<unsigned char*>(sums) + S::kSumBytes);
  const uint32_t ring = shared_address(shared);

  const int tid = threadIdx.x;
  const int lane = tid % 32, warp = tid / 32;
  const int wn = warp % WN, wm = warp / WN % WM, wk = warp / (WN * WM);
  const int g = lane / 4, t = lane % 4;

  const TileScheduler schedule(p);
  const int tiles_n = p.N / MARLIN_TILE_N;
  const int tiles_k = p.K / MARLIN_TILE_K;

  // ---- Filling the pipeline. `fill_*` run ahead of the arithmetic by stages - 1 iterations, across ends of tiles.
  // -------- A thread copies the same places of every step, so it keeps addresses and moves them on.
  constexpr int kPieces = S::kBlockK / 8;             // 16-byte pieces in a row of activations
  constexpr int kRowsAtOnce = S::kThreads / kPieces;  // rows that the block copies at once
  constexpr int kScalePieces = WK * WN * 8;           // 16-byte pieces of scales, for each subgroup
  constexpr int kZeroPieces = WK * WN * S::BITS / 2;  // the same of zero points
  const int piece = tid % kPieces, first_row = tid / kPieces;
  const int scale_wk = tid / (WN * 8);

  const char* fill_weights = nullptr;     // of this lane's words in the warp's first tile
  const T* fill_activations = nullptr;    // of this thread's piece of its first row
  const uint16_t* fill_scales = nullptr;  // of this thread's columns, group 0
  const char* fill_zeros = nullptr;       // the same
  int fill_rows = 0;                      // rows of the output tile
  int fill_tiles = 0;                     // tiles along K from the warp's first to the matrix's end; 0 beyond N
  int fill_iteration = schedule.begin;
  int fill_step = 0;
  int fill_slot = 0;
  const int64_t weights_pitch = static_cast<int64_t>(tiles_n) * S::kTileBytes;  // bytes in a row of tiles
  const int64_t zeros_pitch = static_cast<int64_t>(p.N) * S::BITS / 8;

  auto start_tile = [&](int tile, int step) {
    const OutputTile<S> at(p, tile);
    const int tile_n = at.column() / MARLIN_TILE_N + wn;
    const int tile_k = (step * WK + wk) * KT + wm;
    fill_step = step;
    fill_weights = reinterpret_cast<const char*>(p.B) + tile_k * weights_pitch +
                   static_cast<int64_t>(tile_n) * S::kTileBytes + lane * 16;
    fill_tiles = tile_n < tiles_n ? tiles_k - tile_k : 0;
    fill_activations = static_cast<const T*>(p.A) + (at.row + first_row) * p.lda + step * S::kBlockK + piece * 8;
    fill_rows = min(S::kBlockM, p.M - at.row);
    // Pieces beyond K or N meet zeros or are never stored; they take the scales of some valid group and columns.
    fill_scales = p.s + min(at.column() + tid % (WN * 8) * 8, p.N - 8);
    if constexpr (S::kExtended) {
      constexpr int kColumns = 128 / S::BITS;  // in 16 bytes
      fill_zeros = static_cast<const char*>(p.zeros) +
                   min(at.column() + tid % (WN * S::BITS / 2) * kColumns, p.N - kColumns) * S::BITS / 8;
    }
  };
  start_tile(TileScheduler::tile(p, fill_iteration), fill_iteration % p.steps);

  auto fill = [&]() {
    if (fill_iteration < schedule.end) {
      const uint32_t stage = ring + fill_slot * S::kStageBytes;

      // Weights: a warp's own pieces, shared out among the warps along M.
      // With 8 bits, bytes 512 h + 16 l .. are what lane 16 h + l / 2 reads l % 2 th.
      const uint32_t weights_to = stage + ((wk * KT + wm) * WN + wn) * S::kTileBytes +
                                  (S::BITS == 4 ? lane * 16 : lane % 2 * 512 + lane / 2 * 16);
#pragma unroll
      for (int i = 0; i < KT / WM; i++) {
        if (i * WM < fill_tiles) {
          cp_async16(weights_to + i * (WM * WN * S::kTileBytes), fill_weights + i * WM * weights_pitch);
          if constexpr (S::BITS == 8)
            cp_async16(weights_to + i * (WM * WN * S::kTileBytes) + 256, fill_weights + i * WM * weights_pitch + 512);
        }
      }

      // Activations: rows below M only (a row feeds no other row's outputs), zeros beyond K.
      const bool valid = fill_step * S::kBlockK + piece * 8 < p.in_features;
      const uint32_t activations_to = stage + S::kWeightBytes + first_row * (S::kBlockK * 2);
#pragma unroll
      for (int i = 0; i < (S::kBlockM + kRowsAtOnce - 1) / kRowsAtOnce; i++) {
        const int row = first_row + i * kRowsAtOnce;
        if (row < fill_rows)
          cp_async16_or_zero(activations_to + i * (kRowsAtOnce * S::kBlockK * 2) + ((piece ^ (row % 8)) * 16),
                             fill_activations + i * kRowsAtOnce * p.lda, valid);
      }

      if constexpr (S::kExtended) {
        const uint32_t scales_to = stage + S::kWeightBytes + S::kActivationBytes;
        const int rows_shift = p.subgroups == 1 ? 6 : p.subgroups == 2 ? 5 : 4;  // log2 of the rows between subgroups
        for (int sub = 0; sub < p.subgroups; sub++) {
          if (tid < kScalePieces) {
            const int first = (fill_step * WK + scale_wk) * (KT * 16) + (sub << rows_shift);
            const int group = min(first >> p.group_shift, p.groups - 1);
            cp_async16(scales_to + (scale_wk * 4 + sub) * (S::kBlockN * 2) + tid % (WN * 8) * 16,
                       fill_scales + static_cast<int64_t>(group) * p.N);
          }
          if (p.zeros != nullptr && tid < kZeroPieces) {
            constexpr int kRow = WN * S::BITS / 2;  // pieces in a row
            const int first = (fill_step * WK + tid / kRow) * (KT * 16) + (sub << rows_shift);
            const int group = min(first >> p.group_shift, p.groups - 1);
            cp_async16(
                scales_to + S::kScaleBytes + (tid / kRow * 4 + sub) * (S::kBlockN * S::BITS / 8) + tid % kRow * 16,
                fill_zeros + group * zeros_pitch);
          }
        }
      } else if (tid < kScalePieces) {
        const int group = min(((fill_step * WK + scale_wk) * (KT * 16)) >> p.group_shift, p.groups - 1);
        cp_async16(stage + S::kWeightBytes + S::kActivationBytes + tid * 16,
                   fill_scales + static_cast<int64_t>(group) * p.N);
      }

      fill_iteration++;
      fill_slot = fill_slot + 1 == p.stages ? 0 : fill_slot + 1;
      if (fill_step + 1 == p.steps) {
        start_tile(TileScheduler::tile(p, fill_iteration), 0);
      } else {
        fill_step++;
        fill_tiles -= WK * KT;
        fill_weights += WK * KT * weights_pitch;
        fill_activations += S::kBlockK;
      }
    }
    cp_async_commit();  // also when nothing was copied: the count of groups is the count of steps
  };

  for (int i = 0; i < p.stages - 1; i++) fill();

  // ---- What a lane reads of a stage. -------------------------------------------------------------------------------
  const uint32_t weights_at = ring + (wk * KT * WN + wn) * S::kTileBytes + lane * 16;
  // ldmatrix: lane l names row l % 8 of matrix l / 8. Matrices 0 and 1 are the halves of K of one 8-row block, 2 and 3
  // those of the next block.
  const uint32_t row_at =
      ring + S::kWeightBytes + (wm * MB * 8 + (lane / 16) * 8 + lane % 8) * (S::kBlockK * 2) + wk * (KT * 32);
  const uint32_t half_at = ((lane / 8 % 2) ^ (lane % 8)) * 16;
  static_assert(KT % 4 == 0, "a warp's piece of a row is whole runs of 8 swizzled pieces");
  const uint32_t scales_at =
      ring + S::kWeightBytes + S::kActivationBytes + wk * S::kSubgroups * (S::kBlockN * 2) + wn * 128;
  const uint32_t zeros_at = ring + S::kWeightBytes + S::kActivationBytes + S::kScaleBytes +
                            wk * S::kSubgroups * (S::kBlockN * S::BITS / 8) + wn * (8 * S::BITS) + g * S::BITS;

  float sum[4][MB][4];   // outputs: [sub-tile][8-row block][register of the fragment]
  float part[4][MB][4];  // the same, of the current group, not yet scaled
  auto clear = [](float (&v)[4][MB][4]) {
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int b = 0; b < MB; b++)
#pragma unroll
        for (int c = 0; c < 4; c++) v[j][b][c] = 0.0f;
  };

  // A group's sums are complete: scales and adds them. `at`: the warp's scales.
  auto scale_part = [&](uint32_t at) {
    uint16_t scale[8];  // of the columns g + 8 i
    if (p.groups > 1) {
      *reinterpret_cast<uint4*>(scale) = load_shared16(at + g * 16);
    } else {
#pragma unroll
      for (int i = 0; i < 8; i++)
        asm volatile("ld.shared.u16 %0, [%1];" : "=h"(scale[i]) : "r"(at + scale_index(g + 8 * i, true) * 2));
    }
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const float f = scale_to_float(scale[2 * j + h], p.bf16_scales);
#pragma unroll
        for (int i = 0; i < MB; i++) {
          sum[j][i][2 * h] += f * part[j][i][2 * h];
          sum[j][i][2 * h + 1] += f * part[j][i][2 * h + 1];
        }
      }
    clear(part);
  };

  // Extended: what takes the zero points of the columns g + 8 i away; those of `at` where they are stored.
  uint32_t zero[8];
  auto load_zeros = [&](uint32_t at) {
    uint32_t words[S::BITS / 4];
#pragma unroll
    for (int i = 0; i < S::BITS / 4; i++) asm volatile("ld.shared.u32 %0, [%1];" : "=r"(words[i]) : "r"(at + 4 * i));
#pragma unroll
    for (int i = 0; i < 8; i++) zero[i] = Decoder<T, S::BITS>::zero(zero_of<S::BITS>(words, i));
  };
  if constexpr (S::kExtended) {
#pragma unroll
    for (int i = 0; i < 8; i++) zero[i] = Decoder<T, S::BITS>::zero(1 << (S::BITS - 1));
  }

  int slot = 0;
  int iteration = schedule.begin;
  while (iteration < schedule.end) {
    const int tile = TileScheduler::tile(p, iteration);
    const int step_begin = iteration % p.steps;
    const int step_end = min(p.steps, step_begin + schedule.end - iteration);
    clear(sum);
    clear(part);

    for (int step = step_begin; step < step_end; step++) {
      wait_for_oldest(p.stages);
      __syncthreads();  // everyone's copies of this step have landed, and everyone is done with the slot filled next
      fill();

      const uint32_t stage = slot * S::kStageBytes;
      const int k = (step * WK + wk) * (KT * 16);
      // Whether the group does not go on in the warp's next piece, or this is the block's last step of the tile.
      const bool ends = step + 1 == step_end || (k >> p.group_shift) != ((k + WK * KT * 16) >> p.group_shift);
#pragma unroll
      for (int kt = 0; kt < KT; kt++) {
        const uint32_t words_at = stage + weights_at + kt * (WN * S::kTileBytes);
        uint32_t b[MB][2];
        const uint32_t at = stage + row_at + (kt / 4) * 128 + ((kt % 4 * 32) ^ half_at);
        const uint4 q = load_shared16(words_at);
#pragma unroll
        for (int i = 0; i + 1 < MB; i += 2) ldmatrix4(b[i], b[i + 1], at + i * 8 * (S::kBlockK * 2));
        if (MB % 2) ldmatrix2(b[MB - 1], at + (MB - 1) * 8 * (S::kBlockK * 2));
        if constexpr (S::kExtended) {
          if (p.zeros != nullptr && kt * p.subgroups % 4 == 0)
            load_zeros(stage + zeros_at + kt * p.subgroups / 4 * (S::kBlockN * S::BITS / 8));
          uint32_t words[S::BITS];
          words[0] = q.x, words[1] = q.y, words[2] = q.z, words[3] = q.w;
          if constexpr (S::BITS == 8) {
            const uint4 r = load_shared16(words_at + 512);
            words[4] = r.x, words[5] = r.y, words[6] = r.z, words[7] = r.w;
          }
#pragma unroll
          for (int j = 0; j < 4; j++) {
            uint32_t a[4];
            Decoder<T, S::BITS>::word(words + j * (S::BITS / 4), zero[2 * j], zero[2 * j + 1], a);
#pragma unroll
            for (int i = 0; i < MB; i++) mma<T>(part[j][i], a, b[i]);
          }
          if (p.subgroups > 1 && (kt + 1) * p.subgroups % 4 == 0)
            scale_part(stage + scales_at + kt * p.subgroups / 4 * (S::kBlockN * 2));
        } else {
          const uint32_t words[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
          for (int j = 0; j < 4; j++) {
            uint32_t a[4];
            Decoder<T, 4>::word(words + j, a);
#pragma unroll
            for (int i = 0; i < MB; i++) mma<T>(part[j][i], a, b[i]);
          }
        }
      }
      if (ends && (!S::kExtended || p.subgroups == 1)) scale_part(stage + scales_at);
      if (++slot == p.stages) slot = 0;
    }

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
    iteration += step_end - step_begin;
  }
}

}  // namespace marlin
