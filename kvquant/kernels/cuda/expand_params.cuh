// Arguments of the kernel that expands allocated codes. Python fills the same struct
// (cuda_expand_allocated.py).
#pragma once

#include "types.cuh"

struct ExpandParams {
  const i64* arenas;       // [arenas, NUM_ARENA_FIELDS] addresses
  const int* table;        // [batch, table_stride] block numbers
  const int* lengths;      // [batch, 4]: sinks held, blocks, tokens in the tail, their sum
  const u16* sink_keys;    // [batch, num_kv_heads, sink_room, HEAD_DIM], before RoPE
  const u16* sink_values;  // the same shape
  const void* tail_keys;   // [batch, num_kv_heads, tail_room, HEAD_DIM], before RoPE
  const void* tail_values;
  const u8* head_tables;      // [num_kv_heads, HEAD_TABLE_STRIDE]
  const float* key_zero;      // [num_kv_heads, HEAD_DIM]
  const float* key_scale;     // the same shape
  const float* key_levels;    // [MAX_WIDTH, 64]
  const float* value_levels;  // the same shape
  const float* cos;           // [positions, HALF_DIM]
  const float* sin;           // the same shape
  u16* out;                   // [2, batch, num_kv_heads, places, HEAD_DIM]
  int num_kv_heads, table_stride, sink_room, tail_room, low, chunks, base, places, sinks, fp32_tail,
      heads_each;
};
template struct ExpandParamsLayout<ExpandParams>;
