// The calibration of one kv head as the decode kernel copies it; decode_tables.py makes it.
#pragma once

#include "decode_instructions.cuh"
#include "decode_params.cuh"
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

// Where in `ScoreTables::rope` the entry of a token and frequency lies: {cos x 4, sin x 4} for four
// frequencies at a time.
__device__ __forceinline__ int rope_offset(const HeadTable&, int token, int f) {
  int j = f / (HEAD_DIM / 4), rest = f % (HEAD_DIM / 4), t = rest / (HEAD_DIM / 16),
      w = rest % (HEAD_DIM / 16) / 4;
  return token * ROPE_STRIDE + ((w * 2 + j) * 4 + t) * 16 + (f % 4) * 2;
}

constexpr int SINE_OFFSET = 8;  // from a cosine to its sine

// Where channel `c` of a query lies in its operands, in halves: by selector word and thread of
// four, channels (c, c+1), those + HALF_DIM, (c+2, c+3), those + HALF_DIM.
__device__ __forceinline__ int query_offset(const HeadTable&, int c) {
  int f = c % HALF_DIM, j = f / (HEAD_DIM / 4), rest = f % (HEAD_DIM / 4),
      t = rest / (HEAD_DIM / 16), w = rest % (HEAD_DIM / 16) / 4;
  return ((w * 2 + j) * 4 + t) * 8 + (f % 4) / 2 * 4 + (c / HALF_DIM) * 2 + f % 2;
}

// Where the codes of a kv head lie in a block, and how long a block and a chunk are.
struct CodePlaces {
  __device__ __forceinline__ CodePlaces(const DecodeParams& params, int kv_head_idx)
      : kv_head_idx(kv_head_idx),
        num_kv_heads(params.num_kv_heads) {}
  __device__ __forceinline__ i64 block_offset(i64 place, int) const {
    return (place * num_kv_heads + kv_head_idx) * (BLOCK_SIZE * TOKEN_BYTES);
  }
  __device__ __forceinline__ int chunk_bytes(int) const { return CHUNK_SIZE * TOKEN_BYTES; }

 private:
  const int kv_head_idx, num_kv_heads;
};
__device__ __forceinline__ int chunk_bytes(const HeadTable&, int) {
  return CHUNK_SIZE * TOKEN_BYTES;
}

// Levels stand for themselves.
__device__ __forceinline__ float value_shift(const HeadTable&) { return 0.0f; }
__device__ __forceinline__ float value_scale(const HeadTable&) { return 1.0f; }
