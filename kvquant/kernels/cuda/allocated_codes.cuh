// A lane's codes of a chunk and tile, and what they are read as.
//
// formats/lane_layout.py says where the bits lie. An item is two codes, whose places in the lower
// and the upper half of a word are the same; a lane has 16 items of a chunk and tile.
#pragma once

#include "allocated_table.cuh"

constexpr bool looked_up(int width, Side side) {
  return width >= MIN_LOOKED_UP && width <= (side == KEYS ? 3 : 4);
}

// The bits of an item that lies whole in the words' halves: its word and first bit.
struct ItemPlace {
  int word, begin;
};
template <int WIDTH> constexpr bool is_scattered(int item) {
  return WIDTH == 5 ? item == 15 : WIDTH == 6 && item >= 12;
}
template <int WIDTH> constexpr ItemPlace item_place(int item) {
  const int j = item / 2, s = item % 2;
  if (WIDTH == 5) {
    if (j < 5) return {j, 5 * s};
    return {s ? j - 2 : j - 5, 10};
  }
  if (WIDTH == 6) return {item / 2, 6 * s};
  return {item * WIDTH / 16, item * WIDTH % 16};
}

__device__ __forceinline__ u32 shifted(u32 x, int left) {
  return left < 0 ? x >> -left : x << left;
}

// Both halves' bits from `mask`.
constexpr u32 in_halves(u32 mask) { return mask | mask << 16; }

// The codes of an item, each from bit TO of its half on; the other bits are zero.
template <int WIDTH, int TO>
__device__ __forceinline__ u32 item_codes(const u32 (&words)[WIDTH], int item) {
  constexpr u32 MASK = (1u << WIDTH) - 1;
  if constexpr (WIDTH == 5) {
    if (is_scattered<WIDTH>(item)) {
      u32 codes = 0;
#pragma unroll
      for (int bit = 0; bit < WIDTH; bit++)
        codes |= shifted(words[bit], TO + bit - 15) & in_halves(1u << (TO + bit));
      return codes;
    }
  } else if constexpr (WIDTH == 6) {
    if (is_scattered<WIDTH>(item)) {
      const int q = item - 12, low = q == 0 ? 0 : q == 1 ? 2 : q == 2 ? 3 : 5, high = q < 2 ? 1 : 4;
      return (shifted(words[low], TO - 12) & in_halves(15u << TO)) |
             (shifted(words[high], TO + 4 - 12 - 2 * (q % 2)) & in_halves(3u << (TO + 4)));
    }
  }
  const ItemPlace place = item_place<WIDTH>(item);
  return shifted(words[place.word], TO - place.begin) & in_halves(MASK << TO);
}

// The selectors of the codes of 16 tokens: nibbles are codes of h, s and e, lowest first.
template <int WIDTH> __device__ __forceinline__ u32 selectors(const u32 (&words)[WIDTH], int m) {
  if constexpr (WIDTH == 4) return words[m];
  const u32 low = (words[m / 2] >> (2 * (m % 2))) & 0x33333333u;
  if constexpr (WIDTH == 3) return low | (shifted(words[2], 2 - m) & 0x44444444u);
  else return low;
}

// Loads the words of a tile from word K on, in flight until they are used. `lane_codes`: the lane's
// first word.
template <int WIDTH, int K = 0>
__device__ __forceinline__ void load_codes(u32 (&words)[WIDTH], const u8* lane_codes) {
  words[K] = load_word<K * PLANE_BYTES>(lane_codes);
  if constexpr (K + 1 < WIDTH) load_codes<WIDTH, K + 1>(words, lane_codes);
}

// The same of a width that is known at run time: the first `width` words of six.
template <int K = 0>
__device__ __forceinline__ void load_codes(u32 (&words)[MAX_WIDTH], int width,
                                           const u8* lane_codes) {
  if (K < width) words[K] = load_word<K * PLANE_BYTES>(lane_codes);
  if constexpr (K + 1 < MAX_WIDTH) load_codes<K + 1>(words, width, lane_codes);
}
