// marlin.h: the contract between the languages.
//
// Constants, error codes and C prototypes of the native CPU library (`_cpu.so`). The layout itself is explained in
// marlin_convert/layout.py, which a test compares with the constants below. Plain C: no torch, no Python.
//
// Conventions
//   * Sizes are int64_t and count elements, not bytes. All matrices are row-major and contiguous.
//   * No pointer needs more alignment than a byte. Buffers that are written must not overlap any other argument.
//   * W is K x N. K is a multiple of MARLIN_TILE_K, N of MARLIN_TILE_N. A block of a layer's rows is a K x N like any.
//   * fp16 values travel as their 16 bits, uint16_t.
//   * Every function is thread-safe. `threads` is the most it may use; small work is done on fewer.
//   * Functions that can fail return MARLIN_OK or another code below, and then have written nothing.
#ifndef MARLIN_H_
#define MARLIN_H_

#include <stdint.h>

// Raise it with every change of a prototype or of a meaning, here and in marlin_convert/ops.py.
#define MARLIN_CPU_ABI_VERSION 1

// The layout; the same names as in layout.py.
#define MARLIN_BITS 4
#define MARLIN_PACK_FACTOR 8
#define MARLIN_ZERO_POINT 8
#define MARLIN_TILE_K 16
#define MARLIN_TILE_N 64
#define MARLIN_SUBTILE_N 16
#define MARLIN_TILE_WORDS 128
#define MARLIN_WARP_LANES 32
#define MARLIN_MIN_K 128
#define MARLIN_MIN_N 256

// Error codes.
#define MARLIN_OK 0
#define MARLIN_ERROR_NULL 1   // a pointer is null
#define MARLIN_ERROR_SHAPE 2  // a size is not positive, not a multiple of the tile, or the groups do not fit the rows
#define MARLIN_ERROR_ISA 3    // this CPU lacks the instruction set asked for

// Instruction sets. AUTO takes the highest that the CPU has.
#define MARLIN_ISA_AUTO 0
#define MARLIN_ISA_PLAIN 1   // C++ without intrinsics: any CPU
#define MARLIN_ISA_AVX2 2    // AVX2, FMA, F16C: x86 since 2013
#define MARLIN_ISA_AVX512 3  // AVX-512 F, BW, VBMI: Intel since Ice Lake (2019), AMD since Zen 4 (2022)

// The library is compiled with hidden visibility; what follows is all it shows.
#define MARLIN_EXPORT __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

MARLIN_EXPORT int marlin_cpu_abi_version(void);

// The highest instruction set (MARLIN_ISA_*) of this CPU.
MARLIN_EXPORT int marlin_cpu_best_isa(void);

// qweight [k/8, n] -> B [k/16, 2n], and back.
MARLIN_EXPORT int marlin_cpu_pack(const int32_t* qweight, int32_t* B, int64_t k, int64_t n, int threads, int isa);
MARLIN_EXPORT int marlin_cpu_unpack(const int32_t* B, int32_t* qweight, int64_t k, int64_t n, int threads, int isa);

// Index of the first element in which a[count] and b[count] differ, or -1.
MARLIN_EXPORT int64_t marlin_cpu_first_difference(const int32_t* a, const int32_t* b, int64_t count);

// W [k, n] fp16 = (code - 8) * scale, rounded once (to nearest, ties to even). `groups` rows of scales; k is a
// multiple of groups, and k / groups of MARLIN_TILE_K. `s` is in Marlin's order, chosen by `groups`.
MARLIN_EXPORT int marlin_cpu_dequantize_gptq(const int32_t* qweight, const uint16_t* scales, uint16_t* w, int64_t k,
                                             int64_t n, int64_t groups, int threads, int isa);
MARLIN_EXPORT int marlin_cpu_dequantize_marlin(const int32_t* B, const uint16_t* s, uint16_t* w, int64_t k, int64_t n,
                                               int64_t groups, int threads, int isa);

// y [m, n] += x[:, k0 : k0 + k] @ W, where W [k, n] is the block of rows k0 .. k0 + k of a layer, given as `qweight`
// or `B` of those rows alone, with the weights rounded to fp16 as above and fp32 accumulation. x is [m, x_columns],
// the scales are the whole layer's, [groups, n], each row of them for rows_per_group rows. k0 and rows_per_group are
// multiples of MARLIN_TILE_K. The result does not depend on `threads`.
MARLIN_EXPORT int marlin_cpu_matmul_gptq(const float* x, int64_t m, int64_t x_columns, const int32_t* qweight,
                                         const uint16_t* scales, float* y, int64_t k0, int64_t k, int64_t n,
                                         int64_t groups, int64_t rows_per_group, int threads, int isa);
MARLIN_EXPORT int marlin_cpu_matmul_marlin(const float* x, int64_t m, int64_t x_columns, const int32_t* B,
                                           const uint16_t* s, float* y, int64_t k0, int64_t k, int64_t n,
                                           int64_t groups, int64_t rows_per_group, int threads, int isa);

#ifdef __cplusplus
}  // extern "C"
#endif

#endif  // MARLIN_H_
