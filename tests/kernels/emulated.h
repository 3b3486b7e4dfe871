// What `pack.cu` needs of CUDA, for a CPU: the threads of a program are coroutines that change places
// at barriers and warp collectives. Programs run one after the other.

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

typedef uint32_t u32;
typedef uint16_t u16;
typedef uint8_t u8;
typedef long long i64;
struct uint4 {
  u32 x, y, z, w;
};

#define DEVICE static inline
#define KERNEL(threads, blocks) static void
#define SHARED static
#define __align__(n) __attribute__((aligned(n)))

using std::max;
using std::min;

// ------------------------------------------------------------------------------- coroutines

enum State { RUNNING, AT_BARRIER, IN_WARP, DONE };
struct Thread {
  ucontext_t context;
  State state;
  int operation;
  u32 given, got;
  std::vector<char> stack;
};
static std::vector<Thread> threads;
static ucontext_t scheduler;
static struct { unsigned x; } threadIdx, blockIdx;
static std::function<void()> body;

static void leave(State state) {
  Thread& own = threads[threadIdx.x];
  own.state = state;
  swapcontext(&own.context, &scheduler);
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
static u32 from_below(u32 x, int lanes) { return collective(BELOW + lanes, x); }

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
    int from = operation >= BELOW ? i - (operation - BELOW) : i;
    warp[i].got = operation < BELOW ? all : warp[from < 0 ? i : from].given;
    warp[i].state = RUNNING;
  }
  return true;
}

static void entry() {
  body();
  leave(DONE);
}

static void run_program(int count) {
  if ((int)threads.size() != count) {
    threads = std::vector<Thread>(count);
    for (Thread& t : threads) t.stack.resize(1 << 16);
  }
  for (Thread& t : threads) {
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack.data();
    t.context.uc_stack.ss_size = t.stack.size();
    t.context.uc_link = nullptr;
    makecontext(&t.context, entry, 0);
    t.state = RUNNING;
  }
  for (;;) {
    bool moved = false, all_done = true, all_waiting = true;
    for (int i = 0; i < count; ++i) {
      if (threads[i].state == RUNNING) {
        threadIdx.x = i;
        swapcontext(&scheduler, &threads[i].context);
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
      fprintf(stderr, "emulated program: threads wait for each other\n");
      abort();
    }
  }
}

template <typename F> static void launch(int grid, int count, F f) {
  body = f;
  for (int i = 0; i < grid; ++i) {
    blockIdx.x = i;
    run_program(count);
  }
}

// ------------------------------------------------------------------------------- arithmetic

static float to_float(u16 x) {
#if BF16
  u32 wide = (u32)x << 16;
  float f;
  memcpy(&f, &wide, 4);
  return f;
#else
  _Float16 h;
  memcpy(&h, &x, 2);
  return (float)h;
#endif
}
static u16 to_16(float x) {
  u16 d;
#if BF16
  u32 wide;
  memcpy(&wide, &x, 4);
  d = x != x ? 0x7FFF : (u16)((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16);
#else
  _Float16 h = (_Float16)x;
  memcpy(&d, &h, 2);
#endif
  return d;
}
template <typename F> static u32 halves(u32 a, u32 b, F f) {
  u32 low = f((u16)a, (u16)b), high = f((u16)(a >> 16), (u16)(b >> 16));
  return (low & 0xFFFF) | high << 16;
}
#define COMPARE(name, test)                                                        \
  static u32 name(u32 a, u32 b) {                                                  \
    return halves(a, b, [](u16 p, u16 q) -> u32 {                                  \
      float x = to_float(p), y = to_float(q);                                      \
      return (test) ? 0xFFFF : 0;                                                  \
    });                                                                            \
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
static float __fmul_rn(float a, float b) { return a * b; }
static float __fadd_rn(float a, float b) { return a + b; }
static float __fsub_rn(float a, float b) { return a - b; }
static float __fdiv_rn(float a, float b) { return a / b; }
static int __popc(u32 x) { return __builtin_popcount(x); }
static int __ffs(u32 x) { return __builtin_ffs((int)x); }
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
