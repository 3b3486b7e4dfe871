// Phase 2 of the decode kernel with allocated codes: scores from packed keys.
#pragma once

#include "allocated_codes.cuh"
#include "decode_blocks.cuh"
#include "decode_softmax.cuh"

// Copies the rotations inside a chunk in the order of the head's pairs.
__device__ __forceinline__ void copy_rope(const DecodeParams& params, SharedStorage& smem,
                                          int kv_head_idx) {
  const u32* const pairs =
      (const u32*)((const HeadTable*)(params.head_tables + (i64)kv_head_idx * HEAD_TABLE_STRIDE))
          ->pairs;
  const u32* const rope = (const u32*)params.rope;  // {cosine, sine} by token and frequency
  thread_block_loop<CHUNK_SIZE * HALF_DIM / 2>([&](int i) {
    const int two = i % (HALF_DIM / 2), token = i / (HALF_DIM / 2);
    const u32 both = __ldg(pairs + two);
    const u32 first = __ldg(rope + token * HALF_DIM + (both & 0xFFFF)),
              second = __ldg(rope + token * HALF_DIM + (both >> 16));
    *(uint2*)(smem.tables.rope + rope_operands(two / 4, token, two % 4)) =
        make_uint2(permute_bytes(first, second, 0x5410), permute_bytes(first, second, 0x7632));
  });
}

// Rotates a warp's queries back by a chunk's first position and writes them as fp16 operands. A
// lane takes two pairs at a time, or of grouped queries only some of the queries.
__device__ __forceinline__ void unrotate_queries(const SharedStorage& smem,
                                                 uint4 (*to)[QUERY_STRIDE], const float* phases,
                                                 int lane_idx) {
  constexpr int TWOS = HALF_DIM / 2, LANES_PER_TWO = TWOS >= 32 || GROUP_SIZE == 1 ? 1 : 2;
#pragma unroll
  for (int item = lane_idx; item < TWOS * LANES_PER_TWO; item += 32) {
    const int two = item % TWOS;
    const u32 both = ((const u32*)smem.head_table.pairs)[two];
    const int f = both & 0xFFFF, k = both >> 16;
    const float c[2] = {cosine(phases[f]), cosine(phases[k])},
                s[2] = {sine(phases[f]), sine(phases[k])};
#pragma unroll
    for (int q = item / TWOS; q < GROUP_SIZE; q += LANES_PER_TWO) {
      const float* const query = smem.query[q];
      const float x[2] = {query[f], query[k]}, y[2] = {query[f + HALF_DIM], query[k + HALF_DIM]};
      ((uint2*)to[q])[two] =
          make_uint2(pack2(fmaf(x[0], c[0], y[0] * s[0]), fmaf(x[1], c[1], y[1] * s[1])),
                     pack2(fmaf(y[0], c[0], -x[0] * s[0]), fmaf(y[1], c[1], -x[1] * s[1])));
    }
  }
}

// Adds the products of a tile of channels to the scores of a chunk's four tiles of tokens.
template <int WIDTH>
__device__ __forceinline__ void multiply_key_tile(float (&scores)[TILES_PER_CHUNK][4],
                                                  const u32 (&codes)[MAX_WIDTH],
                                                  const Levels* table, const uint4& operands,
                                                  const uint2& query, const u8* rope) {
  u32 words[WIDTH];
#pragma unroll
  for (int k = 0; k < WIDTH; k++) words[k] = codes[k];
  Levels levels;
  if constexpr (looked_up(WIDTH, KEYS)) levels = table[WIDTH - MIN_LOOKED_UP];
#pragma unroll
  for (int m = 0; m < TILES_PER_CHUNK; m++) {
    u32 a[2], b[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      u32 x, y;
      if constexpr (looked_up(WIDTH, KEYS)) {
        levels.look_up(selectors(words, m) >> (16 * h), x, y);
      } else {  // numbers from 1 to 2, whose first fraction bits are the code; of one bit, 1 and -1
        constexpr int TO = WIDTH == 1 ? 15 : 10 - WIDTH;
        x = item_codes<WIDTH, TO>(words, 4 * m + 2 * h) | 0x3C003C00u;
        y = item_codes<WIDTH, TO>(words, 4 * m + 2 * h + 1) | 0x3C003C00u;
      }
      x = fma2(x, operands.x, operands.z);
      y = fma2(y, operands.y, operands.w);
      const uint2 rotation = *(const uint2*)(rope + (16 * m + 8 * h) * 32);  // cosines, sines
      a[h] = fma2(neg2(y), rotation.y, mul2(x, rotation.x));
      b[h] = fma2(x, rotation.y, mul2(y, rotation.x));
    }
    mma_m16n8k16(scores[m], a[0], a[1], b[0], b[1], query.x, query.y);
  }
}

// The widths of the tiles of keys, four bits each.
__device__ __forceinline__ u64 packed_widths(const HeadTable& table) {
  u64 widths = 0;
#pragma unroll
  for (int tile = 0; tile < CHANNEL_TILES; tile++)
    widths |= (u64)table.key_widths[tile] << (4 * tile);
  return widths;
}

// Phase 2: scores of the warp's chunks, and their maxima.
__device__ __forceinline__ void compute_scores(const DecodeParams& params, SharedStorage& smem,
                                               int num_chunks, int warp_idx, int lane_idx) {
  const int g = lane_idx / 4, t = lane_idx % 4;
  // Columns beyond the group repeat its last query; nobody reads what comes of them.
  const uint2* const query =
      (const uint2*)smem.tables.query[warp_idx][g < GROUP_SIZE ? g : GROUP_SIZE - 1] + t;
  const u8* const rope = smem.tables.rope + lane_idx * 8;
  const Levels* const levels = smem.head_table.key_levels;
  float maximum[2] = {NO_SCORE, NO_SCORE};
  const u64 widths = packed_widths(smem.head_table);
  const u8* codes = chunk_codes(smem, KEYS, warp_idx, num_chunks) + lane_idx * 4;
  u32 ahead[MAX_WIDTH];  // the words of the next tile
  load_codes(ahead, (int)widths & 15, codes);
#pragma unroll 1
  for (int kv_chunk_idx = warp_idx; kv_chunk_idx < num_chunks; kv_chunk_idx += NUM_WARPS) {
    if (kv_chunk_idx + NUM_WARPS < num_chunks) {
      prefetch_chunk(chunk_codes(smem, KEYS, kv_chunk_idx + NUM_WARPS, num_chunks),
                     chunk_bytes(smem.head_table, KEYS), lane_idx);
      prefetch_chunk(chunk_codes(smem, VALUES, kv_chunk_idx + NUM_WARPS, num_chunks),
                     chunk_bytes(smem.head_table, VALUES), lane_idx);
    }
    unrotate_queries(smem, smem.tables.query[warp_idx], smem.tables.phases[kv_chunk_idx], lane_idx);
    __syncwarp();
    float scores[TILES_PER_CHUNK][4];
#pragma unroll
    for (int m = 0; m < TILES_PER_CHUNK; m++)
      scores[m][0] = scores[m][1] = scores[m][2] = scores[m][3] = 0.0f;
    const u8* const next_chunk =
        chunk_codes(smem, KEYS, kv_chunk_idx + NUM_WARPS, num_chunks) + lane_idx * 4;
    u64 rest = widths;
#pragma unroll 1
    for (int tile = 0; tile < CHANNEL_TILES; tile++) {
      u32 words[MAX_WIDTH];
#pragma unroll
      for (int k = 0; k < MAX_WIDTH; k++) words[k] = ahead[k];
      const int width = (int)rest & 15;
      const bool last = tile == CHANNEL_TILES - 1;
      rest = last ? widths : rest >> 4;
      codes = last ? next_chunk : codes + width * PLANE_BYTES;
      load_codes(ahead, (int)rest & 15, codes);
      const uint4 operands = smem.head_table.key_operands[tile][t];
      const uint2 tile_query = query[tile * 4];
      const u8* const turns = rope + tile * (CHUNK_SIZE * 32);
      switch (width) {
        case 1:
          multiply_key_tile<1>(scores, words, levels, operands, tile_query, turns);
          break;
        case 2:
          multiply_key_tile<2>(scores, words, levels, operands, tile_query, turns);
          break;
        case 3:
          multiply_key_tile<3>(scores, words, levels, operands, tile_query, turns);
          break;
        case 4:
          multiply_key_tile<4>(scores, words, levels, operands, tile_query, turns);
          break;
        case 5:
          multiply_key_tile<5>(scores, words, levels, operands, tile_query, turns);
          break;
        default:
          multiply_key_tile<6>(scores, words, levels, operands, tile_query, turns);
      }
    }
    const float unit = HAS_OUTLIERS ? smem.score_units[kv_chunk_idx / CHUNKS_PER_BLOCK] : 0.0f;
    float* const to = &smem.score[2 * t < GROUP_SIZE ? 2 * t : 0][kv_chunk_idx * CHUNK_SIZE + g];
#pragma unroll
    for (int m = 0; m < TILES_PER_CHUNK; m++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float* const place = to + i % 2 * SCORE_STRIDE + 16 * m + i / 2 * 8;
        float x = scores[m][i];
        if (2 * t + i % 2 < GROUP_SIZE) {
          if constexpr (HAS_OUTLIERS) x = fmaf((float)*(const int*)place, unit, x);
          x = soft_capped(params, x);
          *place = x;
        }
        maximum[i % 2] = fmaxf(maximum[i % 2], x);
      }
    __syncwarp();  // the queries are overwritten for the next chunk
  }
  share_maxima(smem, maximum, warp_idx, g, t);
}
