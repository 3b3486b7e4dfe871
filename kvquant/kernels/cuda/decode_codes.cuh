// Packed codes in registers, as selectors of byte permutations that look up levels.
//
// A row, one token of the kv head, is laid out by formats/packing.py. With 2 or 3 bits it begins
// with a plane of the codes' lower two bits, HEAD_DIM / 4 bytes, which the third bits follow,
// HEAD_DIM / 8 bytes. With 4 bits it is one plane of HEAD_DIM / 2 bytes, taken in two halves. A
// selector's nibbles are codes: the low ones of channels c.., the high ones of c + HALF_DIM..
#pragma once

#include "decode_instructions.cuh"
#include "decode_shape.cuh"

// The selectors in the lower and in the upper bit pairs of a word of the plane. `top_bits`: the
// word with third bits, of 3-bit codes.
__device__ __forceinline__ u32 first_selectors(u32 plane, u32 top_bits) {
  if constexpr (BITS == 3) return (plane & 0x33333333u) | ((top_bits << 2) & 0x44444444u);
  else return plane & 0x33333333u;
}
__device__ __forceinline__ u32 second_selectors(u32 plane, u32 top_bits) {
  if constexpr (BITS == 3) return ((plane >> 2) & 0x33333333u) | (top_bits & 0x44444444u);
  else return (plane >> 2) & 0x33333333u;
}

// A thread's codes of the keys of tokens g and g + 8 of a tile.
struct KeyCodes {
  u32 low[2][CODE_PLANES][KEY_WORDS], high[2][KEY_WORDS];

  __device__ __forceinline__ void load(const u8* codes, int g, int t) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const u8* row = codes + (8 * h + g) * TOKEN_BYTES;
      load_words(low[h][0], row + HEAD_DIM / 16 * t);
      if constexpr (BITS == 4)
        load_words(low[h][CODE_PLANES - 1], row + HEAD_DIM / 4 + HEAD_DIM / 16 * t);
      else if constexpr (BITS == 3)
        load_words(high[h], row + HEAD_DIM / 4 + HEAD_DIM / 16 * (t & 1));
    }
  }
  __device__ __forceinline__ u32 selector(int h, int w, int j, int t) const {
    if constexpr (BITS == 4) return low[h][j][w];
    const u32 top_bits = BITS == 3 ? high[h][w] >> (t >> 1) : 0;
    return j ? second_selectors(low[h][0][w], top_bits) : first_selectors(low[h][0][w], top_bits);
  }
};

// Where a thread's codes of the values of tokens r and r + 1 of a tile lie, r = 2t + (0, 8). The
// second offset is that of the third bits, or of 4-bit codes' second half.
__device__ __forceinline__ int value_low_offset(int g, int t) {
  return 2 * t * TOKEN_BYTES + VALUE_BYTES * g;
}
__device__ __forceinline__ int value_high_offset(int g, int t) {
  return 2 * t * TOKEN_BYTES + HEAD_DIM / 4 + (BITS == 3 ? VALUE_BYTES * (g & 3) : VALUE_BYTES * g);
}

struct ValueCodes {
  u32 low[2][2][CODE_PLANES][VALUE_WORDS], high[2][2][VALUE_WORDS];

  __device__ __forceinline__ static void load_part(u32 (&words)[VALUE_WORDS], const u8* from) {
    if constexpr (VALUE_BYTES >= 4) load_words(words, from);
    else words[0] = load_short(from);
  }
  __device__ __forceinline__ void load(const u8* low_codes, const u8* high_codes) {
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const int row = (8 * h + e) * TOKEN_BYTES;
        load_part(low[h][e][0], low_codes + row);
        if constexpr (BITS == 4) load_part(low[h][e][CODE_PLANES - 1], high_codes + row);
        else if constexpr (BITS == 3) load_part(high[h][e], high_codes + row);
      }
  }
  __device__ __forceinline__ u32 selector(int h, int e, int w, int j, int g) const {
    if constexpr (BITS == 4) return low[h][e][j][w];
    const u32 top_bits = BITS == 3 ? high[h][e][w] >> (g >> 2) : 0;
    return j ? second_selectors(low[h][e][0][w], top_bits)
             : first_selectors(low[h][e][0][w], top_bits);
  }
};
