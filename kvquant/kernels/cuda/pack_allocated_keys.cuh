// Keys: one thread block per (block, kv head), because a head's outliers of a block are one list.
#pragma once

#include "pack_allocated_codes.cuh"
#include "pack_allocated_params.cuh"

// What a lane needs of a tile's calibration.
struct KeyTile {
  float zero[2][2], inverse[2][2];  // by s and e
  int channel[2];                   // of s = 0, by e; that of s = 1 is the pair's other one

  __device__ __forceinline__ KeyTile(const PackTables& tables, int row, int t) {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const uint4 range = __ldg(tables.ranges + (row * 2 + s) * 4 + t);
      zero[s][0] = __uint_as_float(range.x), zero[s][1] = __uint_as_float(range.y);
      inverse[s][0] = __uint_as_float(range.z), inverse[s][1] = __uint_as_float(range.w);
    }
    const u32 pairs = __ldg(tables.channels + row * 4 + t);
    channel[0] = pairs & 0xFFFF, channel[1] = pairs >> 16;
  }
};

// Encodes a lane's elements of a tile and writes them. Returns a bit per outlier: 4 k + 2 s + e.
__device__ __forceinline__ u32 encode_keys(const Chunk& chunk, const KeyTile& tile, int width,
                                           const float* levels, u32* out, int g) {
  Operand x;
#pragma unroll
  for (int s = 0; s < 2; ++s)
#pragma unroll
    for (int e = 0; e < 2; ++e) chunk.take(x.w[s][e], tile.channel[e] + s * (HEAD_DIM / 2), g);
  u32 marks = 0;
  encode_tile<true>(width, x, levels, out, [&](int k, float (&n)[2][2]) {
#pragma unroll
    for (int s = 0; s < 2; ++s)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        n[s][e] = __fmul_rn(__fsub_rn(n[s][e], tile.zero[s][e]), tile.inverse[s][e]);
        if (HAS_KEY_OUTLIERS && fabsf(n[s][e]) > 1.0f) marks |= 1u << (4 * k + 2 * s + e);
      }
  });
  return marks;
}

// Writes a lane's outliers of a tile from `slot` on. `x`: the chunk's first token.
__device__ __forceinline__ void write_key_outliers(const PackTarget& target, const u16* x,
                                                   i64 token_stride, int first_token, u32 marks,
                                                   u32 pairs, int g, int& slot) {
  for (; marks; marks &= marks - 1, ++slot) {
    const int bit = __ffs(marks) - 1;
    const int token = 8 * (bit >> 2) + g;
    const int pair = (int)(bit & 1 ? pairs >> 16 : pairs & 0xFFFF);
    const int channel = pair + (bit >> 1 & 1) * (HEAD_DIM / 2);
    if (slot < target.num_slots) {
      target.outliers[slot] = x[token * token_stride + channel];
      target.positions[slot] = (position_t)((first_token + token) * HEAD_DIM + channel);
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
    pack_allocated_keys(const PackSource source, const PackTarget target, const PackTables tables) {
  __shared__ Chunk chunk_smem;
  __shared__ float levels_smem[MAX_WIDTH * LEVEL_ROW];
  __shared__ int warp_counts[WARPS];
  __shared__ int first_slot;
  const int tid = threadIdx.x, list = blockIdx.x, lane_idx = tid & 31, warp_idx = tid >> 5;
  const int kv_head_idx = list % NUM_KV_HEADS, block_idx = list / NUM_KV_HEADS;
  const int g = lane_idx >> 2, t = lane_idx & 3, octet = tid % OCTETS, u = tid / OCTETS;
  const u16* x = block_start(source, block_idx) + kv_head_idx * source.head_stride;
  u32 marks[CHUNKS][TILES_PER_WARP];
  bool bad = false;
  for (int chunk = 0; chunk < CHUNKS; ++chunk) {
    Piece piece;
    piece.load(x + (chunk * CHUNK + u) * source.token_stride + 8 * octet, source.token_stride);
    if (chunk == 0) {
      for (int i = tid; i < MAX_WIDTH * LEVEL_ROW; i += THREADS)
        levels_smem[i] = __ldg(tables.levels + i);
    } else {
      __syncthreads();  // the last chunk has been read
    }
    bad |= piece.has_infinite();
    piece.store(chunk_smem, octet, u);
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < TILES_PER_WARP; ++i) {
      const int tile = warp_idx + i * WARPS;
      const TilePlace place(tables, kv_head_idx, tile);
      const KeyTile calibration(tables, kv_head_idx * TILES + tile, t);
      marks[chunk][i] = encode_keys(
          chunk_smem, calibration, place.width, levels_smem + (place.width - 1) * LEVEL_ROW,
          place.words(target.codes, tables, block_idx, chunk) + lane_idx, g);
    }
  }
  if (bad) target.status[1] = 1;
  if constexpr (HAS_KEY_OUTLIERS) {
    int count = 0;
    for (int chunk = 0; chunk < CHUNKS; ++chunk)
      for (int i = 0; i < TILES_PER_WARP; ++i) count += __popc(marks[chunk][i]);
    const int prefix = inclusive_sum(count, lane_idx);
    if (lane_idx == 31) warp_counts[warp_idx] = prefix;
    __syncthreads();
    int before = 0, total = 0;
#pragma unroll
    for (int i = 0; i < WARPS; ++i) {
      before += i < warp_idx ? warp_counts[i] : 0;
      total += warp_counts[i];
    }
    if (tid == 0) {
      first_slot = atomicAdd(target.cursor, total);
      open_list(target, list, first_slot, total);
    }
    __syncthreads();
    if (!count) return;
    int slot = first_slot + before + prefix - count;
    for (int chunk = 0; chunk < CHUNKS; ++chunk)
      for (int i = 0; i < TILES_PER_WARP; ++i) {
        const int row = kv_head_idx * TILES + warp_idx + i * WARPS;
        write_key_outliers(target, x + chunk * CHUNK * source.token_stride, source.token_stride,
                           chunk * CHUNK, marks[chunk][i], __ldg(tables.channels + row * 4 + t), g,
                           slot);
      }
  }
}
