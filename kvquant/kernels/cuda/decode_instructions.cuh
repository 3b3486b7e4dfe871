// Instructions of `decode.cu`.

#include "types.cuh"

#ifdef EMULATED
#include "emulated_decode.h"  // tests only: the same functions for a CPU
#else
#define MEMBER DEVICE
#define SEPARATE __device__
#define APART __device__ __noinline__
#define CONSTANT extern "C" __constant__
#define DYNAMIC(name, bytes) extern __shared__ __align__(16) u8 name[]

// Four bytes of a and b by the nibbles of s; unlike __byte_perm it costs no masking of s.
DEVICE u32 bytes(u32 a, u32 b, u32 s) {
  u32 d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(s));
  return d;
}
// (yes & mask) | (no & ~mask), in one instruction.
DEVICE u32 choose(u32 mask, u32 yes, u32 no) {
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0xCA;" : "=r"(d) : "r"(mask), "r"(yes), "r"(no));
  return d;
}
DEVICE u32 fma2(u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
DEVICE u32 mul2(u32 a, u32 b) {
  u32 d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
DEVICE u32 neg2(u32 a) {
  u32 d;
  asm("neg.f16x2 %0, %1;" : "=r"(d) : "r"(a));
  return d;
}
DEVICE u32 pack2(float low, float high) {
  u32 d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
DEVICE u16 to_half(float x) {
  u16 d;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(d) : "f"(x));
  return d;
}
DEVICE u16 to_bfloat(float x) {
  u16 d;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(d) : "f"(x));
  return d;
}
DEVICE float from_half(u16 x) {
  float d;
  asm("cvt.f32.f16 %0, %1;" : "=f"(d) : "h"(x));
  return d;
}
DEVICE float exp2(float x) {
  float d;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(x));
  return d;
}
// Of an angle of a few turns, with an error of about 1e-6.
DEVICE float cosine(float x) {
  float d;
  asm("cos.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(x));
  return d;
}
DEVICE float sine(float x) {
  float d;
  asm("sin.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(x));
  return d;
}
DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
// Copies to shared memory that go on while something else is done.
DEVICE void copy16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
DEVICE void copy4(void* to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
DEVICE void copies_done() { asm volatile("cp.async.wait_all;" ::: "memory"); }
DEVICE void fetch(const u8* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
DEVICE void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// Loads that stay where they are written, so that they are all in flight before the first use.
template <int N> DEVICE void load_words(u32 (&w)[N], const u8* p) {
  if constexpr (N == 4)
    asm volatile("ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3]) : "l"(p));
  else if constexpr (N == 2)
    asm volatile("ld.global.nc.v2.u32 {%0,%1}, [%2];" : "=r"(w[0]), "=r"(w[1]) : "l"(p));
  else
    asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(w[0]) : "l"(p));
}
DEVICE u32 load_short(const u8* p) {
  u16 x;
  asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(x) : "l"(p));
  return x;
}
#endif

DEVICE float low_of(u32 x) { return from_half((u16)(x & 0xFFFF)); }
DEVICE float high_of(u32 x) { return from_half((u16)(x >> 16)); }
// A 16-bit number of the cache.
DEVICE float load16(u16 x) {
#if BF16
  return __uint_as_float((u32)x << 16);
#else
  return from_half(x);
#endif
}
DEVICE u16 store16(float x) { return BF16 ? to_bfloat(x) : to_half(x); }
