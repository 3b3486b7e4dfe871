// The calibration of one kv head with allocated codes, as the decode kernel copies it;
// allocated_tables.py makes it.
//
// Tiles of 16 channels are 8 RoPE pairs: channels c (x) and c + HALF_DIM (y). The pairs of a head
// are sorted; `place` means a pair's index in that order.
#pragma once

#include "decode_instructions.cuh"
#include "decode_params.cuh"
#include "decode_shape.cuh"

constexpr int CHANNEL_TILES = HEAD_DIM / 16;
constexpr int MIN_LOOKED_UP = 2;  // the smallest width whose levels are looked up
constexpr int MAX_WIDTH = 6;
constexpr int PLANE_BYTES = 128;  // of a chunk and tile: a word of each lane

// Up to eight fp16 levels, their high and their low bytes apart.
struct Levels {
  u32 high[2], low[2];

  // Copies the levels from shared memory. They pass through a shuffle, after which the compiler no
  // longer knows that all lanes hold the same: short of registers, it would keep them in uniform
  // ones and copy them for each use.
  __device__ __forceinline__ void load(const Levels& from, int lane_idx) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      high[i] = __shfl_sync(~0u, from.high[i], lane_idx);
      low[i] = __shfl_sync(~0u, from.low[i], lane_idx);
    }
  }
  // Looks up four levels by the four low nibbles of `selector`, as two pairs of fp16 numbers.
  __device__ __forceinline__ void look_up(u32 selector, u32& first, u32& second) const {
    const u32 h = permute_bytes(high[0], high[1], selector),
              l = permute_bytes(low[0], low[1], selector);
    first = permute_bytes(l, h, 0x5140);
    second = permute_bytes(l, h, 0x7362);
  }
};

// Sixteen fp16 levels: those of codes whose highest bit is 0, and of the others.
struct WideLevels {
  Levels halves[2];

  __device__ __forceinline__ void load(const WideLevels& from, int lane_idx) {
    halves[0].load(from.halves[0], lane_idx), halves[1].load(from.halves[1], lane_idx);
  }
  __device__ __forceinline__ void look_up(u32 selector, u32& first, u32& second) const {
    const u32 inner = selector & 0x7777, half = ((selector >> 1) & 0x4444) | 0x3210;
    const Levels &a = halves[0], &b = halves[1];
    const u32 h = permute_bytes(permute_bytes(a.high[0], a.high[1], inner),
                                permute_bytes(b.high[0], b.high[1], inner), half),
              l = permute_bytes(permute_bytes(a.low[0], a.low[1], inner),
                                permute_bytes(b.low[0], b.low[1], inner), half);
    first = permute_bytes(l, h, 0x5140);
    second = permute_bytes(l, h, 0x7362);
  }
};

// In memory a table is followed by `level_ends` of each of the head's channels (KeyChannel).
struct __align__(16) HeadTable {
  // By tile and thread of four: factors of x, factors of y, summands of x, summands of y for the
  // thread's two pairs, fp16. They turn what a code is read as into a key.
  uint4 key_operands[CHANNEL_TILES][4];
  Levels key_levels[2], value_levels[2];  // of widths 2 and 3
  WideLevels wide_levels;                 // of values, of width 4
  i64 offset[2];                          // bytes from the begin of a block to the head's codes
  i64 block_bytes[2];                     // of all heads
  int chunk_bytes[2];                     // of the head
  int value_reading;                      // the values' width, or EVEN_FOUR (allocated_output.cuh)
  float value_factor[2];  // makes values, but for the shift, of sums over codes of rows g, g + 8
  float value_shift;      // of levels, against what their codes are read as
  float largest_key;      // the largest magnitude that a level of keys stands for
  float value_scale;      // of all values of the head
  u16 pairs[HALF_DIM];    // the pair at each place
  u16 places[HALF_DIM];   // the place of each pair
  u8 key_widths[16];      // of the tiles
};
template struct HeadTableLayout<HeadTable>;
constexpr int HEAD_TABLE_BYTES = sizeof(HeadTable);
constexpr int HEAD_TABLE_STRIDE = HEAD_TABLE_BYTES + HEAD_DIM * 4;  // in memory, with level ends

// Where the cosines of a thread's two pairs lie in `ScoreTables::rope`, before their sines.
__device__ __forceinline__ int rope_operands(int tile, int token, int t) {
  return ((tile * CHUNK_SIZE + token) * 4 + t) * 8;
}
// Where in `ScoreTables::rope` the entry of a token and frequency lies.
__device__ __forceinline__ int rope_offset(const HeadTable& table, int token, int f) {
  const int place = table.places[f];
  return rope_operands(place / 8, token, place % 8 / 2) + place % 2 * 2;
}
constexpr int SINE_OFFSET = 4;  // from a cosine to its sine

// Where channel `c` of a query lies in its operands, in halves: by tile and thread of four, the x
// of two pairs, then their y.
__device__ __forceinline__ int query_offset(const HeadTable& table, int c) {
  const int place = table.places[c % HALF_DIM];
  return place / 2 * 4 + c / HALF_DIM * 2 + place % 2;
}

// Where the codes of a kv head lie in a block, and how long a block and a chunk are. The head's
// table is read in global memory, because these are needed before it has been copied.
struct CodePlaces {
  const HeadTable* const table;

  __device__ __forceinline__ CodePlaces(const DecodeParams& params, int kv_head_idx)
      : table((const HeadTable*)(params.head_tables + (i64)kv_head_idx * HEAD_TABLE_STRIDE)) {}
  __device__ __forceinline__ i64 block_offset(i64 place, int side) const {
    return place * __ldg(&table->block_bytes[side]) + __ldg(&table->offset[side]);
  }
  __device__ __forceinline__ int chunk_bytes(int side) const {
    return __ldg(&table->chunk_bytes[side]);
  }
};
__device__ __forceinline__ int chunk_bytes(const HeadTable& table, int side) {
  return table.chunk_bytes[side];
}
__device__ __forceinline__ float value_shift(const HeadTable& table) { return table.value_shift; }
__device__ __forceinline__ float value_scale(const HeadTable& table) { return table.value_scale; }
