// Phase 3 of the decode kernel: softmax, and what caps the scores before.
#pragma once

#include "decode_blocks.cuh"

// A score as it is where scores are not capped, else squeezed: bound * tanh(x / bound).
__device__ __forceinline__ float soft_capped(const DecodeParams& params, float x) {
  if constexpr (!SOFT_CAP) return x;
  // An exponential beyond the range is infinite or zero, and the result one of the bounds.
  return fmaf(-2.0f * params.score_bound, reciprocal(exp2(x * params.score_steepness) + 1.0f),
              params.score_bound);
}

// Writes the maxima of a warp's scores of queries 2t and 2t + 1, found by each of its lanes.
__device__ __forceinline__ void share_maxima(SharedStorage& smem, float (&maximum)[2], int warp_idx,
                                             int g, int t) {
#pragma unroll
  for (int n = 0; n < 2; n++) {
#pragma unroll
    for (int d = 4; d < 32; d <<= 1)
      maximum[n] = fmaxf(maximum[n], __shfl_xor_sync(~0u, maximum[n], d));
    if (g == 0 && 2 * t + n < GROUP_SIZE) smem.score_max[2 * t + n][warp_idx] = maximum[n];
  }
}

// Phase 3: weights of the warp's chunks, relative to the maxima of all warps, and their sums. A
// token's scale goes into its weight, its zero into one sum.
__device__ __forceinline__ void compute_weights(SharedStorage& smem, int num_chunks, int warp_idx,
                                                int lane_idx) {
  float maximum[GROUP_SIZE], sum[GROUP_SIZE], zeros[GROUP_SIZE];
  const float shift = value_shift(smem.head_table);  // of levels, against what they are read as
#pragma unroll
  for (int q = 0; q < GROUP_SIZE; q++) {
    maximum[q] = warp_max_signed(lane_idx < NUM_WARPS ? smem.score_max[q][lane_idx] : NO_SCORE);
    sum[q] = zeros[q] = 0.0f;
  }
#pragma unroll 1
  for (int kv_chunk_idx = warp_idx; kv_chunk_idx < num_chunks; kv_chunk_idx += NUM_WARPS)
    if (lane_idx < PAIRS_PER_CHUNK) {
      const int pair = kv_chunk_idx % CHUNKS_PER_BLOCK * PAIRS_PER_CHUNK + lane_idx;
      const u32 both_scales = smem.v_scales[kv_chunk_idx / CHUNKS_PER_BLOCK][pair],
                both_zeros = smem.v_zeros[kv_chunk_idx / CHUNKS_PER_BLOCK][pair];
      const float scale[2] = {load16((u16)(both_scales & 0xFFFF)),
                              load16((u16)(both_scales >> 16))};
      const float zero[2] = {load16((u16)(both_zeros & 0xFFFF)), load16((u16)(both_zeros >> 16))};
#pragma unroll
      for (int q = 0; q < GROUP_SIZE; q++) {
        uint2* const weight = &smem.weight[q][kv_chunk_idx * PAIRS_PER_CHUNK + lane_idx];
        const uint2 scores = *weight;
        const float a = exp2(__uint_as_float(scores.x) - maximum[q]),
                    b = exp2(__uint_as_float(scores.y) - maximum[q]);
        sum[q] += a + b;
        zeros[q] = fmaf(a, fmaf(scale[0], shift, zero[0]),
                        fmaf(b, fmaf(scale[1], shift, zero[1]), zeros[q]));
        *weight = make_uint2(pack2(a * scale[0], b * scale[1]), pack2(a, b));
      }
    }
#pragma unroll
  for (int q = 0; q < GROUP_SIZE; q++) {
#pragma unroll
    for (int d = 1; d < 32; d <<= 1) {
      sum[q] += __shfl_xor_sync(~0u, sum[q], d);
      zeros[q] += __shfl_xor_sync(~0u, zeros[q], d);
    }
    if (lane_idx == 0) {
      smem.weight_sum[q][warp_idx] = sum[q];
      smem.zero_sum[q][warp_idx] = zeros[q] * value_scale(smem.head_table);
    }
  }
}
