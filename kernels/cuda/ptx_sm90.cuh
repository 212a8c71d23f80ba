// ptx_sm90.cuh: the instructions of compute capability 9.0 that gemm_sm90.cuh is built from, one thin wrapper each:
// mbarrier, TMA (the copy engine), wgmma, clusters. Only for code compiled for sm_90a.
#pragma once

#include <cuda.h>

#include "ptx.cuh"

namespace marlin {

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// For lanes of a warp that stays together: only where `arrives`.
__device__ __forceinline__ void mbarrier_arrive_if(uint32_t barrier, bool arrives) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %1, 0;\n@p mbarrier.arrive.shared.b64 _, [%0];\n}" ::"r"(barrier),
               "r"(static_cast<uint32_t>(arrives))
               : "memory");
}
__device__ __forceinline__ void mbarrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Waits until the phase of this parity is over.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
      "@done bra finished;\n"
      "bra again;\n"
      "finished:\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// The L2 policy for weights, which are read once: evict them first, so that activations and partial sums stay. This is
// the policy word that createpolicy.fractional.L2::evict_first makes for a fraction of 1. On cp.async the hint is no
// option: in some kernels nvcc 13.0 puts its 64-bit descriptor into an odd register, and the instruction is illegal.
constexpr uint64_t kEvictFirst = 0x12f0000000000000;
constexpr uint64_t kEvictNormal = 0x1000000000000000;  // where several blocks read them

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Copies the box of a matrix whose first element is (x, y); zeros outside of the matrix. Its bytes count on `barrier`.
__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap* map, int x, int y, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
          "r"(to),
      "l"(map), "r"(x), "r"(y), "r"(barrier)
      : "memory");
}
__device__ __forceinline__ void copy_weights(uint32_t to, const CUtensorMap* map, int line, int tile_row,
                                             uint32_t barrier, uint64_t policy = kEvictFirst) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, "
      "%3, %4}], [%5], %6;" ::"r"(to),
      "l"(map), "r"(0), "r"(line), "r"(tile_row), "r"(barrier), "l"(policy)
      : "memory");
}
__device__ __forceinline__ void copy_bytes(uint32_t to, const void* from, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}

// Right operand of wgmma: rows of 128 bytes, swizzled, 8 rows to 1024 bytes (64 units of 16).
__device__ __forceinline__ uint64_t operand_descriptor(uint32_t at) {
  return (uint64_t{1} << 62) | (uint64_t{64} << 32) | (uint64_t{1} << 16) | ((at & 0x3ffff) >> 4);
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// d (+)= a * b: a is this warp's 16x16 of the 64x16 left operand, b the 16 x 8 MB right operand in shared memory.
// Without `add`, d is overwritten. One specialization per width: the instruction names every register.
template <typename T, int MB>
__device__ __forceinline__ void wgmma(float (&d)[MB][4], const uint32_t (&a)[4], uint64_t b, bool add);

// Registers of an 8-row block, and of eight of them; and what they are to the compiler.
#define MARLIN_R8_0                                                        \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define MARLIN_R8_1                                                                  \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MARLIN_R8_2                                                                  \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define MARLIN_R8_3                                                                              \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define MARLIN_D1(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define MARLIN_D4(i) MARLIN_D1(i), MARLIN_D1(i + 1), MARLIN_D1(i + 2), MARLIN_D1(i + 3)
#define MARLIN_D8(i) MARLIN_D4(i), MARLIN_D4(i + 4)
#define MARLIN_WGMMA(T, TYPE, MB, N, REGISTERS, A0, A1, A2, A3, B, ADD, ...)                                       \
  template <>                                                                                                      \
  __device__ __forceinline__ void wgmma<T, MB>(float (&d)[MB][4], const uint32_t (&a)[4], uint64_t b, bool add) {  \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" ADD                                                          \
                 ", 0;\n"                                                                                          \
                 "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" REGISTERS "}, {%" A0 ", %" A1 \
                 ", %" A2 ", %" A3 "}, %" B ", p, 1, 1, 0;\n}"                                                     \
                 : __VA_ARGS__                                                                                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)));                \
  }
#define MARLIN_WGMMA_BOTH(MB, N, REGISTERS, A0, A1, A2, A3, B, ADD, ...)             \
  MARLIN_WGMMA(__half, "f16", MB, N, REGISTERS, A0, A1, A2, A3, B, ADD, __VA_ARGS__) \
  MARLIN_WGMMA(__nv_bfloat16, "bf16", MB, N, REGISTERS, A0, A1, A2, A3, B, ADD, __VA_ARGS__)
MARLIN_WGMMA_BOTH(1, "8", "%0, %1, %2, %3", "4", "5", "6", "7", "8", "9", MARLIN_D1(0))
MARLIN_WGMMA_BOTH(2, "16", "%0, %1, %2, %3, %4, %5, %6, %7", "8", "9", "10", "11", "12", "13", MARLIN_D1(0),
                  MARLIN_D1(1))
MARLIN_WGMMA_BOTH(4, "32", "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15", "16", "17", "18",
                  "19", "20", "21", MARLIN_D4(0))
MARLIN_WGMMA_BOTH(8, "64", MARLIN_R8_0, "32", "33", "34", "35", "36", "37", MARLIN_D8(0))
MARLIN_WGMMA_BOTH(16, "128", MARLIN_R8_0 ", " MARLIN_R8_1, "64", "65", "66", "67", "68", "69", MARLIN_D8(0),
                  MARLIN_D8(8))
MARLIN_WGMMA_BOTH(32, "256", MARLIN_R8_0 ", " MARLIN_R8_1 ", " MARLIN_R8_2 ", " MARLIN_R8_3, "128", "129", "130", "131",
                  "132", "133", MARLIN_D8(0), MARLIN_D8(8), MARLIN_D8(16), MARLIN_D8(24))
#undef MARLIN_WGMMA_BOTH
#undef MARLIN_WGMMA
#undef MARLIN_D8
#undef MARLIN_D4
#undef MARLIN_D1
#undef MARLIN_R8_0
#undef MARLIN_R8_1
#undef MARLIN_R8_2
#undef MARLIN_R8_3

// Words of a tile, neighbours within a lane's 16 bytes; eight of them in two swizzled halves.
template <int WORDS>
__device__ __forceinline__ void load_words(uint32_t (&v)[WORDS], uint32_t from);
template <>
__device__ __forceinline__ void load_words<8>(uint32_t (&v)[8], uint32_t from) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(from));
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[4]), "=r"(v[5]), "=r"(v[6]), "=r"(v[7])
               : "r"(from ^ 16));
}
template <>
__device__ __forceinline__ void load_words<4>(uint32_t (&v)[4], uint32_t from) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(from));
}
template <>
__device__ __forceinline__ void load_words<2>(uint32_t (&v)[2], uint32_t from) {
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v[0]), "=r"(v[1]) : "r"(from));
}
template <>
__device__ __forceinline__ void load_words<1>(uint32_t (&v)[1], uint32_t from) {
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v[0]) : "r"(from));
}
// Where in a tile the words stand that a lane reads for the sub-tiles from `subtile` on, in bytes.
//
// A lane owns 16 bytes with 4 bits, four for each sub-tile, and 32 with 8 bits, eight for each. With 32 bytes from lane
// to lane, eight lanes that read 16 bytes each would meet only every other bank. So the copy engine swizzles: the
// 16-byte piece p of line r, of 128 bytes, stands at p ^ (r % 8).
template <int BITS>
__device__ __forceinline__ int weight_offset(int lane, int subtile) {
  if (BITS == 4) return lane * 16 + subtile * 4;
  const int line = lane / 4, piece = lane % 4 * 2 + subtile / 2;
  return line * 128 + (piece ^ line) * 16 + subtile % 2 * 8;
}

// Puts v to `to` in a block of the cluster; its four bytes count on `barrier` there.
__device__ __forceinline__ void push_cluster(uint32_t to, float v, uint32_t barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(to), "f"(v),
               "r"(barrier)
               : "memory");
}
// As mbarrier_wait, for what other blocks of the cluster put here.
__device__ __forceinline__ void mbarrier_wait_for_cluster(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred p;\nagain:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], %1;\n"
      "@!p bra again;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// A barrier for all threads of a cluster that have not ended.
__device__ __forceinline__ void cluster_synchronize() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// The address, in another block of the cluster, of what is at `at` in this one.
__device__ __forceinline__ uint32_t shared_of_rank(uint32_t at, int rank) {
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(rank));
  return there;
}
__device__ __forceinline__ float4 load_cluster(uint32_t from) {
  float4 v;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(from));
  return v;
}

}  // namespace marlin
