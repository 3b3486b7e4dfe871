// Quantize and pack: a layer's keys and values are read once and leave as codes and exact outliers.
//
// Compiled at run time (cuda_build.py) with these constants:
//   BITS 2, 3 or 4   DIM head_dim (64, 128, 256)   HEADS kv heads   SIZE tokens a block
//   OUTLIERS: whether keys have any   PER_SIDE: outliers at each end of a token's values
//   WORKERS: threads a token of values   AHEAD: whether the next token is loaded meanwhile
//   KEY_BLOCKS, VALUE_BLOCKS: least programs a multiprocessor
//   POS32, COUNT32: types of the outliers' index arrays   BF16: bfloat16 instead of fp16
//
// Codes without arithmetic: for a given zero and scale the code grows with the 16-bit element, so it
// is the number of *thresholds* at or below it, where a threshold is the smallest 16-bit number that
// the fp32 arithmetic of the specification puts above a midpoint. Two elements are compared at a
// time, and a binary search over the thresholds gives a code's bits as masks of both halves of a
// word. Keys bring their thresholds (thresholds.py), values find them once a token.
//
// Who has what: a thread takes the channels c, c + 1 of all eight lanes of a row (packing.py), whose
// codes make whole bytes of every plane. In accumulators the lower half of a word is for channel c,
// the upper one for c + 1.
//
// Keys: a program a (block, head). Values: a program takes tokens of all heads. A bound with a little
// more than PER_SIDE threads' largest elements above it picks few candidates, which are ranked; ties
// that make too many of them are cut off by a search for the exact place. Outliers go to a list of
// the token, and `group_values` sorts the lists of a block by head.

#include "types.cuh"

#ifndef EMULATED
#if BF16
#define KIND "bf16"
#else
#define KIND "f16"
#endif
// Masks of both halves. Unordered comparisons (u) are true for NaN.
#if BF16 && __CUDA_ARCH__ < 900
#define COMPARE(name, op)                                                              \
  DEVICE u32 name(u32 a, u32 b) {                                                      \
    u32 low, high;                                                                     \
    asm("set." op ".u32.f32 %0, %1, %2;"                                               \
        : "=r"(low) : "f"(__uint_as_float(a << 16)), "f"(__uint_as_float(b << 16)));   \
    asm("set." op ".u32.f32 %0, %1, %2;" : "=r"(high)                                  \
        : "f"(__uint_as_float(a & 0xFFFF0000u)), "f"(__uint_as_float(b & 0xFFFF0000u))); \
    return __byte_perm(low, high, 0x7610);                                             \
  }
#else
#define COMPARE(name, op)                                                      \
  DEVICE u32 name(u32 a, u32 b) {                                              \
    u32 d;                                                                     \
    asm("set." op ".u32." KIND "x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));   \
    return d;                                                                  \
  }
#endif
COMPARE(ge2, "ge")
COMPARE(le2, "le")
COMPARE(geu2, "geu")
// NaN if either is.
DEVICE u32 max2(u32 a, u32 b) {
  u32 d;
  asm("max.NaN." KIND "x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
DEVICE u32 min2(u32 a, u32 b) {
  u32 d;
  asm("min.NaN." KIND "x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
DEVICE float to_float(u16 x) {
#if BF16
  return __uint_as_float((u32)x << 16);
#else
  float d;
  asm("cvt.f32.f16 %0, %1;" : "=f"(d) : "h"(x));
  return d;
#endif
}
DEVICE u16 to_16(float x) {
  u16 d;
  asm("cvt.rn." KIND ".f32 %0, %1;" : "=h"(d) : "f"(x));
  return d;
}
// Loads that stay where they are written, so that all are in flight before the first use.
DEVICE u32 load2(const u16* p) {
  u32 d;
  asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(d) : "l"(p));
  return d;
}
DEVICE u32 warp_sum(u32 x) { return __reduce_add_sync(~0u, x); }
DEVICE int warp_max(int x) { return __reduce_max_sync(~0u, x); }
DEVICE int warp_min(int x) { return __reduce_min_sync(~0u, x); }
DEVICE u32 from_below(u32 x, int lanes) { return __shfl_up_sync(~0u, x, lanes); }
#endif

#if BF16
#define INFINITE 0x7F80
#else
#define INFINITE 0x7C00
#endif
#define BOTH 0x00010001u  // a number for both halves of a word
#define D8 (DIM / 8)             // channels a lane
#define PAIRS (DIM / 16)         // threads a row
#define ROW (DIM * BITS / 8)     // bytes of a row
#define EDGES ((1 << BITS) - 1)  // thresholds
#define CHANNELS (HEADS * DIM)

// Blocks [blocks, HEADS, SIZE, DIM] with steps in elements.
struct Source {
  const u16* x;
  i64 block, head, token;
};
// `PackTarget`
struct Target {
  u8* codes;
  int* status;
  int* begin;
  count_t* count;
  pos_t* positions;
  u16* values;
  int* cursor;
  int slots;
};

// Bits of a row's codes, for the two channels of a thread.
struct Codes {
#if BITS == 4
  u32 quad[2];
#else
  u32 low, top;
#endif
};

DEVICE u32 choose(u32 mask, u32 yes, u32 no) { return (mask & yes) | (~mask & no); }

// Adds lane j's codes of two elements; `t`: thresholds in both halves.
DEVICE void encode(Codes& c, u32 x, const u32* t, int j) {
#if BITS == 2
  u32 b1 = ge2(x, t[1]);
  u32 b0 = ge2(x, choose(b1, t[2], t[0]));
#elif BITS == 3
  u32 b2 = ge2(x, t[3]);
  u32 b1 = ge2(x, choose(b2, t[5], t[1]));
  u32 b0 = ge2(x, choose(b1, choose(b2, t[6], t[2]), choose(b2, t[4], t[0])));
#else
  u32 b3 = ge2(x, t[7]);
  u32 b2 = ge2(x, choose(b3, t[11], t[3]));
  u32 b1 = ge2(x, choose(b2, choose(b3, t[13], t[5]), choose(b3, t[9], t[1])));
  u32 upper = choose(b2, choose(b3, t[14], t[6]), choose(b3, t[10], t[2]));
  u32 lower = choose(b2, choose(b3, t[12], t[4]), choose(b3, t[8], t[0]));
  u32 b0 = ge2(x, choose(b1, upper, lower));
#endif
#if BITS == 4
  int at = 8 * (j & 1) + 4 * (j >> 2), q = (j >> 1) & 1;
  c.quad[q] |= b0 & (BOTH << at);
  c.quad[q] |= b1 & (BOTH << (at + 1));
  c.quad[q] |= b2 & (BOTH << (at + 2));
  c.quad[q] |= b3 & (BOTH << (at + 3));
#else
  int at = 8 * (j & 1) + 2 * (j >> 1);
  c.low |= b0 & (BOTH << at);
  c.low |= b1 & (BOTH << (at + 1));
#if BITS == 3
  c.top |= b2 & (BOTH << j);
#endif
#endif
}

DEVICE void clear(Codes& c) {
#if BITS == 4
  c.quad[0] = c.quad[1] = 0;
#else
  c.low = c.top = 0;
#endif
}

// Bytes 0 and 2 go to lane 2 q's place, bytes 1 and 3 to that of lane 2 q + 1.
DEVICE void store_bytes(u8* out, u32 word) {
  u32 sorted = __byte_perm(word, 0, 0x3120);
  *(u16*)out = (u16)sorted;
  *(u16*)(out + D8) = (u16)(sorted >> 16);
}

// `out`: the row's first byte, plus the thread's first channel in the lane.
DEVICE void store(u8* out, const Codes& c) {
#if BITS == 4
  store_bytes(out, c.quad[0]);
  store_bytes(out + 2 * D8, c.quad[1]);
#else
  store_bytes(out, c.low);
#if BITS == 3
  *(u16*)(out + 2 * D8) = (u16)__byte_perm(c.top, 0, 0x4420);
#endif
#endif
}

DEVICE bool not_finite(u16 x) { return (x & 0x7FFF) >= INFINITE; }
DEVICE u32 absolute(u32 x) { return x & 0x7FFF7FFFu; }

// Integers ordered as the floats are; -0 counts as 0.
DEVICE int ordered(u32 raw) { return raw & 0x8000 ? -(int)(raw & 0x7FFF) : (int)raw; }
DEVICE u32 unordered(int at) { return at < 0 ? 0x8000u | (u32)-at : (u32)at; }

// Where a (block, head)'s entries go; counts those that find no slot.
DEVICE void open_group(const Target& t, int group, int base, int total) {
  int first = min(base, t.slots), written = min(base + total, t.slots) - first;
  t.begin[group] = first;
  t.count[group] = (count_t)written;
  if (written < total) atomicAdd(t.status, total - written);
}

// ---------------------------------------------------------------------------------------- keys

#define ROWS 4                                  // rows a thread
#define STEP (SIZE / ROWS)                      // between them
#define KEY_THREADS (STEP * PAIRS)
#define KEY_WARPS (KEY_THREADS / 32)
#define VECTORS ((EDGES + 2 * OUTLIERS + 3) / 4)  // of four thresholds

// `table` [HEADS, 8 lanes, VECTORS, PAIRS]: thresholds, then the largest number that is an outlier
// below the range and the smallest one above.
KERNEL(KEY_THREADS, KEY_BLOCKS)
pack_keys(const Source s, const Target t, const uint4* __restrict__ table) {
  SHARED __align__(16) u8 rows[SIZE * ROW];
  SHARED int sums[KEY_WARPS];
  SHARED int start;
  const int tid = threadIdx.x, group = blockIdx.x;
  const int head = group % HEADS, block = group / HEADS;
  const int pair = tid % PAIRS, first = tid / PAIRS;
  const u16* x = s.x + block * s.block + head * s.head + 2 * pair;
  u32 w[ROWS][8];
#pragma unroll
  for (int i = 0; i < ROWS; ++i) {
    const u16* p = x + (first + i * STEP) * s.token;
#pragma unroll
    for (int j = 0; j < 8; ++j) w[i][j] = load2(p + j * D8);
  }
  Codes c[ROWS];
  u32 marks[ROWS / 2] = {}, bad = 0;
#pragma unroll
  for (int i = 0; i < ROWS; ++i) clear(c[i]);
  const uint4* mine = table + head * (8 * VECTORS * PAIRS) + pair;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    u32 edges[VECTORS * 4];
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      uint4 four = mine[(j * VECTORS + v) * PAIRS];
      edges[4 * v] = four.x, edges[4 * v + 1] = four.y;
      edges[4 * v + 2] = four.z, edges[4 * v + 3] = four.w;
    }
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      encode(c[i], w[i][j], edges, j);
#if OUTLIERS
      u32 out = le2(w[i][j], edges[EDGES]) | geu2(w[i][j], edges[EDGES + 1]);
      marks[i / 2] |= out & (BOTH << (8 * (i & 1) + j));
#else
      bad |= geu2(absolute(w[i][j]), INFINITE * BOTH);
#endif
    }
  }
#pragma unroll
  for (int i = 0; i < ROWS; ++i) store(rows + (first + i * STEP) * ROW + 2 * pair, c[i]);
#if OUTLIERS
  const int lane = tid & 31, warp = tid >> 5;
  int number = __popc(marks[0]) + __popc(marks[1]), upto = number;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    int below = from_below(upto, d);
    if (lane >= d) upto += below;
  }
  if (lane == 31) sums[warp] = upto;
#endif
  __syncthreads();
  uint4* out = (uint4*)(t.codes + (i64)group * (SIZE * ROW));
#pragma unroll
  for (int k = 0; k < SIZE * ROW / 16; k += KEY_THREADS)
    if (k + tid < SIZE * ROW / 16) out[k + tid] = ((const uint4*)rows)[k + tid];
#if OUTLIERS
  int before = 0, total = 0;
#pragma unroll
  for (int i = 0; i < KEY_WARPS; ++i) {
    before += i < warp ? sums[i] : 0;
    total += sums[i];
  }
  if (tid == 0) {
    start = atomicAdd(t.cursor, total);
    open_group(t, group, start, total);
  }
  __syncthreads();
  int slot = start + before + upto - number, half = 0;
  u32 rest = marks[0];
  while (number--) {
    if (!rest) rest = marks[1], half = 2;
    int bit = __ffs(rest) - 1;
    rest &= rest - 1;
    int row = first + (half + ((bit >> 3) & 1)) * STEP;
    int channel = (bit & 7) * D8 + (bit >> 4);  // from the thread's first
    u16 value = x[row * s.token + channel];
    bad |= not_finite(value);
    if (slot < t.slots) {
      t.values[slot] = value;
      t.positions[slot] = (pos_t)(row * DIM + 2 * pair + channel);
    }
    ++slot;
  }
#endif
  if (bad) t.status[1] = 1;
}

// -------------------------------------------------------------------------------------- values

#define UNITS (HEADS * PAIRS)                    // rows' threads of a token
#define EACH ((UNITS + WORKERS - 1) / WORKERS)   // of them a thread takes
#define FULL (UNITS % WORKERS == 0)
#define ROOM (4 * PER_SIDE + 36)                 // candidates at an end
#define SLACK (PER_SIDE / 4 + 3)                 // how loose the bound may be
#define CHOSEN (2 * PER_SIDE)

// A sort key: larger for larger elements, of equal ones for the lower channel. The last bit keeps
// the sign of a zero.
DEVICE int sort_key(u32 raw, int channel) {
  return ordered(raw) * 65536 + 2 * (CHANNELS - 1 - channel) + ((raw & 0xFFFF) == 0x8000);
}
DEVICE u32 element_of(int key) { return unordered(key >> 16) | (key & 1 ? 0x8000u : 0u); }
DEVICE int channel_of(int key) { return CHANNELS - 1 - ((key & 0xFFFF) >> 1); }

// The smallest 16-bit number that is above a midpoint when normalized; infinity if none is.
DEVICE u32 threshold(float zero, float inverse, float scale, float midpoint) {
  auto above = [&](int at) {
    float x = to_float((u16)unordered(at));
    return __fmul_rn(__fsub_rn(x, zero), inverse) > midpoint;
  };
  int low = 1 - INFINITE, high = INFINITE;  // low <= answer <= high
  // It is next to the midpoint's place, unless the zero is much larger than the result.
  int guess = ordered(to_16(midpoint * scale + zero));
  int below = max(guess - 4, low), beyond = min(guess + 3, high - 1);
  if (below < beyond) {
    if (above(below)) high = below;
    else low = below + 1;
    if (above(beyond)) high = min(high, beyond);
    else low = max(low, beyond + 1);
  }
  while (low < high) {
    int middle = (low + high) >> 1;  // rounds down: infinity itself is never asked
    if (above(middle)) high = middle;
    else low = middle + 1;
  }
  return unordered(low);
}

struct Row {
  u32 w[EACH][8];
};

DEVICE void load_row(Row& r, const Source& s, int spot) {
  const u16* x = s.x + (i64)(spot / SIZE) * s.block + (i64)(spot % SIZE) * s.token;
#pragma unroll
  for (int u = 0; u < EACH; ++u) {
    int unit = threadIdx.x + u * WORKERS;
    if (FULL || unit < UNITS) {
      const u16* p = x + (unit / PAIRS) * s.head + 2 * (unit % PAIRS);
#pragma unroll
      for (int j = 0; j < 8; ++j) r.w[u][j] = load2(p + j * D8);
    }
  }
}

// Calls f(unit, lane, two elements) for all that a thread has.
template <typename F> DEVICE void for_pairs(const Row& r, F f) {
#pragma unroll
  for (int u = 0; u < EACH; ++u)
    if (FULL || threadIdx.x + u * WORKERS < UNITS)
#pragma unroll
      for (int j = 0; j < 8; ++j) f(u, j, r.w[u][j]);
}

#define NOTHING 0xFFFFu  // no outlier: a channel that does not exist

struct Selection {
  u32 ends[2][WORKERS];  // each thread's largest elements; on side 1 of the negated ones
  u32 bound[2];
  int number[2], tally;
  int list[2][ROOM];
  int next[2];  // the largest that is no outlier, as an ordered integer
  u32 edges[EDGES];
};

// A bound with a little more than PER_SIDE of the threads' largest elements at or above it. A warp.
DEVICE u32 find_bound(const u32* ends, int lane) {
  u32 words[WORKERS / 32];
  int low = INFINITE, high = -INFINITE;
#pragma unroll
  for (int i = 0; i < WORKERS / 32; ++i) {
    u32 w = words[i] = ends[i * 32 + lane];
    int a = ordered(w & 0xFFFF), b = ordered(w >> 16);
    low = min(low, min(a, b));
    high = max(high, max(a, b));
  }
  low = warp_min(low);
  high = warp_max(high);
  int held = 2 * WORKERS;
  while (low < high && held > PER_SIDE + 1 + SLACK) {
    int middle = low + ((high - low + 1) >> 1);
    u32 bound = unordered(middle) * BOTH, sum = 0;
#pragma unroll
    for (int i = 0; i < WORKERS / 32; ++i) sum -= ge2(words[i], bound);
    sum = warp_sum(sum);  // a + (b - a) 2^16 for a lower and b upper halves
    int number = ((int)sum >> 16) + 2 * (int)(sum & 0xFFFF);
    if (number > PER_SIDE) low = middle, held = number;
    else high = middle - 1;
  }
  return unordered(low) * BOTH;
}

// Rare: ties or a crowd. The PER_SIDE + 1 largest by a search over sort keys; the row is read again
// in each step, which costs other tokens no registers.
DEVICE void search_exactly(const u16* x, const Source& s, Selection& m, int side) {
  const u32 flip = side ? 0x8000u : 0u;
  i64 low = -2147483647, high = 2147483647;
  while (low < high) {
    int middle = (int)((low + high + 1) >> 1), number = 0;
#pragma unroll 4
    for (int c = threadIdx.x; c < CHANNELS; c += WORKERS)
      number += sort_key(x[(c / DIM) * s.head + c % DIM] ^ flip, c) >= middle;
    number = warp_sum(number);
    if (threadIdx.x == 0) m.tally = 0;
    __syncthreads();
    if ((threadIdx.x & 31) == 0) atomicAdd(&m.tally, number);
    __syncthreads();
    if (m.tally > PER_SIDE) low = middle;
    else high = (i64)middle - 1;
    __syncthreads();
  }
  if (threadIdx.x == 0) m.number[side] = 0;
  __syncthreads();
#pragma unroll 1
  for (int c = threadIdx.x; c < CHANNELS; c += WORKERS) {
    int key = sort_key(x[(c / DIM) * s.head + c % DIM] ^ flip, c);
    if (key >= low) m.list[side][min(atomicAdd(&m.number[side], 1), ROOM - 1)] = key;
  }
}

// The token's outliers to `found`, and the ends of the rest.
DEVICE void select(const Row& r, const u16* x, const Source& s, Selection& m, u32* found) {
  const int tid = threadIdx.x, lane = tid & 31;
  if (WORKERS == 32) {
    m.bound[0] = find_bound(m.ends[0], lane);
    m.bound[1] = find_bound(m.ends[1], lane);
  } else if (tid < 64) {
    u32 bound = find_bound(m.ends[tid >> 5], lane);
    if (lane == 0) m.bound[tid >> 5] = bound;
  }
  __syncthreads();
  const u32 above = m.bound[0], below = m.bound[1] ^ 0x80008000u;
  u32 marks[EACH] = {};  // bits 0..7 of a half: lanes at or above the bound, 8..15: below theirs
  for_pairs(r, [&](int u, int j, u32 w) {
    marks[u] |= ge2(w, above) & (BOTH << j);
    marks[u] |= le2(w, below) & (BOTH << (8 + j));
  });
#pragma unroll
  for (int u = 0; u < EACH; ++u) {
    u32 rest = marks[u];
    const int unit = tid + u * WORKERS, base = (unit / PAIRS) * DIM + 2 * (unit % PAIRS);
    while (rest) {
      int bit = __ffs(rest) - 1, side = (bit >> 3) & 1;
      rest &= rest - 1;
      int slot = atomicAdd(&m.number[side], 1);
      if (slot < ROOM) m.list[side][slot] = base + (bit & 7) * D8 + (bit >> 4);
    }
  }
  __syncthreads();
  // From here on, one half of the threads for each end.
  const int side = tid / (WORKERS / 2), own = tid % (WORKERS / 2);
  const u32 flip = side ? 0x8000u : 0u;
  int* list = m.list[side];
  const bool many = m.number[0] > ROOM, few = m.number[1] > ROOM;
  for (int i = own; i < min(m.number[side], ROOM); i += WORKERS / 2) {
    int channel = list[i];
    list[i] = sort_key(x[(channel / DIM) * s.head + channel % DIM] ^ flip, channel);
  }
  __syncthreads();
  if (many || few) {
#pragma unroll 1
    for (int end = 0; end < 2; ++end)
      if (end ? few : many) search_exactly(x, s, m, end);
    __syncthreads();
  }
  const int number = min(m.number[side], ROOM), least = ordered(above & 0xFFFF);
  for (int i = own; i < number; i += WORKERS / 2) {
    const int key = list[i];
    int rank = 0;
    for (int k = 0; k < number; ++k) rank += list[k] > key;
    if (rank < PER_SIDE) {
      u32 raw = element_of(key) ^ flip, entry = raw << 16 | (u32)channel_of(key);
      if (side) {  // in a nearly constant token an element may be among the largest as well
        const int mirror = sort_key(raw, channel_of(key));
        if (mirror >> 16 >= least) {
          int place = 0, there = 0;
#pragma unroll 1
          for (int k = 0; k < min(m.number[0], ROOM); ++k) {
            place += m.list[0][k] > mirror;
            there |= m.list[0][k] == mirror;
          }
          if (there && place < PER_SIDE) entry = NOTHING;
        }
      }
      found[side * PER_SIDE + rank] = entry;
    }
    if (rank == PER_SIDE) m.next[side] = key >> 16;
  }
  __syncthreads();
}

// A program takes `each` tokens of all `spots`; `found` [spots, CHOSEN]: element and channel.
KERNEL(WORKERS, VALUE_BLOCKS)
pack_values(const Source s, u8* __restrict__ codes, int* status, u16* __restrict__ zeros,
            u16* __restrict__ scales, const float* __restrict__ midpoints, u32* __restrict__ found,
            int spots, int each) {
  SHARED Selection m;
  const int tid = threadIdx.x;
  int spot = blockIdx.x * each;
  const int stop = min(spot + each, spots);
  if (spot >= stop) return;
  Row row;
#if AHEAD
  Row following;
  load_row(row, s, spot);
#endif
  for (; spot < stop; ++spot) {
#if AHEAD
    if (spot + 1 < stop) load_row(following, s, spot + 1);
#else
    load_row(row, s, spot);
#endif
    u32 largest = 0, smallest = 0;
    bool begun = false;
    for_pairs(row, [&](int, int, u32 w) {
      largest = begun ? max2(largest, w) : w;
      smallest = begun ? min2(smallest, w) : w;
      begun = true;
    });
    if (geu2(absolute(largest), INFINITE * BOTH) | geu2(absolute(smallest), INFINITE * BOTH))
      status[1] = 1;
    if (!FULL && tid >= UNITS) largest = (0x8000 | INFINITE) * BOTH, smallest = INFINITE * BOTH;
    m.ends[0][tid] = largest;
    m.ends[1][tid] = smallest ^ 0x80008000u;
    if (tid < 2) m.number[tid] = 0;
    __syncthreads();
#if PER_SIDE
    const u16* x = s.x + (i64)(spot / SIZE) * s.block + (i64)(spot % SIZE) * s.token;
    select(row, x, s, m, found + (i64)spot * CHOSEN);
#else
    if (tid < 64 || WORKERS == 32) {
      for (int side = WORKERS == 32 ? 0 : tid >> 5; side < (WORKERS == 32 ? 2 : 1 + (tid >> 5));
           ++side) {
        int most = -INFINITE;
        for (int i = tid & 31; i < WORKERS; i += 32) {
          u32 w = m.ends[side][i];
          most = max(most, max(ordered(w & 0xFFFF), ordered(w >> 16)));
        }
        m.next[side] = warp_max(most);
      }
    }
    __syncthreads();
#endif
    if (tid < EDGES) {
      float high = to_float((u16)unordered(m.next[0]));
      float low = -to_float((u16)unordered(m.next[1]));
      u16 zero = to_16(__fmul_rn(__fadd_rn(high, low), 0.5f));
      u16 scale = to_16(__fmul_rn(__fsub_rn(high, low), 0.5f));
      float z = to_float(zero), half = to_float(scale);
      float inverse = half == 0.0f ? 0.0f : __fdiv_rn(1.0f, half);
      m.edges[tid] = threshold(z, inverse, half, midpoints[tid]) * BOTH;
      if (tid == 0) zeros[spot] = zero, scales[spot] = scale;
    }
    __syncthreads();
    u32 edges[EDGES];
#pragma unroll
    for (int i = 0; i < EDGES; ++i) edges[i] = m.edges[i];
    u8* out = codes + (i64)(spot / SIZE) * (HEADS * SIZE * ROW) + (spot % SIZE) * ROW;
#pragma unroll
    for (int u = 0; u < EACH; ++u) {
      int unit = tid + u * WORKERS;
      if (FULL || unit < UNITS) {
        Codes c;
        clear(c);
#pragma unroll
        for (int j = 0; j < 8; ++j) encode(c, row.w[u][j], edges, j);
        store(out + (unit / PAIRS) * (SIZE * ROW) + 2 * (unit % PAIRS), c);
      }
    }
#if AHEAD
    row = following;
#endif
  }
}

#if PER_SIDE
// The lists of a block's tokens to its heads.
#define GROUPERS 256
KERNEL(GROUPERS, 1) group_values(const Target t, const u32* __restrict__ found) {
  SHARED int number[HEADS], place[HEADS];
  const int tid = threadIdx.x, block = blockIdx.x, all = SIZE * CHOSEN;
  found += (i64)block * all;
  for (int h = tid; h < HEADS; h += GROUPERS) number[h] = 0;
  __syncthreads();
  // A list that NaN cut short holds anything; no channel beyond the token's is followed.
  for (int i = tid; i < all; i += GROUPERS) {
    u32 channel = found[i] & 0xFFFF;
    if (channel < CHANNELS) atomicAdd(&number[channel / DIM], 1);
  }
  __syncthreads();
  if (tid < 32) {
    int total = 0, base = 0;
    for (int h = tid; h < HEADS; h += 32) total += number[h];
    total = warp_sum(total);
    if (tid == 0) base = atomicAdd(t.cursor, total);
    base = warp_sum(base);  // all others give 0
    for (int first = 0; first < HEADS; first += 32) {
      int h = first + tid, own = h < HEADS ? number[h] : 0, upto = own;
      for (int d = 1; d < 32; d *= 2) {
        int below = from_below(upto, d);
        if (tid >= d) upto += below;
      }
      if (h < HEADS) {
        place[h] = base + upto - own;
        open_group(t, block * HEADS + h, base + upto - own, own);
      }
      base += warp_sum(own);
    }
  }
  __syncthreads();
  for (int i = tid; i < all; i += GROUPERS) {
    u32 entry = found[i], channel = entry & 0xFFFF;
    if (channel >= CHANNELS) continue;
    int slot = atomicAdd(&place[channel / DIM], 1);
    if (slot < t.slots) {
      t.values[slot] = (u16)(entry >> 16);
      t.positions[slot] = (pos_t)((i / CHOSEN) * DIM + channel % DIM);
    }
  }
}
#endif
