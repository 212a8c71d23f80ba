// marlin_cuda.h: the C interface of the CUDA library (`_cuda.so`). Plain C: no torch, no Python, no CUDA headers.
//
// Conventions
//   * Pointers are device pointers unless said otherwise, aligned to 16 bytes. Matrices are row-major; only A may have
//     a row stride of its own. Buffers that are written must not overlap any other argument.
//   * W is K x N. K and N are multiples of MARLIN_CUDA_K_MULTIPLE and MARLIN_CUDA_N_MULTIPLE. G is the number of groups
//     of rows that share a scale: K / 128, or 1 for per-channel scales.
//   * `stream` is a cudaStream_t. Calls are queued there, never wait, and never print. `device` is a CUDA ordinal; the
//     calling thread's current device is the same after a call as before it.
//   * The result is MARLIN_OK (0), a cudaError_t (positive), or one of the negative codes below; after a negative code
//     nothing was queued. marlin_cuda_error_string explains each.
#ifndef MARLIN_CUDA_H_
#define MARLIN_CUDA_H_

#include <stddef.h>
#include <stdint.h>

#include "marlin.h"

// Raise it with every change of a prototype or of a meaning, here and in marlin_convert/ops.py.
#define MARLIN_CUDA_ABI_VERSION 1

#define MARLIN_CUDA_K_MULTIPLE 64
#define MARLIN_CUDA_N_MULTIPLE 64
#define MARLIN_CUDA_GROUP_SIZE 128

// Types of activations and outputs.
#define MARLIN_CUDA_FP16 0
#define MARLIN_CUDA_BF16 1

// What marlin_cuda_choose answers.
#define MARLIN_CUDA_USE_GEMM 0        // marlin_cuda_gemm
#define MARLIN_CUDA_USE_DEQUANTIZE 1  // marlin_cuda_dequantize, then a 16-bit matrix product by cuBLAS

// Error codes.
#define MARLIN_CUDA_ERROR_NULL (-1)        // a required pointer is null
#define MARLIN_CUDA_ERROR_SHAPE (-2)       // M, N or K is not positive, too large, or not a multiple of what it must be
#define MARLIN_CUDA_ERROR_GROUPS (-3)      // G is neither 1 nor K / 128
#define MARLIN_CUDA_ERROR_STRIDE (-4)      // lda is less than K or not a multiple of 8
#define MARLIN_CUDA_ERROR_ALIGNMENT (-5)   // a pointer is not aligned to 16 bytes
#define MARLIN_CUDA_ERROR_DTYPE (-6)       // neither MARLIN_CUDA_FP16 nor MARLIN_CUDA_BF16
#define MARLIN_CUDA_ERROR_WORKSPACE (-7)   // workspace_bytes is less than marlin_cuda_gemm_workspace_bytes
#define MARLIN_CUDA_ERROR_DEVICE (-8)      // no such device, or its compute capability is below 8.0
#define MARLIN_CUDA_ERROR_VARIANT (-9)     // no such variant, or this device has too little shared memory for it

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  int32_t capability_major, capability_minor;
  int32_t multiprocessors;
  int32_t shared_bytes_per_block;  // the most a block may ask for
  int64_t l2_bytes;
  int64_t memory_bytes;
  int32_t driver_version, runtime_version;  // 1000 major + 10 minor, of CUDA: 13000 is 13.0
  char name[256];
} marlin_cuda_device_info_t;

MARLIN_EXPORT int marlin_cuda_abi_version(void);

// A sentence for a code returned by any function here. Never null; need not be freed.
MARLIN_EXPORT const char* marlin_cuda_error_string(int code);

// The number of CUDA devices. Returns 35 (cudaErrorInsufficientDriver) where the driver is missing or older than the
// CUDA runtime in this library, 100 (cudaErrorNoDevice) where there is no GPU.
MARLIN_EXPORT int marlin_cuda_device_count(int* count /* host */);
MARLIN_EXPORT int marlin_cuda_device_info(int device, marlin_cuda_device_info_t* info /* host */);

// C [M, N] = A [M, K] * W + bias, accumulated in fp32. W is B [K / 16, 2 N] with the scales s [G, N] fp16, both as
// stored. A, bias [N] (or null) and C are of `dtype`; lda is the number of elements between rows of A.
// The workspace holds partial sums. Its first MARLIN_CUDA_COUNTER_BYTES must be zero before the first call that uses it
// and are zero after each; calls that may run at the same time need workspaces of their own.
// `variant` is 0 for the library's choice; other values (see struct Variant in cuda/gemm.cu) are for tests and tuning.
// Equal arguments on equal devices give equal bits.
#define MARLIN_CUDA_COUNTER_BYTES 8192
MARLIN_EXPORT int marlin_cuda_gemm(const void* A, const void* B, const void* s, const void* bias, void* C,
                                   void* workspace, size_t workspace_bytes, int64_t M, int64_t N, int64_t K, int64_t G,
                                   int64_t lda, int dtype, int device, void* stream, int variant);

// Bytes of workspace that marlin_cuda_gemm needs for this shape and any variant; 0 if the shape or device is invalid.
MARLIN_EXPORT size_t marlin_cuda_gemm_workspace_bytes(int64_t M, int64_t N, int64_t K, int device);

// Which is expected to be faster for this shape: MARLIN_CUDA_USE_GEMM or MARLIN_CUDA_USE_DEQUANTIZE (or a negative
// code).
MARLIN_EXPORT int marlin_cuda_choose(int64_t M, int64_t N, int64_t K, int device);

// GPTQ qweight [K / 8, N] -> B [K / 16, 2 N], and back. Bits are moved, nothing is computed.
MARLIN_EXPORT int marlin_cuda_repack(const void* qweight, void* B, int64_t K, int64_t N, int device, void* stream);
MARLIN_EXPORT int marlin_cuda_unpack(const void* B, void* qweight, int64_t K, int64_t N, int device, void* stream);

// W [K, N] = (code - 8) * scale in `dtype`, rounded once to nearest even.
MARLIN_EXPORT int marlin_cuda_dequantize(const void* B, const void* s, void* W, int64_t K, int64_t N, int64_t G,
                                         int dtype, int device, void* stream);

// Reads `bytes` (a multiple of 16) once and writes one word to `sink` at most: the least time in which weights can be
// read, for benchmarks.
MARLIN_EXPORT int marlin_cuda_stream_read(const void* data, int64_t bytes, void* sink, int device, void* stream);

#ifdef __cplusplus
}  // extern "C"
#endif

#endif  // MARLIN_CUDA_H_
