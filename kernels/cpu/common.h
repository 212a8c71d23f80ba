// common.h: what the files of the CPU library share: the choice of an instruction set, checks, threads.
#ifndef MARLIN_CPU_COMMON_H_
#define MARLIN_CPU_COMMON_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <thread>
#include <vector>

#include "../marlin.h"

// -DMARLIN_X86=0 leaves the intrinsics out, as on any other processor.
#ifndef MARLIN_X86
#if defined(__x86_64__)
#define MARLIN_X86 1
#else
#define MARLIN_X86 0
#endif
#endif

#if MARLIN_X86
#define MARLIN_AVX2 __attribute__((target("avx2")))
#define MARLIN_AVX512 __attribute__((target("avx512f,avx512bw,avx512vbmi")))
#endif

#if MARLIN_X86
#include <cpuid.h>
#endif

namespace marlin {

#if MARLIN_X86
// Asked of the CPU itself: before GCC 11, __builtin_cpu_supports does not know the name.
inline bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
#endif

inline int best_isa() {
#if MARLIN_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vbmi")) {
    return MARLIN_ISA_AVX512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) {
    return MARLIN_ISA_AVX2;
  }
#endif
  return MARLIN_ISA_PLAIN;
}

// The instruction set to use for the caller's `isa`, or -1 if there is no such or this CPU lacks it.
inline int choose_isa(int isa) {
  const int best = best_isa();
  if (isa == MARLIN_ISA_AUTO) return best;
  return isa >= MARLIN_ISA_PLAIN && isa <= best ? isa : -1;
}

inline bool whole_tiles(int64_t k, int64_t n) {
  return k > 0 && n > 0 && k % MARLIN_TILE_K == 0 && n % MARLIN_TILE_N == 0;
}

inline uint32_t load(const int32_t* p) {
  uint32_t v;
  std::memcpy(&v, p, sizeof v);  // no alignment is promised
  return v;
}
inline void store(int32_t* p, uint32_t v) { std::memcpy(p, &v, sizeof v); }

// Run work(begin, end) over [0, items), split evenly among at most `threads` threads of which this is one. No thread
// gets fewer than `least` items: below some ten microseconds of work, starting a thread costs more than it saves.
// (std::thread, because an OpenMP pool does not survive a fork, and Python programs fork.)
template <class Work>
void parallel(int64_t items, int64_t least, int threads, const Work& work) {
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, items / std::max<int64_t>(1, least)));
  if (parts == 1) return work(int64_t{0}, items);

  std::vector<std::thread> others;
  int64_t begin = 0;
  try {
    others.reserve(parts - 1);
    for (int64_t part = 1; part < parts; ++part) {
      const int64_t end = items * part / parts;
      others.emplace_back([&work, begin, end] { work(begin, end); });
      begin = end;
    }
  } catch (const std::exception&) {
    // The system refused a thread or memory: what has not been handed out is done here.
  }
  work(begin, items);
  for (std::thread& other : others) other.join();
}

}  // namespace marlin

#endif  // MARLIN_CPU_COMMON_H_
