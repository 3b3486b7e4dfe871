// Phase 5 of the decode kernel with allocated codes: the output from packed values.
#pragma once

#include "allocated_codes.cuh"
#include "decode_blocks.cuh"

// Phase 4 has nothing to do: rotated values have no outliers.
__device__ __forceinline__ void correct_output(const DecodeParams&, SharedStorage&, int, int, int,
                                               float) {}

// How values are read: by their width, or as evenly spaced levels of 4 bits.
enum Reading { EVEN_FOUR = MAX_WIDTH + 1 };

// The factor of the weights of every second token: EVEN_FOUR reads these tokens' codes as 16 times
// as large numbers.
constexpr u32 SECOND_TOKENS = 0x2C003C00u;  // fp16 1 and 1/16

// To which bit codes are shifted that are multiplied as subnormal fp16 numbers: those of channels g
// and those of channels g + 8. `value_factor` makes levels of the sums.
template <int WIDTH> constexpr int code_bit(int s) { return s == 1 && WIDTH == 5 ? WIDTH : 0; }

// The operands of 16 tokens and channels, by h and s.
//
// \tparam READING  width of the codes, or EVEN_FOUR
// \tparam L        Levels or WideLevels
template <int READING, int WIDTH, typename L>
__device__ __forceinline__ void read_values(u32 (&a)[2][2], const u32 (&words)[WIDTH],
                                            const L& levels, int m) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    if constexpr (READING == EVEN_FOUR) {
      // A byte has the codes of two tokens: the first one's in the lower half, which 16 times
      // smaller is the second one's in the upper half.
      a[h][0] = permute_bytes(words[m], 0, 0x4040 + 0x0202 * h) & 0x00F0000Fu;
      a[h][1] = permute_bytes(words[m], 0, 0x4141 + 0x0202 * h) & 0x00F0000Fu;
    } else if constexpr (looked_up(WIDTH, VALUES)) {
      levels.look_up(selectors(words, m) >> (16 * h), a[h][0], a[h][1]);
    } else {
      a[h][0] = item_codes<WIDTH, code_bit<WIDTH>(0)>(words, 4 * m + 2 * h);
      a[h][1] = item_codes<WIDTH, code_bit<WIDTH>(1)>(words, 4 * m + 2 * h + 1);
    }
  }
}

// The weighted values of the warp's chunks, whose codes are all read in one way.
template <int READING>
__device__ __forceinline__ void accumulate_reading(const SharedStorage& smem, int num_chunks,
                                                   int warp_idx, int lane_idx,
                                                   float (&out)[CHANNEL_TILES][4]) {
  constexpr int WIDTH = READING == EVEN_FOUR ? 4 : READING, AHEAD = 4;  // tiles on their way
  const int g = lane_idx / 4, t = lane_idx % 4;
  typename Select<WIDTH == 4, WideLevels, Levels>::type levels;
  if constexpr (READING == 4) levels.load(smem.head_table.wide_levels, lane_idx);
  else if constexpr (WIDTH != 4 && looked_up(WIDTH, VALUES))
    levels.load(smem.head_table.value_levels[WIDTH - MIN_LOOKED_UP], lane_idx);
  const uint2* const group_weights = smem.weight[g < GROUP_SIZE ? g : GROUP_SIZE - 1] + t;
  const u8* codes = chunk_codes(smem, VALUES, warp_idx, num_chunks) + lane_idx * 4;
  u32 words[AHEAD][WIDTH];
#pragma unroll
  for (int i = 0; i < AHEAD; i++) load_codes(words[i], codes + i * (WIDTH * PLANE_BYTES));
#pragma unroll 1
  for (int kv_chunk_idx = warp_idx; kv_chunk_idx < num_chunks; kv_chunk_idx += NUM_WARPS) {
    const u8* const next_chunk =
        chunk_codes(smem, VALUES, kv_chunk_idx + NUM_WARPS, num_chunks) + lane_idx * 4;
    u32 weights[TILES_PER_CHUNK][2];
#pragma unroll
    for (int m = 0; m < TILES_PER_CHUNK; m++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const u32 both = group_weights[kv_chunk_idx * PAIRS_PER_CHUNK + 8 * m + 4 * h].x;
        weights[m][h] = READING == EVEN_FOUR ? mul2(both, SECOND_TOKENS) : both;
      }
#pragma unroll
    for (int tile = 0; tile < CHANNEL_TILES; tile++) {
#pragma unroll
      for (int m = 0; m < TILES_PER_CHUNK; m++) {
        u32 a[2][2];
        read_values<READING>(a, words[tile % AHEAD], levels, m);
        mma_m16n8k16(out[tile], a[0][0], a[0][1], a[1][0], a[1][1], weights[m][0], weights[m][1]);
      }
      const int after = tile + AHEAD;
      if (after < CHANNEL_TILES)
        load_codes(words[tile % AHEAD], codes + after * (WIDTH * PLANE_BYTES));
      else
        load_codes(words[tile % AHEAD],
                   next_chunk + (after - CHANNEL_TILES) * (WIDTH * PLANE_BYTES));
    }
    codes = next_chunk;
  }
}

// Phase 5: the weighted values of the warp's chunks, as accumulators.
__device__ __forceinline__ void accumulate_values(const SharedStorage& smem, int num_chunks,
                                                  int warp_idx, int lane_idx,
                                                  float (&out)[CHANNEL_TILES][4]) {
  switch (smem.head_table.value_reading) {
    case 1:
      return accumulate_reading<1>(smem, num_chunks, warp_idx, lane_idx, out);
    case 2:
      return accumulate_reading<2>(smem, num_chunks, warp_idx, lane_idx, out);
    case 3:
      return accumulate_reading<3>(smem, num_chunks, warp_idx, lane_idx, out);
    case 4:
      return accumulate_reading<4>(smem, num_chunks, warp_idx, lane_idx, out);
    case 5:
      return accumulate_reading<5>(smem, num_chunks, warp_idx, lane_idx, out);
    case 6:
      return accumulate_reading<6>(smem, num_chunks, warp_idx, lane_idx, out);
    default:
      return accumulate_reading<EVEN_FOUR>(smem, num_chunks, warp_idx, lane_idx, out);
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
