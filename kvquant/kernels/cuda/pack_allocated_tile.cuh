// A chunk of a kv head in shared memory, from which each lane takes the codes of its operands.
//
// It lies by channels. The 64 tokens 8 k + u of a channel are eight units of 16 bytes, one per u,
// each with the tokens of all k. A lane needs whole units: for keys, whose tokens are 8 k + g, one
// per channel; for values, whose tokens are 8 k + 2 t + e, two. Units of a channel change places by
// its number, so that threads which store or load side by side find them in different banks.
#pragma once

#include "pack_allocated_instructions.cuh"
#include "pack_allocated_shape.cuh"

// A lane's codes: for s and e of lane_layout.py, the words of k = 0 and 1, 2 and 3, and so on.
struct Operand {
  u32 w[2][2][4];
};

struct Chunk {
  uint4 units[HEAD_DIM * 8];

  static __device__ __forceinline__ int place(int channel, int u) {
    return channel * 8 + (u ^ ((channel ^ (channel >> 3)) & 7));
  }
  __device__ __forceinline__ void take(u32 (&words)[4], int channel, int u) const {
    const uint4 unit = units[place(channel, u)];
    words[0] = unit.x, words[1] = unit.y, words[2] = unit.z, words[3] = unit.w;
  }
};

// What a thread loads of a chunk: 8 channels of the tokens 8 k + u. `w[c][i]`: channel c, tokens of
// k = 2 i and 2 i + 1.
struct Piece {
  u32 w[8][4];

  __device__ __forceinline__ void load(const u16* x, i64 token_stride) {
    uint4 rows[8];
#pragma unroll
    for (int k = 0; k < 8; ++k, x += 8 * token_stride) rows[k] = load8(x);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint4 a = rows[2 * i], b = rows[2 * i + 1];
      const u32 first[4] = {a.x, a.y, a.z, a.w}, second[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int c = 0; c < 8; ++c)
        w[c][i] = __byte_perm(first[c / 2], second[c / 2], c % 2 ? 0x7632 : 0x5410);
    }
  }
  __device__ __forceinline__ void store(Chunk& chunk, int octet, int u) const {
#pragma unroll
    for (int c = 0; c < 8; ++c)
      chunk.units[Chunk::place(8 * octet + c, u)] = make_uint4(w[c][0], w[c][1], w[c][2], w[c][3]);
  }
  // Whether a number is not finite: its product with zero is NaN then.
  __device__ __forceinline__ bool has_infinite() const {
    u32 sum = 0;
#pragma unroll
    for (int c = 0; c < 8; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i) sum = fma2(w[c][i], 0, sum);
    return (sum & 0x7FFF7FFFu) != 0;
  }
};
