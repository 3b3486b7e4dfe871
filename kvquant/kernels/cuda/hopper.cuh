// PTX instructions of Hopper GPUs: barriers in shared memory, bulk copies, products of warpgroups.
#pragma once

#include "integers.cuh"

__device__ __forceinline__ u32 shared_address(const void* p) {
  return (u32)__cvta_generic_to_shared(p);
}

// A barrier that counts arrivals, and the bytes of bulk copies.
struct Barrier {
  u64 bits;

  __device__ __forceinline__ void init(int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)),
                 "r"(arrivals));
  }
  // Arrives, and lets the phase end only when so many bytes have been copied.
  __device__ __forceinline__ void arrive_with(int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                     shared_address(this)),
                 "r"(bytes)
                 : "memory");
  }
  __device__ __forceinline__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(this)) : "memory");
  }
  // Waits until the phase of this parity has ended; the first phase has parity 0.
  __device__ __forceinline__ void wait(u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "AGAIN:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra AGAIN;\n}" ::"r"(shared_address(this)),
        "r"(parity)
        : "memory");
  }
};

// Makes the initial state of barriers visible to bulk copies.
__device__ __forceinline__ void fence_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Makes what threads have written to shared memory visible to products.
__device__ __forceinline__ void fence_operands() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Copies from global to shared memory; both addresses and the bytes are multiples of 16.
__device__ __forceinline__ void copy_bulk(void* to, const void* from, int bytes,
                                          Barrier& finished) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(&finished))
      : "memory");
}

// The number of registers per thread from here on, of all warps of a warpgroup.
template <int COUNT> __device__ __forceinline__ void give_registers_back() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT> __device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// Waits for the other warps of the warpgroup.
__device__ __forceinline__ void synchronize_warpgroup() {
  asm volatile("bar.sync %0, 128;" ::"r"(1 + threadIdx.x / 128) : "memory");
}

// An operand of products in shared memory: rows of ROW_BYTES (64 or 128) one behind the other, with
// the 16-byte pieces of each permuted as the hardware wants it (its "swizzle").
template <int ROW_BYTES> struct Operand {
  static_assert(ROW_BYTES == 64 || ROW_BYTES == 128, "");
  static constexpr u32 EIGHT_ROWS = 8 * ROW_BYTES / 16, SWIZZLE = ROW_BYTES == 128 ? 1 : 2;
  u32 low;  // of the descriptor, whose upper half is constant

  __device__ __forceinline__ explicit Operand(const void* p)
      : low((shared_address(p) & 0x3FFFF) >> 4 | 1 << 16) {}
  // The descriptor from some bytes on, a multiple of 16.
  __device__ __forceinline__ u64 from(u32 bytes) const {
    return (u64)(SWIZZLE << 30 | EIGHT_ROWS) << 32 | (low + bytes / 16);
  }
};

// Products are asynchronous: what they read and write in registers is left alone between
// begin_products and the end of wait_for_products.
__device__ __forceinline__ void begin_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}

#define EIGHT(AS, i)                                                                             \
  AS(i), AS(i + 1), AS(i + 2), AS(i + 3), AS(i + 4), AS(i + 5), AS(i + 6), AS(i + 7)
#define THIRTY_TWO(AS, i) EIGHT(AS, i), EIGHT(AS, i + 8), EIGHT(AS, i + 16), EIGHT(AS, i + 24)
#define INTEGER(i) "+r"(d[i])
#define FLOAT(i) "+f"(d[i])
#define NAMES_32                                                                                 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,"   \
  "%25,%26,%27,%28,%29,%30,%31"
#define NAMES_64                                                                                 \
  NAMES_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,"   \
           "%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

// d += a * b of INT8: 64 rows of a, 128 of b, 32 columns each.
__device__ __forceinline__ void multiply_int8(u32 (&d)[64], u64 a, u64 b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {" NAMES_64 "}, %64, %65, 1;"
               : THIRTY_TWO(INTEGER, 0), THIRTY_TWO(INTEGER, 32)
               : "l"(a), "l"(b));
}

// d = a * b, or with ADD d += a * b, of e4m3: 64 rows of a in registers, 64 or 72 of b.
template <bool ADD>
__device__ __forceinline__ void multiply_fp8(float (&d)[32], const u32* a, u64 b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 {" NAMES_32
               "}, {%32,%33,%34,%35}, %36, %37, 1, 1;"
               : THIRTY_TWO(FLOAT, 0)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(ADD));
}
template <bool ADD>
__device__ __forceinline__ void multiply_fp8(float (&d)[36], const u32* a, u64 b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n72k32.f32.e4m3.e4m3 {" NAMES_32
               ",%32,%33,%34,%35}, {%36,%37,%38,%39}, %40, %41, 1, 1;"
               : THIRTY_TWO(FLOAT, 0), FLOAT(32), FLOAT(33), FLOAT(34), FLOAT(35)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(ADD));
}
#undef EIGHT
#undef THIRTY_TWO
#undef INTEGER
#undef FLOAT
#undef NAMES_32
#undef NAMES_64

// Four numbers as e4m3, the first in the lowest byte.
__device__ __forceinline__ u32 pack_e4m3(float a, float b, float c, float d) {
  u32 packed;
  asm("{\n.reg .b16 low, high;\n"
      "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      "mov.b32 %0, {low, high};\n}"
      : "=r"(packed)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return packed;
}
