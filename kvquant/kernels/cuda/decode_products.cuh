// Phases 2, 3 and 5 of `decode.cu`: scores, softmax and output from packed codes.

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
    for (int s = 0; s < SIGMA; s++) scale[s] = sh.table.channel[s][t][0], zero[s] = sh.table.channel[s][t][1];
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
  MEMBER Operands(const Space& sh, int t) : channel((const uint4 (*)[4][2])sh.table.channel[0][t]) {}
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
DEVICE void value_tile(float (&out)[DIM / 16][4], const ValueCodes& codes, const Levels& levels, u32 w0, u32 w1, int g) {
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
  levels.take(sh.table.levels[0], lane);
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
  levels.take(sh.table.levels[1], lane);
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
