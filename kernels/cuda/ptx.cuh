// ptx.cuh: the few PTX instructions the kernels are built from, one thin wrapper each.
//
// Everything here exists since sm_80 (Ampere). Shared-memory addresses are 32-bit "shared window" addresses.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace marlin {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Asynchronous 16-byte copy global -> shared, past L1 (.cg). The thread goes on; see cp_async_wait. Without an L2 hint:
// weights would better be evicted first, but in some kernels nvcc 13.0 puts the hint's 64-bit descriptor into an odd
// register, and an H100 stops at the illegal instruction. Activations are read again and again and stay in L2 anyway.
// Only if `wanted`, without a branch, which would keep the compiler from moving anything across it.
__device__ __forceinline__ void cp_async16_if(bool wanted, uint32_t to, const void* from) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %2, 0;\n"
      "@p cp.async.cg.shared.global [%0], [%1], 16;\n}" ::"r"(to),
      "l"(from), "r"(static_cast<int>(wanted))
      : "memory");
}

// The same, but writes zeros (and reads nothing) unless `valid`.
__device__ __forceinline__ void cp_async16_or_zero_if(bool wanted, uint32_t to, const void* from, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %2, 0;\n"
      "@p cp.async.cg.shared.global [%0], [%1], 16, %3;\n}" ::"r"(to),
      "l"(from), "r"(static_cast<int>(wanted)), "r"(bytes)
      : "memory");
}

// Closes the group of copies issued since the last commit.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `PENDING` of this thread's youngest groups are still under way.
template <int PENDING>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// mbarrier: a barrier in shared memory that threads arrive at without waiting.
__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Lets this thread arrive when all copies that it has issued so far have landed.
__device__ __forceinline__ void cp_async_arrive(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}
// Whether the barrier's phase of that parity has ended.
__device__ __forceinline__ bool mbarrier_has_ended(uint32_t barrier, uint32_t parity) {
  uint32_t ended;
  asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
               : "=r"(ended)
               : "r"(barrier), "r"(parity)
               : "memory");
  return ended != 0;
}
// Waits for it, polling where there is no try_wait.
__device__ __forceinline__ void mbarrier_poll(uint32_t barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
#define MARLIN_MBARRIER_WAIT "mbarrier.try_wait.parity.shared.b64"
#else
#define MARLIN_MBARRIER_WAIT "mbarrier.test_wait.parity.shared.b64"
#endif
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\n" MARLIN_MBARRIER_WAIT
      " done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
#undef MARLIN_MBARRIER_WAIT
}

// 16 bytes from shared memory.
__device__ __forceinline__ uint4 load_shared16(uint32_t from) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(from));
  return v;
}

// Two or four 8x8 matrices of 16-bit values from shared memory. Lane l names the row l % 8 of matrix l / 8 and
// receives of every matrix the two values at row l / 4, columns 2 (l % 4) and 2 (l % 4) + 1.
__device__ __forceinline__ void ldmatrix2(uint32_t (&v)[2], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(v[0]), "=r"(v[1]) : "r"(row));
}
__device__ __forceinline__ void ldmatrix4(uint32_t (&v)[2], uint32_t (&w)[2], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(w[0]), "=r"(w[1])
               : "r"(row));
}

// Transposes one 8x8 matrix of 16-bit values spread over the warp as ldmatrix leaves it.
__device__ __forceinline__ uint32_t movmatrix(uint32_t v) {
  uint32_t r;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
  return r;
}

// d += a * b on tensor cores: a is 16x16, b is 16x8, d is 16x8 in fp32.
template <typename T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
__device__ __forceinline__ void mma<__half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void mma<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// (a & MASK) | ORED in one instruction; the 8-bit immediate is the truth table of the three inputs.
template <uint32_t MASK, uint32_t ORED>
__device__ __forceinline__ uint32_t and_or(uint32_t a) {
  uint32_t r;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(a), "n"(MASK), "n"(ORED));
  return r;
}

// Kernels may be launched early (programmatic dependent launch): one begins when all blocks of the kernel before it have
// said let_next_kernel_begin or ended, and waits here before it reads or writes anything that others touch: then the
// kernel before has ended, and what it wrote is there. A kernel that was not launched so waits for nothing.
__device__ __forceinline__ void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_next_kernel_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace marlin
