// Instructions of the packing kernels, on pairs of 16-bit numbers in a word.
#pragma once

#include "types.cuh"

constexpr int INFINITY_BITS = BF16 ? 0x7F80 : 0x7C00;
constexpr u32 BOTH_HALVES = 0x00010001u;  // times a 16-bit number: that number in both halves

#ifndef EMULATED
// Only sm_90 and later compare two bfloat16 at a time.
constexpr bool COMPARE_AS_FLOATS = BF16 && __CUDA_ARCH__ < 900;

// Comparisons whose results are masks of both halves. Unordered ones (u) are true for NaN. A macro,
// since an instruction's name must be a literal.
#define COMPARE(name, op)                                                                      \
  __device__ __forceinline__ u32 name(u32 a, u32 b) {                                          \
    if constexpr (COMPARE_AS_FLOATS) {                                                         \
      u32 low, high;                                                                           \
      asm("set." op ".u32.f32 %0, %1, %2;"                                                     \
          : "=r"(low)                                                                          \
          : "f"(__uint_as_float(a << 16)), "f"(__uint_as_float(b << 16)));                     \
      asm("set." op ".u32.f32 %0, %1, %2;"                                                     \
          : "=r"(high)                                                                         \
          : "f"(__uint_as_float(a & 0xFFFF0000u)), "f"(__uint_as_float(b & 0xFFFF0000u)));     \
      return __byte_perm(low, high, 0x7610);                                                   \
    } else {                                                                                   \
      u32 d;                                                                                   \
      if constexpr (BF16) asm("set." op ".u32.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b)); \
      else asm("set." op ".u32.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));                 \
      return d;                                                                                \
    }                                                                                          \
  }
COMPARE(ge2, "ge")
COMPARE(le2, "le")
COMPARE(geu2, "geu")
#undef COMPARE

// The larger and the smaller number of each half; NaN if either is.
__device__ __forceinline__ u32 max2(u32 a, u32 b) {
  u32 d;
  if constexpr (BF16) asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  else asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
__device__ __forceinline__ u32 min2(u32 a, u32 b) {
  u32 d;
  if constexpr (BF16) asm("min.NaN.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  else asm("min.NaN.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
__device__ __forceinline__ float to_float(u16 x) {
  if constexpr (BF16) {
    return __uint_as_float((u32)x << 16);
  } else {
    float d;
    asm("cvt.f32.f16 %0, %1;" : "=f"(d) : "h"(x));
    return d;
  }
}
__device__ __forceinline__ u16 to_16(float x) {
  u16 d;
  if constexpr (BF16) asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(d) : "f"(x));
  else asm("cvt.rn.f16.f32 %0, %1;" : "=h"(d) : "f"(x));
  return d;
}
// A load that stays where it is written, so that all are in flight before the first is used.
__device__ __forceinline__ u32 load2(const u16* p) {
  u32 d;
  asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(d) : "l"(p));
  return d;
}
__device__ __forceinline__ u32 warp_sum(u32 x) { return __reduce_add_sync(~0u, x); }
__device__ __forceinline__ int warp_max(int x) { return __reduce_max_sync(~0u, x); }
__device__ __forceinline__ int warp_min(int x) { return __reduce_min_sync(~0u, x); }
__device__ __forceinline__ u32 from_lane_below(u32 x, int lanes) {
  return __shfl_up_sync(~0u, x, lanes);
}
#endif

__device__ __forceinline__ bool not_finite(u16 x) { return (x & 0x7FFF) >= INFINITY_BITS; }
__device__ __forceinline__ u32 absolute(u32 x) { return x & 0x7FFF7FFFu; }

// Integers that are ordered as the floats are (-0 counts as 0), and back.
__device__ __forceinline__ int ordered(u32 raw) {
  return raw & 0x8000 ? -(int)(raw & 0x7FFF) : (int)raw;
}
__device__ __forceinline__ u32 unordered(int order) {
  return order < 0 ? 0x8000u | (u32)-order : (u32)order;
}

// The sum of the lanes' numbers up to and including the own.
__device__ __forceinline__ int inclusive_sum(int x, int lane_idx) {
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    int below = from_lane_below(x, d);
    if (lane_idx >= d) x += below;
  }
  return x;
}
