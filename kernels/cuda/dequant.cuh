// dequant.cuh: from packed codes to the 16-bit values that tensor cores multiply.
//
// The codes become small integers, code - 8 in -8 .. 7, which fp16 and bf16 hold exactly, so nothing is rounded here.
// Scales are applied in fp32 to sums over a group (gemm_sm80.cuh, gemm_sm90.cuh), or to the values (gemm_sm90_wide.cuh).
//
// No conversion instruction is used: OR-ing a code into the mantissa of a power of two 2^m adds the code to it.
//
//   fp16  0x6400 = 1024, spacing 1:     0x6400 | c       = 1024 + c           for a code in bits 0..3
//                                       0x6400 | c << 4  = 1024 + 16 c        for a code in bits 4..7
//   bf16  0x4300 = 128,  spacing 1:     0x4300 | c       = 128 + c            bits 0..3 only: 7 bits of mantissa
//
// and one subtraction or fused multiply-add on the pair of values takes the offset (and the 16) away again.
#pragma once

#include <type_traits>

#include "../marlin.h"
#include "ptx.cuh"

namespace marlin {

__device__ __forceinline__ uint32_t fma_half2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
__device__ __forceinline__ uint32_t add_half2(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
__device__ __forceinline__ uint32_t fma_bfloat2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// The lower or the upper half of a register, twice. As a move of halves, which nvcc makes a part of the instruction that
// takes it (R0.H0_H0), unlike a permutation of bytes.
__device__ __forceinline__ uint32_t lower_twice(uint32_t v) {
  uint32_t d;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; mov.b32 %0, {l, l};}" : "=r"(d) : "r"(v));
  return d;
}
__device__ __forceinline__ uint32_t upper_twice(uint32_t v) {
  uint32_t d;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; mov.b32 %0, {h, h};}" : "=r"(d) : "r"(v));
  return d;
}

// One word of a tile: the 16x16 sub-tile's share of one lane, eight codes. With g = lane / 4 and t = lane % 4:
//
//   nibble    7     6     5     4     3     2     1     0
//   row     2t+9  2t+1  2t+9  2t+1  2t+8   2t   2t+8   2t       (along K)
//   column   g+8   g+8    g     g    g+8   g+8    g     g       (along N)
//
// mma.m16n8k16 wants of its 16x16 left operand, from the same lane, four pairs: (row g, columns 2t, 2t+1), (row g+8,
// the same), (row g, columns 2t+8, 2t+9), (row g+8, the same). Read the word transposed, N as the operand's rows, and
// the pairs are nibbles (0, 4), (2, 6), (1, 5), (3, 7): sixteen bits apart, so one mask takes a pair.
//
// Decoder<T, BITS>::word(words, fragment) takes 4-bit codes whose zero point is 8 everywhere; with one more argument, a
// register made by `zeros`, columns g and g + 8 have zero points of their own, which `zeros` takes at bits 0 and 16
// (zeros_of).
//
// A zero point is subtracted before the product, where |code - zero| <= 255 is exact in both types; the register that
// takes the offset away takes it away as well:
//
//   fp16          1024 + c - (1024 + zero): both below 2048, spacing 1
//   bf16, 4 bits   128 + c - (128 + zero)
//   bf16, 8 bits  7 bits of mantissa do not hold a code, so its upper bit goes apart: (128 + c % 128) - (256 or 128)
//                 is c - 128, then (c - 128) + (128 - zero); each fits eight bits
//
// Columns g and g + 8 of a sub-tile have the zero points z0 and z1. With 8 bits a sub-tile has two words of a lane, one
// for each column: bytes 0, 2 are rows 2t, 2t+1, bytes 1, 3 rows 2t+8, 2t+9.
template <typename T, int BITS>
struct Decoder;

template <>
struct Decoder<__half, 4> {
  static __device__ __forceinline__ void word(const uint32_t* q, uint32_t (&a)[4]) {
    constexpr uint32_t kMinus1032 = 0xe408e408;  // -(1024 + MARLIN_ZERO_POINT), twice
    constexpr uint32_t kSixteenth = 0x2c002c00;  // 1 / 16
    constexpr uint32_t kMinus72 = 0xd480d480;    // -(1024 / 16 + MARLIN_ZERO_POINT)
    const uint32_t upper = q[0] >> 8;
    a[0] = add_half2(and_or<0x000f000f, 0x64006400>(q[0]), kMinus1032);
    a[1] = add_half2(and_or<0x000f000f, 0x64006400>(upper), kMinus1032);
    a[2] = fma_half2(and_or<0x00f000f0, 0x64006400>(q[0]), kSixteenth, kMinus72);
    a[3] = fma_half2(and_or<0x00f000f0, 0x64006400>(upper), kSixteenth, kMinus72);
  }
  static __device__ __forceinline__ uint32_t zeros(uint32_t packed) { return and_or<0x000f000f, 0xe400e400>(packed); }
  static __device__ __forceinline__ void word(const uint32_t* q, uint32_t zeros, uint32_t (&a)[4]) {
    const uint32_t z0 = lower_twice(zeros), z1 = upper_twice(zeros);
    constexpr uint32_t kSixteenth = 0x2c002c00;  // 1 / 16
    constexpr uint32_t k960 = 0x63806380;        // -(1024 + zero) + 960 = -(1024 / 16 + zero)
    const uint32_t upper = q[0] >> 8;
    a[0] = add_half2(and_or<0x000f000f, 0x64006400>(q[0]), z0);
    a[1] = add_half2(and_or<0x000f000f, 0x64006400>(upper), z1);
    a[2] = fma_half2(and_or<0x00f000f0, 0x64006400>(q[0]), kSixteenth, add_half2(z0, k960));
    a[3] = fma_half2(and_or<0x00f000f0, 0x64006400>(upper), kSixteenth, add_half2(z1, k960));
  }
};

template <>
struct Decoder<__nv_bfloat16, 4> {
  static __device__ __forceinline__ void word(const uint32_t* q, uint32_t (&a)[4]) {
    constexpr uint32_t kOne = 0x3f803f80;
    constexpr uint32_t kMinus136 = 0xc308c308;  // -(128 + MARLIN_ZERO_POINT), twice
    a[0] = fma_bfloat2(and_or<0x000f000f, 0x43004300>(q[0]), kOne, kMinus136);
    a[1] = fma_bfloat2(and_or<0x000f000f, 0x43004300>(q[0] >> 8), kOne, kMinus136);
    a[2] = fma_bfloat2(and_or<0x000f000f, 0x43004300>(q[0] >> 4), kOne, kMinus136);
    a[3] = fma_bfloat2(and_or<0x000f000f, 0x43004300>(q[0] >> 12), kOne, kMinus136);
  }
  static __device__ __forceinline__ uint32_t zeros(uint32_t packed) { return and_or<0x000f000f, 0xc300c300>(packed); }
  static __device__ __forceinline__ void word(const uint32_t* q, uint32_t zeros, uint32_t (&a)[4]) {
    const uint32_t z0 = lower_twice(zeros), z1 = upper_twice(zeros);
    constexpr uint32_t kOne = 0x3f803f80;
    a[0] = fma_bfloat2(and_or<0x000f000f, 0x43004300>(q[0]), kOne, z0);
    a[1] = fma_bfloat2(and_or<0x000f000f, 0x43004300>(q[0] >> 8), kOne, z1);
    a[2] = fma_bfloat2(and_or<0x000f000f, 0x43004300>(q[0] >> 4), kOne, z0);
    a[3] = fma_bfloat2(and_or<0x000f000f, 0x43004300>(q[0] >> 12), kOne, z1);
  }
};

template <>
struct Decoder<__half, 8> {
  static __device__ __forceinline__ void word(const uint32_t* q, uint32_t (&a)[4]) {
    constexpr uint32_t kMinus1152 = 0xe480e480;  // -(1024 + 128), twice
    a[0] = add_half2(and_or<0x00ff00ff, 0x64006400>(q[0]), kMinus1152);
    a[1] = add_half2(and_or<0x00ff00ff, 0x64006400>(q[1]), kMinus1152);
    a[2] = add_half2(__byte_perm(q[0], 0x64646464, 0x4341), kMinus1152);
    a[3] = add_half2(__byte_perm(q[1], 0x64646464, 0x4341), kMinus1152);
  }
  static __device__ __forceinline__ uint32_t zeros(uint32_t packed) { return and_or<0x00ff00ff, 0xe400e400>(packed); }
  static __device__ __forceinline__ void word(const uint32_t* q, uint32_t zeros, uint32_t (&a)[4]) {
    const uint32_t z0 = lower_twice(zeros), z1 = upper_twice(zeros);
    a[0] = add_half2(and_or<0x00ff00ff, 0x64006400>(q[0]), z0);
    a[1] = add_half2(and_or<0x00ff00ff, 0x64006400>(q[1]), z1);
    a[2] = add_half2(__byte_perm(q[0], 0x64646464, 0x4341), z0);
    a[3] = add_half2(__byte_perm(q[1], 0x64646464, 0x4341), z1);
  }
};

template <>
struct Decoder<__nv_bfloat16, 8> {
  static __device__ __forceinline__ uint32_t zeros(uint32_t packed) {
    const auto left = [](uint32_t z) {  // (2^23 + 128) - (2^23 + z), exact
      return __float_as_uint(8388736.0f - __uint_as_float(0x4b000000u | z));
    };
    return __byte_perm(left(packed & 0xff), left(packed >> 16 & 0xff), 0x7632);
  }
  // Bytes 0 and 2 of q, less 128.
  static __device__ __forceinline__ uint32_t pair(uint32_t q) {
    constexpr uint32_t kOne = 0x3f803f80;
    uint32_t minus;
    asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(minus) : "r"(q), "n"(0x00800080), "n"(0xc380c380));  // (q & b) ^ c
    return fma_bfloat2(and_or<0x007f007f, 0x43004300>(q), kOne, minus);
  }
  static __device__ __forceinline__ uint32_t pair(uint32_t q, uint32_t z) {
    constexpr uint32_t kOne = 0x3f803f80;
    return fma_bfloat2(pair(q), kOne, z);
  }
  static __device__ __forceinline__ void word(const uint32_t* q, uint32_t (&a)[4]) {
    a[0] = pair(q[0]);
    a[1] = pair(q[1]);
    a[2] = pair(q[0] >> 8);
    a[3] = pair(q[1] >> 8);
  }
  static __device__ __forceinline__ void word(const uint32_t* q, uint32_t zeros, uint32_t (&a)[4]) {
    const uint32_t z0 = lower_twice(zeros), z1 = upper_twice(zeros);
    a[0] = pair(q[0], z0);
    a[1] = pair(q[1], z1);
    a[2] = pair(q[0] >> 8, z0);
    a[3] = pair(q[1] >> 8, z1);
  }
};

// A row of zero points is permuted like one of grouped scales, so that the eight of a lane's columns g + 8 i stand
// together, in 4 (4 bits) or 8 bytes at 4 g or 8 g, and then interleaved within a word: of 4 bits in the order i = 0, 2, 4,
// 6, 1, 3, 5, 7, of 8 bits 0, 2, 1, 3. So those of sub-tile j, i = 2 j and 2 j + 1, are 16 bits apart. From the lane's
// words, at bits 0 and 16, other bits in between:
template <int BITS>
__device__ __forceinline__ uint32_t zeros_of(const uint32_t* words, int j) {
  return BITS == 4 ? words[0] >> 4 * j : words[j / 2] >> j % 2 * 8;
}

// A scale from its 16 bits.
__device__ __forceinline__ float scale_to_float(uint16_t bits, bool bf16) {
  return bf16 ? __uint_as_float(static_cast<uint32_t>(bits) << 16) : __half2float(__ushort_as_half(bits));
}

// A pair of values times a pair of scales, rounded once.
template <typename T>
__device__ __forceinline__ uint32_t times(uint32_t a, uint32_t scale);
template <>
__device__ __forceinline__ uint32_t times<__half>(uint32_t a, uint32_t scale) {
  uint32_t d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(scale));
  return d;
}
template <>
__device__ __forceinline__ uint32_t times<__nv_bfloat16>(uint32_t a, uint32_t scale) {
#if __CUDA_ARCH__ >= 900
  uint32_t d;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(scale));
  return d;
#else
  return fma_bfloat2(a, scale, 0x80008000);  // plus -0: the same bits
#endif
}

__device__ __forceinline__ uint32_t round_pair(float low, float high, __half) {
  uint32_t d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
__device__ __forceinline__ uint32_t round_pair(float low, float high, __nv_bfloat16) {
  uint32_t d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

// The fragment of a sub-tile, decoded, multiplied by the scales of its columns g (lower half of `scales`) and g + 8, and
// rounded once: what marlin_cuda_dequantize stores, bit for bit. MIXED: scales are not of type T, one is fp16 and the
// other bf16; they are multiplied in fp32, where the product is exact, with integers that widen from bf16 by a shift.
template <typename T, bool MIXED>
__device__ __forceinline__ void scale_fragment(uint32_t (&a)[4], uint32_t scales) {
  if constexpr (MIXED) {
    constexpr bool kBf16Scales = std::is_same<T, __half>::value;
    const float s[2] = {scale_to_float(static_cast<uint16_t>(scales), kBf16Scales),
                        scale_to_float(static_cast<uint16_t>(scales >> 16), kBf16Scales)};
#pragma unroll
    for (int i = 0; i < 4; i++)
      a[i] = round_pair(__uint_as_float(a[i] << 16) * s[i % 2], __uint_as_float(a[i] & 0xffff0000) * s[i % 2], T());
  } else {
    const uint32_t s[2] = {lower_twice(scales), upper_twice(scales)};
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = times<T>(a[i], s[i % 2]);
  }
}
// The type that integers are decoded to for it.
template <typename T, bool MIXED>
using ScaledFrom = typename std::conditional<MIXED, __nv_bfloat16, T>::type;

// Where the scale of column n (0 .. 63 of a tile) stands in the permuted row of scales. A lane needs the columns
// g + 8 i, i = 0 .. 7. With groups (G > 1) these eight stand together, 16 bytes at 8 g. Per-channel scales (G == 1)
// are ordered for another fragment, in runs of 32 columns: new[8 i + j] = old[2 i + {0,1,8,9,16,17,24,25}[j]].
__device__ __forceinline__ int scale_index(int column, bool per_channel) {
  if (!per_channel) return (column & 7) * 8 + (column >> 3);
  const int c = column & 31;
  return (column & 32) + ((c & 7) >> 1) * 8 + (c >> 3) * 2 + (c & 1);
}

}  // namespace marlin
