// The sinks and the tail of a sequence, which the cache keeps in 16 bits.
#pragma once

#include "decode_blocks.cuh"
#include "decode_softmax.cuh"

// Adds one token to a warp's running softmax; lanes take channels.
__device__ __forceinline__ void attend_token(const DecodeParams& params, const SharedStorage& smem,
                                             const uint4 (*queries)[QUERY_STRIDE], const u16* keys,
                                             const u16* values, i64 base, int token, int lane_idx,
                                             float (&maximum)[GROUP_SIZE], float (&sum)[GROUP_SIZE],
                                             float (&out)[GROUP_SIZE][HEAD_DIM / 32]) {
  float scores[GROUP_SIZE];
#pragma unroll
  for (int q = 0; q < GROUP_SIZE; q++) scores[q] = 0.0f;
#pragma unroll
  for (int begin = 0; begin < HALF_DIM; begin += 32) {
    int f = begin + lane_idx;
    float a = load16(keys[(base + token) * HEAD_DIM + f]);
    float b = load16(keys[(base + token) * HEAD_DIM + f + HALF_DIM]);
    int at = rope_offset(smem.head_table, token, f);
    float c = from_half(*(const u16*)(smem.tables.rope + at)),
          s = from_half(*(const u16*)(smem.tables.rope + at + SINE_OFFSET));
    float ya = a * c - b * s, yb = b * c + a * s;
#pragma unroll
    for (int q = 0; q < GROUP_SIZE; q++) {
      const u16* query = (const u16*)queries[q];
      scores[q] += ya * from_half(query[query_offset(smem.head_table, f)]) +
                   yb * from_half(query[query_offset(smem.head_table, f + HALF_DIM)]);
    }
  }
  float v[HEAD_DIM / 32];
#pragma unroll
  for (int i = 0; i < HEAD_DIM / 32; i++)
    v[i] = load16(values[(base + token) * HEAD_DIM + i * 32 + lane_idx]);
#pragma unroll
  for (int q = 0; q < GROUP_SIZE; q++) {
#pragma unroll
    for (int d = 16; d; d >>= 1) scores[q] += __shfl_xor_sync(~0u, scores[q], d);
    scores[q] = soft_capped(params, scores[q]);
    float m = fmaxf(maximum[q], scores[q]), rescale = exp2(maximum[q] - m),
          weight = exp2(scores[q] - m);
    maximum[q] = m;
    sum[q] = sum[q] * rescale + weight;
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 32; i++) out[q][i] = out[q][i] * rescale + weight * v[i];
  }
}

// A warp's share of the 16-bit tokens, one token at a time. Not inlined by force: the compiler
// decides what keeps the packed path's registers free.
__device__ void attend_16bit_tokens(const DecodeParams& params, SharedStorage& smem, int batch_idx,
                                    int kv_head_idx, int warp_idx, int lane_idx,
                                    float (&maximum)[GROUP_SIZE], float (&sum)[GROUP_SIZE],
                                    float (&out)[GROUP_SIZE][HEAD_DIM / 32]) {
  uint4(*queries)[QUERY_STRIDE] = smem.tables.query[warp_idx];
  const int* lengths = params.lengths + batch_idx * 3;
  int num_sinks = lengths[0], num_blocks = lengths[1], tail_length = lengths[2];
#pragma unroll
  for (int q = 0; q < GROUP_SIZE; q++) {
    maximum[q] = NO_SCORE;
    sum[q] = 0.0f;
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 32; i++) out[q][i] = 0.0f;
  }
  // Piece 0 are the sinks, the others chunks of the tail.
  int num_pieces = 1 + (tail_length + CHUNK_SIZE - 1) / CHUNK_SIZE;
  for (int piece = 0; piece < num_pieces; piece++) {
    bool sink = piece == 0;
    int count = sink ? num_sinks : min(CHUNK_SIZE, tail_length - (piece - 1) * CHUNK_SIZE);
    i64 base = (i64)(batch_idx * params.num_kv_heads + kv_head_idx) *
               (sink ? params.sink_capacity : params.tail_capacity);
    const u16* keys = sink ? params.sink_keys : params.tail_keys;
    const u16* values = sink ? params.sink_values : params.tail_values;
    if (!sink) base += (piece - 1) * CHUNK_SIZE;
    __syncwarp();
    unrotate_queries(
        smem, queries,
        params.phases + (sink ? 0 : (i64)(num_blocks * CHUNKS_PER_BLOCK + piece) * HALF_DIM),
        lane_idx);
    __syncwarp();
    for (int token = warp_idx; token < count; token += NUM_WARPS)
      attend_token(params, smem, queries, keys, values, base, token, lane_idx, maximum, sum, out);
  }
}

// The 16-bit tokens of a sequence; the warps' results go to shared memory as those of packed
// chunks.
__device__ __forceinline__ void attend_16bit(const DecodeParams& params, SharedStorage& smem,
                                             int batch_idx, int kv_head_idx, int warp_idx,
                                             int lane_idx) {
  float maximum[GROUP_SIZE], sum[GROUP_SIZE], out[GROUP_SIZE][HEAD_DIM / 32];
  attend_16bit_tokens(params, smem, batch_idx, kv_head_idx, warp_idx, lane_idx, maximum, sum, out);
#pragma unroll
  for (int q = 0; q < GROUP_SIZE; q++)
    if (lane_idx == 0) smem.score_max[q][warp_idx] = maximum[q];
  __syncthreads();  // the tables give way to the outputs
#pragma unroll
  for (int q = 0; q < GROUP_SIZE; q++) {
    const float weight =
        exp2(maximum[q] -
             warp_max_signed(lane_idx < NUM_WARPS ? smem.score_max[q][lane_idx] : NO_SCORE));
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 32; i++)
      smem.out[warp_idx][q][i * 32 + lane_idx] = weight * out[q][i];
    if (lane_idx == 0) {
      smem.weight_sum[q][warp_idx] = weight * sum[q];
      smem.zero_sum[q][warp_idx] = 0.0f;
    }
  }
}
