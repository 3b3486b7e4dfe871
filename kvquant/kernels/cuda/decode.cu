// Decode attention straight from packed blocks: one query a sequence, split over the past.
//
// Compiled at run time (cuda_build.py) with these constants:
//   BITS 2, 3 or 4   DIM head_dim (64, 128, 256)   GROUP query heads a kv head (1..8)
//   SIZE tokens a block (a multiple of 32)   POS32, COUNT32: types of the outliers' index arrays
//   SPLIT: most chunks a program   ROUNDS: outliers a lane and block at a time
//   BF16: whether 16-bit numbers of the cache are bfloat16
//
// A program takes up to SPLIT chunks of T tokens of one kv head, in three phases:
//   1. Outliers of keys: (exact - dequantized) times the query, added up for each token. An outlier's
//      dense code is known from its value, so nothing else of the cache is read for it.
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
// depend on the order, and integer additions are faster there than those of floats.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef long long i64;

#define WARPS 4
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
#define QPITCH (SIGMA * 4 + 1)       // operands; the odd one spreads the banks
#define PAIRS (T / 2)               // pairs of neighbouring tokens of a chunk
#define SHARE (SPLIT / WARPS)      // most blocks whose outliers a warp takes
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

// The first phases need tables, the end needs room for the warps' outputs.
struct Tables {
  u8 rope[T * ROPE_PITCH];
  // Queries rotated back to each chunk, as operands: of a selector word and a thread of four,
  // channels (c, c+1), those + DIM / 2, (c+2, c+3), those + DIM / 2.
  uint4 query[SPLIT][GROUP][QPITCH];
  u32 pairs[SPLIT][GROUP][HALF];  // the same: channels f and f + HALF
};

struct Space {
  union {
    Tables tables;
    float out[WARPS][GROUP][DIM];
  };
  u32 weights[WARPS][GROUP][PAIRS];  // times the tokens' scales, fp16
  // Corrections of the scores (integers until their unit is known), then the scores.
  union {
    int change[GROUP][SPLIT * T];
    float score[GROUP][SPLIT * T];
  };
  union {  // corrections of the outputs, likewise
    int out_change[WARPS][GROUP][DIM];
    float out_fix[WARPS][GROUP][DIM];
  };
  float top[WARPS][GROUP], sum[WARPS][GROUP], zeros[WARPS][GROUP], old[WARPS][GROUP];
  uint4 channel[SIGMA][4][2];  // scale and zero: of channels c.. and of c + DIM / 2..
  float2 channels[DIM];        // the same by channel, rounded to fp16
  float query[GROUP][DIM];     // rotated, times the factor of the scores
  float levels[2][LEVELS];     // fp16 levels of keys and values, widened
  float middles[LEVELS];       // where values' codes change
};

extern "C" __constant__ int space_bytes = sizeof(Space);

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
  const u32* turns;       // [T, HALF]: the same places, fp16 cos | sin << 16
  const u32* starts;      // [1 + chunks, HALF]: fp16 cos | sin << 16 of position 0 and chunks' first
  float* part_out;        // [batch, kv heads, splits, GROUP, DIM]
  float* part_sum;        // [batch, kv heads, splits, GROUP, 2]: maximum, sum
  int heads, table_stride, sink_room, tail_room, chunks_a_split, outliers;
  float scaling;          // of the scores, times log2(e)
};

// Queries rotated back by a chunk's first position, as fp16 operands.
__device__ __forceinline__ void turn_queries(const Space& sh, uint4 (*to)[QPITCH], u32 (*pairs)[HALF],
                                             const u32* start, int f) {
  const u32 cs = __ldg(start + f);
  const float c = low_of(cs), s = high_of(cs);
#pragma unroll
  for (int q = 0; q < GROUP; q++) {
    const float a = sh.query[q][f], b = sh.query[q][f + HALF];
    u16* query = (u16*)to[q];
    const u16 low = to_half(a * c + b * s), high = to_half(b * c - a * s);
    query[query_at(f)] = low;
    query[query_at(f + HALF)] = high;
    if (pairs) pairs[q][f] = (u32)high << 16 | low;
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
    for (int f = lane; f < HALF; f += 32)
      turn_queries(sh, mine, nullptr, p.starts + (sink ? 0 : (i64)(blocks * CPB + piece) * HALF), f);
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

// Outliers of some blocks, in registers: position in the block and value, or nothing.
struct Outliers {
  int at[SHARE][ROUNDS];
  float value[SHARE][ROUNDS];
  int more;  // whether a block has further ones

  // Those from `from` on of blocks warp, warp + WARPS, ... All loads are independent.
  __device__ __forceinline__ void load(const Args& p, const int* table, int blocks, int head, int warp,
                                       int lane, int from, bool keys) {
    int mine = 0, begin = 0;
    u32 entry = 0;
    if (lane < SHARE && warp + lane * WARPS < blocks) {  // a lane a block
      entry = __ldg(table + warp + lane * WARPS);
      const i64* arena = p.arenas + (i64)(entry >> 20) * FIELDS;
      const i64 group = (i64)(entry & 0xFFFFF) * p.heads + head;
      begin = __ldg((const int*)__ldg(arena + (keys ? KBEGIN : VBEGIN)) + group);
      mine = __ldg((const count_t*)__ldg(arena + (keys ? KCOUNT : VCOUNT)) + group);
    }
    more = __any_sync(~0u, mine > from + ROUNDS * 32);
#pragma unroll
    for (int j = 0; j < SHARE; j++) {
      const int count = __shfl_sync(~0u, mine, j), first = __shfl_sync(~0u, begin, j);
      const i64* arena = p.arenas + (i64)(__shfl_sync(~0u, entry, j) >> 20) * FIELDS;
      const pos_t* positions = (const pos_t*)__ldg(arena + (keys ? KPOS : VPOS)) + first;
      const u16* exact = (const u16*)__ldg(arena + (keys ? KVAL : VVAL)) + first;
#pragma unroll
      for (int r = 0; r < ROUNDS; r++) {
        const int i = from + r * 32 + lane;
        at[j][r] = -1;
        value[j][r] = 0.0f;
        if (i < count) {
          at[j][r] = POSITION(__ldg(positions + i));
          value[j][r] = load16(__ldg(exact + i));
        }
      }
    }
  }
};

// A correction's unit: no more than `meet` parts of at most `most` add up in one place.
__device__ __forceinline__ float unit_of(float most, int meet) {
  return most > 1e-30f ? most * (float)meet * 0x1p-30f : 0.0f;
}

// Phase 1. Corrections of the scores of all tokens of the split, as floats.
__device__ __forceinline__ void key_outliers(const Args& p, Space& sh, const int* table, int blocks, int head,
                                             int warp, int lane) {
  Outliers outliers;
  int from = 0;
  do {
    outliers.load(p, table, blocks, head, warp, lane, from, true);
    float most = 0.0f;
#pragma unroll
    for (int j = 0; j < SHARE; j++)
#pragma unroll
      for (int r = 0; r < ROUNDS; r++)
        if (outliers.at[j][r] >= 0) {
          const float2 channel = sh.channels[outliers.at[j][r] % DIM];
          // Outside the range, so the dense code is that of an end.
          const float level = sh.levels[0][outliers.value[j][r] > channel.y ? LEVELS - 1 : 0];
          outliers.value[j][r] -= from_half(to_half(fmaf(level, channel.x, channel.y)));
          most = fmaxf(most, fabsf(outliers.value[j][r]));
        }
    most = warp_max(most);
    float query = 0.0f;  // a rotated query's number is at most the length of its pair
    for (int i = lane; i < GROUP * HALF; i += 32) {
      const float a = sh.query[i / HALF][i % HALF], b = sh.query[i / HALF][i % HALF + HALF];
      query = fmaxf(query, a * a + b * b);
    }
    const float factor = low_of(__ldg(p.starts));  // of a scaled rotary embedding
    const float unit = unit_of(most * factor * sqrtf(warp_max(query)) * 1.01f, DIM);
    const float inverse = unit > 0.0f ? 1.0f / unit : 0.0f;
#pragma unroll
    for (int j = 0; j < SHARE; j++)
#pragma unroll
      for (int r = 0; r < ROUNDS; r++)
        if (outliers.at[j][r] >= 0) {
          const int token = (warp + j * WARPS) * SIZE + outliers.at[j][r] / DIM, c = outliers.at[j][r] % DIM;
          const u32 turn = __ldg(p.turns + token % T * HALF + c % HALF);
          const float a = outliers.value[j][r] * low_of(turn), b = outliers.value[j][r] * high_of(turn);
#pragma unroll
          for (int q = 0; q < GROUP; q++) {
            const u32 pair = sh.tables.pairs[token / T][q][c % HALF];
            const float low = low_of(pair), high = high_of(pair);
            const float x = c < HALF ? fmaf(a, low, b * high) : fmaf(a, high, -b * low);
            if (from == 0)
              atomicAdd(&sh.change[q][token], __float2int_rn(x * inverse));
            else  // rare
              atomicAdd(&sh.score[q][token], x);
          }
        }
    __syncwarp();
    if (from == 0) {
#pragma unroll
      for (int j = 0; j < SHARE; j++)
        if (warp + j * WARPS < blocks)
          for (int q = 0; q < GROUP; q++)
            for (int i = lane; i < SIZE; i += 32) {
              const int token = (warp + j * WARPS) * SIZE + i;
              sh.score[q][token] = (float)sh.change[q][token] * unit;
            }
      __syncwarp();
    }
    from += ROUNDS * 32;
  } while (outliers.more);
}

// Phase 3. Corrections of the output, by weights relative to the maxima `top`.
__device__ __forceinline__ void value_outliers(const Args& p, Space& sh, const int* table, int blocks, int head,
                                               int warp, int lane, const float (&top)[GROUP]) {
  Outliers outliers;
  int from = 0;
  do {
    outliers.load(p, table, blocks, head, warp, lane, from, false);
    float most = 0.0f;
#pragma unroll
    for (int j = 0; j < SHARE; j++) {
      const u32 entry = warp + j * WARPS < blocks ? __ldg(table + warp + j * WARPS) : 0;
      const i64* arena = p.arenas + (i64)(entry >> 20) * FIELDS;
      const u16* zeros = (const u16*)__ldg(arena + VZERO) + (i64)(entry & 0xFFFFF) * SIZE;
      const u16* scales = (const u16*)__ldg(arena + VSCALE) + (i64)(entry & 0xFFFFF) * SIZE;
#pragma unroll
      for (int r = 0; r < ROUNDS; r++)
        if (outliers.at[j][r] >= 0) {
          const int token = outliers.at[j][r] / DIM;
          const float x = outliers.value[j][r], zero = load16(__ldg(zeros + token)), scale = load16(__ldg(scales + token));
          // The dense code, found as the packer found it from the same number.
          const float normalized = (x - zero) * (scale == 0.0f ? 0.0f : __fdiv_rn(1.0f, scale));
          int code = 0;
#pragma unroll
          for (int k = LEVELS / 2; k; k >>= 1) code += normalized > sh.middles[code + k - 1] ? k : 0;
          outliers.value[j][r] = x - fmaf(sh.levels[1][code], scale, zero);
          most = fmaxf(most, fabsf(outliers.value[j][r]));
        }
    }
    // Weights are at most 1.
    const float unit = unit_of(warp_max(most), SHARE * SIZE), inverse = unit > 0.0f ? 1.0f / unit : 0.0f;
#pragma unroll
    for (int j = 0; j < SHARE; j++)
#pragma unroll
      for (int r = 0; r < ROUNDS; r++)
        if (outliers.at[j][r] >= 0) {
          const int token = (warp + j * WARPS) * SIZE + outliers.at[j][r] / DIM, c = outliers.at[j][r] % DIM;
#pragma unroll
          for (int q = 0; q < GROUP; q++) {
            const float x = exp2(sh.score[q][token] - top[q]) * outliers.value[j][r];
            if (from == 0)
              atomicAdd(&sh.out_change[warp][q][c], __float2int_rn(x * inverse));
            else  // rare
              atomicAdd(&sh.out_fix[warp][q][c], x);
          }
        }
    __syncwarp();
    if (from == 0) {
#pragma unroll
      for (int q = 0; q < GROUP; q++)
        for (int i = lane; i < DIM; i += 32) sh.out_fix[warp][q][i] = (float)sh.out_change[warp][q][i] * unit;
      __syncwarp();
    }
    from += ROUNDS * 32;
  } while (outliers.more);
}

// Where a chunk's data are; nowhere in particular beyond the last chunk.
struct Place {
  const u8 *keys, *values;
  const u16 *scale, *zero;
  __device__ __forceinline__ Place(const Args& p, const int* table, int chunk, int count, int head) {
    const u32 entry = chunk < count ? __ldg(table + chunk / CPB) : 0;
    const i64* arena = p.arenas + (i64)(entry >> 20) * FIELDS;
    const i64 place = entry & 0xFFFFF;
    const int skip = chunk % CPB * T;  // tokens of the block before the chunk
    const i64 row = ((place * p.heads + head) * SIZE + skip) * ROW;
    keys = (const u8*)__ldg(arena + KCODES) + row;
    values = (const u8*)__ldg(arena + VCODES) + row;
    scale = (const u16*)__ldg(arena + VSCALE) + place * SIZE + skip;
    zero = (const u16*)__ldg(arena + VZERO) + place * SIZE + skip;
  }
};

// A thread's part of the keys of tokens 16m + g + (0, 8).
struct KeyCodes {
  u32 low[2][BITS == 4 ? 2 : 1][LW], high[2][LW];
  __device__ __forceinline__ void load(const u8* codes, int m, int g, int t) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const u8* row = codes + (16 * m + 8 * h + g) * ROW;
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

// A thread's part of the values of tokens r and r + 1, r = 16m + 2t + (0, 8).
constexpr int VW = VB >= 4 ? VB / 4 : 1;
struct ValueCodes {
  u32 low[2][2][BITS == 4 ? 2 : 1][VW], high[2][2][VW];
  __device__ __forceinline__ void load(const u8* codes, int m, int g, int t) {
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const u8* row = codes + (16 * m + 8 * h + 2 * t + e) * ROW;
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

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) decode(const Args p) {
  extern __shared__ __align__(16) u8 raw[];
  Space& sh = *(Space*)raw;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int splits = gridDim.x, split = blockIdx.x, head = blockIdx.y, batch = blockIdx.z;
  const i64 part = ((i64)(batch * p.heads + head) * splits + split) * GROUP;
  const int chunks = p.lengths[batch * 3 + 1] * CPB;
  // Split 0 has the tokens in 16 bits, the others have chunks.
  const int first = (split - 1) * p.chunks_a_split, count = min(p.chunks_a_split, chunks - first);
  if (split > 0 && count <= 0) {
    if (threadIdx.x < GROUP) {
      p.part_sum[(part + threadIdx.x) * 2] = NONE;
      p.part_sum[(part + threadIdx.x) * 2 + 1] = 0.0f;
    }
    return;
  }
  for (int i = threadIdx.x; i < T * SIGMA * 4; i += THREADS) {
    int token = i / (SIGMA * 4), rest = i % (SIGMA * 4);
    *(uint4*)(sh.tables.rope + token * ROPE_PITCH + rest * 16) = __ldg((const uint4*)p.rope + i);
  }
  for (int i = threadIdx.x; i < GROUP * DIM; i += THREADS)
    sh.query[i / DIM][i % DIM] = load16(p.query[(i64)(batch * p.heads + head) * GROUP * DIM + i]) * p.scaling;
  if (threadIdx.x < SIGMA * 4) {
    int s = threadIdx.x / 4, tt = threadIdx.x % 4, c = (DIM / 16) * tt + 4 * (s / 2) + (DIM / 4) * (s % 2);
    const float* scale = p.key_scale + head * DIM + c;
    const float* zero = p.key_zero + head * DIM + c;
    sh.channel[s][tt][0] = make_uint4(pack2(scale[0], scale[1]), pack2(scale[2], scale[3]),
                                      pack2(scale[HALF], scale[HALF + 1]), pack2(scale[HALF + 2], scale[HALF + 3]));
    sh.channel[s][tt][1] = make_uint4(pack2(zero[0], zero[1]), pack2(zero[2], zero[3]),
                                      pack2(zero[HALF], zero[HALF + 1]), pack2(zero[HALF + 2], zero[HALF + 3]));
  }
  for (int i = threadIdx.x; i < DIM; i += THREADS)
    sh.channels[i] = make_float2(from_half(to_half(p.key_scale[head * DIM + i])),
                                 from_half(to_half(p.key_zero[head * DIM + i])));
  if (threadIdx.x < LEVELS) {
    int i = threadIdx.x;
    sh.levels[0][i] = from_half(to_half(p.key_levels[i]));
    sh.levels[1][i] = from_half(to_half(p.value_levels[i]));
    sh.middles[i] = i + 1 < LEVELS ? (p.value_levels[i] + p.value_levels[i + 1]) * 0.5f : 3e38f;
  }
  for (int i = threadIdx.x; i < GROUP * SPLIT * T; i += THREADS) sh.change[i / (SPLIT * T)][i % (SPLIT * T)] = 0;
  for (int i = threadIdx.x; i < WARPS * GROUP * DIM; i += THREADS) (&sh.out_change[0][0][0])[i] = 0;
  __syncthreads();

  if (split == 0) {
    float top[GROUP], sum[GROUP], out[GROUP][DIM / 32];
    plain_tokens(p, sh, batch, head, warp, lane, top, sum, out);
    __syncthreads();  // the tables give way to the outputs
#pragma unroll
    for (int q = 0; q < GROUP; q++) {
#pragma unroll
      for (int i = 0; i < DIM / 32; i++) sh.out[warp][q][i * 32 + lane] = out[q][i];
      if (lane == 0) {
        sh.top[warp][q] = top[q];
        sh.sum[warp][q] = sum[q];
      }
    }
    __syncthreads();
  } else {
    const int* table = p.table + (i64)batch * p.table_stride + first / CPB;
    const int blocks = count / CPB;
    for (int i = threadIdx.x; i < count * HALF; i += THREADS)
      turn_queries(sh, sh.tables.query[i / HALF], sh.tables.pairs[i / HALF], p.starts + (i64)(first + i / HALF + 1) * HALF, i % HALF);
    __syncthreads();
    if (p.outliers) {
      key_outliers(p, sh, table, blocks, head, warp, lane);
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

    Place at(p, table, warp, count, head);
    KeyCodes kcodes;
    kcodes.load(at.keys, 0, g, t);
    for (int chunk = warp; chunk < count; chunk += WARPS) {
      const Place ahead(p, table, chunk + WARPS, count, head);

#pragma unroll 1
      for (int m = 0; m < MT; m++) {
        const KeyCodes codes = kcodes;
        if (m + 1 < MT) kcodes.load(at.keys, m + 1, g, t);
        // Of queries 2t, 2t + 1 and tokens 16m + g, 16m + g + 8, in the order of an accumulator.
        float scores[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        float* place = &sh.score[2 * t < GROUP ? 2 * t : 0][chunk * T + 16 * m + g];
        if (p.outliers) {
#pragma unroll
          for (int n = 0; n < 2; n++)
            if (2 * t + n < GROUP) {
              scores[n] = place[n * SPLIT * T];
              scores[2 + n] = place[n * SPLIT * T + 8];
            }
        }
#pragma unroll
        for (int w = 0; w < LW; w++)
#pragma unroll
          for (int j = 0; j < 2; j++) {
            const int sigma = w * 2 + j;
            const uint4 scale = sh.channel[sigma][t][0], zero = sh.channel[sigma][t][1];
            uint4 query = make_uint4(0, 0, 0, 0);
            if (g < GROUP) query = sh.tables.query[chunk][g][sigma * 4 + t];
            u32 ya[2][2], yb[2][2];
#pragma unroll
            for (int h = 0; h < 2; h++) {
              const u32 s = codes.selector(h, w, j, t);
              u32 h0, l0, h1, l1;
              keys.find(s, h0, l0);
              keys.find(s >> 16, h1, l1);
              // low nibbles: channels c, c + 1 and c + 2, c + 3; high nibbles: those + DIM / 2
              const u32 xa = fma2(bytes(l0, h0, 0x6240), scale.x, zero.x);
              const u32 xb = fma2(bytes(l1, h1, 0x6240), scale.y, zero.y);
              const u32 za = fma2(bytes(l0, h0, 0x7351), scale.z, zero.z);
              const u32 zb = fma2(bytes(l1, h1, 0x7351), scale.w, zero.w);
              const uint4 cs = *(const uint4*)(sh.tables.rope + (16 * m + 8 * h + g) * ROPE_PITCH + (sigma * 4 + t) * 16);
              ya[h][0] = fma2(neg2(za), cs.z, mul2(xa, cs.x));
              ya[h][1] = fma2(xa, cs.z, mul2(za, cs.x));
              yb[h][0] = fma2(neg2(zb), cs.w, mul2(xb, cs.y));
              yb[h][1] = fma2(xb, cs.w, mul2(zb, cs.y));
            }
            mma(scores, ya[0][0], ya[1][0], ya[0][1], ya[1][1], query.x, query.y);
            mma(scores, yb[0][0], yb[1][0], yb[0][1], yb[1][1], query.z, query.w);
          }
#pragma unroll
        for (int n = 0; n < 2; n++)
          if (2 * t + n < GROUP) {
            place[n * SPLIT * T] = scores[n];
            place[n * SPLIT * T + 8] = scores[2 + n];
          }
      }

      ValueCodes vcodes;
      vcodes.load(at.values, 0, g, t);
      __syncwarp();
      const bool some = lane < PAIRS;  // a lane has a pair of tokens
      const int token = some ? 2 * lane : 0;
      const u32 scales = __ldg((const u32*)(at.scale + token)), offsets = __ldg((const u32*)(at.zero + token));
      const float scale[2] = {load16((u16)scales), load16((u16)(scales >> 16))};
      const float zero[2] = {load16((u16)offsets), load16((u16)(offsets >> 16))};
      bool grows = false;
#pragma unroll
      for (int q = 0; q < GROUP; q++) {
        const float2 both = *(const float2*)&sh.score[q][chunk * T + token];
        const float a = some ? both.x : NONE, b = some ? both.y : NONE;
        const float most = fmaxf(top[q], warp_max_signed(fmaxf(a, b)));
        const float old = exp2(top[q] - most), wa = exp2(a - most), wb = exp2(b - most);
        grows |= most > top[q];
        if (lane == 0) sh.old[warp][q] = old;
        top[q] = most;
        sum[q] = fmaf(sum[q], old, wa + wb);
        zeros[q] = fmaf(zeros[q], old, fmaf(wa, zero[0], wb * zero[1]));
        if (some) sh.weights[warp][q][lane] = pack2(wa * scale[0], wb * scale[1]);
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
      if (chunk + WARPS < count) kcodes.load(ahead.keys, 0, g, t);

#pragma unroll 1
      for (int m = 0; m < MT; m++) {
        const ValueCodes codes = vcodes;
        if (m + 1 < MT) vcodes.load(at.values, m + 1, g, t);
        const u32* weights = sh.weights[warp][g < GROUP ? g : 0] + 8 * m + t;
        const u32 w0 = g < GROUP ? weights[0] : 0, w1 = g < GROUP ? weights[4] : 0;
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
                values.find(mixed[n][0] >> (16 * half), h0, l0);
                values.find(mixed[n][1] >> (16 * half), h1, l1);
                const int tile = ((w * 2 + j) * 2 + n) * (VB >= 4 ? 2 : 1) + half;
                mma(out[tile], bytes(l0, h0, 0x5140), bytes(l0, h0, 0x7362), bytes(l1, h1, 0x5140),
                    bytes(l1, h1, 0x7362), w0, w1);
              }
          }
      }
      at = ahead;
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
        sh.zeros[warp][q] = zeros[q];
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
        if (q < GROUP) sh.out[warp][q][c + k / 2] = out[tile][k] + sh.zeros[warp][q];
      }
    }
    __syncthreads();
    if (p.outliers) {
      float most[GROUP];
#pragma unroll
      for (int q = 0; q < GROUP; q++) {
        most[q] = NONE;
#pragma unroll
        for (int w = 0; w < WARPS; w++) most[q] = fmaxf(most[q], sh.top[w][q]);
      }
      value_outliers(p, sh, table, blocks, head, warp, lane, most);
      __syncthreads();
    }
  }

  for (int i = threadIdx.x; i < GROUP * DIM; i += THREADS) {
    int q = i / DIM, c = i % DIM;
    float m = NONE, total = 0.0f, value = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) m = fmaxf(m, sh.top[w][q]);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      float factor = exp2(sh.top[w][q] - m);
      total += factor * sh.sum[w][q];
      value += factor * sh.out[w][q][c] + sh.out_fix[w][q][c];
    }
    p.part_out[part * DIM + i] = value;
    if (c == 0) {
      p.part_sum[(part + q) * 2] = m;
      p.part_sum[(part + q) * 2 + 1] = total;
    }
  }
}

// One block a (sequence, query head), a thread a channel: parts weighted by their maxima.
extern "C" __global__ void __launch_bounds__(DIM) combine(
    const float* __restrict__ part_out, const float* __restrict__ part_sum, u16* __restrict__ out, int splits) {
  const int row = blockIdx.x, q = row % GROUP, c = threadIdx.x;
  const i64 part = (i64)(row / GROUP) * splits * GROUP + q;
  float m = NONE, total = 0.0f, value = 0.0f;
  for (int s = 0; s < splits; s++) m = fmaxf(m, part_sum[(part + (i64)s * GROUP) * 2]);
  for (int s = 0; s < splits; s++) {
    const i64 at = part + (i64)s * GROUP;
    float factor = exp2(part_sum[at * 2] - m), weight = part_sum[at * 2 + 1];
    if (weight > 0.0f) {  // an empty part wrote no output
      total += factor * weight;
      value += factor * part_out[at * DIM + c];
    }
  }
  out[(i64)row * DIM + c] = store16(total > 0.0f ? value / total : 0.0f);
}
