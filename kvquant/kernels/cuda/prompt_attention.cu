// Attention of many queries with 8-bit products, for Hopper GPUs: scores of INT8, outputs of e4m3.
//
// Compiled at run time (cuda_build.py). A thread block takes 64 rows per consuming warpgroup of one
// query head; a row is a query. One thread of the first warpgroup copies tiles of keys and values
// to shared memory, STAGES at most ahead, from the last one that a row sees to the first. They are
// quantized and lie in memory as the products read them (triton_prompt_pack.py), so that a tile is
// one bulk copy. The warpgroups are not synchronized with each other: while one weighs its scores,
// the products of the others run.
//
// The first tile and those next to a row have most of its weight, so that most of the error would
// come from there. They are fine: queries, keys and values have a second number of 8 bits with what
// the first one left over, and a tile takes two places in the ring of stages.
//
// A warpgroup's work on a tile, online softmax as in FlashAttention (Dao et al., arXiv 2205.14135):
//   1. Scores: integer sums that begin at MAGIC, so that their bits are those of the float 1.5 *
//      2^23 + sum and need no conversion. |sum| <= 127 * 127 * HEAD_DIM < 2^22.
//   2. Weights 2^(score - base + WEIGHT_BITS). The base is the tile's own maximum, so that weights
//      fill the range of e4m3 also where an earlier tile has a much larger one; the running output
//      is kept relative to it, which may make it grow by 2^MAX_DROP.
//   3. Weights become operands where they are: accumulators hold neighbouring columns of two groups
//      of eight, operands four neighbouring ones, so tokens of values are stored in the order that
//      makes up for it.
//   4. Outputs of the tile, 64 channels at a time, added in fp32 to the sum of the tiles before:
//      sums of e4m3 products inside the tensor core have fewer bits than fp32. Behind the last
//      channel comes one that is one for every token, whose output is the sum of the weights.
// Dequantization of values is linear and waits for the end.

#include "hopper.cuh"
#include "prompt_params.cuh"

constexpr u32 MAGIC = 0x4B400000u;
constexpr float MAGIC_NUMBER = 12582912.0f;
constexpr float WEIGHT_BITS = 8.0f, MAX_DROP = 40.0f;
constexpr float LOWEST = -1e30f;  // stands for a maximum of nothing
constexpr int SCORES = KEYS_PER_TILE / 2, PARTS = HEAD_DIM / 64;  // accumulators; see step 4
constexpr int ONES_BYTES = 8 * KEYS_PER_TILE;  // eight channels: a one for every token, and zeros
constexpr u32 E4M3_ONES = 0x38383838u;
constexpr int REST_UNITS = 1 << REST_BITS;  // second numbers per unit of the first

struct Values {
  u8 channels[TILE_BYTES];
  u8 ones[ONES_BYTES];
};
struct SharedStorage {
  u8 queries[2][CONSUMERS][QUERY_BYTES];  // the second numbers behind the first ones
  u8 keys[STAGES][TILE_BYTES];
  Values values[STAGES];
  Barrier queries_full, keys_full[STAGES], values_full[STAGES], keys_empty[STAGES],
      values_empty[STAGES];
};
static_assert(sizeof(SharedStorage) + 1024 <= SHARED_BYTES, "SHARED_BYTES");
static_assert(STAGES >= 2, "a fine tile holds two places at once");

// The part of the work of a thread block.
struct Work {
  int sequence, head, kv_head, first_row, num_rows, num_keys, offset;

  // The first tile that is next to a row, and those behind it.
  __device__ __forceinline__ int near(int row) const {
    return max(0, row + offset) / KEYS_PER_TILE - NEAR_TILES;
  }
};
__device__ __forceinline__ bool is_fine(int tile, int near) { return tile == 0 || tile >= near; }

// A number that is the same in all lanes, which the compiler cannot know otherwise.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(~0u, x, 0); }

// Heads take turns in groups, so that their keys and values stay in the L2 cache; in a group the
// rows with most keys come first.
__device__ __forceinline__ Work find_work(const PromptParams& params) {
  const int row_tiles = (params.query_tiles + CONSUMERS - 1) / CONSUMERS;
  const int per_group = row_tiles * params.heads_together;
  const int groups = params.num_heads / params.heads_together;
  const int group = blockIdx.x / per_group, inside = blockIdx.x % per_group;
  Work work;
  work.sequence = group / groups;
  work.head = group % groups * params.heads_together + inside % params.heads_together;
  work.kv_head = work.head / (params.num_heads / params.num_kv_heads);
  work.first_row = (row_tiles - 1 - inside / params.heads_together) * ROWS;
  const int* const counts = params.counts + 3 * work.sequence;
  work.num_rows = uniform(counts[0]);
  work.num_keys = uniform(counts[1]);
  work.offset = uniform(counts[2]);
  return work;
}

// The first tile of keys that some of `rows` rows see, and the one behind the last.
struct Tiles {
  int begin, end;
};
__device__ __forceinline__ Tiles find_tiles(const PromptParams& params, const Work& work,
                                            int first_row, int rows) {
  const int stop = min(first_row + rows, work.num_rows);  // behind the last row
  if (stop <= first_row) return {1 << 30, 0};
  const int keys = min(work.num_keys, stop + work.offset);
  const int unseen = params.window > 0 ? max(0, first_row + work.offset + 1 - params.window) : 0;
  return {unseen / KEYS_PER_TILE, (keys + KEYS_PER_TILE - 1) / KEYS_PER_TILE};
}

// The producer: copies queries, then keys and values of the tiles from the last to the first.
__device__ __forceinline__ void load_tiles(const PromptParams& params, SharedStorage& smem,
                                           const Work& work, Tiles tiles) {
  const int first_tile = work.first_row / ROWS_PER_WARPGROUP;
  const int bytes = min(CONSUMERS, params.query_tiles - first_tile) * QUERY_BYTES;
  const i64 head = (i64)work.sequence * params.num_heads + work.head;
  smem.queries_full.arrive_with(2 * bytes);
  const i64 row_tile = head * params.query_tiles + first_tile;
  const i64 kv_head = (i64)work.sequence * params.num_kv_heads + work.kv_head;
#pragma unroll
  for (int part = 0; part < 2; part++)
    copy_bulk(smem.queries[part], params.queries[part] + row_tile * QUERY_BYTES, bytes,
              smem.queries_full);
  const int near = work.near(work.first_row);
  int place = 0;
  for (int tile = tiles.end - 1; tile >= tiles.begin; tile--) {
    const i64 at = (kv_head * params.key_tiles + tile) * TILE_BYTES;
    const int parts = is_fine(tile, near) ? 2 : 1;
    for (int part = 0; part < parts; part++, place++) {
      const int stage = place % STAGES, round = place / STAGES;
      if (round) smem.keys_empty[stage].wait((round - 1) & 1);
      smem.keys_full[stage].arrive_with(TILE_BYTES);
      copy_bulk(smem.keys[stage], (part ? params.keys[1] : params.keys[0]) + at, TILE_BYTES,
                smem.keys_full[stage]);
      if (round) smem.values_empty[stage].wait((round - 1) & 1);
      smem.values_full[stage].arrive_with(TILE_BYTES);
      copy_bulk(smem.values[stage].channels, (part ? params.values[1] : params.values[0]) + at,
                TILE_BYTES, smem.values_full[stage]);
    }
  }
}

__device__ __forceinline__ float exp2_approximately(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The maximum over the four lanes that share a row.
__device__ __forceinline__ int row_maximum(int x) {
  x = max(x, __shfl_xor_sync(~0u, x, 1));
  return max(x, __shfl_xor_sync(~0u, x, 2));
}

// A thread's two rows, r and r + 8 of its warpgroup, as they are processed.
struct Rows {
  int first;                // the first one's number among the sequence's queries
  float scale[2];           // of scores, in units of log2, as the next ones
  float highest[2];         // the maximum so far
  float base[2];            // that of the tile before, or a little more: `out` is relative to it
  float total[2];           // of the weights, in the first of the four lanes
  float factor[2];          // what weights of earlier tiles are multiplied by
  float out[PARTS][32];
};

// Turns scores into packed weights. With MASKED, some rows do not see some keys of the tile, whose
// first key is `first_key`.
template <bool MASKED>
__device__ __forceinline__ void weigh(const PromptParams& params, const Work& work, Rows& rows,
                                      u32 (&scores)[SCORES], float key_scale, int first_key,
                                      int lane, u32 (&packed)[SCORES / 4]) {
  u32 unseen[2] = {0, 0};  // a bit per accumulator of the row
  if constexpr (MASKED) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int position = rows.first + 8 * h + work.offset;  // the last key that the row sees
      const int last = min(position, work.num_keys - 1);
#pragma unroll
      for (int i = 0; i < SCORES / 2; i++) {
        const int key = first_key + i / 2 * 8 + 2 * (lane % 4) + i % 2;
        const bool hidden = key > last || (params.window > 0 && key <= position - params.window);
        unseen[h] |= (u32)hidden << i;
        if (hidden) scores[4 * (i / 2) + 2 * h + i % 2] = 0x80000000u;  // the least integer
      }
    }
  }
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const float scale = rows.scale[h] * key_scale;
    int top[2];  // two chains, because each waits for its own result before
#pragma unroll
    for (int c = 0; c < 2; c++) {
      top[c] = max((int)scores[32 * c + 2 * h], (int)scores[32 * c + 2 * h + 1]);
#pragma unroll
      for (int i = 1; i < 8; i++)
        top[c] = __vimax3_s32(top[c], (int)scores[32 * c + 4 * i + 2 * h],
                              (int)scores[32 * c + 4 * i + 2 * h + 1]);
    }
    const int largest = row_maximum(max(top[0], top[1]));
    float base = rows.base[h];
    if (!MASKED || largest > 0) {  // else the row sees no key of the tile
      const float here = (float)(largest - (int)MAGIC) * scale;
      rows.highest[h] = fmaxf(rows.highest[h], here);
      base = fmaxf(here, rows.highest[h] - MAX_DROP);
    }
    const float shift = fmaf(-MAGIC_NUMBER, scale, WEIGHT_BITS - base);
    rows.factor[h] = exp2_approximately(rows.base[h] - base);
    rows.base[h] = base;
#pragma unroll
    for (int i = 0; i < SCORES / 2; i += 4) {
      float w[4];
#pragma unroll
      for (int k = 0; k < 4; k++) {
        const u32 score = scores[4 * ((i + k) / 2) + 2 * h + k % 2];
        w[k] = exp2_approximately(fmaf(__uint_as_float(score), scale, shift));
        if (MASKED && (unseen[h] >> (i + k) & 1)) w[k] = 0.0f;
      }
      // A tile's operand of 32 tokens has four registers: h, then the second sixteen tokens.
      packed[i / 8 * 4 + i / 4 % 2 * 2 + h] = pack_e4m3(w[0], w[1], w[2], w[3]);
    }
  }
}

// The place of a tile in the ring of stages.
struct Place {
  int stage;
  u32 parity;

  __device__ __forceinline__ void advance() {
    if (++stage == STAGES) {
      stage = 0;
      parity ^= 1;
    }
  }
  __device__ __forceinline__ Place next() const {
    Place place = *this;
    place.advance();
    return place;
  }
};

// Lets the producer overwrite a tile that no row of this warpgroup sees. Its warps wait for each
// other, as products would make them: one that fell two rounds behind would wait for ever.
__device__ __forceinline__ void skip_tile(SharedStorage& smem, Place place, bool leader) {
  smem.keys_full[place.stage].wait(place.parity);
  smem.values_full[place.stage].wait(place.parity);
  synchronize_warpgroup();
  if (leader) {
    smem.keys_empty[place.stage].arrive();
    smem.values_empty[place.stage].arrive();
  }
}

// Adds a tile's products of some channels, and for the last ones the sum of the weights, which
// comes twice where the values have second numbers.
template <int PART, bool FINE>
__device__ __forceinline__ void add_outputs(Rows& rows, const u32 (&packed)[SCORES / 4],
                                            const Operand<KEYS_PER_TILE>& values,
                                            const Operand<KEYS_PER_TILE>& rest) {
  constexpr bool LAST = PART == PARTS - 1;
  float out[LAST ? 36 : 32];
  constexpr u32 FIRST_BYTE = PART * 64 * KEYS_PER_TILE;
  begin_products();
  multiply_fp8<false>(out, packed, values.from(FIRST_BYTE));
#pragma unroll
  for (int k = 1; k < KEYS_PER_TILE / 32; k++)
    multiply_fp8<true>(out, packed + 4 * k, values.from(FIRST_BYTE + 32 * k));
  if constexpr (FINE) {
#pragma unroll
    for (int k = 0; k < KEYS_PER_TILE / 32; k++)
      multiply_fp8<true>(out, packed + 4 * k, rest.from(FIRST_BYTE + 32 * k));
  }
  commit_products();
  wait_for_products();
#pragma unroll
  for (int i = 0; i < 32; i++)
    rows.out[PART][i] = fmaf(rows.out[PART][i], rows.factor[i / 2 % 2], out[i]);
  if constexpr (LAST) {
    const float once = FINE ? 0.5f : 1.0f;
    rows.total[0] = fmaf(rows.total[0], rows.factor[0], out[32] * once);
    rows.total[1] = fmaf(rows.total[1], rows.factor[1], out[34] * once);
  } else {
    add_outputs<PART + 1, FINE>(rows, packed, values, rest);
  }
}

// Adds products of queries, some bytes on, and keys to the scores.
template <int FROM>
__device__ __forceinline__ void add_scores(u32 (&scores)[SCORES], const Operand<HEAD_DIM>& queries,
                                           const u8* tile) {
  const Operand<HEAD_DIM> keys(tile);
#pragma unroll
  for (int k = 0; k < HEAD_DIM / 32; k++)
    multiply_int8(scores, queries.from(FROM + 32 * k), keys.from(32 * k));
}

// One tile: scores, weights and outputs. The second numbers of a fine one lie in the next place.
template <bool FINE>
__device__ __forceinline__ void attend_tile(const PromptParams& params, const Work& work,
                                            SharedStorage& smem, Rows& rows,
                                            const Operand<HEAD_DIM>& queries,
                                            const float* key_scale, Place place, int first_key,
                                            bool masked, bool leader, int lane) {
  const Place second = place.next();
  u32 packed[SCORES / 4];
  {
    u32 scores[SCORES];
    smem.keys_full[place.stage].wait(place.parity);
    if constexpr (FINE) {
      smem.keys_full[second.stage].wait(second.parity);
#pragma unroll
      for (int i = 0; i < SCORES; i++) scores[i] = 0;
      begin_products();
      add_scores<0>(scores, queries, smem.keys[second.stage]);
      add_scores<CONSUMERS * QUERY_BYTES>(scores, queries, smem.keys[place.stage]);
      commit_products();
      wait_for_products();
#pragma unroll
      for (int i = 0; i < SCORES; i++)
        scores[i] = MAGIC + (u32)((int)(scores[i] + REST_UNITS / 2) >> REST_BITS);
    } else {
#pragma unroll
      for (int i = 0; i < SCORES; i++) scores[i] = MAGIC;
    }
    begin_products();
    add_scores<0>(scores, queries, smem.keys[place.stage]);
    commit_products();
    const float scale = __ldg(key_scale);
    wait_for_products();
    if (leader) smem.keys_empty[place.stage].arrive();
    if (FINE && leader) smem.keys_empty[second.stage].arrive();
    if (masked) weigh<true>(params, work, rows, scores, scale, first_key, lane, packed);
    else weigh<false>(params, work, rows, scores, scale, first_key, lane, packed);
  }
  smem.values_full[place.stage].wait(place.parity);
  if constexpr (FINE) smem.values_full[second.stage].wait(second.parity);
  add_outputs<0, FINE>(rows, packed, Operand<KEYS_PER_TILE>(smem.values[place.stage].channels),
                       Operand<KEYS_PER_TILE>(smem.values[second.stage].channels));
  if (leader) smem.values_empty[place.stage].arrive();
  if (FINE && leader) smem.values_empty[second.stage].arrive();
}

__device__ __forceinline__ u32 pack16(float low, float high) {
  u32 d;
  if constexpr (BF16) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

// Dequantizes a thread's outputs, adds them to those of earlier parts and writes them, as the
// result or as the state that the next part reads.
__device__ __forceinline__ void write_rows(const PromptParams& params, const Work& work,
                                           const Rows& rows, int lane) {
  const i64 head = (i64)work.sequence * params.num_heads + work.head;
  const i64 kv_head = (i64)work.sequence * params.num_kv_heads + work.kv_head;
  const float* const scales = params.value_scales + kv_head * HEAD_DIM;
  const float unit = 1.0f / (1 << (int)WEIGHT_BITS);
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int row = rows.first + 8 * h;
    float total = __shfl_sync(~0u, rows.total[h], lane & ~3) * unit;
    float top = rows.base[h], own = unit, before = 0.0f;
    if (row >= work.num_rows) continue;
    const i64 state = head * params.query_tiles * ROWS_PER_WARPGROUP + row;
    if (params.query_offsets) top += params.query_offsets[state];
    if (rows.base[h] == LOWEST) top = LOWEST;
    if (!params.first) {
      const float other = params.state_top[state], maximum = fmaxf(top, other);
      const float shrink = exp2_approximately(top - maximum);
      before = exp2_approximately(other - maximum);
      own *= shrink;
      total = fmaf(params.state_total[state], before, total * shrink);
      top = maximum;
    }
    float norm = 1.0f;
    if (params.out) norm = total > 0.0f ? 1.0f / total : 0.0f;
    else if (lane % 4 == 0) {
      params.state_top[state] = top;
      params.state_total[state] = total;
    }
    i64 to = 0;
    if (params.out) {
      const int column =
          params.columns ? params.columns[(i64)work.sequence * params.columns_stride + row] : row;
      to = (((i64)work.sequence * params.num_columns + column) * params.num_heads + work.head) *
           HEAD_DIM;
    }
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 8; n++) {
      const int channel = 8 * n + 2 * (lane % 4);
      float2* const kept = (float2*)(params.state_out + state * HEAD_DIM + channel);
      float x = rows.out[n / 8][4 * (n % 8) + 2 * h] * own * scales[channel];
      float y = rows.out[n / 8][4 * (n % 8) + 2 * h + 1] * own * scales[channel + 1];
      if (!params.first) {
        const float2 earlier = *kept;
        x = fmaf(earlier.x, before, x);
        y = fmaf(earlier.y, before, y);
      }
      if (params.out) *(u32*)(params.out + to + channel) = pack16(x * norm, y * norm);
      else *kept = make_float2(x, y);
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attend_prompt(const __grid_constant__ PromptParams params) {
  DYNAMIC_SHARED(raw, SHARED_BYTES);
  // Swizzled operands begin at multiples of 1024 bytes.
  SharedStorage& smem = *(SharedStorage*)(raw + ((1024 - (shared_address(raw) & 1023)) & 1023));
  const Work work = find_work(params);
  if (work.first_row >= work.num_rows) return;
  const Tiles tiles = find_tiles(params, work, work.first_row, ROWS);
  if (threadIdx.x == 0) {
    smem.queries_full.init(1);
    for (int i = 0; i < STAGES; i++) {
      smem.keys_full[i].init(1);
      smem.values_full[i].init(1);
      smem.keys_empty[i].init(CONSUMERS);
      smem.values_empty[i].init(CONSUMERS);
    }
    fence_barriers();
  }
  for (int i = threadIdx.x; i < STAGES * ONES_BYTES / 4; i += THREADS) {
    const int word = i % (ONES_BYTES / 4);
    ((u32*)smem.values[i / (ONES_BYTES / 4)].ones)[word] =
        word < KEYS_PER_TILE / 4 ? E4M3_ONES : 0;
  }
  fence_operands();
  __syncthreads();
  const int warpgroup = uniform(threadIdx.x / 128);
  if (warpgroup == 0) {
    give_registers_back<24>();
    if (threadIdx.x == 0) load_tiles(params, smem, work, tiles);
    return;
  }
  take_registers<CONSUMERS == 3 ? 160 : 240>();
  const int consumer = warpgroup - 1, lane = threadIdx.x % 32;
  const bool leader = threadIdx.x % 128 == 0;
  const int first_row = work.first_row + ROWS_PER_WARPGROUP * consumer;
  const Tiles own = find_tiles(params, work, first_row, ROWS_PER_WARPGROUP);
  Rows rows;
  rows.first = first_row + threadIdx.x % 128 / 32 * 16 + lane / 4;
  const float* const query_scales =
      params.query_scales +
      ((i64)work.sequence * params.num_heads + work.head) * params.query_tiles * ROWS_PER_WARPGROUP;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int row = rows.first + 8 * h;
    rows.scale[h] = row < work.num_rows ? query_scales[row] : 0.0f;
    rows.highest[h] = rows.base[h] = LOWEST;
    rows.total[h] = 0.0f;
  }
#pragma unroll
  for (int i = 0; i < PARTS; i++)
#pragma unroll
    for (int k = 0; k < 32; k++) rows.out[i][k] = 0.0f;
  const float* const key_scales =
      params.key_scales +
      ((i64)work.sequence * params.num_kv_heads + work.kv_head) * params.key_tiles;
  const Operand<HEAD_DIM> queries(smem.queries[0][consumer]);
  // Tiles from `full.end` on, and those before `full.begin`, have keys that some row does not see.
  const int last_seen = first_row + work.offset, window_begin = last_seen + 64 - params.window;
  Tiles full;
  full.end = min(last_seen + 1, work.num_keys) / KEYS_PER_TILE;
  full.begin = params.window > 0 ? (max(0, window_begin) + KEYS_PER_TILE - 1) / KEYS_PER_TILE : 0;
  smem.queries_full.wait(0);
  Place place = {0, 0};
  int tile = tiles.end - 1;
  // Tiles that are fine for some row of the block take two places, of which other rows skip one.
  const int near = work.near(work.first_row), own_near = work.near(first_row);
#pragma unroll 1
  for (; tile >= tiles.begin; tile--) {
    const bool seen = tile >= own.begin && tile < own.end, fine = is_fine(tile, own_near);
    const bool masked = tile >= full.end || tile < full.begin;
    const int first_key = tile * KEYS_PER_TILE;
    if (seen && fine)
      attend_tile<true>(params, work, smem, rows, queries, key_scales + tile, place, first_key,
                        masked, leader, lane);
    else if (seen)
      attend_tile<false>(params, work, smem, rows, queries, key_scales + tile, place, first_key,
                         masked, leader, lane);
    else
      skip_tile(smem, place, leader);
    place.advance();
    if (!is_fine(tile, near)) continue;
    if (!seen || !fine) skip_tile(smem, place, leader);
    place.advance();
  }
  write_rows(params, work, rows, lane);
}
