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
//   kExtended: a register for each of a lane's columns takes the zero point away. A warp's piece of a step, 16 KT rows,
//   has up to KT rows of scales and of zero points; in the exact way sums are scaled after each group.
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
//   scales       [WK][SUB][BLOCK_N] fp16 or bf16, the groups of each warp's piece, as stored
//   zero points  extended: [WK][SUB][BLOCK_N bits / 32] words
//   Tiles of 8 bits, 1024 bytes, stand there in two halves: first the first 16 bytes of all lanes, then the others
//
// Fragments are loaded one 16-row tile ahead of the arithmetic, also across steps: the barrier that ends a step stands
//   before the last products of it, which hide what it costs.
#pragma once

#include "dequant.cuh"
#include "epilogue.cuh"
#include "tile_scheduler.cuh"

namespace marlin {

template <int MB_, int WM_, int WN_, int WK_, int KT_, int BITS_ = 4, bool EXTENDED = false, bool SCALED = false,
          bool MIXED = false>
struct Sm80Shape {
  static constexpr int BITS = BITS_;
  static constexpr bool kExtended = EXTENDED;  // takes 8 bits and zero points
  static constexpr bool kScaled = SCALED;      // weights are scaled, and rounded, before they are multiplied
  static constexpr bool kMixed = MIXED;        // scaled: scales are not of the activations' type
  static constexpr bool kAnyGroups = EXTENDED || SCALED;
  static constexpr int MB = MB_;  // 8-row blocks of M in a warp's piece
  static constexpr int WM = WM_, WN = WN_, WK = WK_;
  static constexpr int KT = KT_;  // 16-row tiles of K in a warp's piece
  static constexpr int kThreads = 32 * WM * WN * WK;
  static constexpr int kConsumers = kThreads;  // threads that multiply
  static constexpr bool kSplitKInWorkspace = true;
  static constexpr int kFixUpItems = MB < 8 ? 2 : 1;  // with more, registers spill
  static constexpr int kBlockM = 8 * MB * WM;
  static constexpr int kBlockN = MARLIN_TILE_N * WN;
  static constexpr int kBlockK = MARLIN_TILE_K * KT * WK;

  // When copies are issued. In parts, between the products of a step; or, which is faster where a warp has most registers
  // and products, all at once after the barrier: of the two warps on a scheduler, w and w + 4, one then copies while the
  // other multiplies, and they change.
  static constexpr bool kAlternate = MB >= 8 && WN == 4;

  // Shared memory, in bytes.
  static constexpr int kTileBytes = BITS * 128;
  static constexpr int kWeightBytes = WK * KT * WN * kTileBytes;
  static constexpr int kActivationBytes = kBlockM * kBlockK * 2;
  static constexpr int kSubgroups = kAnyGroups ? KT : 1;  // at most
  static constexpr int kScaleBytes = WK * kSubgroups * kBlockN * 2;
  static constexpr int kZeroBytes = EXTENDED ? WK * kSubgroups * kBlockN * BITS / 8 : 0;
  static constexpr int kStageBytes = kWeightBytes + kActivationBytes + kScaleBytes + kZeroBytes;
  // The sums of a tile pass through shared memory in rounds of at most two 8-row blocks a warp: 33 KB at most.
  static constexpr int kRoundMB = MB < 2 || MB >= 8 ? 1 : 2;
  static constexpr int kRoundRows = WM * kRoundMB * 8;
  // Four floats of padding: lanes that differ in t write rows 2t of the same columns, 8 banks apart.
  static constexpr int kSumPitch = kBlockN + 4;
  static constexpr int kSumBytes = WK * kRoundRows * kSumPitch * 4;
  static constexpr int kExtraBytes = kSumBytes + 16;  // and one flag
  static constexpr int kMaxStages = 8;

  static_assert(MB % kRoundMB == 0, "rounds are whole");
  static_assert(KT % WM == 0, "warps along M share the copying of a warp's weights");
  static_assert(kBlockK >= 64, "the swizzle permutes eight 16-byte pieces");
  static_assert(KT == 2 || KT == 4, "fragments alternate between two sets of registers; the swizzle takes 8 pieces");
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

// What a lane holds of 16 rows of K: its words of weights, its fragments of activations, scales and zero points of its
// columns g + 8 i, as stored.
template <typename S>
struct Sm80Fragments {
  uint32_t words[S::BITS];
  uint32_t b[S::MB][2];
  uint32_t scales[4];
  uint32_t zeros[S::BITS / 4];
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

template <typename T, typename S, typename Cursor = Sm80Cursor<S>, typename P>
__device__ __forceinline__ void gemm_sm80(const P& p) {
  constexpr int MB = S::MB, WM = S::WM, WN = S::WN, WK = S::WK, KT = S::KT;
  constexpr int kLogKT = KT == 4 ? 2 : 1;
  extern __shared__ __align__(128) unsigned char shared[];
  float* const sums = reinterpret_cast<float*>(shared + p.stages * S::kStageBytes);
  unsigned* const is_last = reinterpret_cast<unsigned*>(reinterpret_cast<unsigned char*>(sums) + S::kSumBytes);
  const uint32_t ring = shared_address(shared);

  const int tid = threadIdx.x;
  const int lane = tid % 32, warp = tid / 32;
  const int wn = warp % WN, wm = warp / WN % WM, wk = warp / (WN * WM);
  const int g = lane / 4, t = lane % 4;

  TileScheduler schedule(p);
  if (p.split_k > 0) schedule.split_tile(p);
  const int tiles_n = p.N / MARLIN_TILE_N;
  const int tiles_k = p.K / MARLIN_TILE_K;
  // log2 of the 16-row tiles of a warp's piece that share a row of scales.
  const int sub_shift = S::kAnyGroups ? min(p.group_shift - 4, kLogKT) : kLogKT;

  // ---- Filling the pipeline, ahead of the arithmetic by stages - 1 iterations, across ends of tiles. ----------------
  // A thread copies the same places of every step, so it keeps addresses and moves them on. There are no branches but
  // one at the end of a tile, so that the compiler can mix it with products.
  constexpr int kPieces = S::kBlockK / 8;             // 16-byte pieces in a row of activations
  constexpr int kRowsAtOnce = S::kThreads / kPieces;  // rows that the block copies at once
  constexpr int kRowCopies = (S::kBlockM + kRowsAtOnce - 1) / kRowsAtOnce;
  constexpr int kScaleRow = WN * 8, kZeroRow = WN * S::BITS / 2;  // 16-byte pieces in a row of scales, of zero points
  static_assert(WK * S::kSubgroups * kScaleRow <= S::kThreads, "one piece a thread");
  static_assert(WK * S::kSubgroups * kZeroRow <= S::kThreads, "one piece a thread");
  const int piece = tid % kPieces, first_row = tid / kPieces;
  const int64_t weights_pitch = static_cast<int64_t>(tiles_n) * S::kTileBytes;  // bytes in a row of tiles

  int fill_left = schedule.end - schedule.begin;  // iterations
  int fill_step = schedule.begin % p.steps;
  int fill_slot = 0;
  const char* fill_weights = nullptr;   // this lane's words in the warp's first tile
  const T* fill_activations = nullptr;  // this thread's piece of its first row
  int fill_tiles = 0;                   // tiles along K from the warp's first to the matrix's end; 0 beyond N

  Cursor fill_at(p, TileScheduler::tile(p, schedule.begin));
  auto start_tile = [&]() {
    const int tile_n = fill_at.n * WN + wn;
    const int tile_k = (fill_step * WK + wk) * KT + wm;
    fill_weights = reinterpret_cast<const char*>(p.B) + (fill_at.first_tile_row(p) + tile_k) * weights_pitch +
                   static_cast<int64_t>(tile_n) * S::kTileBytes + lane * 16;
    fill_tiles = tile_n < tiles_n ? tiles_k - tile_k : 0;
    fill_activations =
        static_cast<const T*>(p.A) + (fill_at.row(p) + first_row) * p.lda + fill_step * S::kBlockK + piece * 8;
  };
  start_tile();

  // Of the activations of the next step to be copied, rows [FIRST, LAST) of kRowCopies; rows below M only (a row feeds
  // no other row's outputs), zeros beyond K.
  auto fill_rows = [&](int first, int last) {
    const uint32_t to = ring + fill_slot * S::kStageBytes + S::kWeightBytes + first_row * (S::kBlockK * 2);
    const int rows = fill_left > 0 ? fill_at.rows(p) : 0;
    const bool valid = fill_step * S::kBlockK + piece * 8 < p.in_features;
#pragma unroll
    for (int i = first; i < last; i++) {
      const int row = first_row + i * kRowsAtOnce;
      cp_async16_or_zero_if(row < rows, to + i * (kRowsAtOnce * S::kBlockK * 2) + ((piece ^ (row % 8)) * 16),
                            fill_activations + i * kRowsAtOnce * p.lda, valid);
    }
  };
  // The weights: a warp's own pieces, shared out among the warps along M.
  auto fill_words = [&]() {
    // With 8 bits, bytes 512 h + 16 l .. are what lane 16 h + l / 2 reads l % 2 th.
    const uint32_t to = ring + fill_slot * S::kStageBytes + ((wk * KT + wm) * WN + wn) * S::kTileBytes +
                        (S::BITS == 4 ? lane * 16 : lane % 2 * 512 + lane / 2 * 16);
    const int tiles = fill_left > 0 ? fill_tiles : 0;
    const char* from = fill_weights;
#pragma unroll
    for (int i = 0; i < KT / WM; i++) {
      cp_async16_if(i * WM < tiles, to + i * (WM * WN * S::kTileBytes), from);
      if constexpr (S::BITS == 8) cp_async16_if(i * WM < tiles, to + i * (WM * WN * S::kTileBytes) + 256, from + 512);
      from += WM * weights_pitch;
    }
  };
  // Scales and zero points: a row for each group that a warp's piece meets. Pieces beyond K or N meet zeros or are never
  // stored; they take those of some valid group and columns. One group has its scales at the end. Then on to the next.
  auto fill_scales = [&]() {
    const uint32_t to = ring + fill_slot * S::kStageBytes + S::kWeightBytes + S::kActivationBytes;
    const auto group_of = [&](int of_wk, int sub) {
      const int k = (fill_step * WK + of_wk) * (KT * 16) + (16 * sub << sub_shift);
      return (fill_at.first_group(p) + min(k >> p.group_shift, p.groups - 1)) * p.N;
    };
    {
      const int row = tid / kScaleRow, sub = row / WK, of_wk = row % WK;
      const int column = min(fill_at.n * S::kBlockN + tid % kScaleRow * 8, p.N - 8);
      cp_async16_if(fill_left > 0 && p.groups > 1 && sub < KT >> sub_shift,
                    to + (of_wk * S::kSubgroups + sub) * (S::kBlockN * 2) + tid % kScaleRow * 16,
                    p.s + group_of(of_wk, sub) + column);
    }
    if constexpr (S::kExtended) {
      constexpr int kColumns = 128 / S::BITS;  // in a piece
      const int row = tid / kZeroRow, sub = row / WK, of_wk = row % WK;
      const int column = min(fill_at.n * S::kBlockN + tid % kZeroRow * kColumns, p.N - kColumns);
      cp_async16_if(
          fill_left > 0 && p.zeros != nullptr && sub < KT >> sub_shift,
          to + S::kScaleBytes + (of_wk * S::kSubgroups + sub) * (S::kBlockN * S::BITS / 8) + tid % kZeroRow * 16,
          static_cast<const char*>(p.zeros) + (group_of(of_wk, sub) + column) * S::BITS / 8);
    }
    cp_async_commit();  // also when nothing was copied: the count of groups is the count of steps

    fill_left--;
    fill_slot = fill_slot + 1 == p.stages ? 0 : fill_slot + 1;
    fill_step++;
    fill_tiles -= WK * KT;
    fill_weights += WK * KT * weights_pitch;
    fill_activations += S::kBlockK;
    if (fill_step == p.steps && fill_left > 0) {
      fill_step = 0;
      fill_at.next(p);
      start_tile();
    }
  };
  // Part `part` of KT - 1.
  auto fill = [&](int part) {
    constexpr int kParts = KT - 1;
    if (part == 0) fill_words();
    fill_rows(part * kRowCopies / kParts, (part + 1) * kRowCopies / kParts);
    if (part == kParts - 1) fill_scales();
  };

  auto fill_step_at_once = [&]() {
#pragma unroll
    for (int part = 0; part < KT - 1; part++) fill(part);
  };
  for (int i = 0; i < p.stages - 1; i++) fill_step_at_once();

  // ---- What a lane reads of a stage. -------------------------------------------------------------------------------
  constexpr int kFirstPiece = KT * 2;  // 16-byte pieces of a row of activations that a warp's piece takes
  const uint32_t weights_at = ring + (wk * KT * WN + wn) * S::kTileBytes + lane * 16;
  // ldmatrix: lane l names row l % 8 of matrix l / 8. Matrices 0 and 1 are the halves of K of one 8-row block, 2 and 3
  // those of the next block.
  const uint32_t row_at = ring + S::kWeightBytes + (wm * MB * 8 + (lane / 16) * 8 + lane % 8) * (S::kBlockK * 2) +
                          wk * kFirstPiece / 8 * 128;
  const uint32_t half_at = ((lane / 8 % 2 + wk * kFirstPiece % 8) ^ (lane % 8)) * 16;
  const uint32_t scales_at =
      ring + S::kWeightBytes + S::kActivationBytes + wk * S::kSubgroups * (S::kBlockN * 2) + wn * 128 + g * 16;
  const uint32_t zeros_at = ring + S::kWeightBytes + S::kActivationBytes + S::kScaleBytes +
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
    if constexpr (S::BITS == 8) {
      const uint4 r = load_shared16(words_at + 512);
      f.words[4] = r.x, f.words[5] = r.y, f.words[6] = r.z, f.words[7] = r.w;
    }
    const uint32_t at = stage + row_at + (kt * 32 ^ half_at);
#pragma unroll
    for (int i = 0; i + 1 < MB; i += 2) ldmatrix4(f.b[i], f.b[i + 1], at + i * 8 * (S::kBlockK * 2));
    if (MB % 2) ldmatrix2(f.b[MB - 1], at + (MB - 1) * 8 * (S::kBlockK * 2));
    const int sub = kt >> sub_shift;
    if ((S::kAnyGroups || kt == KT - 1) && p.groups > 1) {
      const uint4 s = load_shared16(stage + scales_at + (S::kAnyGroups ? sub * (S::kBlockN * 2) : 0));
      f.scales[0] = s.x, f.scales[1] = s.y, f.scales[2] = s.z, f.scales[3] = s.w;
    }
    if constexpr (S::kExtended) {
      if (p.zeros != nullptr) {
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
  uint32_t zero[S::kExtended ? 4 : 1];
  if constexpr (S::kExtended) {
#pragma unroll
    for (int i = 0; i < S::BITS / 4; i++)
      fragments[0].zeros[i] = fragments[1].zeros[i] = S::BITS == 4 ? 0x88888888 : 0x80808080;
#pragma unroll
    for (int j = 0; j < 4; j++) zero[j] = Decoder<ScaledFrom<T, S::kMixed>, S::BITS>::zeros(0x10001 << (S::BITS - 1));
  }

  using Integer = ScaledFrom<T, S::kMixed>;  // what codes are decoded to
  auto multiply = [&](const Sm80Fragments<S>& f, int kt) {
    if constexpr (S::kExtended && !S::kScaled) {
      if (p.zeros != nullptr && (kt & ((1 << sub_shift) - 1)) == 0) {
#pragma unroll
        for (int j = 0; j < 4; j++) zero[j] = Decoder<Integer, S::BITS>::zeros(zeros_of<S::BITS>(f.zeros, j));
      }
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
      uint32_t a[4];
      if constexpr (S::kExtended && S::kScaled)  // registers are scarce: made anew
        zero[j] = Decoder<Integer, S::BITS>::zeros(zeros_of<S::BITS>(f.zeros, j));
      if constexpr (S::kExtended)
        Decoder<Integer, S::BITS>::word(f.words + j * (S::BITS / 4), zero[j], a);
      else
        Decoder<Integer, S::BITS>::word(f.words + j, a);
      if constexpr (S::kScaled) scale_fragment<T, S::kMixed>(a, f.scales[j]);
#pragma unroll
      for (int i = 0; i < MB; i++) mma<T>(S::kScaled ? sum[j][i] : part[S::kScaled ? 0 : j][i], a, f.b[i]);
    }
  };

  // kAlternate: the turn in which this warp multiplies, the same in all lanes.
  const int multiplies_at = __shfl_sync(0xffffffff, warp < S::kThreads / 64, 0);
  int slot = -1;  // of the current step
  // The next step's copies have landed, everyone's; and everyone holds what it needs of the slot that fill() takes next.
  auto advance = [&]() {
    wait_for_oldest(p.stages);
    __syncthreads();
    slot = slot + 1 == p.stages ? 0 : slot + 1;
  };

  int iteration = schedule.begin;
  while (iteration < schedule.end) {
    const int tile = TileScheduler::tile(p, iteration);
    const int step_begin = iteration % p.steps;
    const int step_end = min(p.steps, step_begin + schedule.end - iteration);
    clear(sum);
    clear(part);
    advance();
    load(fragments[0], slot * S::kStageBytes, 0);
    if constexpr (S::kAlternate) fill_step_at_once();

    for (int step = step_begin; step < step_end; step++) {
      const int k = (step * WK + wk) * (KT * 16);
      // Whether the group does not go on in the warp's next piece, or this is the block's last step of the tile.
      const bool ends = step + 1 == step_end || (k >> p.group_shift) != ((k + WK * KT * 16) >> p.group_shift);
#pragma unroll
      for (int kt = 0; kt < KT; kt++) {
        const Sm80Fragments<S>& f = fragments[kt % 2];
        const bool last = kt + 1 == KT, goes_on = step + 1 < step_end;
        if (!last) {
          load(fragments[(kt + 1) % 2], slot * S::kStageBytes, kt + 1);
          if constexpr (!S::kAlternate) fill(kt);
        } else if (goes_on) {
          advance();
          load(fragments[0], slot * S::kStageBytes, 0);
        }
        if (last && S::kAlternate) {
#pragma unroll 1
          for (int turn = 0; turn < 2; turn++) {
            if (turn == multiplies_at)
              multiply(f, kt);
            else if (goes_on)
              fill_step_at_once();
          }
        } else {
          multiply(f, kt);
        }
        if constexpr (!S::kScaled) {
          if (last ? ends : S::kExtended && (kt + 1 & ((1 << sub_shift) - 1)) == 0) scale_part(f);
        }
      }
    }

    const typename P::template Tile<S> at(p, tile);
    if (p.groups == 1) {
      const uint16_t* const scales = p.s + at.first_group(p) * p.N;
      const int column = at.column() + wn * MARLIN_TILE_N;
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const float scale =
            column < p.N ? scale_to_float(scales[column + scale_index(g + 8 * i, true)], p.bf16_scales) : 0.0f;
#pragma unroll
        for (int b = 0; b < MB; b++) {
          sum[i / 2][b][i % 2 * 2] *= scale;
          sum[i / 2][b][i % 2 * 2 + 1] *= scale;
        }
      }
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

template <typename T, typename S>
__global__ void __launch_bounds__(S::kThreads, 1) gemm_sm80_kernel(const GemmArguments p) {
  gemm_sm80<T, S>(p);
}

}  // namespace marlin
