// instance.h: the instances of the kernel templates, as data. Each has a number and a name that never change, such as
// sm90_m16n128_b4_g64: instructions of sm_90, output tiles of 16 rows (M) by 128 columns (N), 4 bits, groups of 64.
// "gany" takes any groups. A z at the end tells it from an instance that, for the same numbers, takes no zero points
// (of those that round weights, those with a z take weights with zero points alone); k64 from one with longer steps along K.
#pragma once

#include <vector>

namespace marlin {

enum class MainLoop { kSm80, kSm90, kSm90Wide };  // gemm_sm80.cuh, gemm_sm90.cuh, gemm_sm90_wide.cuh

enum ZeroPoints : int { kNever = 0, kEither = 1, kAlways = 2 };  // what weights must have of them

constexpr int kOtherScales = 2, kOneGroup = 4, kKernels = 6;  // in Instance::kernels

struct Instance {
  int id;
  const char* name;
  MainLoop loop;
  // By dtype; rounds_weights: from kOtherScales on for scales that are not of the activations' type, and from kOneGroup
  // on for one group alone, where there are such.
  const void* kernels[kKernels];
  int bits;
  int group_size;  // rows that share a scale; 128 is also for G == 1; 0: any number
  ZeroPoints zero_points;
  bool rounds_weights;  // to the activations' type, scaled, before they are multiplied
  bool invariant;       // one of those that add up a row's products in the same order, if K is cut into the same parts
  bool parts_in_turn;   // a block can do these parts of a whole tile in turn
  int threads, block_m, block_n, block_k;
  int blocks_per_sm, warps_m;  // sm80: of an SM, of a block along M
  // Shared memory: bytes of each pipeline stage and beside the stages; how many stages, and a multiple of what.
  int stage_bytes, extra_bytes, max_stages, stage_multiple;
  int min_stages;  // sm80
  int line_bytes;  // sm90: of the lines that TMA copies weights as
};

// The instances in one translation unit, gemm_sm80_b4.cu and so on. Those of sm_90 are compiled for sm_90a only, and are
// there when the library is built for it (MARLIN_HAS_SM90).
std::vector<Instance> sm80_b4_instances();
std::vector<Instance> sm80_b4_groups_instances();
std::vector<Instance> sm80_b8_instances();
std::vector<Instance> sm80_b8_zeros_instances();
std::vector<Instance> sm90_b4_instances();
std::vector<Instance> sm90_b4_groups_instances();
std::vector<Instance> sm90_b8_instances();
std::vector<Instance> sm90_wide_b4_instances();
std::vector<Instance> sm90_wide_b4_zeros_instances();
std::vector<Instance> sm90_wide_b8_instances();
std::vector<Instance> sm90_wide_b8_zeros_instances();

}  // namespace marlin
