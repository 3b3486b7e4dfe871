// Phase 2 of the decode kernel: scores from packed keys.
#pragma once

#include "decode_blocks.cuh"
#include "decode_codes.cuh"
#include "decode_softmax.cuh"

// Begins to copy the rotations inside a chunk, which all heads share.
__device__ __forceinline__ void copy_rope(const DecodeParams& params, SharedStorage& smem, int) {
  thread_block_loop<CHUNK_SIZE * KEY_SELECTORS * 4>([&](int i) {
    cp_async_16(
        smem.tables.rope + i / (KEY_SELECTORS * 4) * ROPE_STRIDE + i % (KEY_SELECTORS * 4) * 16,
        (const uint4*)params.rope + i);
  });
}

// Rotates a warp's queries back by a chunk's first position and writes them as fp16 operands. A
// lane takes four neighbouring frequencies at a time, or of grouped queries only some of the
// queries.
__device__ __forceinline__ void unrotate_queries(const SharedStorage& smem,
                                                 uint4 (*to)[QUERY_STRIDE], const float* phases,
                                                 int lane_idx) {
  constexpr int QUADS = HALF_DIM / 4;
  constexpr int LANES_PER_QUAD = QUADS >= 32 || GROUP_SIZE == 1  ? 1
                                 : QUADS == 16 || GROUP_SIZE < 4 ? 2
                                                                 : 4;
#pragma unroll
  for (int item = lane_idx; item < QUADS * LANES_PER_QUAD; item += 32) {
    const int quad = item % QUADS, f = 4 * quad;
    const float4 phase = *(const float4*)(phases + f);
    const float c[4] = {cosine(phase.x), cosine(phase.y), cosine(phase.z), cosine(phase.w)};
    const float s[4] = {sine(phase.x), sine(phase.y), sine(phase.z), sine(phase.w)};
    const int j = quad / (HEAD_DIM / 16), rest = quad % (HEAD_DIM / 16);
    const int operand = (rest % KEY_WORDS * 2 + j) * 4 + rest / KEY_WORDS;
#pragma unroll
    for (int q = item / QUADS; q < GROUP_SIZE; q += LANES_PER_QUAD) {
      const float4 x = *(const float4*)&smem.query[q][f],
                   y = *(const float4*)&smem.query[q][f + HALF_DIM];
      const float a[4] = {x.x, x.y, x.z, x.w}, b[4] = {y.x, y.y, y.z, y.w};
      float low[4], high[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        low[i] = fmaf(a[i], c[i], b[i] * s[i]);
        high[i] = fmaf(b[i], c[i], -a[i] * s[i]);
      }
      to[q][operand] = make_uint4(pack2(low[0], low[1]), pack2(high[0], high[1]),
                                  pack2(low[2], low[3]), pack2(high[2], high[3]));
    }
  }
}

// What all tiles of keys need for a selector word: scales and zeros of the channels, and queries.
//
// \tparam IN_REGISTERS  whether they stay in registers; else each use reads shared memory
template <bool IN_REGISTERS> struct KeyOperands {
  uint4 scales[KEY_SELECTORS], zeros[KEY_SELECTORS], queries[KEY_SELECTORS];

  __device__ __forceinline__ KeyOperands(const SharedStorage& smem, int t) {
#pragma unroll
    for (int s = 0; s < KEY_SELECTORS; s++)
      scales[s] = smem.head_table.key_operands[s][t][0],
      zeros[s] = smem.head_table.key_operands[s][t][1];
  }
  __device__ __forceinline__ void set_queries(const uint4* unrotated) {
#pragma unroll
    for (int s = 0; s < KEY_SELECTORS; s++) queries[s] = unrotated[s * 4];
  }
  __device__ __forceinline__ void get(int s, uint4& scale, uint4& zero, uint4& query) const {
    scale = scales[s], zero = zeros[s], query = queries[s];
  }
};
template <> struct KeyOperands<false> {
  const uint4 (*channels)[4][2];
  const uint4* queries;

  __device__ __forceinline__ KeyOperands(const SharedStorage& smem, int t)
      : channels((const uint4 (*)[4][2])smem.head_table.key_operands[0][t]) {}
  __device__ __forceinline__ void set_queries(const uint4* unrotated) { queries = unrotated; }
  __device__ __forceinline__ void get(int s, uint4& scale, uint4& zero, uint4& query) const {
    scale = channels[s][0][0], zero = channels[s][0][1], query = queries[s * 4];
  }
};
typedef KeyOperands<KEY_SELECTORS <= 4> HeldOperands;

// Dequantizes and rotates the four channel pairs of one selector: operands of two products.
__device__ __forceinline__ void dequantize_keys(u32 (&first)[2], u32 (&second)[2], u32 selector,
                                                const Levels& levels, const uint4& scale,
                                                const uint4& zero, const u8* rope) {
  u32 h0, l0, h1, l1;
  levels.look_up(selector, h0, l0);
  levels.look_up(selector >> 16, h1, l1);
  // Low nibbles: channels c, c + 1 and c + 2, c + 3. High nibbles: those + HALF_DIM.
  const u32 xa = fma2(permute_bytes(l0, h0, 0x6240), scale.x, zero.x);
  const u32 xb = fma2(permute_bytes(l1, h1, 0x6240), scale.y, zero.y);
  const u32 za = fma2(permute_bytes(l0, h0, 0x7351), scale.z, zero.z);
  const u32 zb = fma2(permute_bytes(l1, h1, 0x7351), scale.w, zero.w);
  const uint4 rotation = *(const uint4*)rope;  // cosines of two channel pairs, then sines
  first[0] = fma2(neg2(za), rotation.z, mul2(xa, rotation.x));
  first[1] = fma2(xa, rotation.z, mul2(za, rotation.x));
  second[0] = fma2(neg2(zb), rotation.w, mul2(xb, rotation.y));
  second[1] = fma2(xb, rotation.w, mul2(zb, rotation.y));
}

// Scores of tiles of 16 tokens: of queries 2t, 2t + 1 and tokens g, g + 8, in the order of an
// accumulator.
//
// \tparam N  number of tiles
template <int N>
__device__ __forceinline__ void multiply_key_tiles(float (&scores)[N][4],
                                                   const HeldOperands& operands,
                                                   const KeyCodes (&codes)[N], const Levels& levels,
                                                   const u8* rope, int t) {
#pragma unroll
  for (int k = 0; k < N; k++) scores[k][0] = scores[k][1] = scores[k][2] = scores[k][3] = 0.0f;
#pragma unroll
  for (int w = 0; w < KEY_WORDS; w++)
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const int s = w * 2 + j;
      uint4 scale, zero, query;
      operands.get(s, scale, zero, query);
#pragma unroll
      for (int k = 0; k < N; k++) {
        u32 first[2][2], second[2][2];
#pragma unroll
        for (int h = 0; h < 2; h++)
          dequantize_keys(first[h], second[h], codes[k].selector(h, w, j, t), levels, scale, zero,
                          rope + (16 * k + 8 * h) * ROPE_STRIDE + s * 64);
        mma_m16n8k16(scores[k], first[0][0], first[1][0], first[0][1], first[1][1], query.x,
                     query.y);
        mma_m16n8k16(scores[k], second[0][0], second[1][0], second[0][1], second[1][1], query.z,
                     query.w);
      }
    }
}

// Tiles of keys that a warp takes together.
constexpr int TILES_PER_STEP = 2 * KEY_TILES <= TILES_PER_CHUNK ? KEY_TILES : TILES_PER_CHUNK / 2;

// The scores of a thread's tiles in shared memory, where their corrections wait.
struct ScoreTiles {
  float* const scores;  // of the chunk's token g and query 2t
  const float unit;     // of the corrections
  const int t;
  int change[TILES_PER_STEP][4];

  __device__ __forceinline__ void load_changes(int tile) {
    if constexpr (HAS_OUTLIERS)
#pragma unroll
      for (int k = 0; k < TILES_PER_STEP; k++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          if (2 * t + i % 2 < GROUP_SIZE)
            change[k][i] =
                *(const int*)(scores + i % 2 * SCORE_STRIDE + 16 * (tile + k) + i / 2 * 8);
  }
  __device__ __forceinline__ void store(const DecodeParams& params,
                                        const float (&raw)[TILES_PER_STEP][4], int tile,
                                        float (&maximum)[2]) const {
#pragma unroll
    for (int k = 0; k < TILES_PER_STEP; k++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float x = raw[k][i];
        if constexpr (HAS_OUTLIERS) x = fmaf((float)change[k][i], unit, x);
        x = soft_capped(params, x);
        if (2 * t + i % 2 < GROUP_SIZE)
          scores[i % 2 * SCORE_STRIDE + 16 * (tile + k) + i / 2 * 8] = x;
        maximum[i % 2] = fmaxf(maximum[i % 2], x);
      }
  }
};

// Phase 2: scores of the warp's chunks, and their maxima.
__device__ __forceinline__ void compute_scores(const DecodeParams& params, SharedStorage& smem,
                                               int num_chunks, int warp_idx, int lane_idx) {
  const int g = lane_idx / 4, t = lane_idx % 4;
  Levels levels;
  levels.load(smem.head_table.levels[KEYS], lane_idx);
  // Columns beyond the group repeat its last query; nobody reads what comes of them.
  const uint4* query = smem.tables.query[warp_idx][g < GROUP_SIZE ? g : GROUP_SIZE - 1] + t;
  const u8* rope = smem.tables.rope + g * ROPE_STRIDE + t * 16;
  float maximum[2] = {NO_SCORE, NO_SCORE};
  HeldOperands operands(smem, t);
  KeyCodes even[TILES_PER_STEP], odd[TILES_PER_STEP];
  auto load = [&](KeyCodes(&codes)[TILES_PER_STEP], const u8* from) {
#pragma unroll
    for (int k = 0; k < TILES_PER_STEP; k++) codes[k].load(from + 16 * k * TOKEN_BYTES, g, t);
  };
  const u8* k_codes = chunk_codes(smem, KEYS, warp_idx, num_chunks);
  load(even, k_codes);
#pragma unroll 1
  for (int kv_chunk_idx = warp_idx; kv_chunk_idx < num_chunks; kv_chunk_idx += NUM_WARPS) {
    const u8* next_codes = chunk_codes(smem, KEYS, kv_chunk_idx + NUM_WARPS, num_chunks);
    if (kv_chunk_idx + NUM_WARPS < num_chunks) {
      prefetch_chunk(next_codes, CHUNK_SIZE * TOKEN_BYTES, lane_idx);
      prefetch_chunk(chunk_codes(smem, VALUES, kv_chunk_idx + NUM_WARPS, num_chunks),
                     CHUNK_SIZE * TOKEN_BYTES, lane_idx);
    }
    unrotate_queries(smem, smem.tables.query[warp_idx], smem.tables.phases[kv_chunk_idx], lane_idx);
    __syncwarp();
    operands.set_queries(query);
    ScoreTiles tiles{&smem.score[2 * t < GROUP_SIZE ? 2 * t : 0][kv_chunk_idx * CHUNK_SIZE + g],
                     HAS_OUTLIERS ? smem.score_units[kv_chunk_idx / CHUNKS_PER_BLOCK] : 0.0f,
                     t,
                     {}};
#pragma unroll 1
    for (int m = 0; m < TILES_PER_CHUNK; m += 2 * TILES_PER_STEP) {
      const bool last = m + 2 * TILES_PER_STEP >= TILES_PER_CHUNK;
      float scores[TILES_PER_STEP][4];
      load(odd, k_codes + 16 * (m + TILES_PER_STEP) * TOKEN_BYTES);
      tiles.load_changes(m);  // before the products, which hide the waiting
      multiply_key_tiles(scores, operands, even, levels, rope + 16 * m * ROPE_STRIDE, t);
      tiles.store(params, scores, m, maximum);
      if (!last || kv_chunk_idx + NUM_WARPS < num_chunks)
        load(even, last ? next_codes : k_codes + 16 * (m + 2 * TILES_PER_STEP) * TOKEN_BYTES);
      tiles.load_changes(m + TILES_PER_STEP);
      multiply_key_tiles(scores, operands, odd, levels,
                         rope + 16 * (m + TILES_PER_STEP) * ROPE_STRIDE, t);
      tiles.store(params, scores, m + TILES_PER_STEP, maximum);
    }
    __syncwarp();  // the queries are overwritten for the next chunk
    k_codes = next_codes;
  }
  share_maxima(smem, maximum, warp_idx, g, t);
}
