// marlin_cuda.h: the C interface of the CUDA library (`_cuda.so`). Plain C: no torch, no Python, no CUDA headers.
//
// Conventions
//   * Pointers are device pointers unless said otherwise, aligned to 16 bytes. Matrices are row-major; only A may have
//     a row stride of its own. Buffers that are written must not overlap any other argument.
//   * W is K x N as stored, padding included. K and N are multiples of MARLIN_CUDA_K_MULTIPLE and
//     MARLIN_CUDA_N_MULTIPLE. G is the number of groups of rows that share a scale: 1, or K / 16, K / 32, K / 64 or
//     K / 128 (MARLIN_CUDA_GROUP_SIZE). docs/concepts/format.md has the formats.
//   * `stream` is a cudaStream_t. Calls are queued there and never wait. They print only with MARLIN_PRINT_PLAN=1 in
//     the environment: a line to stderr for each new plan of a product. `device` is a CUDA ordinal; the calling thread's
//     current device is the same after a call as before it.
//   * The result is MARLIN_OK (0), a cudaError_t (positive), or one of the negative codes below; after a negative code
//     nothing was queued. marlin_cuda_error_string explains each.
#ifndef MARLIN_CUDA_H_
#define MARLIN_CUDA_H_

#include <stddef.h>
#include <stdint.h>

#include "marlin.h"

// Raise it with every change of a prototype or of a meaning, here and in marlin_convert/native/cuda_library.py.
#define MARLIN_CUDA_ABI_VERSION 7

#define MARLIN_CUDA_K_MULTIPLE 64
#define MARLIN_CUDA_N_MULTIPLE 64
#define MARLIN_CUDA_GROUP_SIZE 128

// Types of activations, outputs and scales.
#define MARLIN_CUDA_FP16 0
#define MARLIN_CUDA_BF16 1

// What marlin_cuda_choose answers.
#define MARLIN_CUDA_USE_GEMM 0        // marlin_cuda_gemm
#define MARLIN_CUDA_USE_DEQUANTIZE 1  // marlin_cuda_dequantize, then a 16-bit matrix product by cuBLAS

// Error codes.
#define MARLIN_CUDA_ERROR_NULL (-1)  // a required pointer is null
#define MARLIN_CUDA_ERROR_SHAPE \
  (-2)                                    // M, N or K is not positive, too large, or not a multiple of what it must
                                          // be, or in_features or out_features does not fit K or N
#define MARLIN_CUDA_ERROR_GROUPS (-3)     // G is none of 1, K / 16, K / 32, K / 64, K / 128
#define MARLIN_CUDA_ERROR_STRIDE (-4)     // lda is less than in_features, or it or in_features is no multiple of 8
#define MARLIN_CUDA_ERROR_ALIGNMENT (-5)  // a pointer is not aligned to 16 bytes
#define MARLIN_CUDA_ERROR_DTYPE (-6)      // neither MARLIN_CUDA_FP16 nor MARLIN_CUDA_BF16
#define MARLIN_CUDA_ERROR_WORKSPACE (-7)  // workspace_bytes is less than marlin_cuda_workspace_bytes
#define MARLIN_CUDA_ERROR_DEVICE (-8)     // no such device, or its compute capability is below 8.0
#define MARLIN_CUDA_ERROR_VARIANT (-9)    // no such variant, or not for these weights, or too little shared memory
#define MARLIN_CUDA_ERROR_BITS (-10)      // neither 4 nor 8 bits
#define MARLIN_CUDA_ERROR_EXPERTS (-11)   // experts of a mixture do not fit together, or are more than 1024
#define MARLIN_CUDA_ERROR_SCRATCH (-12)   // scratch_bytes is less than marlin_cuda_moe_layout says

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

// A layer's weights as stored: a struct in the host's memory that points to tensors in the device's. Functions that
// only plan (workspace_bytes, choose) do not look at the pointers, except whether `zeros` is null.
typedef struct {
  const void* B;      // int32 [K / 16, N bits / 2] codes in tile order
  const void* s;      // [G, N] scales, columns permuted
  const void* zeros;  // int32 [G, N bits / 32] zero points, or null: 8 or 128 everywhere
  const void* perm;   // int32 [in_features], or null: stored row k is row perm[k] of the source
  int64_t K, N, G;
  int64_t in_features, out_features;  // the layer's own, without padding: 1 .. K and 1 .. N
  int32_t bits;                       // 4 or 8
  int32_t scale_dtype;                // MARLIN_CUDA_FP16 or MARLIN_CUDA_BF16
} marlin_cuda_weights_t;

// One product with them, likewise in the host's memory.
typedef struct {
  const void* A;     // [M, in_features] activations; columns in the order of stored rows (marlin_cuda_gather)
  const void* bias;  // [out_features], or null
  void* C;           // [M, out_features]
  void* workspace;
  size_t workspace_bytes;
  void* stream;
  int64_t M;
  int64_t lda;    // elements between rows of A
  int32_t dtype;  // of A, bias and C
  int32_t device;
  int32_t variant;  // 0: the library's choice; others, for tests and tuning: MARLIN_CUDA_VARIANT
  int32_t early;    // 1: weights have been there for a while (below); else 0
} marlin_cuda_product_t;

MARLIN_EXPORT int marlin_cuda_abi_version(void);

// A sentence for a code returned by any function here. Never null; need not be freed.
MARLIN_EXPORT const char* marlin_cuda_error_string(int code);

// The number of CUDA devices. Returns 35 (cudaErrorInsufficientDriver) where the driver is missing or older than the
// CUDA runtime in this library, 100 (cudaErrorNoDevice) where there is no GPU.
MARLIN_EXPORT int marlin_cuda_device_count(int* count /* host */);
MARLIN_EXPORT int marlin_cuda_device_info(int device, marlin_cuda_device_info_t* info /* host */);

// C [M, out_features] = A [M, in_features] * W + bias, accumulated in fp32. `perm` plays no part: with act-order or
// in_features that are no multiple of 8, marlin_cuda_gather makes the A [M, K] that this takes, and in_features is K.
// The workspace holds partial sums. Its first MARLIN_CUDA_COUNTER_BYTES must be zero before the first call that uses it
// and are zero after each; calls that may run at the same time need workspaces of their own.
// Equal arguments on equal devices give equal bits.
//
// With few rows weights enter as exact integers and scales as fp32: nothing is rounded before the sums. With many (on
// compute capability 9.0 from 65 on, elsewhere where tiles that do so are faster: from about 9 on, with 8 bits always, in
// small groups often) instances run that round each weight to `dtype` once, as marlin_cuda_dequantize does: weights beyond
// 65504 are infinite in fp16.
// marlin_cuda_plan tells which instance runs, its `rounds_weights` whether it does so. With one group of scales none
// rounds.
//
// With `early`, on compute capability 9.0, a product may begin while the work queued before it on the stream still runs
// (programmatic dependent launch) and copy weights, scales and zero points meanwhile; it waits for that work before it
// reads or writes anything else. So none of these three may be written by work on the stream that has not ended: say it of
// weights that stay, not of those that were just loaded or repacked. The bits of the result are the same.
#define MARLIN_CUDA_COUNTER_BYTES 8192
MARLIN_EXPORT int marlin_cuda_gemm(const marlin_cuda_weights_t* weights /* host */,
                                   const marlin_cuda_product_t* product /* host */);

// A variant: the id of an instance, its pipeline stages, and how the work is split; each 0: the library's choice.
#define MARLIN_CUDA_VARIANT(instance, stages, split) ((instance) | (stages) << 12 | (split) << 16)
#define MARLIN_CUDA_MOST_CLUSTER 8    // splits 1 .. 8: that many blocks share a tile along K
#define MARLIN_CUDA_STREAM_K 9        // equal ranges of all steps of all tiles
#define MARLIN_CUDA_DATA_PARALLEL 10  // whole tiles

// As a variant, alone: how K is cut, and the order of every sum, depend on the weights and the GPU, not on M. Row i of
// any A has the bits that it has alone. On compute capability 9.0 weights then enter as exact integers for any M,
// elsewhere they are rounded for any M, except with one group of scales.
#define MARLIN_CUDA_BATCH_INVARIANT (1 << 20)

// An instance of the kernels: a size of output tiles, for some kinds of weights.
typedef struct {
  int32_t id;
  int32_t capability;  // of its instructions: 80, on every GPU from 8.0 up, or 90, on 9.0 alone
  int32_t bits;
  int32_t group_size;                 // that it takes (128: also one group); 0: any
  int32_t zero_points;                // 0: takes weights without, 1: both, 2: weights with
  int32_t block_m, block_n, block_k;  // the output tile, and the rows of K in a step
  int32_t clusters;                   // 1: splits 1 .. 8 are possible
  int32_t rounds_weights;             // 1: weights are rounded to the activations' type, as marlin_cuda_dequantize does
  char name[64];                      // such as sm90_m16n128_b4_g64
} marlin_cuda_instance_t;

// How many instances this library has, and the one at `index`, 0 .. count - 1. Needs no GPU.
MARLIN_EXPORT int marlin_cuda_instance_count(void);
MARLIN_EXPORT int marlin_cuda_instance(int index, marlin_cuda_instance_t* instance /* host */);

// What marlin_cuda_gemm would launch. Times are predicted.
typedef struct {
  int32_t instance;  // its id
  int32_t stages, split, blocks;
  int32_t parts;    // batch-invariant: into which K is cut, by the split or within a block; else 0
  int32_t rows;     //   of a launch; there may be several, one after the other; else M
  double us;        // orders the candidates
  double gemm_us;   // at least what the tensor cores need: compared with
  double dense_us;  //   dequantizing and a 16-bit product
} marlin_cuda_plan_t;
MARLIN_EXPORT int marlin_cuda_plan(const marlin_cuda_weights_t* weights /* host */, int64_t M, int device, int variant,
                                   marlin_cuda_plan_t* plan /* host */);

// Bytes of workspace that marlin_cuda_gemm needs on this device, for any weights and variant; 0 if there is no such
// device.
MARLIN_EXPORT size_t marlin_cuda_workspace_bytes(int device);

// Which is expected to be faster for M rows: MARLIN_CUDA_USE_GEMM or MARLIN_CUDA_USE_DEQUANTIZE (or a negative code).
MARLIN_EXPORT int marlin_cuda_choose(const marlin_cuda_weights_t* weights /* host */, int64_t M, int device);

// ---- Mixtures of experts ----
//
// out[t] = the sum over j of weights[t, j] * expert ids[t, j] of x[t], for a block of experts that are each
// down(up(x) * activation(gate(x))). Nothing waits for the device, and the grid depends on sizes alone, so the call can be
// captured in a graph. Equal arguments on equal devices give equal bits.
//
// Experts stand in an order of their own, their positions. Those with the same settings are neighbours there, and the
// tensors of such a set are stacked: the B of its first expert, of its second, and so on without gaps, likewise the rest.
typedef struct {
  marlin_cuda_weights_t weights;  // of the first expert
  const void* bias;               // [experts, out_features], or null
} marlin_cuda_stack_t;

typedef struct {
  marlin_cuda_stack_t gate, up, down;  // without up (its B null): `joined` of marlin_cuda_moe_t
  int32_t first, last;                 // their positions: first .. last - 1
} marlin_cuda_experts_t;

// Activations: of the gate, at most `limit`. SILU: gate / (1 + exp(-alpha gate)).
#define MARLIN_CUDA_SILU 0
#define MARLIN_CUDA_GELU 1
#define MARLIN_CUDA_GELU_TANH 2
#define MARLIN_CUDA_RELU 3
#define MARLIN_CUDA_RELU_SQUARED 4

// Where the outputs of up are, when there is no matrix for it alone.
#define MARLIN_CUDA_NOT_JOINED 0   // in a matrix of their own; or without it nowhere, the experts have no gate
#define MARLIN_CUDA_JOINED 1       // second half of the outputs of `gate`
#define MARLIN_CUDA_ALTERNATING 2  // every second output of `gate`, from the second on

typedef struct {
  const void* x;    // [tokens, ldx], of which in_features are read
  const void* ids;  // [tokens, top_k] int32 or int64: the expert of each choice; others than 0 .. experts - 1: none
  const float* weights;     // [tokens, top_k], or null: ones
  const int32_t* position;  // [experts] the position of each, -1 if it is not here; or null: its number
  void* out;                // [tokens, out_features of down]
  void* scratch;            // marlin_cuda_moe_layout says how large
  size_t scratch_bytes;
  void* workspace;  // as of marlin_cuda_gemm
  size_t workspace_bytes;
  void* stream;
  int64_t tokens, ldx;
  int32_t top_k, experts, positions, wide_ids;  // wide_ids: ids are int64
  int32_t dtype, device;                        // of x, biases and out
  int32_t variant;           // 0: the library's choice; others: MARLIN_CUDA_BATCH_INVARIANT; MARLIN_CUDA_MOE_VARIANT
  int32_t weights_on_input;  // x is multiplied by the weights, rounded, instead of the result
  int32_t activation, joined;
  float limit, alpha, beta;  // up is clamped to -limit .. limit, then beta is added
  int32_t unused;
} marlin_cuda_moe_t;

// block_m: 8, 16, 32, 64 or 128 rows; block_n: 128 or 256 columns; split: MARLIN_CUDA_STREAM_K or
// MARLIN_CUDA_DATA_PARALLEL; each 0: the library's choice. one_by_one: kernels do not overlap; portable: the
// kernels for every GPU (16 or 64 rows, 256 columns); rounding: with 64 rows, those that round weights. All for tests.
#define MARLIN_CUDA_MOE_VARIANT(block_m, block_n, split, one_by_one, portable, rounding) \
  ((block_m) | (block_n) << 10 | (split) << 20 | (one_by_one) << 24 | (portable) << 25 | (rounding) << 26)

// How a call would lay out its scratch memory: offsets in bytes, of what each step leaves behind. Rows are choices
// (t * top_k + j) sorted by position, those of experts that are not here left out.
typedef struct {
  int64_t bytes;
  int64_t rows, places, first_row;  // int32: [choices] the choice of each row; the row of each choice, or -1;
                                    // [positions + 1] the first row of each position
  int64_t gate, up;                 // [rows, out_features] outputs of the first product
  int64_t hidden;                   // [rows, hidden_columns] inputs of the second,
  int64_t down;                     // [rows, out_features] its outputs
  int64_t gathered, gathered_up;    // [rows, gathered_columns] inputs of the first; `down` takes the same place later
  int64_t gathered_columns, hidden_columns;
  int32_t block_m;
  int32_t rounds_weights;  // as of marlin_cuda_instance_t
} marlin_cuda_moe_layout_t;

// Pointers are not looked at, except whether they are null.
MARLIN_EXPORT int marlin_cuda_moe_layout(const marlin_cuda_experts_t* sets /* host */, int count,
                                         const marlin_cuda_moe_t* call /* host */,
                                         marlin_cuda_moe_layout_t* layout /* host */);
MARLIN_EXPORT int marlin_cuda_moe(const marlin_cuda_experts_t* sets /* host */, int count,
                                  const marlin_cuda_moe_t* call /* host */);

// out [M, K]: column k is column perm[k] of A (k without perm), and 0 from in_features on. lda is any number of
// elements; A is aligned to 2 bytes, perm and out to 16.
MARLIN_EXPORT int marlin_cuda_gather(const void* A, const void* perm, void* out, int64_t M, int64_t lda,
                                     int64_t in_features, int64_t K, int device, void* stream);

// GPTQ qweight [K bits / 32, N] -> B [K / 16, N bits / 2], and back. Bits are moved, nothing is computed.
MARLIN_EXPORT int marlin_cuda_repack(const void* qweight, void* B, int64_t K, int64_t N, int bits, int device,
                                     void* stream);
MARLIN_EXPORT int marlin_cuda_unpack(const void* B, void* qweight, int64_t K, int64_t N, int bits, int device,
                                     void* stream);

// W [in_features, out_features] = (code - zero) * scale in `dtype`, rounded once to nearest even; rows in the source's
// order.
MARLIN_EXPORT int marlin_cuda_dequantize(const marlin_cuda_weights_t* weights /* host */, void* W, int dtype,
                                         int device, void* stream);

// Reads `bytes` (a multiple of 16) once and writes one word to `sink` at most: the least time in which weights can be
// read, for benchmarks.
MARLIN_EXPORT int marlin_cuda_stream_read(const void* data, int64_t bytes, void* sink, int device, void* stream);

#ifdef __cplusplus
}  // extern "C"
#endif

#endif  // MARLIN_CUDA_H_
