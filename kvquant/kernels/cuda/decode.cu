// Decode attention straight from packed blocks: one query a sequence, split over the past.
//
// Compiled at run time (cuda_build.py) with these constants:
//   BITS 2, 3 or 4   DIM head_dim (64, 128, 256)   GROUP query heads a kv head (1..8)
//   SIZE tokens a block (a multiple of 32)   POS32, COUNT32: types of the outliers' index arrays
//   WARPS: warps a program   SPLIT: most chunks a program
//   ROUNDS: outliers a lane and block whose data wait in shared memory; further ones are read again
//   SPACE: bytes of shared memory that cuda_decode.py counts
//   BF16: whether 16-bit numbers of the cache are bfloat16
//
// A program takes up to SPLIT chunks of T tokens of one kv head, in three phases:
//   1. Outliers of keys: (exact - dequantized) times the query, added up for each token. An outlier's
//      dense code is known from its value, so nothing else of the cache is read for it, and its
//      rotation is a sine and a cosine of the special function unit.
//   2. A warp a chunk at a time: scores, softmax, output. Loops are kept short (16 tokens a turn, the
//      next ones being loaded): their code and registers decide how many warps hide each other's
//      waiting. Codes go from memory to registers in the
//      places of mma.m16n8k16 operands: a byte permutation looks up four fp16 levels at a time (each
//      byte of the level table separately), two tokens or two channels of which make an operand
//      register. The dot products of all queries of a group then cost the same as those of one.
//        K: rows are tokens. Key = level * scale + zero (a channel's), rotated by its place in the
//           chunk; the query is rotated back by the chunk's first position.
//        V: rows are channels. The token's scale goes into the weights, its zero into one sum.
//   3. Outliers of values: (exact - dequantized) times the weight, added up for each channel.
// Those sums are made of integers in units of their largest part, in shared memory: they do not
// depend on the order, and integer additions are faster there than those of floats. What the first
// and the last phase read is copied to shared memory while something else is done (cp.async), and
// codes are fetched into the L2 cache a turn ahead.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef long long i64;
typedef unsigned long long u64;

#define THREADS (WARPS * 32)
#define T (SIZE < 64 ? SIZE : 64)  // tokens a chunk
#define CPB (SIZE / T)             // chunks a block
#define MT (T / 16)                // m-tiles of tokens
#define HALF (DIM / 2)
#define LW (DIM / 64)              // words of a 2-bit plane a thread and row, in K
#define SIGMA (2 * LW)             // selector words a thread and row, in K
#define VB (DIM / 32)              // bytes of a 2-bit plane a thread and row, in V
#define NH (VB / 2)                // half selectors (four codes) a set, in V
#define ROW (DIM * BITS / 8)       // bytes of a token
#define LEVELS (1 << BITS)
#define ROPE_PITCH (HALF * 4 + 64) // bytes; rows of neighbouring threads meet different banks
#define QPITCH (SIGMA * 4 + 1)      // operands; the odd one spreads the banks
#define PAIRS (T / 2)               // pairs of neighbouring tokens of a chunk
#define BLOCKS (SPLIT / CPB)         // most blocks a program
#define SHARE ((BLOCKS + WARPS - 1) / WARPS)  // most blocks whose outliers a warp takes
#define CAP (ROUNDS * 32)            // outliers of a block that wait in shared memory
#define MAGIC 12582912.0f            // 1.5 * 2^23: added to a float, its low bits are an integer
#define MAGIC_BITS 0x4B400000
#define FIX 0x1p-22f                 // of the largest part: the unit of integer sums
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

// Four bytes of a and b by the nibbles of s; unlike __byte_perm it costs no masking of s.
__device__ __forceinline__ u32 bytes(u32 a, u32 b, u32 s) {
  u32 d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(s));
  return d;
}
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
__device__ __forceinline__ float from_half(u16 x) {
  float d;
  asm("cvt.f32.f16 %0, %1;" : "=f"(d) : "h"(x));
  return d;
}
__device__ __forceinline__ float low_of(u32 x) { return from_half((u16)(x & 0xFFFF)); }
__device__ __forceinline__ float high_of(u32 x) { return from_half((u16)(x >> 16)); }
// A 16-bit number of the cache.
__device__ __forceinline__ float load16(u16 x) {
#if BF16
  return __uint_as_float((u32)x << 16);
#else
  return from_half(x);
#endif
}
__device__ __forceinline__ u16 store16(float x) {
#if BF16
  u16 d;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(d) : "f"(x));
  return d;
#else
  return to_half(x);
#endif
}
__device__ __forceinline__ float exp2(float x) {
  float d;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(x));
  return d;
}
// Of an angle of a few turns, with an error of about 1e-6.
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
__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
// Copies to shared memory that go on while something else is done.
__device__ __forceinline__ void copy16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void copy4(void* to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void copies_done() { asm volatile("cp.async.wait_all;" ::: "memory"); }
__device__ __forceinline__ void fetch(const u8* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
__device__ __forceinline__ void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// Loads that stay where they are written, so that they are all in flight before the first use.
template <int N> __device__ __forceinline__ void load_words(u32 (&w)[N], const u8* p) {
  if constexpr (N == 4)
    asm volatile("ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3]) : "l"(p));
  else if constexpr (N == 2)
    asm volatile("ld.global.nc.v2.u32 {%0,%1}, [%2];" : "=r"(w[0]), "=r"(w[1]) : "l"(p));
  else
    asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(w[0]) : "l"(p));
}
__device__ __forceinline__ u32 load_short(const u8* p) {
  u16 x;
  asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(x) : "l"(p));
  return x;
}

// The levels of a codebook, its high and low bytes apart.
struct Levels {
  u32 high[LEVELS > 8 ? 4 : 2], low[LEVELS > 8 ? 4 : 2];
  __device__ __forceinline__ void read(const float* levels) {
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
  // Four levels by the four low nibbles of `s`: high bytes and low bytes.
  __device__ __forceinline__ void find(u32 s, u32& h, u32& l) const {
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
__device__ __forceinline__ u32 first_set(u32 a, u32 h) {
#if BITS == 3
  return (a & 0x33333333u) | ((h << 2) & 0x44444444u);
#else
  return a & 0x33333333u;
#endif
}
__device__ __forceinline__ u32 second_set(u32 a, u32 h) {
#if BITS == 3
  return ((a >> 2) & 0x33333333u) | (h & 0x44444444u);
#else
  return (a >> 2) & 0x33333333u;
#endif
}
__device__ __forceinline__ u32 choose(u32 mask, u32 yes, u32 no) { return (yes & mask) | (no & ~mask); }

// Copies of an outlier list; both begin at a multiple of 16 bytes of global memory.
struct List {
  pos_t at[CAP + 16 / sizeof(pos_t)];
  u16 value[CAP + 8];
};

struct Channel {
  float high, low;  // what its outermost levels stand for, rounded to fp16
  float zero;
  float theta;      // radians a token
};

// The first phases need tables, the end needs room for the warps' outputs.
struct Tables {
  u8 rope[T * ROPE_PITCH];
  // A warp's queries rotated back to its chunk, as operands: of a selector word and a thread of
  // four, channels (c, c+1), those + DIM / 2, (c+2, c+3), those + DIM / 2.
  uint4 query[WARPS][GROUP][QPITCH];
  float phases[SPLIT][HALF];  // of the chunks' first positions, radians
};
struct Ends {
  float out[WARPS][GROUP][DIM];
  int change[WARPS][GROUP][DIM];  // by outliers, in units
};

struct __align__(16) Space {
  union {
    Tables tables;
    Ends ends;
  };
  List lists[BLOCKS];  // of keys, then of values
  u32 zeros[BLOCKS][SIZE / 2], scales[BLOCKS][SIZE / 2];  // of the tokens' values
  // Scores of a chunk, of which the softmax makes the weights times the tokens' scales, fp16.
  float raw[WARPS][GROUP][T];
  // Corrections of the scores in their block's unit, then the scores.
  union {
    int change[GROUP][SPLIT * T];
    float score[GROUP][SPLIT * T];
  };
  float2 wave[GROUP][DIM];     // factors of a channel's cosine and sine
  Channel channels[DIM];
  uint4 channel[SIGMA][4][2];  // scale and zero: of channels c.. and of c + DIM / 2..
  float query[GROUP][DIM];     // rotated, times the factor of the scores
  float top[WARPS][GROUP], sum[WARPS][GROUP], zero_sum[WARPS][GROUP], old[WARPS][GROUP];
  float units[BLOCKS], value_unit[WARPS];
  float ends_of_levels[2];  // the last and the first level of values
  float middles[LEVELS];    // where values' codes change
  u32 entry[BLOCKS];
  u32 reach;                // bits of the largest squared length of a query's pairs
};

extern "C" __constant__ int space_bytes = sizeof(Space);
static_assert(sizeof(Space) <= SPACE && sizeof(Space) + 256 > SPACE, "cuda_decode.py counts other bytes");

// Where a token's rotary entry for frequency `f` lies: {cos x 4, sin x 4} for four frequencies.
__device__ __forceinline__ int rope_at(int token, int f) {
  int j = f / (DIM / 4), rest = f % (DIM / 4), t = rest / (DIM / 16), w = rest % (DIM / 16) / 4;
  return token * ROPE_PITCH + ((w * 2 + j) * 4 + t) * 16 + (f % 4) * 2;
}

// Where channel `c` of a query lies in its operands, in halves.
__device__ __forceinline__ int query_at(int c) {
  int f = c % HALF, j = f / (DIM / 4), rest = f % (DIM / 4), t = rest / (DIM / 16), w = rest % (DIM / 16) / 4;
  return ((w * 2 + j) * 4 + t) * 8 + (f % 4) / 2 * 4 + (c / HALF) * 2 + f % 2;
}

// The largest of the lanes' numbers, none of them negative.
__device__ __forceinline__ float warp_max(float x) {
  return __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(x)));
}

// The same of any numbers: integers order as the floats do once negative ones are turned round.
__device__ __forceinline__ float warp_max_signed(float x) {
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
  int heads, table_stride, sink_room, tail_room, chunks_a_split, outliers;
  float scaling;          // of the scores, times log2(e)
};

// A warp's queries rotated back by a chunk's first position, as fp16 operands. A lane takes four
// neighbouring frequencies at a time, or of grouped queries only some of the queries.
__device__ __forceinline__ void turn_queries(const Space& sh, uint4 (*to)[QPITCH], const float* phases,
                                             float factor, int lane) {
  constexpr int QUADS = HALF / 4;
  constexpr int PARTS = QUADS >= 32 || GROUP == 1 ? 1 : QUADS == 16 || GROUP < 4 ? 2 : 4;
#pragma unroll
  for (int item = lane; item < QUADS * PARTS; item += 32) {
    const int quad = item % QUADS, f = 4 * quad;
    const float4 phase = *(const float4*)(phases + f);
    const float c[4] = {cosine(phase.x) * factor, cosine(phase.y) * factor, cosine(phase.z) * factor, cosine(phase.w) * factor};
    const float s[4] = {sine(phase.x) * factor, sine(phase.y) * factor, sine(phase.z) * factor, sine(phase.w) * factor};
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
__device__ void plain_tokens(const Args& p, Space& sh, int batch, int head, int warp, int lane,
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
    turn_queries(sh, mine, p.phases + (sink ? 0 : (i64)(blocks * CPB + piece) * HALF), __ldg(p.thetas + HALF), lane);
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

// Where the outliers of a warp's blocks are: lane j has those of block warp + j * WARPS.
struct Lists {
  u32 entry;
  int key_begin, key_count, value_begin, value_count;

  __device__ __forceinline__ Lists(const Args& p, const int* table, int blocks, int head, int warp, int lane) {
    const int block = warp + lane * WARPS;
    const bool some = lane < SHARE && block < blocks;
    entry = some ? __ldg(table + block) : 0;
    const i64* arena = p.arenas + (i64)(entry >> 20) * FIELDS;
    const i64 group = (i64)(entry & 0xFFFFF) * p.heads + head;
    key_begin = key_count = value_begin = value_count = 0;
    if (some && p.outliers) {
      key_begin = __ldg((const int*)__ldg(arena + KBEGIN) + group);
      value_begin = __ldg((const int*)__ldg(arena + VBEGIN) + group);
      key_count = __ldg((const count_t*)__ldg(arena + KCOUNT) + group);
      value_count = __ldg((const count_t*)__ldg(arena + VCOUNT) + group);
    }
  }
};

// The elements of a 16-byte piece of memory that stand before `p`.
template <typename E> __device__ __forceinline__ int before(const E* p) { return (int)((u64)p & 15) / (int)sizeof(E); }

// Begins to copy the 16-byte pieces that hold `count` elements.
template <typename E> __device__ __forceinline__ void stage(E* to, const E* from, int count, int lane) {
  const u8* begin = (const u8*)((u64)from & ~(u64)15);
  const int pieces = ((before(from) + count) * (int)sizeof(E) + 15) / 16;
  for (int i = lane; i < pieces; i += 32) copy16((u8*)to + 16 * i, begin + 16 * i);
}

// A block's outliers: the first CAP in shared memory, the others where they are.
struct Block {
  int count;
  const pos_t *positions, *near_positions;
  const u16 *values, *near_values;

  __device__ __forceinline__ Block(const Args& p, const List& list, const Lists& lists, int j, bool keys) {
    const i64* arena = p.arenas + (i64)(__shfl_sync(~0u, lists.entry, j) >> 20) * FIELDS;
    const int begin = __shfl_sync(~0u, keys ? lists.key_begin : lists.value_begin, j);
    count = __shfl_sync(~0u, keys ? lists.key_count : lists.value_count, j);
    positions = (const pos_t*)__ldg(arena + (keys ? KPOS : VPOS)) + begin;
    values = (const u16*)__ldg(arena + (keys ? KVAL : VVAL)) + begin;
    near_positions = list.at + before(positions);
    near_values = list.value + before(values);
  }
  __device__ __forceinline__ void copy(List& list, int lane) const {
    const int near = min(count, CAP);
    stage(list.at, positions, near, lane);
    stage(list.value, values, near, lane);
  }
};

// Phase 1. Corrections of the scores of the warp's blocks, in a unit of each block.
__device__ __forceinline__ void key_outliers(const Args& p, Space& sh, const Lists& lists, int blocks, int warp, int lane) {
  const float reach = sqrtf(__uint_as_float(sh.reach)) * 1.01f;
#pragma unroll 1
  for (int j = 0; j < SHARE; j++) {
    const int place = warp + j * WARPS;
    if (place >= blocks) break;
    const Block block(p, sh.lists[place], lists, j, true);
    // (exact - dequantized): an outlier is outside the range, so its dense code is that of an end.
    auto difference = [&](int at, float x) {
      const Channel& c = sh.channels[at % DIM];
      return x - (x > c.zero ? c.high : c.low);
    };
    auto add = [&](int at, float d) {
      const int token = at / DIM, c = at % DIM;
      const float angle = fmaf((float)(token % T), sh.channels[c].theta, sh.tables.phases[place * CPB + token / T][c % HALF]);
      const float dc = d * cosine(angle), ds = d * sine(angle);
#pragma unroll
      for (int q = 0; q < GROUP; q++) {
        const float2 w = sh.wave[q][c];
        const int x = __float_as_int(fmaf(w.y, ds, fmaf(w.x, dc, MAGIC))) - MAGIC_BITS;
        atomicAdd(&sh.change[q][place * SIZE + token], x);
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
    const float unit = warp_max(most) * reach * FIX, inverse = unit > 1e-30f ? 1.0f / unit : 0.0f;
    if (lane == 0) sh.units[place] = unit;
#pragma unroll
    for (int r = 0; r < ROUNDS; r++)
      if (at[r] >= 0) add(at[r], d[r] * inverse);
#pragma unroll 1
    for (int i = CAP + lane; i < block.count; i += 32) {
      const int far = POSITION(__ldg(block.positions + i));
      add(far, difference(far, load16(__ldg(block.values + i))) * inverse);
    }
  }
}

// The dense code's level as the packer found it from the same number; needed in flat tokens only.
__device__ __noinline__ float exact_level(const float* middles, const float* levels, float away, float scale) {
  const float normalized = away * (scale == 0.0f ? 0.0f : __fdiv_rn(1.0f, scale));
  int code = 0;
  for (int k = LEVELS / 2; k; k >>= 1) code += normalized > middles[code + k - 1] ? k : 0;
  return from_half(to_half(levels[code]));
}

// Phase 3. Corrections of the output by the warp's blocks, by weights relative to the maxima `top`.
__device__ __forceinline__ void value_outliers(const Args& p, Space& sh, const Lists& lists, int blocks, int warp,
                                               int lane, const float (&top)[GROUP]) {
  u32 largest = 0;
#pragma unroll 1
  for (int j = 0; j < SHARE; j++) {
    const int place = warp + j * WARPS;
    if (place >= blocks) break;
    const Block block(p, sh.lists[place], lists, j, false);
    for (int i = lane; i < min(block.count, CAP); i += 32) largest = max(largest, (u32)(block.near_values[i] & 0x7FFF));
#pragma unroll 1
    for (int i = CAP + lane; i < block.count; i += 32) largest = max(largest, (u32)(__ldg(block.values + i) & 0x7FFF));
  }
  // A token's levels lie between its outliers, so no difference is larger than twice the largest.
  const float most = 2.5f * load16((u16)__reduce_max_sync(~0u, largest));
  const float unit = most * FIX, inverse = unit > 1e-30f ? 1.0f / unit : 0.0f;
  if (lane == 0) sh.value_unit[warp] = unit;
  const float high = sh.ends_of_levels[0], low = sh.ends_of_levels[1];
  const float bound = 1.001f * fmaxf(fmaxf(sh.middles[LEVELS - 2], -sh.middles[0]), 0.0f);
#pragma unroll 1
  for (int j = 0; j < SHARE; j++) {
    const int place = warp + j * WARPS;
    if (place >= blocks) break;
    const Block block(p, sh.lists[place], lists, j, false);
    const u16 *zeros = (const u16*)sh.zeros[place], *scales = (const u16*)sh.scales[place];
    auto difference = [&](int at, float x) {
      const float zero = load16(zeros[at / DIM]), scale = load16(scales[at / DIM]), away = x - zero;
      float level = away > 0.0f ? high : low;  // almost always: it is outside the others' range
      if (fabsf(away) <= scale * bound) level = exact_level(sh.middles, p.value_levels, away, scale);
      return x - fmaf(level, scale, zero);
    };
    auto add = [&](int at, float d) {
      const int token = place * SIZE + at / DIM, c = at % DIM;
#pragma unroll
      for (int q = 0; q < GROUP; q++) {
        const float w = exp2(sh.score[q][token] - top[q]);
        atomicAdd(&sh.ends.change[warp][q][c], __float_as_int(fmaf(w, d, MAGIC)) - MAGIC_BITS);
      }
    };
    int at[ROUNDS];
    float d[ROUNDS];
#pragma unroll
    for (int r = 0; r < ROUNDS; r++) {
      const int i = r * 32 + lane;
      at[r] = -1;
      d[r] = 0.0f;
      if (i < block.count) {
        at[r] = POSITION(block.near_positions[i]);
        d[r] = difference(at[r], load16(block.near_values[i]));
      }
    }
#pragma unroll
    for (int r = 0; r < ROUNDS; r++)
      if (at[r] >= 0) add(at[r], d[r] * inverse);
#pragma unroll 1
    for (int i = CAP + lane; i < block.count; i += 32) {
      const int far = POSITION(__ldg(block.positions + i));
      add(far, difference(far, load16(__ldg(block.values + i))) * inverse);
    }
  }
}

// Where a chunk's codes are; nowhere in particular beyond the last chunk.
struct Place {
  const u8 *keys, *values;
  __device__ __forceinline__ Place(const Args& p, const Space& sh, int chunk, int count, int head) {
    const u32 entry = sh.entry[chunk < count ? chunk / CPB : 0];
    const i64* arena = p.arenas + (i64)(entry >> 20) * FIELDS;
    const int skip = chunk % CPB * T;  // tokens of the block before the chunk
    const i64 row = (((i64)(entry & 0xFFFFF) * p.heads + head) * SIZE + skip) * ROW;
    keys = (const u8*)__ldg(arena + KCODES) + row;
    values = (const u8*)__ldg(arena + VCODES) + row;
  }
  __device__ __forceinline__ void ahead(int lane) const {
    for (int i = lane * 128; i < T * ROW; i += 32 * 128) {
      fetch(keys + i);
      fetch(values + i);
    }
  }
};

// A thread's part of the keys of tokens g and g + 8 of sixteen.
struct KeyCodes {
  u32 low[2][BITS == 4 ? 2 : 1][LW], high[2][LW];
  __device__ __forceinline__ void load(const u8* codes, int g, int t) {
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
  __device__ __forceinline__ u32 selector(int h, int w, int j, int t) const {
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
struct ValueCodes {
  u32 low[2][2][BITS == 4 ? 2 : 1][VW], high[2][2][VW];
  __device__ __forceinline__ void load(const u8* codes, int g, int t) {
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const u8* row = codes + (8 * h + 2 * t + e) * ROW;
        if constexpr (VB >= 4) {
          load_words(low[h][e][0], row + VB * g);
#if BITS == 4
          load_words(low[h][e][1], row + DIM / 4 + VB * g);
#elif BITS == 3
          load_words(high[h][e], row + DIM / 4 + VB * (g & 3));
#endif
        } else {
          low[h][e][0][0] = load_short(row + VB * g);
#if BITS == 4
          low[h][e][1][0] = load_short(row + DIM / 4 + VB * g);
#elif BITS == 3
          high[h][e][0] = load_short(row + DIM / 4 + VB * (g & 3));
#endif
        }
      }
  }
  __device__ __forceinline__ u32 selector(int h, int e, int w, int j, int g) const {
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

// Scores of 16 tokens: of queries 2t, 2t + 1 and tokens g, g + 8, in the order of an accumulator.
__device__ __forceinline__ void key_tile(float (&scores)[4], const Space& sh, const KeyCodes& codes, const Levels& levels,
                                         const u8* rope, const uint4* query, int t) {
  scores[0] = scores[1] = scores[2] = scores[3] = 0.0f;
#pragma unroll
  for (int w = 0; w < LW; w++)
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const int sigma = w * 2 + j;
      const uint4 scale = sh.channel[sigma][t][0], zero = sh.channel[sigma][t][1], turned = query[sigma * 4];
      u32 ya[2][2], yb[2][2];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const u32 s = codes.selector(h, w, j, t);
        u32 h0, l0, h1, l1;
        levels.find(s, h0, l0);
        levels.find(s >> 16, h1, l1);
        // low nibbles: channels c, c + 1 and c + 2, c + 3; high nibbles: those + DIM / 2
        const u32 xa = fma2(bytes(l0, h0, 0x6240), scale.x, zero.x);
        const u32 xb = fma2(bytes(l1, h1, 0x6240), scale.y, zero.y);
        const u32 za = fma2(bytes(l0, h0, 0x7351), scale.z, zero.z);
        const u32 zb = fma2(bytes(l1, h1, 0x7351), scale.w, zero.w);
        const uint4 cs = *(const uint4*)(rope + 8 * h * ROPE_PITCH + sigma * 64);
        ya[h][0] = fma2(neg2(za), cs.z, mul2(xa, cs.x));
        ya[h][1] = fma2(xa, cs.z, mul2(za, cs.x));
        yb[h][0] = fma2(neg2(zb), cs.w, mul2(xb, cs.y));
        yb[h][1] = fma2(xb, cs.w, mul2(zb, cs.y));
      }
      mma(scores, ya[0][0], ya[1][0], ya[0][1], ya[1][1], turned.x, turned.y);
      mma(scores, yb[0][0], yb[1][0], yb[0][1], yb[1][1], turned.z, turned.w);
    }
}

// Adds 16 tokens' weighted values: of channels in rows and queries 2t, 2t + 1 in columns.
__device__ __forceinline__ void value_tile(float (&out)[DIM / 16][4], const ValueCodes& codes, const Levels& levels,
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

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) decode(const Args p) {
  extern __shared__ __align__(16) u8 raw[];
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
  const int* table = p.table + (i64)batch * p.table_stride + first / CPB;
  const int blocks = count / CPB;
  const Lists lists(p, table, blocks, head, warp, lane);
  if (lane < SHARE && warp + lane * WARPS < blocks) sh.entry[warp + lane * WARPS] = lists.entry;
  for (int i = threadIdx.x; i < T * SIGMA * 4; i += THREADS)
    copy16(sh.tables.rope + i / (SIGMA * 4) * ROPE_PITCH + i % (SIGMA * 4) * 16, (const uint4*)p.rope + i);
  for (int i = threadIdx.x; i < count * (HALF / 4); i += THREADS)
    copy16((float4*)sh.tables.phases + i, (const float4*)(p.phases + (i64)(first + 1) * HALF) + i);
  for (int i = threadIdx.x; i < GROUP * DIM; i += THREADS)
    sh.query[i / DIM][i % DIM] = load16(p.query[(i64)(batch * p.heads + head) * GROUP * DIM + i]) * p.scaling;
  const float factor = __ldg(p.thetas + HALF);
  if (threadIdx.x < SIGMA * 4) {
    int s = threadIdx.x / 4, tt = threadIdx.x % 4, c = (DIM / 16) * tt + 4 * (s / 2) + (DIM / 4) * (s % 2);
    const float* scale = p.key_scale + head * DIM + c;
    const float* zero = p.key_zero + head * DIM + c;
    sh.channel[s][tt][0] = make_uint4(pack2(scale[0], scale[1]), pack2(scale[2], scale[3]),
                                      pack2(scale[HALF], scale[HALF + 1]), pack2(scale[HALF + 2], scale[HALF + 3]));
    sh.channel[s][tt][1] = make_uint4(pack2(zero[0], zero[1]), pack2(zero[2], zero[3]),
                                      pack2(zero[HALF], zero[HALF + 1]), pack2(zero[HALF + 2], zero[HALF + 3]));
  }
  if (p.outliers) {
    for (int i = threadIdx.x; i < DIM; i += THREADS) {
      const float scale = from_half(to_half(p.key_scale[head * DIM + i])), zero = p.key_zero[head * DIM + i];
      const float high = from_half(to_half(p.key_levels[LEVELS - 1])), low = from_half(to_half(p.key_levels[0]));
      const float rounded = from_half(to_half(zero));
      sh.channels[i] = {from_half(to_half(fmaf(high, scale, rounded))), from_half(to_half(fmaf(low, scale, rounded))), zero,
                        __ldg(p.thetas + i % HALF)};
    }
    if (threadIdx.x < LEVELS) {
      const int i = threadIdx.x;
      sh.middles[i] = i + 1 < LEVELS ? (p.value_levels[i] + p.value_levels[i + 1]) * 0.5f : 3e38f;
      if (i == LEVELS - 1) sh.ends_of_levels[0] = from_half(to_half(p.value_levels[i]));
      if (i == 0) sh.ends_of_levels[1] = from_half(to_half(p.value_levels[i]));
    }
    for (int i = threadIdx.x; i < GROUP * SPLIT * T / 4; i += THREADS) ((int4*)sh.change)[i] = make_int4(0, 0, 0, 0);
    if (threadIdx.x == 0) sh.reach = 0;
  }
#pragma unroll 1
  for (int j = 0; j < SHARE; j++) {
    const int place = warp + j * WARPS;
    if (place >= blocks) break;
    const u32 entry = __shfl_sync(~0u, lists.entry, j);
    const i64* arena = p.arenas + (i64)(entry >> 20) * FIELDS;
    const u32* zeros = (const u32*)((const u16*)__ldg(arena + VZERO) + (i64)(entry & 0xFFFFF) * SIZE);
    const u32* scales = (const u32*)((const u16*)__ldg(arena + VSCALE) + (i64)(entry & 0xFFFFF) * SIZE);
    for (int i = lane; i < SIZE / 2; i += 32) {
      copy4(&sh.zeros[place][i], zeros + i);
      copy4(&sh.scales[place][i], scales + i);
    }
    if (p.outliers) Block(p, sh.lists[place], lists, j, true).copy(sh.lists[place], lane);
  }
  __syncthreads();
  if (p.outliers) {
    float most = 0.0f;
    for (int i = threadIdx.x; i < GROUP * HALF; i += THREADS) {
      const int q = i / HALF, f = i % HALF;
      const float a = sh.query[q][f] * factor, b = sh.query[q][f + HALF] * factor;
      sh.wave[q][f] = make_float2(a, b);
      sh.wave[q][f + HALF] = make_float2(b, -a);
      most = fmaxf(most, a * a + b * b);
    }
    most = warp_max(most);
    if (lane == 0) atomicMax(&sh.reach, __float_as_uint(most));
  }
  if (warp < count) Place(p, sh, warp, count, head).ahead(lane);
  copies_done();
  __syncthreads();

  if (split == 0) {
    float top[GROUP], sum[GROUP], out[GROUP][DIM / 32];
    plain_tokens(p, sh, batch, head, warp, lane, top, sum, out);
    __syncthreads();  // the tables give way to the outputs
#pragma unroll
    for (int q = 0; q < GROUP; q++) {
#pragma unroll
      for (int i = 0; i < DIM / 32; i++) sh.ends.out[warp][q][i * 32 + lane] = out[q][i];
      if (lane == 0) {
        sh.top[warp][q] = top[q];
        sh.sum[warp][q] = sum[q];
      }
    }
  } else {
    if (p.outliers) {
      key_outliers(p, sh, lists, blocks, warp, lane);
      __syncwarp();  // its lists have been read
#pragma unroll 1
      for (int j = 0; j < SHARE; j++) {
        const int place = warp + j * WARPS;
        if (place < blocks) Block(p, sh.lists[place], lists, j, false).copy(sh.lists[place], lane);
      }
      if (CPB > 1) __syncthreads();  // else a warp reads what it wrote
    }

    Levels keys, values;
    keys.read(p.key_levels);
    values.read(p.value_levels);
    float top[GROUP], sum[GROUP], zeros[GROUP];  // sums of the lane's tokens
#pragma unroll
    for (int q = 0; q < GROUP; q++) top[q] = NONE, sum[q] = zeros[q] = 0.0f;
    float out[DIM / 16][4];
#pragma unroll
    for (int i = 0; i < DIM / 16; i++) out[i][0] = out[i][1] = out[i][2] = out[i][3] = 0.0f;
    // Columns beyond the group repeat its last query; nobody reads what comes of them.
    const uint4* query = sh.tables.query[warp][g < GROUP ? g : GROUP - 1] + t;
    const u8* rope = sh.tables.rope + g * ROPE_PITCH + t * 16;
    float* const scored = &sh.raw[warp][2 * t < GROUP ? 2 * t : 0][g];
    const u32* const weights = (const u32*)sh.raw[warp][g < GROUP ? g : 0] + t;

    KeyCodes even, odd;
    {
      const Place at(p, sh, warp, count, head);
      even.load(at.keys, g, t);
    }
#pragma unroll 1
    for (int chunk = warp; chunk < count; chunk += WARPS) {
      const Place at(p, sh, chunk, count, head), next(p, sh, chunk + WARPS, count, head);
      if (chunk + WARPS < count) next.ahead(lane);
      turn_queries(sh, sh.tables.query[warp], sh.tables.phases[chunk], factor, lane);
      __syncwarp();
#pragma unroll 1
      for (int m = 0; m < MT; m += 2) {
        float scores[4];
        odd.load(at.keys + (16 * m + 16) * ROW, g, t);
        key_tile(scores, sh, even, keys, rope + 16 * m * ROPE_PITCH, query, t);
#pragma unroll
        for (int n = 0; n < 2; n++)
          if (2 * t + n < GROUP) {
            scored[n * T + 16 * m] = scores[n];
            scored[n * T + 16 * m + 8] = scores[2 + n];
          }
        if (m + 2 < MT) even.load(at.keys + (16 * m + 32) * ROW, g, t);
        key_tile(scores, sh, odd, keys, rope + (16 * m + 16) * ROPE_PITCH, query, t);
#pragma unroll
        for (int n = 0; n < 2; n++)
          if (2 * t + n < GROUP) {
            scored[n * T + 16 * m + 16] = scores[n];
            scored[n * T + 16 * m + 24] = scores[2 + n];
          }
      }

      ValueCodes vcodes;
      vcodes.load(at.values, g, t);
      __syncwarp();
      const bool some = lane < PAIRS;  // a lane has a pair of tokens
      const int pair = chunk % CPB * PAIRS + (some ? lane : 0), token = chunk * T + (some ? 2 * lane : 0);
      const u32 both_scales = sh.scales[chunk / CPB][pair], both_zeros = sh.zeros[chunk / CPB][pair];
      const float scale[2] = {load16((u16)both_scales), load16((u16)(both_scales >> 16))};
      const float zero[2] = {load16((u16)both_zeros), load16((u16)(both_zeros >> 16))};
      const float unit = p.outliers ? sh.units[chunk / CPB] : 0.0f;
      bool grows = false;
#pragma unroll
      for (int q = 0; q < GROUP; q++) {
        float2 both = *(const float2*)&sh.raw[warp][q][some ? 2 * lane : 0];
        if (p.outliers) {
          const int2 change = *(const int2*)&sh.change[q][token];
          both.x = fmaf((float)change.x, unit, both.x);
          both.y = fmaf((float)change.y, unit, both.y);
          if (some) *(float2*)&sh.score[q][token] = both;
        }
        const float a = some ? both.x : NONE, b = some ? both.y : NONE;
        const float most = fmaxf(top[q], warp_max_signed(fmaxf(a, b)));
        const float old = exp2(top[q] - most), wa = exp2(a - most), wb = exp2(b - most);
        grows |= most > top[q];
        if (lane == 0) sh.old[warp][q] = old;
        top[q] = most;
        sum[q] = fmaf(sum[q], old, wa + wb);
        zeros[q] = fmaf(zeros[q], old, fmaf(wa, zero[0], wb * zero[1]));
        // All lanes have read the query's scores, since the maximum came of them.
        if (some) ((u32*)sh.raw[warp][q])[lane] = pack2(wa * scale[0], wb * scale[1]);
      }
      __syncwarp();
      if (grows) {  // the same for all lanes
        const float a = 2 * t < GROUP ? sh.old[warp][2 * t] : 1.0f;
        const float b = 2 * t + 1 < GROUP ? sh.old[warp][2 * t + 1] : 1.0f;
#pragma unroll
        for (int i = 0; i < DIM / 16; i++) {
          out[i][0] *= a;
          out[i][1] *= b;
          out[i][2] *= a;
          out[i][3] *= b;
        }
      }
      if (chunk + WARPS < count) even.load(next.keys, g, t);

#pragma unroll 1
      for (int m = 0; m < MT; m += 2) {
        ValueCodes second;
        second.load(at.values + (16 * m + 16) * ROW, g, t);
        value_tile(out, vcodes, values, weights[8 * m], weights[8 * m + 4], g);
        if (m + 2 < MT) vcodes.load(at.values + (16 * m + 32) * ROW, g, t);
        value_tile(out, second, values, weights[8 * m + 8], weights[8 * m + 12], g);
      }
      __syncwarp();  // the weights' place is written again
    }

#pragma unroll
    for (int q = 0; q < GROUP; q++) {
#pragma unroll
      for (int d = 1; d < 32; d <<= 1) {
        sum[q] += __shfl_xor_sync(~0u, sum[q], d);
        zeros[q] += __shfl_xor_sync(~0u, zeros[q], d);
      }
      if (lane == 0) {
        sh.top[warp][q] = top[q];
        sh.sum[warp][q] = sum[q];
        sh.zero_sum[warp][q] = zeros[q];
      }
    }
    __syncthreads();  // the tables give way to the outputs
#pragma unroll
    for (int tile = 0; tile < DIM / 16; tile++) {
      constexpr int PER = VB >= 4 ? 2 : 1;
      int half = tile % PER, n = tile / PER % 2, j = tile / PER / 2 % 2, w = tile / PER / 4;
      int c = VB * g + 4 * w + 2 * half + (DIM / 4) * j + HALF * n;
#pragma unroll
      for (int k = 0; k < 4; k++) {
        int q = 2 * t + k % 2;
        if (q < GROUP) sh.ends.out[warp][q][c + k / 2] = out[tile][k] + sh.zero_sum[warp][q];
      }
    }
    if (p.outliers) {
      for (int i = lane; i < GROUP * DIM / 4; i += 32) ((int4*)sh.ends.change[warp])[i] = make_int4(0, 0, 0, 0);
      float most[GROUP];
#pragma unroll
      for (int q = 0; q < GROUP; q++) {
        most[q] = NONE;
#pragma unroll
        for (int w = 0; w < WARPS; w++) most[q] = fmaxf(most[q], sh.top[w][q]);
      }
      copies_done();
      __syncwarp();
      value_outliers(p, sh, lists, blocks, warp, lane, most);
    }
  }

  __syncthreads();
  const bool corrected = split > 0 && p.outliers;
  for (int i = threadIdx.x; i < GROUP * DIM; i += THREADS) {
    int q = i / DIM, c = i % DIM;
    float m = NONE, total = 0.0f, value = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) m = fmaxf(m, sh.top[w][q]);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      float weight = exp2(sh.top[w][q] - m);
      total += weight * sh.sum[w][q];
      value += weight * sh.ends.out[w][q][c];
      if (corrected) value += (float)sh.ends.change[w][q][c] * sh.value_unit[w];
    }
    p.part_out[part * DIM + i] = value;
    if (c == 0) {
      p.part_sum[(part + q) * 2] = m;
      p.part_sum[(part + q) * 2 + 1] = total;
    }
  }
}

#define COMBINE 256                   // threads of the second pass
#define QUADS (DIM / 4)               // threads that hold a part's output, four channels each
#define AT_ONCE (COMBINE / QUADS)     // parts read at a time

// One block a (sequence, query head): parts weighted by their maxima. All loads of a turn are
// independent, so that even many parts cost little more than a few waits for memory.
extern "C" __global__ void __launch_bounds__(COMBINE) combine(
    const float* __restrict__ part_out, const float* __restrict__ part_sum, u16* __restrict__ out, int splits) {
  __shared__ float4 rows[AT_ONCE][QUADS];
  __shared__ float tops[COMBINE / 32], totals[COMBINE / 32], factors[COMBINE];
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
