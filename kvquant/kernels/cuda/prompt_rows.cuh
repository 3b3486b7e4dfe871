// Rows of queries in the attention of prompts: a warpgroup's work on a tile, and its results.
#pragma once

#include "prompt_tiles.cuh"

constexpr u32 MAGIC = 0x4B400000u;
constexpr float MAGIC_NUMBER = 12582912.0f;
constexpr float WEIGHT_BITS = 8.0f, MAX_DROP = 40.0f;
constexpr float LOWEST = -1e30f;  // stands for a maximum of nothing
constexpr int SCORES = KEYS_PER_TILE / 2, PARTS = HEAD_DIM / 64;  // step 4 of prompt_attention.cu
constexpr int REST_UNITS = 1 << REST_BITS;  // second numbers per unit of the first

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
