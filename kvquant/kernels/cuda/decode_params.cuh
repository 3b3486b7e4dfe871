// Arguments of the decode kernel. Python fills the same struct (cuda_structs.py); the instantiated
// template below refuses a field that lies elsewhere.
#pragma once

#include "types.cuh"

struct DecodeParams {
  const u16* query;        // [batch, num_kv_heads * GROUP_SIZE, HEAD_DIM], rotated
  const u16* sink_keys;    // [batch, num_kv_heads, sink_capacity, HEAD_DIM], before RoPE
  const u16* sink_values;  // the same shape
  const u16* tail_keys;    // [batch, num_kv_heads, tail_capacity, HEAD_DIM], before RoPE
  const u16* tail_values;  // the same shape
  const i64* arenas;       // [arenas, NUM_ARENA_FIELDS] addresses
  const int* block_table;  // [batch, block_table_stride] block numbers
  const int* lengths;      // [batch, 3]: sinks held, blocks, tokens in the tail
  const u8* head_tables;   // [num_kv_heads, HEAD_TABLE_STRIDE]
  const float* value_levels;
  const u8* rope;  // [CHUNK_SIZE, KEY_SELECTORS, 4, {cos x 4, sin x 4}] fp16: places in a chunk
  const float*
      phases;  // [1 + chunks, HALF_DIM] radians: of position 0 and of the chunks' first tokens
  const float* thetas;  // [HALF_DIM + 1]: radians per token, then the factor on cosine and sine
  float* partial_out;   // [batch, num_kv_heads, splits, GROUP_SIZE, HEAD_DIM]
  float*
      partial_state;  // [batch, num_kv_heads, splits, GROUP_SIZE, 2]: maximum and sum of the scores
  int num_kv_heads, block_table_stride, sink_capacity, tail_capacity, chunks_per_split;
  float score_scale;  // of the scores, times log2(e)
  // Of SOFT_CAP: the cap times log2(e), and 2 / cap.
  float score_bound, score_steepness;
};
template struct DecodeParamsLayout<DecodeParams>;
