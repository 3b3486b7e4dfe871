// Constants and arguments of the attention of prompts with 8-bit products. Python fills the same
// struct (cuda_prompt_attention.py).
#pragma once

#include "generated.cuh"
#include "integers.cuh"

constexpr int KEYS_PER_TILE = 128;
constexpr int ROWS_PER_WARPGROUP = 64;
constexpr int ROWS = ROWS_PER_WARPGROUP * CONSUMERS;  // of a thread block
constexpr int THREADS = 128 * (CONSUMERS + 1);        // the first warpgroup loads
constexpr int QUERY_BYTES = ROWS_PER_WARPGROUP * HEAD_DIM;
constexpr int TILE_BYTES = KEYS_PER_TILE * HEAD_DIM;
static_assert(HEAD_DIM == 64 || HEAD_DIM == 128, "a row of operands is 64 or 128 bytes");

struct PromptParams {
  // First and second numbers: INT8, the second in units of 2^-REST_BITS; of values both e4m3.
  const u8* queries[2];        // [batch, num_heads, query_tiles, QUERY_BYTES]
  const u8* keys[2];           // [batch, num_kv_heads, key_tiles, TILE_BYTES]
  const u8* values[2];         // the same shape, transposed
  const float* query_scales;   // [batch, num_heads, query_tiles * 64], in units of log2
  const float* query_offsets;  // the same shape, added to the scores; null: none
  const float* key_scales;     // [batch, num_kv_heads, key_tiles]
  const float* value_scales;   // [batch, num_kv_heads, HEAD_DIM]
  const int* counts;           // [batch, 3]: queries, keys, keys that come before the first query
  const int* columns;          // [batch, columns_stride], the column of a query; null: its number
  u16* out;                    // [batch, num_columns, num_heads, HEAD_DIM]; null: not the last part
  float* state_out;            // [batch, num_heads, query_tiles * 64, HEAD_DIM]; null: one part only
  float* state_top;            // [batch, num_heads, query_tiles * 64], in units of log2
  float* state_total;          // the same shape
  int num_heads, num_kv_heads, query_tiles, key_tiles, num_columns, columns_stride, window,
      heads_together, first;
};
template struct PromptParamsLayout<PromptParams>;
