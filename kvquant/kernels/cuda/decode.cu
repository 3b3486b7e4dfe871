// Decode attention straight from packed blocks: one query a sequence, split over the past.
//
// Compiled at run time (cuda_build.py) with these constants:
//   BITS 2, 3 or 4   DIM head_dim (64, 128, 256)   GROUP query heads a kv head (1..8)
//   SIZE tokens a block (a multiple of 32)   OUTLIERS: whether there are any
//   POS32, COUNT32: types of the outliers' index arrays
//   KTILES: tiles of 16 tokens of keys that a warp takes together
//   WARPS: warps a program   MIN_BLOCKS: programs a multiprocessor   SPLIT: most chunks a program
//   ROUNDS: outliers a lane and block whose data wait in shared memory; further ones are read again
//   SPACE: bytes of shared memory that cuda_decode.py counts
//   HEAD_BYTES: bytes of a HeadTable, as decode_tables.py counts them
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

#include "decode_instructions.cuh"
#include "decode_space.cuh"

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

#include "decode_outliers.cuh"
#include "decode_products.cuh"

// One part of a head's tokens: a piece of the blocks (`count` chunks from `first` on) or, where `plain`,
// the tokens in 16 bits.
DEVICE void take_part(const Args& p, Space& sh, Finder& finder, i64 part, bool plain, int first, int count, int batch, int head,
                      int warp, int lane) {
  const int g = lane / 4, t = lane % 4, blocks = count / CPB;
  constexpr int TURNS = (GROUP * HALF + THREADS - 1) / THREADS;  // pairs of a query a thread
  finder.arenas(p);
  const float strength = __ldg(p.thetas + HALF) * p.scaling;  // of scores
  const u16* const query = p.query + (i64)(batch * p.heads + head) * GROUP * DIM;
  u16 first_half[TURNS], second_half[TURNS];
#pragma unroll
  for (int k = 0; k < TURNS; k++) {
    const int i = min(k * THREADS + (int)threadIdx.x, GROUP * HALF - 1);
    first_half[k] = __ldg(query + i / HALF * DIM + i % HALF);
    second_half[k] = __ldg(query + i / HALF * DIM + i % HALF + HALF);
  }
  const u8* const table = p.head_tables + (i64)head * (HEAD_BYTES + DIM * 4);
  shared_loop<T * SIGMA * 4>([&](int i) {
    copy16(sh.tables.rope + i / (SIGMA * 4) * ROPE_PITCH + i % (SIGMA * 4) * 16, (const uint4*)p.rope + i);
  });
  shared_loop<SPLIT * HALF / 4>([&](int i) {
    if (i < count * (HALF / 4))
      copy16((float4*)sh.tables.phases + i, (const float4*)(p.phases + (i64)(first + 1) * HALF) + i);
  });
  shared_loop<HEAD_BYTES / 16>([&](int i) { copy16((uint4*)&sh.table + i, (const uint4*)table + i); });
#if OUTLIERS
  shared_loop<2 * DIM>([&](int i) {
    copy4((u32*)sh.channels + i, i % 2 ? (const u32*)p.thetas + i / 2 % HALF : (const u32*)(table + HEAD_BYTES) + i / 2);
  });
  shared_loop<GROUP * PITCH / 4>([&](int i) { ((int4*)sh.change)[i] = make_int4(0, 0, 0, 0); });
#endif
  finder.begins(p, head);
  float most = 0.0f;
#pragma unroll
  for (int k = 0; k < TURNS; k++) {
    const int i = k * THREADS + threadIdx.x, q = i / HALF, f = i % HALF;
    if (GROUP * HALF % THREADS && i >= GROUP * HALF) break;
    const u32 a = first_half[k], b = second_half[k];
    const float x = load16((u16)a), y = load16((u16)b);
    sh.query[q][f] = x * strength;
    sh.query[q][f + HALF] = y * strength;
    sh.moved[q][f] = sh.moved[q][f + HALF] = 0;
#if OUTLIERS
    sh.wave[f].query[q] = a | b << 16;
    sh.wave[f + HALF].query[q] = b | (a ^ 0x8000) << 16;
    most = fmaxf(most, x * x + y * y);
#endif
  }
#if OUTLIERS
  most = warp_max(most);
  if (lane == 0) sh.reach[warp] = most;
#endif
  if (threadIdx.x == 0) sh.largest = 0;
  finder.store(p, sh, head, warp, lane);
  __syncwarp();  // its entries
#pragma unroll 1
  for (int j = 0; j < SHARE; j++) {
    const int place = warp + j * WARPS;
    if (place >= blocks) break;
    const Entry& entry = sh.entries[place];
    stage<SIZE>((u16*)sh.zeros[place], entry.zeros, (u16*)sh.scales[place], entry.scales, SIZE, lane);
#if OUTLIERS
    copy_outliers(sh.lists[place], entry, KEYS, lane);
#endif
  }
  if (CPB == 1 && warp < count) {  // else the entry is another warp's
    fetch_chunk(codes_of(sh, KEYS, warp, count), lane);
    fetch_chunk(codes_of(sh, VALUES, warp, count), lane);
  }
  copies_done();
  __syncthreads();

  float unit = 0.0f;  // of `moved`
  if (plain) {
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
    const u32 largest = largest_outlier(sh, VALUES, blocks, warp, lane);
    if (lane == 0) atomicMax(&sh.largest, largest);
#endif
    __syncthreads();
    weigh(sh, count, warp, lane);
#if OUTLIERS
    if (CPB > 1) __syncthreads();
    else __syncwarp();
    // A token's levels lie between its outliers, so no difference is larger than twice the largest.
    unit = 2.5f * load16((u16)sh.largest) * OUTPUT_UNIT;
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
    for (int w = 0; w < WARPS; w++) value += sh.out[w][q][c];
#pragma unroll
    for (int w = 0; w < WARPS; w += 4) {
      const float4 zeros = *(const float4*)&sh.zero_sum[q][w];
      value += zeros.x + zeros.y + (zeros.z + zeros.w);
    }
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

KERNEL(THREADS, MIN_BLOCKS) decode(const Args p) {
  DYNAMIC(raw, SPACE);
  Space& sh = *(Space*)raw;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // Heads first, so that the tokens in 16 bits, which take a short time, come last and fill what
  // the last wave of programs leaves free.
  const int head = blockIdx.x, batch = blockIdx.y, split = blockIdx.z, splits = gridDim.z;
  const int row = batch * p.heads + head;
  const i64 part = ((i64)row * splits + split) * GROUP;
  const bool plain = split == splits - 1;
  const int first = plain ? 0 : split * p.chunks_a_split;
  Finder finder;
  finder.numbers(p.table + (i64)batch * p.table_stride + first / CPB, p.table_stride - first / CPB, warp, lane);
  const int count = plain ? 0 : min(p.chunks_a_split, p.lengths[batch * 3 + 1] * CPB - first);
  finder.among(count / CPB, warp, lane);
  if (plain || count > 0) {
    take_part(p, sh, finder, part, plain, first, count, batch, head, warp, lane);
  } else if (threadIdx.x < GROUP) {
    p.part_sum[(part + threadIdx.x) * 2] = NONE;
    p.part_sum[(part + threadIdx.x) * 2 + 1] = 0.0f;
  }
}

#define COMBINE 256        // threads of the second pass
#define SHARERS (COMBINE / 32)
#define AHEAD (32 / SHARERS)  // of 32 parts a warp's share, which it reads before their weights are known

// One block a (sequence, query head): parts weighted by their maxima. A block has little to do but to
// wait for memory, so its warps share the parts, and what it reads first does not depend on the rest.
KERNEL(COMBINE, 1) combine(
    const float* __restrict__ part_out, const float* __restrict__ part_sum, u16* __restrict__ out, int parts) {
  SHARED float rows[SHARERS][DIM];
  const int row = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const i64 first = (i64)(row / GROUP) * parts * GROUP + row % GROUP;
  const float2* const sums = (const float2*)part_sum + first;
  const float* const outs = part_out + first * DIM + lane;
  float ahead[AHEAD][DIM / 32], sum[DIM / 32];
#pragma unroll
  for (int k = 0; k < AHEAD; k++)
#pragma unroll
    for (int i = 0; i < DIM / 32; i++)
      if (warp + k * SHARERS < parts) ahead[k][i] = __ldg(outs + (warp + k * SHARERS) * GROUP * DIM + i * 32);
  const float2 own = lane < parts ? __ldg(sums + lane * GROUP) : make_float2(NONE, 0.0f);
  float top = own.x;
  for (int s = lane + 32; s < parts; s += 32) top = fmaxf(top, __ldg(&sums[s * GROUP].x));
  top = warp_max_signed(top);
  float factor = own.y > 0.0f ? exp2(own.x - top) : 0.0f;  // an empty part wrote no output
  float total = factor * own.y;
#pragma unroll
  for (int i = 0; i < DIM / 32; i++) sum[i] = 0.0f;
#pragma unroll
  for (int k = 0; k < AHEAD; k++) {
    const float f = __shfl_sync(~0u, factor, warp + k * SHARERS);
#pragma unroll
    for (int i = 0; i < DIM / 32; i++)
      if (f > 0.0f) sum[i] = fmaf(f, ahead[k][i], sum[i]);
  }
  for (int begin = 32; begin < parts; begin += 32) {
    const float2 more = begin + lane < parts ? __ldg(sums + (begin + lane) * GROUP) : make_float2(NONE, 0.0f);
    factor = more.y > 0.0f ? exp2(more.x - top) : 0.0f;
    total = fmaf(factor, more.y, total);
#pragma unroll
    for (int k = 0; k < AHEAD; k++) {
      const float f = __shfl_sync(~0u, factor, warp + k * SHARERS);
#pragma unroll
      for (int i = 0; i < DIM / 32; i++)
        if (f > 0.0f) sum[i] = fmaf(f, __ldg(outs + (begin + warp + k * SHARERS) * GROUP * DIM + i * 32), sum[i]);
    }
  }
#pragma unroll
  for (int d = 16; d; d >>= 1) total += __shfl_xor_sync(~0u, total, d);
#pragma unroll
  for (int i = 0; i < DIM / 32; i++) rows[warp][i * 32 + lane] = sum[i];
  __syncthreads();
  if (threadIdx.x >= DIM) return;
  float value = 0.0f;
#pragma unroll
  for (int w = 0; w < SHARERS; w++) value += rows[w][threadIdx.x];
  out[(i64)row * DIM + threadIdx.x] = store16(total > 0.0f ? value / total : 0.0f);
}
