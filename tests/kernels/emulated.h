// What the kernels need of CUDA, for a CPU: the threads of a thread block are coroutines that
// change places at barriers and warp collectives. Thread blocks run one after the other.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

typedef uint32_t u32;
typedef uint16_t u16;
typedef uint8_t u8;
typedef long long i64;
typedef unsigned long long u64;
struct uint2 {
  u32 x, y;
};
struct uint4 {
  u32 x, y, z, w;
};
struct int4 {
  int x, y, z, w;
};
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
static uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
static uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
static int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
static float2 make_float2(float x, float y) { return {x, y}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

#define __global__
#define __device__
#define __constant__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(threads, blocks)
#define __shared__ static
#define DYNAMIC_SHARED(name, bytes) alignas(16) static u8 name[bytes]
#define __align__(n) __attribute__((aligned(n)))

using std::max;
using std::min;

// ------------------------------------------------------------------------------- coroutines

enum State { RUNNING, AT_BARRIER, IN_WARP, DONE };
struct Thread {
  ucontext_t start;
  jmp_buf place;  // where it goes on; swapcontext would call the operating system each time
  bool started;
  State state;
  int operation;
  u32 given, got;
  u32 shown[6];
  std::vector<char> stack;
};
static std::vector<Thread> threads;
static jmp_buf scheduler;
static struct {
  unsigned x, y, z;
} threadIdx, blockIdx, gridDim;
static void (*body)();

static void leave(State state) {
  Thread& own = threads[threadIdx.x];
  own.state = state;
  if (_setjmp(own.place) == 0) _longjmp(scheduler, 1);
}
static void go_on(Thread& t) {
  if (_setjmp(scheduler) != 0) return;
  if (t.started) _longjmp(t.place, 1);
  t.started = true;
  setcontext(&t.start);
}
static void __syncthreads() { leave(AT_BARRIER); }
static u32 collective(int operation, u32 x) {
  Thread& own = threads[threadIdx.x];
  own.operation = operation;
  own.given = x;
  leave(IN_WARP);
  return own.got;
}
enum { SUM, MAX, MIN, BELOW };  // BELOW + lanes
static u32 warp_sum(u32 x) { return collective(SUM, x); }
static int warp_max(int x) { return (int)collective(MAX, (u32)x); }
static int warp_min(int x) { return (int)collective(MIN, (u32)x); }
static u32 from_lane_below(u32 x, int lanes) { return collective(BELOW + lanes, x); }

// What the lanes of a warp show each other: everyone has shown it, and nobody shows the next thing
// before all have seen it.
enum { SHOW = 100, SEEN };
template <typename F> static void exchange(const u32* mine, int count, F see) {
  Thread& own = threads[threadIdx.x];
  std::copy(mine, mine + count, own.shown);
  collective(SHOW, 0);
  see(&threads[threadIdx.x & ~31u]);
  collective(SEEN, 0);
}
static void __syncwarp() { collective(SEEN, 0); }
template <typename X> static X from_lane(X x, int lane) {
  u32 bits, found;
  static_assert(sizeof(X) == 4, "");
  memcpy(&bits, &x, 4);
  exchange(&bits, 1, [&](const Thread* warp) { found = warp[lane].shown[0]; });
  memcpy(&x, &found, 4);
  return x;
}
template <typename X> static X __shfl_sync(u32, X x, int lane) { return from_lane(x, lane); }
template <typename X> static X __shfl_xor_sync(u32, X x, int mask) {
  return from_lane(x, (threadIdx.x % 32) ^ mask);
}
template <typename X> static X __reduce_max_sync(u32, X x) {
  u32 bits = (u32)x;
  X most = x;
  exchange(&bits, 1, [&](const Thread* warp) {
    for (int i = 0; i < 32; ++i) most = max(most, (X)warp[i].shown[0]);
  });
  return most;
}

static bool finish_warp(Thread* warp) {
  for (int i = 0; i < 32; ++i)
    if (warp[i].state != IN_WARP || warp[i].operation != warp[0].operation) return false;
  const int operation = warp[0].operation;
  u32 all = warp[0].given;
  for (int i = 1; i < 32; ++i) {
    u32 x = warp[i].given;
    if (operation == SUM) all += x;
    if (operation == MAX) all = (u32)max((int)all, (int)x);
    if (operation == MIN) all = (u32)min((int)all, (int)x);
  }
  for (int i = 0; i < 32; ++i) {
    int from = operation >= BELOW && operation < SHOW ? i - (operation - BELOW) : i;
    warp[i].got = operation < BELOW ? all : warp[from < 0 ? i : from].given;
    warp[i].state = RUNNING;
  }
  return true;
}

static void entry() {
  body();
  leave(DONE);
}

static void run_thread_block(int count) {
  if ((int)threads.size() != count) {
    threads = std::vector<Thread>(count);
    for (Thread& t : threads) t.stack.resize(1 << 16);
  }
  for (Thread& t : threads) {
    getcontext(&t.start);
    t.start.uc_stack.ss_sp = t.stack.data();
    t.start.uc_stack.ss_size = t.stack.size();
    t.start.uc_link = nullptr;
    makecontext(&t.start, entry, 0);
    t.started = false;
    t.state = RUNNING;
  }
  for (;;) {
    bool moved = false, all_done = true, all_waiting = true;
    for (int i = 0; i < count; ++i) {
      if (threads[i].state == RUNNING) {
        threadIdx.x = i;
        go_on(threads[i]);
        moved = true;
      }
      all_done &= threads[i].state == DONE;
      all_waiting &= threads[i].state == DONE || threads[i].state == AT_BARRIER;
    }
    if (all_done) return;
    for (int i = 0; i < count; i += 32) moved |= finish_warp(&threads[i]);
    if (all_waiting) {
      for (Thread& t : threads)
        if (t.state == AT_BARRIER) t.state = RUNNING;
      moved = true;
    }
    if (!moved) {
      fprintf(stderr, "emulated thread block: threads wait for each other\n");
      abort();
    }
  }
}

template <typename F> static void launch(int x, int y, int z, int count, F f) {
  static F* kernel;
  kernel = &f;
  body = [] { (*kernel)(); };
  gridDim = {(unsigned)x, (unsigned)y, (unsigned)z};
  for (int i = 0; i < x * y * z; ++i) {
    blockIdx = {(unsigned)(i % x), (unsigned)(i / x % y), (unsigned)(i / x / y)};
    run_thread_block(count);
  }
}

// ------------------------------------------------------------------------------- arithmetic

static float to_float(u16 x) {
  if constexpr (BF16) {
    u32 wide = (u32)x << 16;
    float f;
    memcpy(&f, &wide, 4);
    return f;
  } else {
    _Float16 h;
    memcpy(&h, &x, 2);
    return (float)h;
  }
}
static u16 to_16(float x) {
  u16 d;
  if constexpr (BF16) {
    u32 wide;
    memcpy(&wide, &x, 4);
    d = x != x ? 0x7FFF : (u16)((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16);
  } else {
    _Float16 h = (_Float16)x;
    memcpy(&d, &h, 2);
  }
  return d;
}
template <typename F> static u32 halves(u32 a, u32 b, F f) {
  u32 low = f((u16)a, (u16)b), high = f((u16)(a >> 16), (u16)(b >> 16));
  return (low & 0xFFFF) | high << 16;
}
#define COMPARE(name, test)                       \
  static u32 name(u32 a, u32 b) {                 \
    return halves(a, b, [](u16 p, u16 q) -> u32 { \
      float x = to_float(p), y = to_float(q);     \
      return (test) ? 0xFFFF : 0;                 \
    });                                           \
  }
COMPARE(ge2, x >= y)
COMPARE(le2, x <= y)
COMPARE(geu2, !(x < y))
static bool is_nan(u16 p) { return to_float(p) != to_float(p); }
static u32 max2(u32 a, u32 b) {
  return halves(a, b, [](u16 p, u16 q) -> u32 {
    return is_nan(p) || is_nan(q) ? 0x7FFF : to_float(p) >= to_float(q) ? p : q;
  });
}
static u32 min2(u32 a, u32 b) {
  return halves(a, b, [](u16 p, u16 q) -> u32 {
    return is_nan(p) || is_nan(q) ? 0x7FFF : to_float(p) <= to_float(q) ? p : q;
  });
}
static u32 load2(const u16* p) {
  u32 d;
  memcpy(&d, p, 4);
  return d;
}
static float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
static float __fmul_rn(float a, float b) { return a * b; }
static float __fadd_rn(float a, float b) { return a + b; }
static float __fsub_rn(float a, float b) { return a - b; }
static float __fdiv_rn(float a, float b) { return a / b; }
static int __popc(u32 x) { return __builtin_popcount(x); }
static int __ffs(u32 x) { return __builtin_ffs((int)x); }
static float as_float(u32 bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
static u32 bits_of(float x) {
  u32 bits;
  memcpy(&bits, &x, 4);
  return bits;
}
static float __uint_as_float(u32 x) { return as_float(x); }
static float __int_as_float(int x) { return as_float((u32)x); }
static u32 __float_as_uint(float x) { return bits_of(x); }
static int __float_as_int(float x) { return (int)bits_of(x); }
template <typename X> static X __ldg(const X* p) { return *p; }
static u32 __byte_perm(u32 a, u32 b, u32 s) {
  uint64_t both = (uint64_t)b << 32 | a;
  u32 d = 0;
  for (int i = 0; i < 4; ++i) d |= (u32)(both >> (8 * ((s >> (4 * i)) & 7)) & 0xFF) << (8 * i);
  return d;
}
static int atomicAdd(int* p, int x) {
  int old = *p;
  *p += x;
  return old;
}
static u32 atomicOr(u32* p, u32 x) {
  u32 old = *p;
  *p |= x;
  return old;
}
static u32 atomicMax(u32* p, u32 x) {
  u32 old = *p;
  *p = max(old, x);
  return old;
}
