// What a program of `decode.cu` is given, what it keeps in shared memory, and how that is laid out.

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
#define HELD (SIGMA <= 4)            // whether scales and queries of keys fit in registers
// Units of integer sums, of their largest part: a token's score has up to DIM parts, a channel's
// output one of each token of the program.
#define SCORE_UNIT 0x1p-22f
#define OUTPUT_UNIT (SPLIT * T > 256 ? 0x1p-30f * (SPLIT * T) : 0x1p-22f)
#define NONE (-1e30f)

// Pointers of one arena (int64 each), in this order.
enum { KCODES, VCODES, VZERO, VSCALE, KBEGIN, KCOUNT, KPOS, KVAL, VBEGIN, VCOUNT, VPOS, VVAL, FIELDS };

// The levels of a codebook, its high and low bytes apart.
struct Levels {
  u32 high[LEVELS > 8 ? 4 : 2], low[LEVELS > 8 ? 4 : 2];
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

// What calibration gives a kv head, made by decode_tables.py. Behind it in memory, `ends` of its channels.
struct __align__(16) HeadTable {
  uint4 channel[SIGMA][4][2];  // scale and zero: of channels c.. and of c + DIM / 2..
  Levels levels[2];            // of keys, of values
  float middles[LEVELS];       // where values' codes change
  float ends_of_levels[2];     // the last and the first level of values
  float furthest;              // the largest number that a level of keys stands for, without sign
  float unused;
};

// A channel's factors of cosine (low half) and sine for each query, 16-bit numbers of the cache.
struct __align__(4 * ROOM) Wave {
  u32 query[ROOM];
};

static_assert(sizeof(HeadTable) == HEAD_BYTES, "decode_tables.py makes other tables");

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
  // Corrections of the scores in their warp's unit, then the scores, then of each pair of tokens
  // the weights times the tokens' scales and the weights alone, fp16.
  union {
    int change[GROUP][PITCH];
    float score[GROUP][PITCH];
    uint2 weight[GROUP][PITCH / 2];
  };
  Wave wave[DIM];
  HeadTable table;
  Channel channels[DIM];
  float query[GROUP][DIM];     // rotated, times the strength of the scores
  int moved[GROUP][DIM];       // the output by outliers, in units
  float top[GROUP][WARPS], sum[GROUP][WARPS], zero_sum[GROUP][WARPS];  // rows of 16 bytes or 32
  float units[BLOCKS];
  float reach[WARPS];       // the largest squared lengths of queries' pairs
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

// Calls f(i) for i < N, each thread of the program some.
template <int N, typename F> DEVICE void shared_loop(F f) {
#pragma unroll
  for (int begin = 0; begin < N; begin += THREADS)
    if (begin + THREADS <= N || begin + (int)threadIdx.x < N) f(begin + (int)threadIdx.x);
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

// The integer nearest to a * b + c * d, or near it.
DEVICE int integer(float a, float b, float c = 0.0f, float d = 0.0f) {
  // 1.5 * 2^23 leaves no bits for fractions; for numbers below 2^22.
  return __float_as_int(fmaf(a, b, fmaf(c, d, 12582912.0f))) - 0x4B400000;
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
  const u8* head_tables;  // [kv heads, HEAD_BYTES + DIM * 4]: a HeadTable, ends of the channels
  const float* value_levels;
  const u8* rope;         // [T, SIGMA, 4, {cos x 4, sin x 4}] fp16: places in a chunk
  const float* phases;    // [1 + chunks, HALF] radians: position 0 and chunks' first
  const float* thetas;    // [HALF + 1] radians a token, the factor on cosine and sine
  float* part_out;        // [batch, kv heads, splits, GROUP, DIM]
  float* part_sum;        // [batch, kv heads, splits, GROUP, 2]: maximum, sum
  int heads, table_stride, sink_room, tail_room, chunks_a_split;
  float scaling;          // of the scores, times log2(e)
};
