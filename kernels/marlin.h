// marlin.h: the contract between the languages.
//
// Constants, error codes and C prototypes of the native CPU library (`_cpu.so`). The layout itself is explained in
// marlin_convert/formats/layout.py, which a test compares with the constants below. Plain C: no torch, no Python.
//
// Conventions
//   * Sizes are int64_t and count elements, not bytes. All matrices are row-major and contiguous.
//   * No pointer needs more alignment than a byte. Buffers that are written must not overlap any other argument.
//   * W is K x N. K is a multiple of MARLIN_TILE_K, N of MARLIN_TILE_N. A block of a layer's rows is a K x N like any.
//   * fp16 and bf16 values travel as their 16 bits, uint16_t.
//   * `bits` is 4 or 8.
//   * Every function is thread-safe. `threads` is the most it may use; small work is done on fewer.
//   * Functions that can fail return MARLIN_OK or another code below, and then have written nothing.
#ifndef MARLIN_H_
#define MARLIN_H_

#include <stdint.h>

// Raise it with every change of a prototype or of a meaning, here and in marlin_convert/native/_cpu_library.py.
#define MARLIN_CPU_ABI_VERSION 4

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
#define MARLIN_EXT_K 128
#define MARLIN_EXT_N 64

// Error codes.
#define MARLIN_OK 0
#define MARLIN_ERROR_NULL 1   // a pointer is null
#define MARLIN_ERROR_SHAPE 2  // a size is not positive, not a multiple of the tile, or the groups do not fit the rows
#define MARLIN_ERROR_ISA 3    // this CPU lacks the instruction set asked for
#define MARLIN_ERROR_BITS 4   // neither 4 nor 8 bits

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

// qweight [k bits/32, n] -> B [k/16, n bits/2], and back.
MARLIN_EXPORT int marlin_cpu_pack(const int32_t* qweight, int32_t* B, int64_t k, int64_t n, int bits, int threads,
                                  int isa);
MARLIN_EXPORT int marlin_cpu_unpack(const int32_t* B, int32_t* qweight, int64_t k, int64_t n, int bits, int threads,
                                    int isa);

// Rows k0 .. k0 + rows of a layer as the extended format stores them, as GPTQ words `out` [rows bits/32, padded_n]: row
// k0 + i is the source's row perm[k0 + i], or k0 + i without perm; what lies beyond the source's k rows and n columns is
// `fill` [padded_n], a code for each column. `qweight` is the whole layer's, [k bits/32, n]; perm [k] holds 0 .. k - 1.
// k, rows and k0 are multiples of 32/bits; n and padded_n >= n may be any number.
MARLIN_EXPORT int marlin_cpu_arrange(const int32_t* qweight, const int32_t* perm, const uint8_t* fill, int32_t* out,
                                     int64_t k, int64_t n, int64_t k0, int64_t rows, int64_t padded_n, int bits,
                                     int threads, int isa);

// Act-order, sorted and packed in one pass: B [rows/16, padded_n bits/2] of a layer whose stored row i is the source's row
// perm[i]; what lies beyond the source's k rows and n columns is `fill` [padded_n], a code for each column. qweight
// [k bits/32, n] and B may be some columns of wider matrices: stride and b_stride are words from one row to the next.
// perm [k] holds each of 0 .. k - 1 once; k is a multiple of 32/bits; rows >= k and padded_n >= n are whole tiles.
MARLIN_EXPORT int marlin_cpu_pack_sorted(const int32_t* qweight, int64_t stride, const int32_t* perm,
                                         const uint8_t* fill, int32_t* B, int64_t b_stride, int64_t k, int64_t n,
                                         int64_t rows, int64_t padded_n, int bits, int threads, int isa);

// Whether B is what marlin_cpu_pack_sorted makes, found out the other way round: B is unpacked, and every code of the
// source compared with the one at its place. `difference` receives -1, or row * padded_n + column of the first code of B
// that is not as it should be.
MARLIN_EXPORT int marlin_cpu_compare_sorted(const int32_t* qweight, int64_t stride, const int32_t* perm,
                                            const uint8_t* fill, const int32_t* B, int64_t b_stride, int64_t k,
                                            int64_t n, int64_t rows, int64_t padded_n, int bits, int threads, int isa,
                                            int64_t* difference);

// Words of another order. `out` [columns, rows] has the columns of `in` [rows, columns] as its rows, of any size.
MARLIN_EXPORT int marlin_cpu_transpose(const int32_t* in, int32_t* out, int64_t rows, int64_t columns, int threads,
                                       int isa);

// 4 bits: AWQ's words [k, n/8], which hold columns 0, 2, 4, 6, 1, 3, 5, 7 of eight from the lowest bits up, -> GPTQ's
// [k/8, n], and back. k and n are multiples of 8.
MARLIN_EXPORT int marlin_cpu_awq_to_gptq(const int32_t* awq, int32_t* gptq, int64_t k, int64_t n, int threads, int isa);
MARLIN_EXPORT int marlin_cpu_gptq_to_awq(const int32_t* gptq, int32_t* awq, int64_t k, int64_t n, int threads, int isa);

// Index of the first element in which a[count] and b[count] differ, or -1.
MARLIN_EXPORT int64_t marlin_cpu_first_difference(const int32_t* a, const int32_t* b, int64_t count);

// A block of rows of a layer. The scales and zero points are the whole layer's, each row of them for rows_per_group rows.
// rows_per_group and k0 are multiples of MARLIN_TILE_K.
typedef struct {
  const int32_t* weights;  // rows k0 .. k0 + k: qweight [k bits/32, n], or B [k/16, n bits/2]
  const uint16_t* scales;  // [groups, n]; with B in Marlin's order of columns, chosen by `groups`
  const uint8_t* zeros;    // [groups, n], the columns in their own order; null: the middle, 8 or 128
  int64_t k0, k, n, groups, rows_per_group;
  int32_t bits;
  int32_t bf16;  // the scales, and the weights as they are rounded: 0 fp16, 1 bf16
} marlin_cpu_layer_t;

// W [k, n] = (code - zero) * scale, rounded once (to nearest, ties to even) to the type of the scales.
MARLIN_EXPORT int marlin_cpu_dequantize_gptq(const marlin_cpu_layer_t* layer, uint16_t* w, int threads, int isa);
MARLIN_EXPORT int marlin_cpu_dequantize_marlin(const marlin_cpu_layer_t* layer, uint16_t* w, int threads, int isa);

// y [m, n] += x[:, k0 : k0 + k] @ W with the weights rounded as above and fp32 accumulation. x is [m, x_columns]. The
// result does not depend on `threads`.
MARLIN_EXPORT int marlin_cpu_matmul_gptq(const float* x, int64_t m, int64_t x_columns, const marlin_cpu_layer_t* layer,
                                         float* y, int threads, int isa);
MARLIN_EXPORT int marlin_cpu_matmul_marlin(const float* x, int64_t m, int64_t x_columns,
                                           const marlin_cpu_layer_t* layer, float* y, int threads, int isa);

#ifdef __cplusplus
}  // extern "C"
#endif

#endif  // MARLIN_H_
