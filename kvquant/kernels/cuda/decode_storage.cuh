// Shared memory of a thread block of the decode kernel, and how its tables are laid out.
#pragma once

#include "decode_params.cuh"
#ifdef ALLOCATED_CODES
#include "allocated_table.cuh"
#else
#include "head_table.cuh"
#endif

// A block's outliers of one side, of which the first STAGED_OUTLIERS are copied here. Both arrays
// begin at a multiple of 16 bytes of global memory, which may lie before the first outlier.
struct StagedOutliers {
  position_t positions[STAGED_OUTLIERS + 16 / sizeof(position_t)];
  u16 values[STAGED_OUTLIERS + 8];
};

struct KeyChannel {
  u32 level_ends;  // fp16 pair: what the channel's lowest and highest level stand for
  float theta;     // radians per token
};

// A channel's factors of cosine (low half) and sine for each query, 16-bit numbers of the cache.
struct __align__(4 * PADDED_GROUP_SIZE) QueryPair {
  u32 query[PADDED_GROUP_SIZE];
};

// Where one block of the kv head lies in global memory.
struct BlockEntry {
  const u8* codes[2];
  const position_t* positions[2];
  const u16* outliers[2];
  const u16 *v_zeros, *v_scales;
  int num_outliers[2];
};

// What the scores need; it gives way to the outputs of the warps.
struct ScoreTables {
  u8 rope[CHUNK_SIZE * ROPE_STRIDE];
  // Each warp's queries, rotated back to its chunk, as tensor-core operands (query_offset).
  uint4 query[NUM_WARPS][GROUP_SIZE][QUERY_STRIDE];
  float phases[MAX_CHUNKS][HALF_DIM];  // of the chunks' first positions, radians
};

struct __align__(16) SharedStorage {
  union {
    ScoreTables tables;
    float out[NUM_WARPS][GROUP_SIZE][HEAD_DIM];
  };
  StagedOutliers staged[MAX_BLOCKS];  // of keys, then of values
  u32 v_zeros[MAX_BLOCKS][BLOCK_SIZE / 2], v_scales[MAX_BLOCKS][BLOCK_SIZE / 2];  // token pairs
  BlockEntry blocks[MAX_BLOCKS];
  // First the corrections of the scores in their warp's unit, then the scores, then for each pair
  // of tokens the weights times the tokens' scales and the weights alone, fp16.
  union {
    __align__(16) int score_change[GROUP_SIZE][SCORE_STRIDE];  // zeroed 16 bytes at a time
    float score[GROUP_SIZE][SCORE_STRIDE];
    uint2 weight[GROUP_SIZE][SCORE_STRIDE / 2];
  };
  QueryPair query_pairs[HEAD_DIM];
  HeadTable head_table;
  KeyChannel k_channels[HEAD_DIM];
  float query[GROUP_SIZE][HEAD_DIM];     // rotated, times the scale of the scores
  int out_change[GROUP_SIZE][HEAD_DIM];  // corrections of the output, in units
  float score_max[GROUP_SIZE][NUM_WARPS], weight_sum[GROUP_SIZE][NUM_WARPS],
      zero_sum[GROUP_SIZE][NUM_WARPS];
  float score_units[MAX_BLOCKS];
  float query_reach[NUM_WARPS];  // the largest squared lengths of the queries' channel pairs
  u32 largest_value_outlier;     // its magnitude, as a 16-bit number of the cache
};

extern "C" {
__constant__ int smem_bytes = sizeof(SharedStorage);  // Python launches with so many
}
static_assert(sizeof(SharedStorage) <= SMEM_BYTES && sizeof(SharedStorage) + 256 > SMEM_BYTES,
              "cuda_decode.py counts other bytes of shared memory");
