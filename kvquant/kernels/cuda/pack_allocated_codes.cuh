// The codes of a tile, found by the comparisons of the specification, and their places in words.
//
// A code is the number of midpoints below the normalized element. Levels of widths 2 and 3, and of
// values of width 4, are anywhere, so their midpoints are compared in a binary search. Those of
// other widths are evenly spaced but for rounding: the nearest midpoint is computed, and comparing
// with it decides.
#pragma once

#include "pack_allocated_tile.cuh"

// 1.5 * 2^23: added to a small number, it leaves the rounded number in the lower bits.
constexpr float ROUNDING = 12582912.0f;
constexpr u32 ROUNDING_BITS = 0x4B400000u;

constexpr bool looked_up(int width, bool of_keys) {
  return width == 2 || width == 3 || (width == 4 && !of_keys);
}

// Whether a code of a width that is computed lies in one word. `item`: 2 k + s.
constexpr bool is_whole(int width, int item) {
  return width == 5 ? item != 15 : width != 6 || item < 12;
}

// The place of a code's bit among a lane's words (lane_layout._place).
constexpr int place(int width, int item, int e, int bit, bool of_keys) {
  if (looked_up(width, of_keys)) {
    const int m = item / 4, nibble = 2 * (item % 4) + e;
    if (width == 4) return 32 * m + 4 * nibble + bit;
    return bit == 2 ? 64 + 4 * nibble + m : 32 * (m / 2) + 4 * nibble + 2 * (m % 2) + bit;
  }
  const int j = item / 2, s = item % 2;
  int word = item * width / 16, begin = item * width % 16;
  if (width == 5) {
    if (s == 0) word = j < 5 ? j : j - 5, begin = j < 5 ? 0 : 10;
    else if (j < 7) word = j < 5 ? j : j - 2, begin = j < 5 ? 5 : 10;
    else word = bit, begin = 15 - bit;
  } else if (width == 6) {
    word = item / 2, begin = 6 * s;
    if (item >= 12) {
      const int q = item - 12;
      if (bit < 4) word = q + (q + 1) / 2, begin = 12;
      else word = 1 + q / 2 * 3, begin = 8 + 2 * (q % 2);
    }
  }
  return 32 * word + 16 * e + begin + bit;
}

// What a word begins with, so that the bits of ROUNDING that codes bring along cancel.
constexpr u32 initial_word(int width, int word, bool of_keys) {
  u32 sum = 0;
  if (width >= 4 && !looked_up(width, of_keys))
    for (int item = 0; item < 16; ++item)
      for (int e = 0; e < 2; ++e) {
        const int at = place(width, item, e, 0, of_keys);
        if (is_whole(width, item) && at / 32 == word) sum -= ROUNDING_BITS << (at % 32);
      }
  return sum;
}

// Codes of one width.
//
// \tparam WIDTH    bits per code
// \tparam OF_KEYS  whether they are those of keys
template <int WIDTH, bool OF_KEYS> struct Coder {
  static constexpr int KEPT = WIDTH < 4 ? (1 << WIDTH) - 1 : 3;  // midpoints in registers
  const float* midpoints;
  float slope, offset;
  float kept[KEPT];
  u32 words[WIDTH];

  // `row`: of the table of midpoints.
  __device__ __forceinline__ explicit Coder(const float* row) : midpoints(row + 2) {
    slope = row[0], offset = row[1];
#pragma unroll
    for (int i = 0; i < KEPT; ++i) kept[i] = midpoints[WIDTH < 4 ? i : WIDTH == 4 ? 4 * i + 3 : 0];
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) words[i] = initial_word(WIDTH, i, OF_KEYS);
  }
  // Adds a bit, or a whole code from its lowest bit on.
  __device__ __forceinline__ void put(int item, int e, int bit, u32 x) {
    words[place(WIDTH, item, e, bit, OF_KEYS) / 32] +=
        x << (place(WIDTH, item, e, bit, OF_KEYS) % 32);
  }
  // Adds the code of a normalized element.
  __device__ __forceinline__ void add(float x, int item, int e) {
    if constexpr (WIDTH == 1) {
      if (x > kept[0]) put(item, e, 0, 1);
    } else if constexpr (WIDTH == 2) {
      const bool upper = x > kept[1];
      if (upper) put(item, e, 1, 1);
      if (x > (upper ? kept[KEPT - 1] : kept[0])) put(item, e, 0, 1);
    } else if constexpr (WIDTH == 3) {
      const bool b2 = x > kept[3 % KEPT];
      if (b2) put(item, e, 2, 1);
      const bool b1 = x > (b2 ? kept[5 % KEPT] : kept[1]);
      if (b1) put(item, e, 1, 1);
      const float above = b2 ? kept[6 % KEPT] : kept[2], below = b2 ? kept[4 % KEPT] : kept[0];
      if (x > (b1 ? above : below)) put(item, e, 0, 1);
    } else if constexpr (looked_up(WIDTH, OF_KEYS)) {
      const bool b3 = x > kept[1], b2 = x > (b3 ? kept[2] : kept[0]);
      u32 code = 8 * b3 + 4 * b2;
      code += x > midpoints[code + 1] ? 2 : 0;
      code += x > midpoints[code] ? 1 : 0;
      put(item, e, 0, code);
    } else {
      // From above where the reference searches and not counts, because NaN gets the last code.
      constexpr float LAST = (1 << WIDTH) - 2;
      const float part = saturated(x, slope, offset);
      const u32 rounded = __float_as_uint(WIDTH > 4 ? __fmaf_rn(part, -LAST, ROUNDING + LAST)
                                                    : __fmaf_rn(part, LAST, ROUNDING));
      const float nearest = midpoints[(int)(rounded - ROUNDING_BITS)];
      const bool above = WIDTH > 4 ? !(x <= nearest) : x > nearest;
      if (is_whole(WIDTH, item)) {
        put(item, e, 0, rounded);
        if (above) put(item, e, 0, 1);
      } else {
        const u32 code = rounded - ROUNDING_BITS + above;
#pragma unroll
        for (int bit = 0; bit < WIDTH; ++bit) put(item, e, bit, code >> bit & 1);
      }
    }
  }
};

// Encodes a lane's elements of a tile and writes them.
//
// \tparam WIDTH, OF_KEYS  see Coder
// \tparam F      callable (int k, float (&x)[2][2]) that normalizes the elements of s and e
template <int WIDTH, bool OF_KEYS, typename F>
__device__ __forceinline__ void encode_width(const Operand& x, const float* levels, u32* out,
                                             F normalize) {
  Coder<WIDTH, OF_KEYS> coder(levels);
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    float n[2][2];
#pragma unroll
    for (int s = 0; s < 2; ++s)
#pragma unroll
      for (int e = 0; e < 2; ++e) n[s][e] = half_of(x.w[s][e][k / 2], k % 2);
    normalize(k, n);
#pragma unroll
    for (int s = 0; s < 2; ++s)
#pragma unroll
      for (int e = 0; e < 2; ++e) coder.add(n[s][e], 2 * k + s, e);
  }
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) out[i * 32] = coder.words[i];
}

// The same for a width that is known at run time. `levels`: the row of that width; `out`: the
// lane's word.
template <bool OF_KEYS, typename F>
__device__ __forceinline__ void encode_tile(int width, const Operand& x, const float* levels,
                                            u32* out, F normalize) {
  switch (width) {
    case 1:
      return encode_width<1, OF_KEYS>(x, levels, out, normalize);
    case 2:
      return encode_width<2, OF_KEYS>(x, levels, out, normalize);
    case 3:
      return encode_width<3, OF_KEYS>(x, levels, out, normalize);
    case 4:
      return encode_width<4, OF_KEYS>(x, levels, out, normalize);
    case 5:
      return encode_width<5, OF_KEYS>(x, levels, out, normalize);
    default:
      return encode_width<6, OF_KEYS>(x, levels, out, normalize);
  }
}
