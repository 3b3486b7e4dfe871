// Phase 5 of the decode kernel with allocated codes: the output from packed values.
#pragma once

#include "allocated_codes.cuh"
#include "decode_blocks.cuh"

// Phase 4 has nothing to do: rotated values have no outliers.
__device__ __forceinline__ void correct_output(const DecodeParams&, SharedStorage&, int, int, int,
                                               float) {}

// To which bit codes are shifted that are multiplied as subnormal fp16 numbers: those of channels g
// and those of channels g + 8. `value_factor` makes levels of the sums.
template <int WIDTH> constexpr int code_bit(int s) {
  return s == 1 && WIDTH == 5 ? WIDTH : 0;
}

// Adds the weighted values of a tile of channels and a chunk's tokens: channels in rows, queries
// 2t, 2t + 1 in columns.
//
// \tparam L  Levels or WideLevels
template <int WIDTH, typename L>
__device__ __forceinline__ void multiply_value_tile(float (&out)[4], const u32 (&words)[WIDTH],
                                                    const L& levels,
                                                    const u32 (&weights)[TILES_PER_CHUNK][2]) {
#pragma unroll
  for (int m = 0; m < TILES_PER_CHUNK; m++) {
    u32 a[2][2];  // [h][s]
#pragma unroll
    for (int h = 0; h < 2; h++) {
      if constexpr (looked_up(WIDTH, VALUES)) {
        levels.look_up(selectors(words, m) >> (16 * h), a[h][0], a[h][1]);
      } else {
        a[h][0] = item_codes<WIDTH, code_bit<WIDTH>(0)>(words, 4 * m + 2 * h);
        a[h][1] = item_codes<WIDTH, code_bit<WIDTH>(1)>(words, 4 * m + 2 * h + 1);
      }
    }
    mma_m16n8k16(out, a[0][0], a[0][1], a[1][0], a[1][1], weights[m][0], weights[m][1]);
  }
}

// The weighted values of the warp's chunks, whose codes all have one width.
template <int WIDTH>
__device__ __forceinline__ void accumulate_width(const SharedStorage& smem, int num_chunks,
                                                 int warp_idx, int lane_idx,
                                                 float (&out)[CHANNEL_TILES][4]) {
  const int g = lane_idx / 4, t = lane_idx % 4;
  typename Select<WIDTH == 4, WideLevels, Levels>::type levels;
  if constexpr (WIDTH == 4) levels.load(smem.head_table.wide_levels, lane_idx);
  else if constexpr (looked_up(WIDTH, VALUES))
    levels.load(smem.head_table.value_levels[WIDTH - MIN_LOOKED_UP], lane_idx);
  const uint2* const group_weights = smem.weight[g < GROUP_SIZE ? g : GROUP_SIZE - 1] + t;
  const u8* codes = chunk_codes(smem, VALUES, warp_idx, num_chunks);
  u32 even[WIDTH], odd[WIDTH];
  load_codes(even, WIDTH, codes, lane_idx);
#pragma unroll 1
  for (int kv_chunk_idx = warp_idx; kv_chunk_idx < num_chunks; kv_chunk_idx += NUM_WARPS) {
    const u8* const next_chunk = chunk_codes(smem, VALUES, kv_chunk_idx + NUM_WARPS, num_chunks);
    u32 weights[TILES_PER_CHUNK][2];
#pragma unroll
    for (int m = 0; m < TILES_PER_CHUNK; m++) {
      weights[m][0] = group_weights[kv_chunk_idx * PAIRS_PER_CHUNK + 8 * m].x;
      weights[m][1] = group_weights[kv_chunk_idx * PAIRS_PER_CHUNK + 8 * m + 4].x;
    }
#pragma unroll
    for (int tile = 0; tile < CHANNEL_TILES; tile += 2) {
      load_codes(odd, WIDTH, codes + (tile + 1) * (WIDTH * PLANE_BYTES), lane_idx);
      multiply_value_tile<WIDTH>(out[tile], even, levels, weights);
      const u8* const after = tile + 2 < CHANNEL_TILES
                                  ? codes + (tile + 2) * (WIDTH * PLANE_BYTES)
                                  : next_chunk;
      load_codes(even, WIDTH, after, lane_idx);
      multiply_value_tile<WIDTH>(out[tile + 1], odd, levels, weights);
    }
    codes = next_chunk;
  }
}

// Phase 5: the weighted values of the warp's chunks, as accumulators.
__device__ __forceinline__ void accumulate_values(const SharedStorage& smem, int num_chunks,
                                                  int warp_idx, int lane_idx,
                                                  float (&out)[CHANNEL_TILES][4]) {
  switch (smem.head_table.value_width) {
    case 1: accumulate_width<1>(smem, num_chunks, warp_idx, lane_idx, out); break;
    case 2: accumulate_width<2>(smem, num_chunks, warp_idx, lane_idx, out); break;
    case 3: accumulate_width<3>(smem, num_chunks, warp_idx, lane_idx, out); break;
    case 4: accumulate_width<4>(smem, num_chunks, warp_idx, lane_idx, out); break;
    case 5: accumulate_width<5>(smem, num_chunks, warp_idx, lane_idx, out); break;
    default: accumulate_width<6>(smem, num_chunks, warp_idx, lane_idx, out);
  }
}

// Writes a warp's accumulators to shared memory, by query and channel.
__device__ __forceinline__ void store_accumulators(SharedStorage& smem,
                                                   const float (&out)[CHANNEL_TILES][4],
                                                   int warp_idx, int g, int t) {
#pragma unroll
  for (int tile = 0; tile < CHANNEL_TILES; tile++)
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const int q = 2 * t + k % 2, s = k / 2;
      if (q < GROUP_SIZE)
        smem.out[warp_idx][q][8 * tile + g + s * HALF_DIM] =
            out[tile][k] * smem.head_table.value_factor[s];
    }
}
