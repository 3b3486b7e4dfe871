// The calibration of one kv head as the decode kernel copies it; decode_tables.py makes it.
#pragma once

#include "decode_instructions.cuh"
#include "decode_shape.cuh"

// The fp16 levels of a codebook, their high and their low bytes apart.
struct Levels {
  u32 high[LEVEL_WORDS], low[LEVEL_WORDS];

  // Copies the levels from shared memory. They pass through a shuffle, after which the compiler no
  // longer knows that all lanes hold the same: short of registers, it would keep them in uniform
  // ones and copy them for each use.
  __device__ __forceinline__ void load(const Levels& from, int lane_idx) {
#pragma unroll
    for (int i = 0; i < LEVEL_WORDS; i++) {
      high[i] = __shfl_sync(~0u, from.high[i], lane_idx);
      low[i] = __shfl_sync(~0u, from.low[i], lane_idx);
    }
  }
  // Looks up four levels by the four low nibbles of `selector`: their high and their low bytes.
  __device__ __forceinline__ void look_up(u32 selector, u32& high_bytes, u32& low_bytes) const {
    if constexpr (NUM_LEVELS > 8) {
      u32 inner = selector & 0x7777;
      u32 half = ((selector >> 1) & 0x4444) | 0x3210;
      high_bytes = permute_bytes(permute_bytes(high[0], high[1], inner),
                                 permute_bytes(high[2], high[3], inner), half);
      low_bytes = permute_bytes(permute_bytes(low[0], low[1], inner),
                                permute_bytes(low[2], low[3], inner), half);
    } else {
      high_bytes = permute_bytes(high[0], high[1], selector);
      low_bytes = permute_bytes(low[0], low[1], selector);
    }
  }
};

// In memory a table is followed by `level_ends` of each of the head's channels (KeyChannel).
struct __align__(16) HeadTable {
  // By selector word and thread of four: scale and zero of the thread's eight channels, those of
  // the lower half of head_dim first.
  uint4 key_operands[KEY_SELECTORS][4][2];
  Levels levels[2];                   // of keys, of values
  float value_midpoints[NUM_LEVELS];  // where the values' codes change
  float value_ends[2];                // the last and the first level of values
  float largest_key;                  // the largest magnitude that a level of keys stands for
  float padding;
};
template struct HeadTableLayout<HeadTable>;
constexpr int HEAD_TABLE_BYTES = sizeof(HeadTable);
constexpr int HEAD_TABLE_STRIDE = HEAD_TABLE_BYTES + HEAD_DIM * 4;  // in memory, with level ends
