// PTX instructions of the decode kernel, and conversions of 16-bit numbers.
#pragma once

#include "types.cuh"

#ifdef EMULATED
#include "emulated_decode.h"  // tests only: the same functions for a CPU
#else
// Picks four bytes of a and b by the nibbles of s. Unlike __byte_perm it costs no masking of s.
__device__ __forceinline__ u32 permute_bytes(u32 a, u32 b, u32 s) {
  u32 d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(s));
  return d;
}
// (yes & mask) | (no & ~mask), in one instruction.
__device__ __forceinline__ u32 select_bits(u32 mask, u32 yes, u32 no) {
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0xCA;" : "=r"(d) : "r"(mask), "r"(yes), "r"(no));
  return d;
}
// The suffix 2 means: of two fp16 numbers in a word.
__device__ __forceinline__ u32 fma2(u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
__device__ __forceinline__ u32 mul2(u32 a, u32 b) {
  u32 d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
__device__ __forceinline__ u32 neg2(u32 a) {
  u32 d;
  asm("neg.f16x2 %0, %1;" : "=r"(d) : "r"(a));
  return d;
}
__device__ __forceinline__ u32 pack2(float low, float high) {
  u32 d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
__device__ __forceinline__ u16 to_half(float x) {
  u16 d;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(d) : "f"(x));
  return d;
}
__device__ __forceinline__ u16 to_bfloat(float x) {
  u16 d;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(d) : "f"(x));
  return d;
}
// The two numbers in the type of the cache.
__device__ __forceinline__ u32 pack16(float low, float high) {
  u32 d;
  if constexpr (BF16) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
// Two numbers of the cache's type; infinite ones become the largest finite ones.
__device__ __forceinline__ u32 finite2(u32 a) {
  u32 d;
  if constexpr (BF16) {
    asm("min.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(0x7F7F7F7Fu));
    asm("max.bf16x2 %0, %0, %1;" : "+r"(d) : "r"(0xFF7FFF7Fu));
  } else {
    asm("min.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(0x7BFF7BFFu));
    asm("max.f16x2 %0, %0, %1;" : "+r"(d) : "r"(0xFBFFFBFFu));
  }
  return d;
}
// Transposes an 8 x 8 matrix of 16-bit numbers, of whose row lane / 4 each lane has two columns,
// 2 * (lane % 4) and the next.
__device__ __forceinline__ u32 transpose_8x8(u32 a) {
  u32 d;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(a));
  return d;
}
__device__ __forceinline__ float from_half(u16 x) {
  float d;
  asm("cvt.f32.f16 %0, %1;" : "=f"(d) : "h"(x));
  return d;
}
__device__ __forceinline__ float exp2(float x) {
  float d;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(x));
  return d;
}
__device__ __forceinline__ float reciprocal(float x) {
  float d;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(x));
  return d;
}
// Cosine and sine of an angle of a few turns, with an error of about 1e-6.
__device__ __forceinline__ float cosine(float x) {
  float d;
  asm("cos.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(x));
  return d;
}
__device__ __forceinline__ float sine(float x) {
  float d;
  asm("sin.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(x));
  return d;
}
__device__ __forceinline__ u32 shared_address(const void* p) {
  return (u32)__cvta_generic_to_shared(p);
}
// A number of a table in shared memory that begins at a multiple of 256 bytes. Byte `i` of `offsets`
// says how many bytes behind that it lies; one instruction makes the address.
__device__ __forceinline__ float look_up_byte(const float* table, u32 offsets, int i) {
  float x;
  asm("ld.shared.f32 %0, [%1];"
      : "=f"(x)
      : "r"(permute_bytes(offsets, shared_address(table), 0x7650 | i)));
  return x;
}
// Copies to shared memory that go on while the thread does something else.
__device__ __forceinline__ void cp_async_16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from)
               : "memory");
}
__device__ __forceinline__ void cp_async_4(void* to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to)), "l"(from)
               : "memory");
}
__device__ __forceinline__ void cp_async_wait_all() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}
__device__ __forceinline__ void prefetch_l2(const u8* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}
// D += A * B with fp16 operands: 16 rows, 8 columns, 16 products per sum. In the terms of the PTX
// manual a lane's groupID is g = lane / 4 and its threadID_in_group is t = lane % 4.
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0,
                                             u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// Loads that stay where they are written, so that all are in flight before the first is used.
template <int N> __device__ __forceinline__ void load_words(u32 (&w)[N], const u8* p) {
  if constexpr (N == 4)
    asm volatile("ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                 : "l"(p));
  else if constexpr (N == 2)
    asm volatile("ld.global.nc.v2.u32 {%0,%1}, [%2];" : "=r"(w[0]), "=r"(w[1]) : "l"(p));
  else asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(w[0]) : "l"(p));
}
// A word OFFSET bytes behind `p`.
template <int OFFSET> __device__ __forceinline__ u32 load_word(const u8* p) {
  u32 w;
  asm volatile("ld.global.nc.u32 %0, [%1+%2];" : "=r"(w) : "l"(p), "n"(OFFSET));
  return w;
}
__device__ __forceinline__ u32 load_short(const u8* p) {
  u16 x;
  asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(x) : "l"(p));
  return x;
}
#endif

__device__ __forceinline__ float low_half(u32 x) { return from_half((u16)(x & 0xFFFF)); }
__device__ __forceinline__ float high_half(u32 x) { return from_half((u16)(x >> 16)); }

// Reads and writes 16-bit numbers of the cache.
__device__ __forceinline__ float load16(u16 x) {
  if constexpr (BF16) return __uint_as_float((u32)x << 16);
  else return from_half(x);
}
__device__ __forceinline__ u16 store16(float x) { return BF16 ? to_bfloat(x) : to_half(x); }

// The largest of the lanes' numbers, none of which is negative.
__device__ __forceinline__ float warp_max(float x) {
  return __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(x)));
}

// The largest of any numbers: integers order as the floats do once negative ones are turned round.
__device__ __forceinline__ float warp_max_signed(float x) {
  int bits = __float_as_int(x);
  bits ^= (bits >> 31) & 0x7FFFFFFF;
  bits = __reduce_max_sync(~0u, bits);
  return __int_as_float(bits ^ ((bits >> 31) & 0x7FFFFFFF));
}

// The integer nearest to a * b + c * d, or next to it; for numbers below 2^22.
__device__ __forceinline__ int round_to_int(float a, float b, float c = 0.0f, float d = 0.0f) {
  // Adding 1.5 * 2^23 leaves no bits for fractions.
  return __float_as_int(fmaf(a, b, fmaf(c, d, 12582912.0f))) - 0x4B400000;
}
