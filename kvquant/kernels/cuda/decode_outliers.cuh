// Phase 1 of the decode kernel: exact outliers of keys.
//
// A position is token * HEAD_DIM + channel within a block. Outliers are taken in rounds of one per
// lane; the loads of two rounds come before the additions, which loads cannot pass.
#pragma once

#include "decode_blocks.cuh"

// The largest magnitude of the outliers of one side of the warp's blocks.
__device__ __forceinline__ u32 largest_outlier(const SharedStorage& smem, int side, int num_blocks,
                                               int warp_idx, int lane_idx) {
  u32 largest = 0;
#pragma unroll 1
  for (int j = 0; j < MAX_BLOCKS_PER_WARP; j++) {
    const int block_idx = warp_idx + j * NUM_WARPS;
    if (block_idx >= num_blocks) break;
    const OutlierView outliers(smem.blocks[block_idx], smem.staged[block_idx], side);
#pragma unroll
    for (int r = 0; r < OUTLIER_ROUNDS; r++)
      if (r * 32 + lane_idx < outliers.count)
        largest = max(largest, (u32)(outliers.staged_values[r * 32 + lane_idx] & 0x7FFF));
#pragma unroll 1
    for (int i = STAGED_OUTLIERS + lane_idx; i < outliers.count; i += 32)
      largest = max(largest, (u32)(__ldg(outliers.values + i) & 0x7FFF));
  }
  return __reduce_max_sync(~0u, largest);
}

// How outliers of keys change the scores of one block.
struct ScoreCorrection {
  SharedStorage& smem;
  const int block_idx;
  const float inverse;  // of the unit, times the scale of the scores

  // The exact key minus the dequantized one, rotated, in units: factors of cosine and sine. An
  // outlier lies outside the range, so its dense code is that of an end.
  __device__ __forceinline__ float2 residual(int position, float x) const {
    const int token = position / HEAD_DIM, c = position % HEAD_DIM;
    const int chunk = CHUNKS_PER_BLOCK > 1 ? token / CHUNK_SIZE : 0;
    const KeyChannel channel = smem.k_channels[c];
    const float low = low_half(channel.level_ends), high = high_half(channel.level_ends);
    const float d = (x - (x + x > low + high ? high : low)) * inverse;
    const float angle =
        fmaf((float)(token - chunk * CHUNK_SIZE), channel.theta,
             smem.tables.phases[block_idx * CHUNKS_PER_BLOCK + chunk][c % HALF_DIM]);
    return make_float2(d * cosine(angle), d * sine(angle));
  }
  __device__ __forceinline__ void add(int position, float2 d, const QueryPair& pair) const {
#pragma unroll
    for (int q = 0; q < GROUP_SIZE; q++) {
      const float a = load16((u16)(pair.query[q] & 0xFFFF)), b = load16((u16)(pair.query[q] >> 16));
      atomicAdd(&smem.score_change[q][block_idx * BLOCK_SIZE + position / HEAD_DIM],
                round_to_int(b, d.y, a, d.x));
    }
  }
  __device__ __forceinline__ void add_all(const OutlierView& outliers, int lane_idx) const {
#pragma unroll
    for (int r = 0; r < OUTLIER_ROUNDS; r += 2) {
      const int i = r * 32 + lane_idx, k = i + 32;
      if (r * 32 >= outliers.count) break;
      const int first = i < outliers.count ? (int)outliers.staged_positions[i] : 0;
      const float2 first_residual = residual(first, load16(outliers.staged_values[i]));
      const QueryPair first_pair = smem.query_pairs[first % HEAD_DIM];
      if (r + 1 < OUTLIER_ROUNDS && (r + 1) * 32 < outliers.count) {
        const int second = k < outliers.count ? (int)outliers.staged_positions[k] : 0;
        const float2 second_residual = residual(second, load16(outliers.staged_values[k]));
        const QueryPair second_pair = smem.query_pairs[second % HEAD_DIM];
        if (k < outliers.count) add(second, second_residual, second_pair);
      }
      if (i < outliers.count) add(first, first_residual, first_pair);
    }
#pragma unroll 1
    for (int i = STAGED_OUTLIERS + lane_idx; i < outliers.count; i += 32) {
      const int position = (int)__ldg(outliers.positions + i);
      add(position, residual(position, load16(__ldg(outliers.values + i))),
          smem.query_pairs[position % HEAD_DIM]);
    }
  }
};

// Phase 1: corrections of the scores of the warp's blocks, in a unit of the warp.
__device__ __forceinline__ void correct_scores(SharedStorage& smem, int num_blocks, int warp_idx,
                                               int lane_idx, float score_scale) {
  // An outlier differs from its level by no more than the largest of both.
  const float reach =
      sqrtf(warp_max(lane_idx < NUM_WARPS ? smem.query_reach[lane_idx] : 0.0f)) * 1.01f;
  const float bound = load16((u16)largest_outlier(smem, KEYS, num_blocks, warp_idx, lane_idx)) +
                      smem.head_table.largest_key;
  const float unit = bound * reach * score_scale * SCORE_UNIT;
  const float inverse = unit > 1e-30f ? score_scale / unit : 0.0f;
#pragma unroll 1
  for (int j = 0; j < MAX_BLOCKS_PER_WARP; j++) {
    const int block_idx = warp_idx + j * NUM_WARPS;
    if (block_idx >= num_blocks) break;
    const OutlierView outliers(smem.blocks[block_idx], smem.staged[block_idx], KEYS);
    if (lane_idx == 0) smem.score_units[block_idx] = unit;
    ScoreCorrection{smem, block_idx, inverse}.add_all(outliers, lane_idx);
  }
}
