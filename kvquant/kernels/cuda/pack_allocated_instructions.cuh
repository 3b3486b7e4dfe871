// Instructions of the kernels that pack allocated codes, and how their thread blocks wait.
#pragma once

#include "pack_instructions.cuh"

#ifdef EMULATED
#include "emulated_pack_allocated.h"  // tests only: the same functions for a CPU
#else
// Eight 16-bit numbers that are read once.
__device__ __forceinline__ uint4 load8(const u16* p) {
  uint4 d;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(d.x), "=r"(d.y), "=r"(d.z), "=r"(d.w)
               : "l"(p));
  return d;
}
// a * b + c of each half.
__device__ __forceinline__ u32 fma2(u32 a, u32 b, u32 c) {
  u32 d;
  if constexpr (BF16) asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  else asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
// a * b + c, cut off at 0 and 1; 0 for NaN.
__device__ __forceinline__ float saturated(float a, float b, float c) {
  float d;
  asm("fma.rn.sat.f32 %0, %1, %2, %3;" : "=f"(d) : "f"(a), "f"(b), "f"(c));
  return d;
}
// Waits until a counter has reached a number; what others wrote before they counted is then seen.
__device__ __forceinline__ void wait_for(const u32* counter, u32 number) {
  u32 found;
  for (;;) {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(found) : "l"(counter) : "memory");
    if (found >= number) return;
    __nanosleep(40);
  }
}
// A load of what other thread blocks wrote during this launch.
__device__ __forceinline__ u32 load_fresh(const u32* p) {
  u32 d;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(d) : "l"(p) : "memory");
  return d;
}
// Counts, after all that the thread block has written.
__device__ __forceinline__ void count_up(u32* counter) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}
#endif

// One half of a word of two 16-bit numbers.
__device__ __forceinline__ float half_of(u32 word, int upper) {
  if constexpr (BF16) return __uint_as_float(upper ? word & 0xFFFF0000u : word << 16);
  else return to_float((u16)(upper ? word >> 16 : word));
}
