// gemm_sm80_copies.cuh: fills the pipeline of gemm_sm80.cuh with cp.async, ahead of the arithmetic, across ends of tiles.
#pragma once

#include "gemm_sm80_shape.cuh"
#include "ptx.cuh"
#include "tile_scheduler.cuh"

namespace marlin {

// How the arithmetic learns that a step's copies have landed, everyone's, and the copies that a slot is free again.
//
// Step by step: a barrier of the block after each step, after which the slot of the step before is free; copies run
// stages - 1 steps ahead.
//
// Otherwise: an mbarrier for each slot, at which every thread arrives as its copies land, so that warps need not be in
// step. Copies run `ahead` = (stages - 1) / 2 steps ahead. A warp that has step s knows that all have issued their copies
// of it, so they are in step s - ahead at least and done with the one before that; the slot of step s + ahead, which it
// fills then, is that of step s + ahead - stages, or an earlier one. For blocks that have an SM for themselves, and many
// rows: others hide each other's barriers, and need all their stages.
template <typename S>
class Sm80Ring {
 public:
  __device__ __forceinline__ Sm80Ring(int stages, uint32_t barriers) : stages(stages), barriers(barriers) {
    if constexpr (!S::kStepByStep) {
      if (threadIdx.x < stages) mbarrier_init(barriers + threadIdx.x * 8, S::kThreads);
      __syncthreads();
    }
  }
  __device__ __forceinline__ int ahead() const { return S::kStepByStep ? stages - 1 : (stages - 1) / 2; }
  // A step is copied into `slot`, as far as this thread is concerned.
  __device__ __forceinline__ void copied(int slot) const {
    if constexpr (S::kStepByStep)
      cp_async_commit();  // also when nothing was copied: the count of groups is the count of steps
    else
      cp_async_arrive(barriers + slot * 8);
  }
  // Asks, some time before advance(), whether the next step's copies have landed.
  __device__ __forceinline__ void ask() {
    if constexpr (!S::kStepByStep) landed = mbarrier_has_ended(barriers + next * 8, parity);
  }
  // On to the next step, whose copies have landed then.
  __device__ __forceinline__ void advance() {
    slot = next;
    if constexpr (S::kStepByStep) {
      wait_for_oldest();
      __syncthreads();
    } else {
      if (!landed) mbarrier_poll(barriers + slot * 8, parity);
    }
    next++;
    if (next == stages) next = 0, parity ^= 1;
  }
  int slot = 0;  // of the current step

 private:
  // At most stages - 2 groups of copies are under way. The instruction takes an immediate; for depths between the cases
  // it waits for one group more than it must.
  __device__ __forceinline__ void wait_for_oldest() const {
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
  const int stages;
  const uint32_t barriers;
  int next = 0;  // slot, and the parity of its barrier's phase
  uint32_t parity = 0;
  bool landed = false;
};

// The output tile that copies are at. From one of a block to its next without a division.
template <typename S>
struct Sm80Cursor {
  int n, m;
  __device__ __forceinline__ Sm80Cursor(const GemmArguments& p, int tile) {
    n = tile / p.tiles_m;
    m = tile - n * p.tiles_m;
  }
  __device__ __forceinline__ void next(const GemmArguments& p) {
    n += p.next_n;
    m += p.next_m;
    if (m >= p.tiles_m) {
      m -= p.tiles_m;
      n++;
    }
  }
  __device__ __forceinline__ int row(const GemmArguments&) const { return m * S::kBlockM; }
  __device__ __forceinline__ int rows(const GemmArguments& p) const { return min(p.M - m * S::kBlockM, S::kBlockM); }
  __device__ __forceinline__ int first_tile_row(const GemmArguments&) const { return 0; }
  __device__ __forceinline__ int64_t first_group(const GemmArguments&) const { return 0; }
};

// A thread copies the same places of every step, so it keeps addresses and moves them on. There are no branches but
// one at the end of a tile, so that the compiler can mix copies with products.
template <typename T, typename S, typename Cursor, typename P>
class Sm80Copies {
  static constexpr int WM = S::WM, WN = S::WN, WK = S::WK, KT = S::KT;
  static constexpr int kPieces = S::kBlockK / 8;             // 16-byte pieces in a row of activations
  static constexpr int kRowsAtOnce = S::kThreads / kPieces;  // rows that the block copies at once
  static constexpr int kRowCopies = (S::kBlockM + kRowsAtOnce - 1) / kRowsAtOnce;
  static constexpr int kScaleRow = WN * 8, kZeroRow = WN * S::BITS / 2;  // 16-byte pieces in a row of them
  static_assert(WK * S::kSubgroups * kScaleRow <= S::kThreads, "one piece a thread");
  static_assert(WK * S::kSubgroups * kZeroRow <= S::kThreads, "one piece a thread");

 public:
  // The block's iterations, from `schedule.begin`.
  __device__ __forceinline__ Sm80Copies(const P& p, const TileScheduler& schedule, const Sm80Ring<S>& ring,
                                        uint32_t stages)
      : p(p),
        ring(ring),
        stages(stages),
        left(schedule.end - schedule.begin),
        step(schedule.begin % p.steps),
        at(p, TileScheduler::tile(p, schedule.begin)) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    wn = warp % WN, wm = warp / WN % WM, wk = warp / (WN * WM);
    tiles_n = p.N / MARLIN_TILE_N;
    pitch = static_cast<int64_t>(tiles_n) * S::kTileBytes;
    // log2 of the 16-row tiles of a warp's piece that share a row of scales.
    sub_shift = S::kAnyGroups ? min(p.group_shift - 4, KT == 4 ? 2 : 1) : KT == 4 ? 2 : 1;
    words_to = ((wk * KT + wm) * WN + wn) * S::kTileBytes + lane * 16;
    start_tile();
  }

  // Part `part` of KT - 1 of the next step; the last goes on to the step after it.
  __device__ __forceinline__ void part(int part) {
    constexpr int kParts = KT - 1;
    if (part == 0) {
      if (step == p.steps && left > 0) {
        step = 0;
        at.next(p);
        start_tile();
      }
      words();
      if constexpr (!S::kOneGroup) scales();
    }
    rows(part * kRowCopies / kParts, (part + 1) * kRowCopies / kParts);
    if (part == kParts - 1) {
      ring.copied(slot);
      advance();
    }
  }
  __device__ __forceinline__ void whole_step() {
#pragma unroll
    for (int i = 0; i < KT - 1; i++) part(i);
  }

 private:
  __device__ __forceinline__ void start_tile() {
    const int tile_n = at.n * WN + wn;
    const int tile_k = (step * WK + wk) * KT + wm;
    weights = reinterpret_cast<const char*>(p.B) + (at.first_tile_row(p) + tile_k) * pitch +
              static_cast<int64_t>(tile_n) * S::kTileBytes + threadIdx.x % 32 * 16;
    tiles = tile_n < tiles_n ? p.K / MARLIN_TILE_K - tile_k : 0;
    rows_left = at.rows(p);
    columns = p.in_features - step * S::kBlockK - threadIdx.x % kPieces * 8;
    activations = static_cast<const T*>(p.A) + (at.row(p) + threadIdx.x / kPieces) * p.lda + step * S::kBlockK +
                  threadIdx.x % kPieces * 8;
  }
  // The weights: a warp's own pieces, shared out among the warps along M.
  __device__ __forceinline__ void words() {
    const uint32_t to = stages + slot * S::kStageBytes + words_to;
    const char* from = weights;
#pragma unroll
    for (int i = 0; i < KT / WM; i++) {
      cp_async16_if(i * WM < tiles, to + i * (WM * WN * S::kTileBytes), from);
      if constexpr (S::BITS == 8) cp_async16_if(i * WM < tiles, to + i * (WM * WN * S::kTileBytes) + 512, from + 512);
      from += WM * pitch;
    }
  }
  // Of the activations, rows [first, last) of kRowCopies; rows below M only (a row feeds no other row's outputs), zeros
  // beyond K.
  __device__ __forceinline__ void rows(int first, int last) {
    const int piece = threadIdx.x % kPieces, first_row = threadIdx.x / kPieces;
    const uint32_t to = stages + slot * S::kStageBytes + S::kWeightBytes + first_row * (S::kBlockK * 2);
#pragma unroll
    for (int i = first; i < last; i++) {
      const int row = first_row + i * kRowsAtOnce;
      cp_async16_or_zero_if(row < rows_left, to + i * (kRowsAtOnce * S::kBlockK * 2) + ((piece ^ (row % 8)) * 16),
                            activations + i * kRowsAtOnce * p.lda, columns > 0);
    }
  }
  // Scales and zero points: a row for each group that a warp's piece meets. Pieces beyond K or N meet zeros or are never
  // stored; they take those of some valid group and columns. One group has its scales at the end.
  __device__ __forceinline__ void scales() {
    const int tid = threadIdx.x;
    const uint32_t to = stages + slot * S::kStageBytes + S::kWeightBytes + S::kActivationBytes;
    const auto group_of = [&](int of_wk, int sub) {
      const int k = (step * WK + of_wk) * (KT * 16) + (16 * sub << sub_shift);
      return (at.first_group(p) + min(k >> p.group_shift, p.groups - 1)) * p.N;
    };
    {
      const int row = tid / kScaleRow, sub = row / WK, of_wk = row % WK;
      const int column = min(at.n * S::kBlockN + tid % kScaleRow * 8, p.N - 8);
      cp_async16_if(left > 0 && p.groups > 1 && sub < KT >> sub_shift,
                    to + (of_wk * S::kSubgroups + sub) * (S::kBlockN * 2) + tid % kScaleRow * 16,
                    p.s + group_of(of_wk, sub) + column);
    }
    if constexpr (S::kZeros) {
      constexpr int kColumns = 128 / S::BITS;  // in a piece
      const int row = tid / kZeroRow, sub = row / WK, of_wk = row % WK;
      const int column = min(at.n * S::kBlockN + tid % kZeroRow * kColumns, p.N - kColumns);
      cp_async16_if(
          left > 0 && p.zeros != nullptr && sub < KT >> sub_shift,
          to + S::kScaleBytes + (of_wk * S::kSubgroups + sub) * (S::kBlockN * S::BITS / 8) + tid % kZeroRow * 16,
          static_cast<const char*>(p.zeros) + (group_of(of_wk, sub) + column) * S::BITS / 8);
    }
  }
  __device__ __forceinline__ void advance() {
    left--;
    if (left == 0) rows_left = 0, tiles = 0;
    slot = slot + 1 == p.stages ? 0 : slot + 1;
    step++;
    tiles -= WK * KT;
    columns -= S::kBlockK;
    weights += WK * KT * pitch;
    activations += S::kBlockK;
  }

  const P& p;
  const Sm80Ring<S>& ring;
  const uint32_t stages;  // a shared address
  int left, step;         // iterations to be copied; the step of the output tile at `at`
  int slot = 0;
  Cursor at;
  int wn, wm, wk, tiles_n, sub_shift;
  uint32_t words_to;
  int64_t pitch;         // bytes in a row of weight tiles
  const char* weights;   // this lane's words in the warp's first tile
  const T* activations;  // this thread's piece of its first row
  int tiles;             // along K from the warp's first to the matrix's end; none beyond N
  int rows_left;         // of the tile; none after the last step
  int columns;           // of A from this thread's piece on
};

}  // namespace marlin
