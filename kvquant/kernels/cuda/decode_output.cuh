// Phase 5 of the decode kernel: the output from packed values.
#pragma once

#include "decode_blocks.cuh"
#include "decode_codes.cuh"

// Adds the weighted values of a tile of 16 tokens: channels in rows, queries 2t, 2t + 1 in columns.
__device__ __forceinline__ void multiply_value_tile(float (&out)[HEAD_DIM / 16][4],
                                                    const ValueCodes& codes, const Levels& levels,
                                                    u32 w0, u32 w1, int g) {
#pragma unroll
  for (int w = 0; w < VALUE_WORDS; w++)
#pragma unroll
    for (int j = 0; j < 2; j++) {
      // A byte with the codes of two tokens: of channels c (first) and c + HALF_DIM (second).
      u32 mixed[2][2];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const u32 s0 = codes.selector(h, 0, w, j, g), s1 = codes.selector(h, 1, w, j, g);
        mixed[0][h] = select_bits(0x0F0F0F0Fu, s0, s1 << 4);
        mixed[1][h] = select_bits(0x0F0F0F0Fu, s0 >> 4, s1);
      }
#pragma unroll
      for (int n = 0; n < 2; n++)
#pragma unroll
        for (int half = 0; half < VALUE_HALVES; half++) {
          u32 h0, l0, h1, l1;
          levels.look_up(mixed[n][0] >> (16 * half), h0, l0);
          levels.look_up(mixed[n][1] >> (16 * half), h1, l1);
          const int tile = ((w * 2 + j) * 2 + n) * VALUE_HALVES + half;
          mma_m16n8k16(out[tile], permute_bytes(l0, h0, 0x5140), permute_bytes(l0, h0, 0x7362),
                       permute_bytes(l1, h1, 0x5140), permute_bytes(l1, h1, 0x7362), w0, w1);
        }
    }
}

// The weighted values of the warp's chunks, as accumulators.
__device__ __forceinline__ void accumulate_values(const SharedStorage& smem, int num_chunks,
                                                  int warp_idx, int lane_idx,
                                                  float (&out)[HEAD_DIM / 16][4]) {
  const int g = lane_idx / 4, t = lane_idx % 4;
  Levels levels;
  levels.load(smem.head_table.levels[VALUES], lane_idx);
  const int low = value_low_offset(g, t), high = value_high_offset(g, t);
  const uint2* const group_weights = smem.weight[g < GROUP_SIZE ? g : GROUP_SIZE - 1] + t;
  ValueCodes even, odd;
  const u8* v_codes = chunk_codes(smem, VALUES, warp_idx, num_chunks);
  even.load(v_codes + low, v_codes + high);
#pragma unroll 1
  for (int kv_chunk_idx = warp_idx; kv_chunk_idx < num_chunks; kv_chunk_idx += NUM_WARPS) {
    const u8* next_codes = chunk_codes(smem, VALUES, kv_chunk_idx + NUM_WARPS, num_chunks);
    const uint2* const weights = group_weights + kv_chunk_idx * PAIRS_PER_CHUNK;
    const u8 *const low_codes = v_codes + low, *const high_codes = v_codes + high;
#pragma unroll
    for (int m = 0; m < TILES_PER_CHUNK; m += 2) {
      odd.load(low_codes + (16 * m + 16) * TOKEN_BYTES, high_codes + (16 * m + 16) * TOKEN_BYTES);
      multiply_value_tile(out, even, levels, weights[8 * m].x, weights[8 * m + 4].x, g);
      if (m + 2 < TILES_PER_CHUNK)
        even.load(low_codes + (16 * m + 32) * TOKEN_BYTES,
                  high_codes + (16 * m + 32) * TOKEN_BYTES);
      else if (kv_chunk_idx + NUM_WARPS < num_chunks)
        even.load(next_codes + low, next_codes + high);
      multiply_value_tile(out, odd, levels, weights[8 * m + 8].x, weights[8 * m + 12].x, g);
    }
    v_codes = next_codes;
  }
}

// Writes a warp's accumulators to shared memory, by query and channel.
__device__ __forceinline__ void store_accumulators(SharedStorage& smem,
                                                   const float (&out)[HEAD_DIM / 16][4],
                                                   int warp_idx, int g, int t) {
#pragma unroll
  for (int tile = 0; tile < HEAD_DIM / 16; tile++) {
    const int half = tile % VALUE_HALVES, n = tile / VALUE_HALVES % 2,
              j = tile / VALUE_HALVES / 2 % 2, w = tile / VALUE_HALVES / 4;
    const int c = VALUE_BYTES * g + 4 * w + 2 * half + (HEAD_DIM / 4) * j + HALF_DIM * n;
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const int q = 2 * t + k % 2;
      if (q < GROUP_SIZE) smem.out[warp_idx][q][c + k / 2] = out[tile][k];
    }
  }
}
