// Phase 4 of the decode kernel: exact outliers of values.
#pragma once

#include "decode_outliers.cuh"

// The level of the dense code that the packer found for the same number. Only nearly constant
// tokens need it.
__device__ __noinline__ float find_level(const float* midpoints, const float* levels, float away,
                                         float scale) {
  const float normalized = away * (scale == 0.0f ? 0.0f : __fdiv_rn(1.0f, scale));
  int code = 0;
  for (int k = NUM_LEVELS / 2; k; k >>= 1) code += normalized > midpoints[code + k - 1] ? k : 0;
  return from_half(to_half(levels[code]));
}

// How outliers of values change the output, from one block.
struct OutputCorrection {
  SharedStorage& smem;
  const float* value_levels;
  const int block_idx;
  const u16 *zeros, *scales;
  const float inverse;           // of the unit
  const float low, high, bound;  // the end levels; normalized, inliers lie within the bound

  // The exact value minus the dequantized one, in units.
  __device__ __forceinline__ float residual(int position, float x) const {
    const float zero = load16(zeros[position / HEAD_DIM]),
                scale = load16(scales[position / HEAD_DIM]);
    const float away = x - zero;
    float level = away > 0.0f ? high : low;  // almost always: it lies outside the others' range
    if (fabsf(away) <= scale * bound)
      level = find_level(smem.head_table.value_midpoints, value_levels, away, scale);
    return (x - fmaf(level, scale, zero)) * inverse;
  }
  __device__ __forceinline__ void load_weights(int position, u32 (&w)[GROUP_SIZE]) const {
    const int token = block_idx * BLOCK_SIZE + position / HEAD_DIM;
#pragma unroll
    for (int q = 0; q < GROUP_SIZE; q++)
      w[q] = ((const u16*)&smem.weight[q][token / 2].y)[token % 2];
  }
  __device__ __forceinline__ void add(int position, float d, const u32 (&w)[GROUP_SIZE]) const {
#pragma unroll
    for (int q = 0; q < GROUP_SIZE; q++)
      atomicAdd(&smem.out_change[q][position % HEAD_DIM], round_to_int(from_half((u16)w[q]), d));
  }
  __device__ __forceinline__ void add_all(const OutlierView& outliers, int lane_idx) const {
#pragma unroll
    for (int r = 0; r < OUTLIER_ROUNDS; r += 2) {
      if (r * 32 >= outliers.count) break;
      const int i = r * 32 + lane_idx, k = i + 32;
      const int first = i < outliers.count ? (int)outliers.staged_positions[i] : 0;
      u32 first_weights[GROUP_SIZE];
      load_weights(first, first_weights);
      const float d =
          i < outliers.count ? residual(first, load16(outliers.staged_values[i])) : 0.0f;
      if (r + 1 < OUTLIER_ROUNDS && (r + 1) * 32 < outliers.count) {
        const int second = k < outliers.count ? (int)outliers.staged_positions[k] : 0;
        u32 second_weights[GROUP_SIZE];
        load_weights(second, second_weights);
        const float e =
            k < outliers.count ? residual(second, load16(outliers.staged_values[k])) : 0.0f;
        if (k < outliers.count) add(second, e, second_weights);
      }
      if (i < outliers.count) add(first, d, first_weights);
    }
#pragma unroll 1
    for (int i = STAGED_OUTLIERS + lane_idx; i < outliers.count; i += 32) {
      const int position = (int)__ldg(outliers.positions + i);
      u32 w[GROUP_SIZE];
      load_weights(position, w);
      add(position, residual(position, load16(__ldg(outliers.values + i))), w);
    }
  }
};

// Phase 4: corrections of the output by the warp's blocks, in a unit that all warps share.
__device__ __forceinline__ void correct_output(const DecodeParams& params, SharedStorage& smem,
                                               int num_blocks, int warp_idx, int lane_idx,
                                               float unit) {
  const float inverse = unit > 1e-30f ? 1.0f / unit : 0.0f;
  const HeadTable& table = smem.head_table;
  const float high = table.value_ends[0], low = table.value_ends[1];
  const float bound =
      1.001f * fmaxf(fmaxf(table.value_midpoints[NUM_LEVELS - 2], -table.value_midpoints[0]), 0.0f);
#pragma unroll 1
  for (int j = 0; j < MAX_BLOCKS_PER_WARP; j++) {
    const int block_idx = warp_idx + j * NUM_WARPS;
    if (block_idx >= num_blocks) break;
    const OutlierView outliers(smem.blocks[block_idx], smem.staged[block_idx], VALUES);
    const u16 *zeros = (const u16*)smem.v_zeros[block_idx],
              *scales = (const u16*)smem.v_scales[block_idx];
    OutputCorrection{smem, params.value_levels, block_idx, zeros, scales, inverse, low, high, bound}
        .add_all(outliers, lane_idx);
  }
}
