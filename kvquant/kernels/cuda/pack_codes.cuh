// Codes of two channels at a time, by comparisons with thresholds.
//
// For a given zero and scale the code grows with the 16-bit element, so it is the number of
// *thresholds* at or below it, where a threshold is the smallest 16-bit number that the fp32
// arithmetic of the specification puts above a midpoint (thresholds.py). A binary search over the
// thresholds, two elements at a time, gives a code's bits as masks of both halves of a word.
#pragma once

#include "pack_instructions.cuh"
#include "pack_shape.cuh"

// The code bits of a row that a thread has: the lower half of a word is for channel c, the upper
// one for c + 1. With 4 bits `low` and `high` are nibbles of even and odd lane pairs; else `low`
// has the lower two bits and `high` the third ones.
struct CodeBits {
  u32 low = 0, high = 0;
};

__device__ __forceinline__ u32 choose(u32 mask, u32 yes, u32 no) {
  return (mask & yes) | (~mask & no);
}

// Adds the codes of two elements of a lane. `t`: thresholds, each in both halves.
__device__ __forceinline__ void encode(CodeBits& c, u32 x, const u32* t, int lane) {
  if constexpr (BITS == 4) {
    const u32 b3 = ge2(x, t[7]);
    const u32 b2 = ge2(x, choose(b3, t[11], t[3]));
    const u32 b1 = ge2(x, choose(b2, choose(b3, t[13], t[5]), choose(b3, t[9], t[1])));
    const u32 upper = choose(b2, choose(b3, t[14], t[6]), choose(b3, t[10], t[2]));
    const u32 lower = choose(b2, choose(b3, t[12], t[4]), choose(b3, t[8], t[0]));
    const u32 b0 = ge2(x, choose(b1, upper, lower));
    const int bit = 8 * (lane & 1) + 4 * (lane >> 2);
    u32& nibbles = (lane >> 1) & 1 ? c.high : c.low;
    nibbles |= b0 & (BOTH_HALVES << bit);
    nibbles |= b1 & (BOTH_HALVES << (bit + 1));
    nibbles |= b2 & (BOTH_HALVES << (bit + 2));
    nibbles |= b3 & (BOTH_HALVES << (bit + 3));
  } else if constexpr (BITS == 3) {
    const u32 b2 = ge2(x, t[3]);
    const u32 b1 = ge2(x, choose(b2, t[5], t[1]));
    const u32 b0 = ge2(x, choose(b1, choose(b2, t[6], t[2]), choose(b2, t[4], t[0])));
    const int bit = 8 * (lane & 1) + 2 * (lane >> 1);
    c.low |= b0 & (BOTH_HALVES << bit);
    c.low |= b1 & (BOTH_HALVES << (bit + 1));
    c.high |= b2 & (BOTH_HALVES << lane);
  } else {
    const u32 b1 = ge2(x, t[1]);
    const u32 b0 = ge2(x, choose(b1, t[2], t[0]));
    const int bit = 8 * (lane & 1) + 2 * (lane >> 1);
    c.low |= b0 & (BOTH_HALVES << bit);
    c.low |= b1 & (BOTH_HALVES << (bit + 1));
  }
}

// Stores bytes 0 and 2 for an even lane pair and bytes 1 and 3 for the next one.
__device__ __forceinline__ void store_bytes(u8* out, u32 word) {
  const u32 sorted = __byte_perm(word, 0, 0x3120);
  *(u16*)out = (u16)sorted;
  *(u16*)(out + LANE_CHANNELS) = (u16)(sorted >> 16);
}

// `out`: the row's first byte plus the thread's first channel within a lane.
__device__ __forceinline__ void store_codes(u8* out, const CodeBits& c) {
  store_bytes(out, c.low);
  if constexpr (BITS == 4) store_bytes(out + 2 * LANE_CHANNELS, c.high);
  else if constexpr (BITS == 3)
    *(u16*)(out + 2 * LANE_CHANNELS) = (u16)__byte_perm(c.high, 0, 0x4420);
}
