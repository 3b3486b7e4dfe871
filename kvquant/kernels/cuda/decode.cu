// Decode attention straight from packed blocks: one query a sequence, split over the past.
//
// Compiled at run time (cuda_build.py) with these constants:
//   BITS 2, 3 or 4   DIM head_dim (64, 128, 256)   GROUP query heads a kv head (1..8)
//   SIZE tokens a block (a multiple of 32)   OUTLIERS: whether there are any
//   POS32, COUNT32: types of the outliers' index arrays
//   KTILES: tiles of 16 tokens of keys that a warp takes together
//   HELD: whether the scales and queries of keys are kept in registers
//   WARPS: warps a program   MIN_BLOCKS: programs a multiprocessor   SPLIT: most chunks a program
//   ROUNDS: outliers a lane and block whose data wait in shared memory; further ones are read again
//   SPACE: bytes of shared memory that cuda_decode.py counts
//   BF16: whether 16-bit numbers of the cache are bfloat16
//
// A program takes up to SPLIT chunks of T tokens of one kv head, in phases, so that each keeps few
// registers and many warps hide each other's waiting:
//   1. Outliers of keys: (exact - dequantized) times the query, added up for each token. An outlier's
//      dense code is known from its value, so nothing else of the cache is read for it, and its
//      rotation is a sine and a cosine of the special function unit.
//   2. Scores, a warp a chunk at a time. Codes go from memory to registers in the places of
//      mma.m16n8k16 operands: a byte permutation looks up four fp16 levels at a time (each byte of
//      the level table separately), two channels of which make an operand register. The dot products
//      of all queries of a group then cost the same as those of one. Rows are tokens. Key = level *
//      scale + zero (a channel's), rotated by its place in the chunk; the query is rotated back by
//      the chunk's first position.
//   3. Softmax: the scores of the whole program are there, so weights need no correction later.
//   4. Outliers of values: (exact - dequantized) times the weight, added up for each channel.
//   5. Output, a warp a chunk at a time: rows are channels. The token's scale goes into the weights,
//      its zero into one sum.
// The sums of 1 and 4 are made of integers in units of their largest part, in shared memory: they do
// not depend on the order, and integer additions are faster there than those of floats. What these
// phases read is copied to shared memory while something else is done (cp.async), and codes are
// fetched into the L2 cache a chunk ahead.

#ifdef EMULATED
#include "emulated_decode.h"  // tests only: the same functions for a CPU
#else
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef long long i64;
typedef unsigned long long u64;

#define DEVICE __device__ __forceinline__
#define MEMBER DEVICE
#define SEPARATE __device__
#define APART __device__ __noinline__
#define KERNEL(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)
#define SHARED __shared__
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

#define THREADS (WARPS * 32)
#define T (SIZE < 64 ? SIZE : 64)  // tokens a chunk
#define CPB (SIZE / T)             // chunks a block
#define MT (T / 16)                // m-tiles of tokens
#define HALF (DIM / 2)
#define LW (DIM / 64)              // words of a 2-bit plane a thread and row, in K
#define SIGMA (2 * LW)             // selector words a thread and row, in K
#define VB (DIM / 32)              // bytes of a 2-bit plane a thread and row, in V
#define ROW (DIM * BITS / 8)       // bytes of a token
#define LEVELS (1 << BITS)
#define ROPE_PITCH (HALF * 4 + 64)  // bytes; rows of neighbouring threads meet different banks
#define QPITCH (SIGMA * 4 + 1)      // operands; the odd one spreads the banks
#define PITCH (SPLIT * T + 8)       // scores of a query; the odd eight spread the banks
#define PAIRS (T / 2)               // pairs of neighbouring tokens of a chunk
#define BLOCKS (SPLIT / CPB)        // most blocks a program
#define SHARE ((BLOCKS + WARPS - 1) / WARPS)  // most blocks whose outliers a warp takes
#define CAP (ROUNDS * 32)           // outliers of a block that wait in shared memory
#define ROOM (GROUP > 4 ? 8 : GROUP == 3 ? 4 : GROUP)  // queries of a group, a power of two
#define MAGIC 12582912.0f           // 1.5 * 2^23: added to a float, its low bits are an integer
#define MAGIC_BITS 0x4B400000
#define FIX 0x1p-22f                // of the largest part: the unit of integer sums
#define NONE (-1e30f)

#if POS32
typedef int pos_t;
#define POSITION(x) (x)
#else
typedef u16 pos_t;
#define POSITION(x) ((int)(x))
#endif
#if COUNT32
typedef int count_t;
#else
typedef short count_t;
#endif

// Pointers of one arena (int64 each), in this order.
enum { KCODES, VCODES, VZERO, VSCALE, KBEGIN, KCOUNT, KPOS, KVAL, VBEGIN, VCOUNT, VPOS, VVAL, FIELDS };

// The levels of a codebook, its high and low bytes apart.
struct Levels {
  u32 high[LEVELS > 8 ? 4 : 2], low[LEVELS > 8 ? 4 : 2];
  MEMBER void read(const float* levels) {
    constexpr int N = LEVELS > 8 ? 4 : 2;
#pragma unroll
    for (int i = 0; i < N; i++) high[i] = low[i] = 0;
#pragma unroll
    for (int i = 0; i < LEVELS; i++) {
      u32 x = to_half(levels[i]);
      high[i / 4] |= (x >> 8) << (8 * (i % 4));
      low[i / 4] |= (x & 255) << (8 * (i % 4));
    }
  }
  // From another copy. Through a shuffle, after which the compiler no longer knows that all lanes have
  // the same: short of registers, it would keep them in uniform ones and copy them for each use.
  MEMBER void take(const Levels& from, int lane) {
    constexpr int N = LEVELS > 8 ? 4 : 2;
#pragma unroll
    for (int i = 0; i < N; i++) {
      high[i] = __shfl_sync(~0u, from.high[i], lane);
      low[i] = __shfl_sync(~0u, from.low[i], lane);
    }
  }
  // Four levels by the four low nibbles of `s`: high bytes and low bytes.
  MEMBER void find(u32 s, u32& h, u32& l) const {
    if constexpr (LEVELS > 8) {
      u32 inner = s & 0x7777;
      u32 half = ((s >> 1) & 0x4444) | 0x3210;
      h = bytes(bytes(high[0], high[1], inner), bytes(high[2], high[3], inner), half);
      l = bytes(bytes(low[0], low[1], inner), bytes(low[2], low[3], inner), half);
    } else {
      h = bytes(high[0], high[1], s);
      l = bytes(low[0], low[1], s);
    }
  }
};

// Selectors of the codes in a plane: nibbles hold channels c and c + DIM / 2.
DEVICE u32 first_set(u32 a, u32 h) {
#if BITS == 3
  return (a & 0x33333333u) | ((h << 2) & 0x44444444u);
#else
  return a & 0x33333333u;
#endif
}
DEVICE u32 second_set(u32 a, u32 h) {
#if BITS == 3
  return ((a >> 2) & 0x33333333u) | (h & 0x44444444u);
#else
  return (a >> 2) & 0x33333333u;
#endif
}
// Copies of an outlier list; both begin at a multiple of 16 bytes of global memory.
struct List {
  pos_t at[CAP + 16 / sizeof(pos_t)];
  u16 value[CAP + 8];
};

struct Channel {
  u32 ends;     // fp16: what its lowest and its highest level stand for
  float theta;  // radians a token
};

// A channel's factors of cosine (low half) and sine for each query, 16-bit numbers of the cache.
struct __align__(4 * ROOM) Wave {
  u32 query[ROOM];
};

enum { KEYS, VALUES };

// Where a block of the head is.
struct Entry {
  const u8* codes[2];
  const pos_t* positions[2];
  const u16* outliers[2];
  const u16 *zeros, *scales;
  int count[2];
};

// Scores need tables, the end needs room for the warps' outputs.
struct Tables {
  u8 rope[T * ROPE_PITCH];
  // A warp's queries rotated back to its chunk, as operands: of a selector word and a thread of
  // four, channels (c, c+1), those + DIM / 2, (c+2, c+3), those + DIM / 2.
  uint4 query[WARPS][GROUP][QPITCH];
  float phases[SPLIT][HALF];  // of the chunks' first positions, radians
};

struct __align__(16) Space {
  union {
    Tables tables;
    float out[WARPS][GROUP][DIM];
  };
  List lists[BLOCKS];  // of keys, then of values
  u32 zeros[BLOCKS][SIZE / 2], scales[BLOCKS][SIZE / 2];  // of the tokens' values
  Entry entries[BLOCKS];
  // Corrections of the scores in their block's unit, then the scores, then of each pair of tokens
  // the weights times the tokens' scales and the weights alone, fp16.
  union {
    int change[GROUP][PITCH];
    float score[GROUP][PITCH];
    uint2 weight[GROUP][PITCH / 2];
  };
  Wave wave[DIM];
  Channel channels[DIM];
  Levels levels[2];            // of keys, of values
  uint4 channel[SIGMA][4][2];  // scale and zero: of channels c.. and of c + DIM / 2..
  float query[GROUP][DIM];     // rotated, times the strength of the scores
  int moved[GROUP][DIM];       // the output by outliers, in units
  float top[GROUP][WARPS], sum[GROUP][WARPS], zero_sum[GROUP][WARPS];
  float units[BLOCKS];
  float ends_of_levels[2];  // the last and the first level of values
  float middles[LEVELS];    // where values' codes change
  u32 reach;                // bits of the largest squared length of a query's pairs
  u32 largest;              // outlier of values, without its sign, 16 bits of the cache
};

CONSTANT int space_bytes = sizeof(Space);
static_assert(sizeof(Space) <= SPACE && sizeof(Space) + 256 > SPACE, "cuda_decode.py counts other bytes");

// Where a token's rotary entry for frequency `f` lies: {cos x 4, sin x 4} for four frequencies.
DEVICE int rope_at(int token, int f) {
  int j = f / (DIM / 4), rest = f % (DIM / 4), t = rest / (DIM / 16), w = rest % (DIM / 16) / 4;
  return token * ROPE_PITCH + ((w * 2 + j) * 4 + t) * 16 + (f % 4) * 2;
}

// Where channel `c` of a query lies in its operands, in halves.
DEVICE int query_at(int c) {
  int f = c % HALF, j = f / (DIM / 4), rest = f % (DIM / 4), t = rest / (DIM / 16), w = rest % (DIM / 16) / 4;
  return ((w * 2 + j) * 4 + t) * 8 + (f % 4) / 2 * 4 + (c / HALF) * 2 + f % 2;
}

// The largest of the lanes' numbers, none of them negative.
DEVICE float warp_max(float x) {
  return __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(x)));
}

// The same of any numbers: integers order as the floats do once negative ones are turned round.
DEVICE float warp_max_signed(float x) {
  int bits = __float_as_int(x);
  bits ^= (bits >> 31) & 0x7FFFFFFF;
  bits = __reduce_max_sync(~0u, bits);
  return __int_as_float(bits ^ ((bits >> 31) & 0x7FFFFFFF));
}

struct Args {
  const u16* query;       // [batch, kv heads * GROUP, DIM], rotated
  const u16* sink_keys;   // [batch, kv heads, sinks, DIM], before RoPE
  const u16* sink_values;
  const u16* tail_keys;   // [batch, kv heads, tail room, DIM], before RoPE
  const u16* tail_values;
  const i64* arenas;      // [arenas, FIELDS]
  const int* table;       // [batch, table_stride]: arena << 20 | place
  const int* lengths;     // [batch, 3]: sinks held, blocks, tail
  const float* key_scale; // [kv heads, DIM]
  const float* key_zero;
  const float* key_levels;
  const float* value_levels;
  const u8* rope;         // [T, SIGMA, 4, {cos x 4, sin x 4}] fp16: places in a chunk
  const float* phases;    // [1 + chunks, HALF] radians: position 0 and chunks' first
  const float* thetas;    // [HALF + 1] radians a token, the factor on cosine and sine
  float* part_out;        // [batch, kv heads, splits, GROUP, DIM]
  float* part_sum;        // [batch, kv heads, splits, GROUP, 2]: maximum, sum
  int heads, table_stride, sink_room, tail_room, chunks_a_split;
  float scaling;          // of the scores, times log2(e)
};

// A warp's queries rotated back by a chunk's first position, as fp16 operands. A lane takes four
// neighbouring frequencies at a time, or of grouped queries only some of the queries.
DEVICE void turn_queries(const Space& sh, uint4 (*to)[QPITCH], const float* phases, int lane) {
  constexpr int QUADS = HALF / 4;
  constexpr int PARTS = QUADS >= 32 || GROUP == 1 ? 1 : QUADS == 16 || GROUP < 4 ? 2 : 4;
#pragma unroll
  for (int item = lane; item < QUADS * PARTS; item += 32) {
    const int quad = item % QUADS, f = 4 * quad;
    const float4 phase = *(const float4*)(phases + f);
    const float c[4] = {cosine(phase.x), cosine(phase.y), cosine(phase.z), cosine(phase.w)};
    const float s[4] = {sine(phase.x), sine(phase.y), sine(phase.z), sine(phase.w)};
    const int j = quad / (DIM / 16), rest = quad % (DIM / 16), place = (rest % LW * 2 + j) * 4 + rest / LW;
#pragma unroll
    for (int q = item / QUADS; q < GROUP; q += PARTS) {
      const float4 x = *(const float4*)&sh.query[q][f], y = *(const float4*)&sh.query[q][f + HALF];
      const float a[4] = {x.x, x.y, x.z, x.w}, b[4] = {y.x, y.y, y.z, y.w};
      float low[4], high[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        low[i] = fmaf(a[i], c[i], b[i] * s[i]);
        high[i] = fmaf(b[i], c[i], -a[i] * s[i]);
      }
      to[q][place] = make_uint4(pack2(low[0], low[1]), pack2(high[0], high[1]), pack2(low[2], low[3]), pack2(high[2], high[3]));
    }
  }
}

// The tokens in 16 bits: sinks and tail. A warp a token at a time, lanes over channel pairs.
SEPARATE void plain_tokens(const Args& p, Space& sh, int batch, int head, int warp, int lane,
                             float (&top)[GROUP], float (&sum)[GROUP], float (&out)[GROUP][DIM / 32]) {
  uint4 (*mine)[QPITCH] = sh.tables.query[warp];
  const int* lengths = p.lengths + batch * 3;
  int sinks = lengths[0], blocks = lengths[1], tail = lengths[2];
#pragma unroll
  for (int q = 0; q < GROUP; q++) {
    top[q] = NONE;
    sum[q] = 0.0f;
#pragma unroll
    for (int i = 0; i < DIM / 32; i++) out[q][i] = 0.0f;
  }
  int pieces = 1 + (tail + T - 1) / T;
  for (int piece = 0; piece < pieces; piece++) {
    bool sink = piece == 0;
    int count = sink ? sinks : min(T, tail - (piece - 1) * T);
    i64 base = (i64)(batch * p.heads + head) * (sink ? p.sink_room : p.tail_room);
    const u16* keys = sink ? p.sink_keys : p.tail_keys;
    const u16* values = sink ? p.sink_values : p.tail_values;
    if (!sink) base += (piece - 1) * T;
    __syncwarp();
    turn_queries(sh, mine, p.phases + (sink ? 0 : (i64)(blocks * CPB + piece) * HALF), lane);
    __syncwarp();
    for (int token = warp; token < count; token += WARPS) {
      float dots[GROUP];
#pragma unroll
      for (int q = 0; q < GROUP; q++) dots[q] = 0.0f;
#pragma unroll
      for (int k = 0; k < HALF; k += 32) {
        int f = k + lane;
        float a = load16(keys[(base + token) * DIM + f]);
        float b = load16(keys[(base + token) * DIM + f + HALF]);
        int at = rope_at(token, f);
        float c = from_half(*(const u16*)(sh.tables.rope + at)), s = from_half(*(const u16*)(sh.tables.rope + at + 8));
        float ya = a * c - b * s, yb = b * c + a * s;
#pragma unroll
        for (int q = 0; q < GROUP; q++) {
          const u16* query = (const u16*)mine[q];
          dots[q] += ya * from_half(query[query_at(f)]) + yb * from_half(query[query_at(f + HALF)]);
        }
      }
      float v[DIM / 32];
#pragma unroll
      for (int i = 0; i < DIM / 32; i++) v[i] = load16(values[(base + token) * DIM + i * 32 + lane]);
#pragma unroll
      for (int q = 0; q < GROUP; q++) {
#pragma unroll
        for (int d = 16; d; d >>= 1) dots[q] += __shfl_xor_sync(~0u, dots[q], d);
        float m = fmaxf(top[q], dots[q]), old = exp2(top[q] - m), w = exp2(dots[q] - m);
        top[q] = m;
        sum[q] = sum[q] * old + w;
#pragma unroll
        for (int i = 0; i < DIM / 32; i++) out[q][i] = out[q][i] * old + w * v[i];
      }
    }
  }
}

// The elements of a 16-byte piece of memory that stand before `p`.
template <typename E> DEVICE int before(const E* p) { return (int)((u64)p & 15) / (int)sizeof(E); }

// Begins to copy the 16-byte pieces that hold `count` elements, MOST at most.
template <int MOST, typename E> DEVICE void stage(E* to, const E* from, int count, int lane) {
  const u8* begin = (const u8*)((u64)from & ~(u64)15);
  const int pieces = ((before(from) + count) * (int)sizeof(E) + 15) / 16;
#pragma unroll
  for (int i = 0; i < MOST * (int)sizeof(E) / 16 + 1; i += 32)
    if (i + lane < pieces) copy16((u8*)to + 16 * (i + lane), begin + 16 * (i + lane));
}

// A block's outliers of one side: the first CAP in shared memory, the others where they are.
struct Outliers {
  int count;
  const pos_t *positions, *near_positions;
  const u16 *values, *near_values;

  MEMBER Outliers(const Entry& entry, const List& list, int side)
      : count(entry.count[side]), positions(entry.positions[side]), values(entry.outliers[side]) {
    near_positions = list.at + before(positions);
    near_values = list.value + before(values);
  }
};
DEVICE void copy_outliers(List& list, const Entry& entry, int side, int lane) {
  const int near = min(entry.count[side], CAP);
  stage<CAP>(list.at, entry.positions[side], near, lane);
  stage<CAP>(list.value, entry.outliers[side], near, lane);
}

// Finds the warp's blocks, a lane a block.
DEVICE void find_blocks(const Args& p, Space& sh, const int* table, int blocks, int head, int warp, int lane) {
  const int place = warp + lane * WARPS;
  if (lane >= SHARE || place >= blocks) return;
  const u32 number = __ldg(table + place);
  const i64* arena = p.arenas + (i64)(number >> 20) * FIELDS;
  const i64 block = number & 0xFFFFF, of_head = block * p.heads + head;
  Entry& entry = sh.entries[place];
  entry.codes[KEYS] = (const u8*)__ldg(arena + KCODES) + of_head * SIZE * ROW;
  entry.codes[VALUES] = (const u8*)__ldg(arena + VCODES) + of_head * SIZE * ROW;
  entry.zeros = (const u16*)__ldg(arena + VZERO) + block * SIZE;
  entry.scales = (const u16*)__ldg(arena + VSCALE) + block * SIZE;
#if OUTLIERS
  const int begin[2] = {__ldg((const int*)__ldg(arena + KBEGIN) + of_head), __ldg((const int*)__ldg(arena + VBEGIN) + of_head)};
  entry.count[KEYS] = __ldg((const count_t*)__ldg(arena + KCOUNT) + of_head);
  entry.count[VALUES] = __ldg((const count_t*)__ldg(arena + VCOUNT) + of_head);
  entry.positions[KEYS] = (const pos_t*)__ldg(arena + KPOS) + begin[KEYS];
  entry.positions[VALUES] = (const pos_t*)__ldg(arena + VPOS) + begin[VALUES];
  entry.outliers[KEYS] = (const u16*)__ldg(arena + KVAL) + begin[KEYS];
  entry.outliers[VALUES] = (const u16*)__ldg(arena + VVAL) + begin[VALUES];
#endif
}

// Phase 1. Corrections of the scores of the warp's blocks, in a unit of each block.
DEVICE void key_outliers(Space& sh, int blocks, int warp, int lane, float strength) {
  const float reach = sqrtf(__uint_as_float(sh.reach)) * 1.01f;
#pragma unroll 1
  for (int j = 0; j < SHARE; j++) {
    const int place = warp + j * WARPS;
    if (place >= blocks) break;
    const Outliers block(sh.entries[place], sh.lists[place], KEYS);
    // (exact - dequantized): an outlier is outside the range, so its dense code is that of an end.
    auto difference = [&](int at, float x) {
      const u32 ends = sh.channels[at % DIM].ends;
      const float low = low_of(ends), high = high_of(ends);
      return x - (x + x > low + high ? high : low);
    };
    auto turned = [&](int at, float d) {
      const int token = at / DIM, c = at % DIM;
      const float angle = fmaf((float)(token % T), sh.channels[c].theta, sh.tables.phases[place * CPB + token / T][c % HALF]);
      return make_float2(d * cosine(angle), d * sine(angle));
    };
    auto add = [&](int at, float2 d, const Wave& wave) {
#pragma unroll
      for (int q = 0; q < GROUP; q++) {
        const float a = load16((u16)(wave.query[q] & 0xFFFF)), b = load16((u16)(wave.query[q] >> 16));
        const int x = __float_as_int(fmaf(b, d.y, fmaf(a, d.x, MAGIC))) - MAGIC_BITS;
        atomicAdd(&sh.change[q][place * SIZE + at / DIM], x);
      }
    };
    int at[ROUNDS];
    float d[ROUNDS], most = 0.0f;
#pragma unroll
    for (int r = 0; r < ROUNDS; r++) {
      const int i = r * 32 + lane;
      at[r] = -1;
      d[r] = 0.0f;
      if (i < block.count) {
        at[r] = POSITION(block.near_positions[i]);
        d[r] = difference(at[r], load16(block.near_values[i]));
        most = fmaxf(most, fabsf(d[r]));
      }
    }
#pragma unroll 1
    for (int i = CAP + lane; i < block.count; i += 32)
      most = fmaxf(most, fabsf(difference(POSITION(__ldg(block.positions + i)), load16(__ldg(block.values + i)))));
    const float unit = warp_max(most) * reach * strength * FIX, inverse = unit > 1e-30f ? strength / unit : 0.0f;
    if (lane == 0) sh.units[place] = unit;
    auto look = [&](int r) { return sh.wave[max(at[r], 0) % DIM]; };
#pragma unroll
    for (int r = 0; r < ROUNDS; r += 2) {
      if (r * 32 >= block.count) break;
      const float2 first = turned(max(at[r], 0), d[r] * inverse);
      const Wave near = look(r);
      if (r + 1 < ROUNDS && (r + 1) * 32 < block.count) {
        // Loads cannot pass the additions, so those of two rounds come before them.
        const int s = r + 1 < ROUNDS ? r + 1 : r;
        const float2 second = turned(max(at[s], 0), d[s] * inverse);
        const Wave next = look(s);
        if (at[s] >= 0) add(at[s], second, next);
      }
      if (at[r] >= 0) add(at[r], first, near);
    }
#pragma unroll 1
    for (int i = CAP + lane; i < block.count; i += 32) {
      const int far = POSITION(__ldg(block.positions + i));
      add(far, turned(far, difference(far, load16(__ldg(block.values + i))) * inverse), sh.wave[far % DIM]);
    }
  }
}

// The dense code's level as the packer found it from the same number; needed in flat tokens only.
APART float exact_level(const float* middles, const float* levels, float away, float scale) {
  const float normalized = away * (scale == 0.0f ? 0.0f : __fdiv_rn(1.0f, scale));
  int code = 0;
  for (int k = LEVELS / 2; k; k >>= 1) code += normalized > middles[code + k - 1] ? k : 0;
  return from_half(to_half(levels[code]));
}

// The largest outlier of values of the warp's blocks, without its sign.
DEVICE void largest_value(Space& sh, int blocks, int warp, int lane) {
  u32 largest = 0;
#pragma unroll 1
  for (int j = 0; j < SHARE; j++) {
    const int place = warp + j * WARPS;
    if (place >= blocks) break;
    const Outliers block(sh.entries[place], sh.lists[place], VALUES);
#pragma unroll
    for (int r = 0; r < ROUNDS; r++)
      if (r * 32 + lane < block.count) largest = max(largest, (u32)(block.near_values[r * 32 + lane] & 0x7FFF));
#pragma unroll 1
    for (int i = CAP + lane; i < block.count; i += 32) largest = max(largest, (u32)(__ldg(block.values + i) & 0x7FFF));
  }
  largest = __reduce_max_sync(~0u, largest);
  if (lane == 0) atomicMax(&sh.largest, largest);
}

// Phase 4. Corrections of the output by the warp's blocks, in units of all.
DEVICE void value_outliers(const Args& p, Space& sh, int blocks, int warp, int lane, float unit) {
  const float inverse = unit > 1e-30f ? 1.0f / unit : 0.0f;
  const float high = sh.ends_of_levels[0], low = sh.ends_of_levels[1];
  const float bound = 1.001f * fmaxf(fmaxf(sh.middles[LEVELS - 2], -sh.middles[0]), 0.0f);
#pragma unroll 1
  for (int j = 0; j < SHARE; j++) {
    const int place = warp + j * WARPS;
    if (place >= blocks) break;
    const Outliers block(sh.entries[place], sh.lists[place], VALUES);
    const u16 *zeros = (const u16*)sh.zeros[place], *scales = (const u16*)sh.scales[place];
    auto difference = [&](int at, float x) {
      const float zero = load16(zeros[at / DIM]), scale = load16(scales[at / DIM]), away = x - zero;
      float level = away > 0.0f ? high : low;  // almost always: it is outside the others' range
      if (fabsf(away) <= scale * bound) level = exact_level(sh.middles, p.value_levels, away, scale);
      return (x - fmaf(level, scale, zero)) * inverse;
    };
    auto look = [&](int at, u32 (&w)[GROUP]) {
      const int token = place * SIZE + at / DIM;
#pragma unroll
      for (int q = 0; q < GROUP; q++) w[q] = ((const u16*)&sh.weight[q][token / 2].y)[token % 2];
    };
    auto add = [&](int at, float d, const u32 (&w)[GROUP]) {
#pragma unroll
      for (int q = 0; q < GROUP; q++)
        atomicAdd(&sh.moved[q][at % DIM], __float_as_int(fmaf(from_half((u16)w[q]), d, MAGIC)) - MAGIC_BITS);
    };
#pragma unroll
    for (int r = 0; r < ROUNDS; r += 2) {
      if (r * 32 >= block.count) break;
      const int i = r * 32 + lane, j = i + 32;
      const int first = i < block.count ? POSITION(block.near_positions[i]) : 0;
      u32 near[GROUP];
      look(first, near);
      const float d = i < block.count ? difference(first, load16(block.near_values[i])) : 0.0f;
      if (r + 1 < ROUNDS && (r + 1) * 32 < block.count) {
        // Loads cannot pass the additions, so those of two rounds come before them.
        const int second = j < block.count ? POSITION(block.near_positions[j]) : 0;
        u32 next[GROUP];
        look(second, next);
        const float e = j < block.count ? difference(second, load16(block.near_values[j])) : 0.0f;
        if (j < block.count) add(second, e, next);
      }
      if (i < block.count) add(first, d, near);
    }
#pragma unroll 1
    for (int i = CAP + lane; i < block.count; i += 32) {
      const int far = POSITION(__ldg(block.positions + i));
      u32 w[GROUP];
      look(far, w);
      add(far, difference(far, load16(__ldg(block.values + i))), w);
    }
  }
}

// Where a chunk's codes are; nowhere in particular beyond the last chunk.
DEVICE const u8* codes_of(const Space& sh, int side, int chunk, int count) {
  return sh.entries[chunk < count ? chunk / CPB : 0].codes[side] + chunk % CPB * (T * ROW);
}
// Fetches it into the L2 cache.
DEVICE void fetch_chunk(const u8* codes, int lane) {
  for (int i = lane * 128; i < T * ROW; i += 32 * 128) fetch(codes + i);
}

// A thread's part of the keys of tokens g and g + 8 of sixteen.
struct KeyCodes {
  u32 low[2][BITS == 4 ? 2 : 1][LW], high[2][LW];
  MEMBER void load(const u8* codes, int g, int t) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const u8* row = codes + (8 * h + g) * ROW;
      load_words(low[h][0], row + DIM / 16 * t);
#if BITS == 4
      load_words(low[h][1], row + DIM / 4 + DIM / 16 * t);
#elif BITS == 3
      load_words(high[h], row + DIM / 4 + DIM / 16 * (t & 1));
#endif
    }
  }
  MEMBER u32 selector(int h, int w, int j, int t) const {
#if BITS == 4
    return low[h][j][w];
#elif BITS == 3
    const u32 top_bits = high[h][w] >> (t >> 1);
    return j ? second_set(low[h][0][w], top_bits) : first_set(low[h][0][w], top_bits);
#else
    return j ? second_set(low[h][0][w], 0) : first_set(low[h][0][w], 0);
#endif
  }
};

// A thread's part of the values of tokens r and r + 1 of sixteen, r = 2t + (0, 8).
constexpr int VW = VB >= 4 ? VB / 4 : 1;
DEVICE int low_offset(int g, int t) { return 2 * t * ROW + VB * g; }
DEVICE int high_offset(int g, int t) { return 2 * t * ROW + DIM / 4 + (BITS == 3 ? VB * (g & 3) : VB * g); }
struct ValueCodes {
  u32 low[2][2][BITS == 4 ? 2 : 1][VW], high[2][2][VW];
  // From a lane's places in the tile; the second plane is that of 4 bits' other half too.
  MEMBER void load(const u8* low_at, const u8* high_at) {
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const int row = (8 * h + e) * ROW;
        if constexpr (VB >= 4) {
          load_words(low[h][e][0], low_at + row);
#if BITS == 4
          load_words(low[h][e][1], high_at + row);
#elif BITS == 3
          load_words(high[h][e], high_at + row);
#endif
        } else {
          low[h][e][0][0] = load_short(low_at + row);
#if BITS == 4
          low[h][e][1][0] = load_short(high_at + row);
#elif BITS == 3
          high[h][e][0] = load_short(high_at + row);
#endif
        }
      }
  }
  MEMBER u32 selector(int h, int e, int w, int j, int g) const {
#if BITS == 4
    return low[h][e][j][w];
#elif BITS == 3
    const u32 top_bits = high[h][e][w] >> (g >> 2);
    return j ? second_set(low[h][e][0][w], top_bits) : first_set(low[h][e][0][w], top_bits);
#else
    return j ? second_set(low[h][e][0][w], 0) : first_set(low[h][e][0][w], 0);
#endif
  }
};

// What all tiles of keys need of a selector word: in registers, or where there are too many words, in
// shared memory.
struct Operands {
#if HELD
  uint4 scale[SIGMA], zero[SIGMA], query[SIGMA];
  MEMBER Operands(const Space& sh, int t) {
#pragma unroll
    for (int s = 0; s < SIGMA; s++) scale[s] = sh.channel[s][t][0], zero[s] = sh.channel[s][t][1];
  }
  MEMBER void turn(const uint4* turned) {
#pragma unroll
    for (int s = 0; s < SIGMA; s++) query[s] = turned[s * 4];
  }
  MEMBER void get(int s, uint4& scale_of, uint4& zero_of, uint4& query_of) const {
    scale_of = scale[s], zero_of = zero[s], query_of = query[s];
  }
#else
  const uint4 (*channel)[4][2];
  const uint4* turned;
  MEMBER Operands(const Space& sh, int t) : channel((const uint4 (*)[4][2])sh.channel[0][t]) {}
  MEMBER void turn(const uint4* query) { turned = query; }
  MEMBER void get(int s, uint4& scale_of, uint4& zero_of, uint4& query_of) const {
    scale_of = channel[s][0][0], zero_of = channel[s][0][1], query_of = turned[s * 4];
  }
#endif
};

// Scores of N tiles of 16 tokens: of queries 2t, 2t + 1 and tokens g, g + 8, in the order of an
// accumulator.
template <int N>
DEVICE void key_tiles(float (&scores)[N][4], const Operands& operands, const KeyCodes (&codes)[N], const Levels& levels,
                      const u8* rope, int t) {
#pragma unroll
  for (int k = 0; k < N; k++) scores[k][0] = scores[k][1] = scores[k][2] = scores[k][3] = 0.0f;
#pragma unroll
  for (int w = 0; w < LW; w++)
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const int sigma = w * 2 + j;
      uint4 scale, zero, turned;
      operands.get(sigma, scale, zero, turned);
#pragma unroll
      for (int k = 0; k < N; k++) {
        u32 ya[2][2], yb[2][2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const u32 s = codes[k].selector(h, w, j, t);
          u32 h0, l0, h1, l1;
          levels.find(s, h0, l0);
          levels.find(s >> 16, h1, l1);
          // low nibbles: channels c, c + 1 and c + 2, c + 3; high nibbles: those + DIM / 2
          const u32 xa = fma2(bytes(l0, h0, 0x6240), scale.x, zero.x);
          const u32 xb = fma2(bytes(l1, h1, 0x6240), scale.y, zero.y);
          const u32 za = fma2(bytes(l0, h0, 0x7351), scale.z, zero.z);
          const u32 zb = fma2(bytes(l1, h1, 0x7351), scale.w, zero.w);
          const uint4 cs = *(const uint4*)(rope + (16 * k + 8 * h) * ROPE_PITCH + sigma * 64);
          ya[h][0] = fma2(neg2(za), cs.z, mul2(xa, cs.x));
          ya[h][1] = fma2(xa, cs.z, mul2(za, cs.x));
          yb[h][0] = fma2(neg2(zb), cs.w, mul2(xb, cs.y));
          yb[h][1] = fma2(xb, cs.w, mul2(zb, cs.y));
        }
        mma(scores[k], ya[0][0], ya[1][0], ya[0][1], ya[1][1], turned.x, turned.y);
        mma(scores[k], yb[0][0], yb[1][0], yb[0][1], yb[1][1], turned.z, turned.w);
      }
    }
}

// Adds 16 tokens' weighted values: of channels in rows and queries 2t, 2t + 1 in columns.
DEVICE void value_tile(float (&out)[DIM / 16][4], const ValueCodes& codes, const Levels& levels,
                                           u32 w0, u32 w1, int g) {
#pragma unroll
  for (int w = 0; w < VW; w++)
#pragma unroll
    for (int j = 0; j < 2; j++) {
      // codes of two tokens a byte: channels c (first) and c + DIM / 2 (second)
      u32 mixed[2][2];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const u32 s0 = codes.selector(h, 0, w, j, g), s1 = codes.selector(h, 1, w, j, g);
        mixed[0][h] = choose(0x0F0F0F0Fu, s0, s1 << 4);
        mixed[1][h] = choose(0x0F0F0F0Fu, s0 >> 4, s1);
      }
#pragma unroll
      for (int n = 0; n < 2; n++)
#pragma unroll
        for (int half = 0; half < (VB >= 4 ? 2 : 1); half++) {
          u32 h0, l0, h1, l1;
          levels.find(mixed[n][0] >> (16 * half), h0, l0);
          levels.find(mixed[n][1] >> (16 * half), h1, l1);
          const int tile = ((w * 2 + j) * 2 + n) * (VB >= 4 ? 2 : 1) + half;
          mma(out[tile], bytes(l0, h0, 0x5140), bytes(l0, h0, 0x7362), bytes(l1, h1, 0x5140),
              bytes(l1, h1, 0x7362), w0, w1);
        }
    }
}

#define STEP (2 * KTILES <= MT ? KTILES : MT / 2)  // tiles of keys taken together

// Phase 2. Scores of the warp's chunks; their maxima.
DEVICE void key_scores(Space& sh, int count, int warp, int lane) {
  const int g = lane / 4, t = lane % 4;
  Levels levels;
  levels.take(sh.levels[0], lane);
  // Columns beyond the group repeat its last query; nobody reads what comes of them.
  const uint4* query = sh.tables.query[warp][g < GROUP ? g : GROUP - 1] + t;
  const u8* rope = sh.tables.rope + g * ROPE_PITCH + t * 16;
  float top[2] = {NONE, NONE};
  Operands operands(sh, t);
  KeyCodes even[STEP], odd[STEP];
  auto load = [&](KeyCodes (&codes)[STEP], const u8* from) {
#pragma unroll
    for (int k = 0; k < STEP; k++) codes[k].load(from + 16 * k * ROW, g, t);
  };
  const u8* at = codes_of(sh, KEYS, warp, count);
  load(even, at);
#pragma unroll 1
  for (int chunk = warp; chunk < count; chunk += WARPS) {
    const u8* next = codes_of(sh, KEYS, chunk + WARPS, count);
    if (chunk + WARPS < count) {
      fetch_chunk(next, lane);
      fetch_chunk(codes_of(sh, VALUES, chunk + WARPS, count), lane);
    }
    turn_queries(sh, sh.tables.query[warp], sh.tables.phases[chunk], lane);
    __syncwarp();
    operands.turn(query);
    float* const scored = &sh.score[2 * t < GROUP ? 2 * t : 0][chunk * T + g];
#if OUTLIERS
    const float unit = sh.units[chunk / CPB];
#endif
    // Corrections are read before the products, which hide the waiting.
    int change[STEP][4] = {};
    auto look = [&](int m) {
#if OUTLIERS
#pragma unroll
      for (int k = 0; k < STEP; k++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          if (2 * t + i % 2 < GROUP) change[k][i] = *(const int*)(scored + i % 2 * PITCH + 16 * (m + k) + i / 2 * 8);
#endif
    };
    auto put = [&](const float (&scores)[STEP][4], int m) {
#pragma unroll
      for (int k = 0; k < STEP; k++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          float x = scores[k][i];
#if OUTLIERS
          x = fmaf((float)change[k][i], unit, x);
#endif
          if (2 * t + i % 2 < GROUP) scored[i % 2 * PITCH + 16 * (m + k) + i / 2 * 8] = x;
          top[i % 2] = fmaxf(top[i % 2], x);
        }
    };
#pragma unroll 1
    for (int m = 0; m < MT; m += 2 * STEP) {
      const bool last = m + 2 * STEP >= MT;
      float scores[STEP][4];
      load(odd, at + 16 * (m + STEP) * ROW);
      look(m);
      key_tiles(scores, operands, even, levels, rope + 16 * m * ROPE_PITCH, t);
      put(scores, m);
      if (!last || chunk + WARPS < count) load(even, last ? next : at + 16 * (m + 2 * STEP) * ROW);
      look(m + STEP);
      key_tiles(scores, operands, odd, levels, rope + 16 * (m + STEP) * ROPE_PITCH, t);
      put(scores, m + STEP);
    }
    __syncwarp();  // the query's place is written again
    at = next;
  }
#pragma unroll
  for (int n = 0; n < 2; n++) {
#pragma unroll
    for (int d = 4; d < 32; d <<= 1) top[n] = fmaxf(top[n], __shfl_xor_sync(~0u, top[n], d));
    if (g == 0 && 2 * t + n < GROUP) sh.top[2 * t + n][warp] = top[n];
  }
}

// Phase 3. Weights of the warp's chunks relative to the maxima of all; their sums.
DEVICE void weigh(Space& sh, int count, int warp, int lane) {
  float top[GROUP], sum[GROUP], zeros[GROUP];
#pragma unroll
  for (int q = 0; q < GROUP; q++) {
    top[q] = warp_max_signed(lane < WARPS ? sh.top[q][lane] : NONE);
    sum[q] = zeros[q] = 0.0f;
  }
#pragma unroll 1
  for (int chunk = warp; chunk < count; chunk += WARPS)
    if (lane < PAIRS) {
      const int pair = chunk % CPB * PAIRS + lane;
      const u32 both_scales = sh.scales[chunk / CPB][pair], both_zeros = sh.zeros[chunk / CPB][pair];
      const float scale[2] = {load16((u16)(both_scales & 0xFFFF)), load16((u16)(both_scales >> 16))};
      const float zero[2] = {load16((u16)(both_zeros & 0xFFFF)), load16((u16)(both_zeros >> 16))};
#pragma unroll
      for (int q = 0; q < GROUP; q++) {
        uint2* const at = &sh.weight[q][chunk * PAIRS + lane];
        const uint2 scores = *at;
        const float a = exp2(__uint_as_float(scores.x) - top[q]), b = exp2(__uint_as_float(scores.y) - top[q]);
        sum[q] += a + b;
        zeros[q] = fmaf(a, zero[0], fmaf(b, zero[1], zeros[q]));
        *at = make_uint2(pack2(a * scale[0], b * scale[1]), pack2(a, b));
      }
    }
#pragma unroll
  for (int q = 0; q < GROUP; q++) {
#pragma unroll
    for (int d = 1; d < 32; d <<= 1) {
      sum[q] += __shfl_xor_sync(~0u, sum[q], d);
      zeros[q] += __shfl_xor_sync(~0u, zeros[q], d);
    }
    if (lane == 0) {
      sh.sum[q][warp] = sum[q];
      sh.zero_sum[q][warp] = zeros[q];
    }
  }
}

// Phase 5. Weighted values of the warp's chunks.
DEVICE void weighted_values(const Space& sh, int count, int warp, int lane, float (&out)[DIM / 16][4]) {
  const int g = lane / 4, t = lane % 4;
  Levels levels;
  levels.take(sh.levels[1], lane);
  const int low = low_offset(g, t), high = high_offset(g, t);
  const uint2* const queries = sh.weight[g < GROUP ? g : GROUP - 1] + t;
  ValueCodes even, odd;
  const u8* at = codes_of(sh, VALUES, warp, count);
  even.load(at + low, at + high);
#pragma unroll 1
  for (int chunk = warp; chunk < count; chunk += WARPS) {
    const u8* next = codes_of(sh, VALUES, chunk + WARPS, count);
    const uint2* const weights = queries + chunk * PAIRS;
    const u8 *const low_at = at + low, *const high_at = at + high;
#pragma unroll
    for (int m = 0; m < MT; m += 2) {
      odd.load(low_at + (16 * m + 16) * ROW, high_at + (16 * m + 16) * ROW);
      value_tile(out, even, levels, weights[8 * m].x, weights[8 * m + 4].x, g);
      if (m + 2 < MT)
        even.load(low_at + (16 * m + 32) * ROW, high_at + (16 * m + 32) * ROW);
      else if (chunk + WARPS < count)
        even.load(next + low, next + high);
      value_tile(out, odd, levels, weights[8 * m + 8].x, weights[8 * m + 12].x, g);
    }
    at = next;
  }
}

KERNEL(THREADS, MIN_BLOCKS) decode(const Args p) {
  DYNAMIC(raw, SPACE);
  Space& sh = *(Space*)raw;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int splits = gridDim.x, split = blockIdx.x, head = blockIdx.y, batch = blockIdx.z;
  const i64 part = ((i64)(batch * p.heads + head) * splits + split) * GROUP;
  const int chunks = p.lengths[batch * 3 + 1] * CPB;
  // Split 0 has the tokens in 16 bits, the others have chunks.
  const int first = split ? (split - 1) * p.chunks_a_split : 0, count = split ? min(p.chunks_a_split, chunks - first) : 0;
  if (split > 0 && count <= 0) {
    if (threadIdx.x < GROUP) {
      p.part_sum[(part + threadIdx.x) * 2] = NONE;
      p.part_sum[(part + threadIdx.x) * 2 + 1] = 0.0f;
    }
    return;
  }
  for (int i = threadIdx.x; i < T * SIGMA * 4; i += THREADS)
    copy16(sh.tables.rope + i / (SIGMA * 4) * ROPE_PITCH + i % (SIGMA * 4) * 16, (const uint4*)p.rope + i);
  for (int i = threadIdx.x; i < count * (HALF / 4); i += THREADS)
    copy16((float4*)sh.tables.phases + i, (const float4*)(p.phases + (i64)(first + 1) * HALF) + i);
  const int* table = p.table + (i64)batch * p.table_stride + first / CPB;
  const int blocks = count / CPB;
  find_blocks(p, sh, table, blocks, head, warp, lane);
  const float strength = __ldg(p.thetas + HALF) * p.scaling;  // of scores
  const u16* const query = p.query + (i64)(batch * p.heads + head) * GROUP * DIM;
  for (int i = threadIdx.x; i < GROUP * DIM; i += THREADS) {
    sh.query[i / DIM][i % DIM] = load16(query[i]) * strength;
    sh.moved[i / DIM][i % DIM] = 0;
  }
  if (threadIdx.x < SIGMA * 4) {
    int s = threadIdx.x / 4, tt = threadIdx.x % 4, c = (DIM / 16) * tt + 4 * (s / 2) + (DIM / 4) * (s % 2);
    const float* scale = p.key_scale + head * DIM + c;
    const float* zero = p.key_zero + head * DIM + c;
    sh.channel[s][tt][0] = make_uint4(pack2(scale[0], scale[1]), pack2(scale[2], scale[3]),
                                      pack2(scale[HALF], scale[HALF + 1]), pack2(scale[HALF + 2], scale[HALF + 3]));
    sh.channel[s][tt][1] = make_uint4(pack2(zero[0], zero[1]), pack2(zero[2], zero[3]),
                                      pack2(zero[HALF], zero[HALF + 1]), pack2(zero[HALF + 2], zero[HALF + 3]));
  }
#if OUTLIERS
  for (int i = threadIdx.x; i < DIM; i += THREADS) {
    const float scale = from_half(to_half(p.key_scale[head * DIM + i])), zero = from_half(to_half(p.key_zero[head * DIM + i]));
    const float high = from_half(to_half(p.key_levels[LEVELS - 1])), low = from_half(to_half(p.key_levels[0]));
    sh.channels[i] = {pack2(fmaf(low, scale, zero), fmaf(high, scale, zero)), __ldg(p.thetas + i % HALF)};
  }
  for (int i = threadIdx.x; i < GROUP * DIM; i += THREADS) {
    const int q = i / DIM, c = i % DIM, f = c % HALF;
    const u32 a = query[q * DIM + f], b = query[q * DIM + f + HALF];
    sh.wave[c].query[q] = c < HALF ? a | b << 16 : b | (a ^ 0x8000) << 16;
  }
  if (threadIdx.x < LEVELS) {
    const int i = threadIdx.x;
    sh.middles[i] = i + 1 < LEVELS ? (p.value_levels[i] + p.value_levels[i + 1]) * 0.5f : 3e38f;
    if (i == LEVELS - 1) sh.ends_of_levels[0] = from_half(to_half(p.value_levels[i]));
    if (i == 0) sh.ends_of_levels[1] = from_half(to_half(p.value_levels[i]));
  }
  for (int i = threadIdx.x; i < GROUP * PITCH / 4; i += THREADS) ((int4*)sh.change)[i] = make_int4(0, 0, 0, 0);
#endif
  if (threadIdx.x == 0) {
    sh.reach = sh.largest = 0;
    sh.levels[0].read(p.key_levels);
  }
  if (threadIdx.x == 32) sh.levels[1].read(p.value_levels);
  __syncwarp();  // its entries
#pragma unroll 1
  for (int j = 0; j < SHARE; j++) {
    const int place = warp + j * WARPS;
    if (place >= blocks) break;
    const Entry& entry = sh.entries[place];
    stage<SIZE>((u16*)sh.zeros[place], entry.zeros, SIZE, lane);
    stage<SIZE>((u16*)sh.scales[place], entry.scales, SIZE, lane);
#if OUTLIERS
    copy_outliers(sh.lists[place], entry, KEYS, lane);
#endif
  }
  __syncthreads();
#if OUTLIERS
  float most = 0.0f;
  for (int i = threadIdx.x; i < GROUP * HALF; i += THREADS) {
    const float a = load16((u16)(sh.wave[i % HALF].query[i / HALF] & 0xFFFF));
    const float b = load16((u16)(sh.wave[i % HALF].query[i / HALF] >> 16));
    most = fmaxf(most, a * a + b * b);
  }
  most = warp_max(most);
  if (lane == 0) atomicMax(&sh.reach, __float_as_uint(most));
#endif
  if (warp < count) {
    fetch_chunk(codes_of(sh, KEYS, warp, count), lane);
    fetch_chunk(codes_of(sh, VALUES, warp, count), lane);
  }
  copies_done();
  __syncthreads();

  float unit = 0.0f;  // of `moved`
  if (split == 0) {
    float top[GROUP], sum[GROUP], out[GROUP][DIM / 32];
    plain_tokens(p, sh, batch, head, warp, lane, top, sum, out);
#pragma unroll
    for (int q = 0; q < GROUP; q++)
      if (lane == 0) sh.top[q][warp] = top[q];
    __syncthreads();  // the tables give way to the outputs
#pragma unroll
    for (int q = 0; q < GROUP; q++) {
      const float weight = exp2(top[q] - warp_max_signed(lane < WARPS ? sh.top[q][lane] : NONE));
#pragma unroll
      for (int i = 0; i < DIM / 32; i++) sh.out[warp][q][i * 32 + lane] = weight * out[q][i];
      if (lane == 0) {
        sh.sum[q][warp] = weight * sum[q];
        sh.zero_sum[q][warp] = 0.0f;
      }
    }
  } else {
#if OUTLIERS
    key_outliers(sh, blocks, warp, lane, strength);
    __syncwarp();  // its lists have been read
#pragma unroll 1
    for (int j = 0; j < SHARE; j++) {
      const int place = warp + j * WARPS;
      if (place < blocks) copy_outliers(sh.lists[place], sh.entries[place], VALUES, lane);
    }
    if (CPB > 1) __syncthreads();  // else a warp reads what it wrote
#endif
    key_scores(sh, count, warp, lane);
#if OUTLIERS
    copies_done();
    __syncwarp();
    largest_value(sh, blocks, warp, lane);
#endif
    __syncthreads();
    weigh(sh, count, warp, lane);
#if OUTLIERS
    if (CPB > 1) __syncthreads();
    else __syncwarp();
    // A token's levels lie between its outliers, so no difference is larger than twice the largest.
    unit = 2.5f * load16((u16)sh.largest) * FIX;
    value_outliers(p, sh, blocks, warp, lane, unit);
#endif
    __syncwarp();
    float out[DIM / 16][4];
#pragma unroll
    for (int i = 0; i < DIM / 16; i++) out[i][0] = out[i][1] = out[i][2] = out[i][3] = 0.0f;
    weighted_values(sh, count, warp, lane, out);
#pragma unroll
    for (int tile = 0; tile < DIM / 16; tile++) {
      constexpr int PER = VB >= 4 ? 2 : 1;
      int half = tile % PER, n = tile / PER % 2, j = tile / PER / 2 % 2, w = tile / PER / 4;
      int c = VB * g + 4 * w + 2 * half + (DIM / 4) * j + HALF * n;
#pragma unroll
      for (int k = 0; k < 4; k++) {
        int q = 2 * t + k % 2;
        if (q < GROUP) sh.out[warp][q][c + k / 2] = out[tile][k];
      }
    }
  }

  __syncthreads();
  for (int i = threadIdx.x; i < GROUP * DIM; i += THREADS) {
    const int q = i / DIM, c = i % DIM;
    float value = (float)sh.moved[q][c] * unit;
#pragma unroll
    for (int w = 0; w < WARPS; w++) value += sh.out[w][q][c] + sh.zero_sum[q][w];
    p.part_out[part * DIM + i] = value;
    if (c == 0) {
      float top = NONE, total = 0.0f;
      for (int w = 0; w < WARPS; w++) {
        top = fmaxf(top, sh.top[q][w]);
        total += sh.sum[q][w];
      }
      p.part_sum[(part + q) * 2] = top;
      p.part_sum[(part + q) * 2 + 1] = total;
    }
  }
}

#define COMBINE 256                   // threads of the second pass
#define QUADS (DIM / 4)               // threads that hold a part's output, four channels each
#define AT_ONCE (COMBINE / QUADS)     // parts read at a time

// One block a (sequence, query head): parts weighted by their maxima. All loads of a turn are
// independent, so that even many parts cost little more than a few waits for memory.
KERNEL(COMBINE, 1) combine(
    const float* __restrict__ part_out, const float* __restrict__ part_sum, u16* __restrict__ out, int splits) {
  SHARED float4 rows[AT_ONCE][QUADS];
  SHARED float tops[COMBINE / 32], totals[COMBINE / 32], factors[COMBINE];
  const int row = blockIdx.x, q = row % GROUP, warp = threadIdx.x / 32;
  const int quad = threadIdx.x % QUADS, mine = threadIdx.x / QUADS;
  const i64 part = (i64)(row / GROUP) * splits * GROUP + q;
  float m = NONE;
  for (int s = threadIdx.x; s < splits; s += COMBINE) m = fmaxf(m, part_sum[(part + (i64)s * GROUP) * 2]);
  m = warp_max_signed(m);
  if (threadIdx.x % 32 == 0) tops[warp] = m;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < COMBINE / 32; w++) m = fmaxf(m, tops[w]);
  float total = 0.0f;
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  for (int first = 0; first < splits; first += COMBINE) {
    const int s = first + threadIdx.x;
    float factor = 0.0f;
    if (s < splits) {
      const float2 both = *(const float2*)(part_sum + (part + (i64)s * GROUP) * 2);
      if (both.y > 0.0f) factor = exp2(both.x - m);  // an empty part wrote no output
      total = fmaf(factor, both.y, total);
    }
    __syncthreads();
    factors[threadIdx.x] = factor;
    __syncthreads();
    const int here = min(COMBINE, splits - first);
#pragma unroll 4
    for (int k = mine; k < here; k += AT_ONCE) {
      const float f = factors[k];
      if (f > 0.0f) {
        const float4 x = __ldg((const float4*)(part_out + (part + (i64)(first + k) * GROUP) * DIM) + quad);
        sum.x = fmaf(f, x.x, sum.x);
        sum.y = fmaf(f, x.y, sum.y);
        sum.z = fmaf(f, x.z, sum.z);
        sum.w = fmaf(f, x.w, sum.w);
      }
    }
  }
#pragma unroll
  for (int d = 16; d; d >>= 1) total += __shfl_xor_sync(~0u, total, d);
  if (threadIdx.x % 32 == 0) totals[warp] = total;
  rows[mine][quad] = sum;
  __syncthreads();
  if (threadIdx.x >= DIM) return;
  total = 0.0f;
#pragma unroll
  for (int w = 0; w < COMBINE / 32; w++) total += totals[w];
  float value = 0.0f;
#pragma unroll
  for (int k = 0; k < AT_ONCE; k++) value += ((const float*)rows[k])[threadIdx.x];
  out[(i64)row * DIM + threadIdx.x] = store16(total > 0.0f ? value / total : 0.0f);
}
