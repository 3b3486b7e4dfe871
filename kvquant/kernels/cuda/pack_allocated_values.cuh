// Values: one thread block per (chunk, kv head). Zero and scale of a token come from its range,
// which is that of all heads (or of the head, RANGE_PER_HEAD).
//
// Values are read once. The thread blocks of a chunk add the ends of their tokens to a workspace,
// and each waits for the others before it encodes what it holds in shared memory. They take their
// chunks in order, by a ticket, so those that are waited for have always begun: a thread block
// waits only while another one of its chunk works, or has room to begin. Where there may be no room
// for the heads of a chunk at once, two launches find the ends and the codes.
#pragma once

#include "pack_allocated_codes.cuh"
#include "pack_allocated_params.cuh"

enum Phases { FIND_ENDS = 1, ENCODE = 2 };

// The ends of a thread's tokens over an octet and then, in each of 8 neighbouring lanes, those of
// one side and two tokens over all octets: the maximum of side lane / 4 % 2, where side 1 is of
// negated numbers, for the tokens of k = 2 (lane % 4) and the next one.
__device__ __forceinline__ u32 find_ends(const Piece& piece, int octet) {
  u32 ends[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    u32 most = piece.w[0][i], least = piece.w[0][i];
#pragma unroll
    for (int c = 1; c < 8; ++c)
      most = max2(most, piece.w[c][i]), least = min2(least, piece.w[c][i]);
    ends[i] = most, ends[4 + i] = least ^ 0x80008000u;
  }
#pragma unroll
  for (int half = 4; half >= 1; half /= 2) {
    const bool upper = octet & half;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const u32 given = upper ? ends[i] : ends[half + i], kept = upper ? ends[half + i] : ends[i];
      ends[i] = max2(kept, __shfl_xor_sync(~0u, given, half));
    }
  }
#pragma unroll
  for (int d = 8; d < OCTETS; d *= 2) ends[0] = max2(ends[0], __shfl_xor_sync(~0u, ends[0], d));
  return ends[0];
}

// A scaled end as a number that is above 0 and grows with it, and back.
__device__ __forceinline__ u32 end_key(u32 raw, float factor) {
  const u32 bits = __float_as_uint(__fmul_rn(to_float((u16)raw), factor));
  return bits ^ (bits >> 31 ? ~0u : 0x80000000u);
}
__device__ __forceinline__ float end_of(u32 key) {
  return __uint_as_float(key ^ (key >> 31 ? 0x80000000u : ~0u));
}

// Zero and inverse of a token, whose zero and scale are written where `zero_out` is not null.
__device__ __forceinline__ float2 token_range(u32 most, u32 most_negated, u16* zero_out,
                                              u16* scale_out) {
  const float high = __fmul_rn(end_of(most), 0.5f), low = __fmul_rn(-end_of(most_negated), 0.5f);
  const u16 zero = to_16(__fadd_rn(high, low)), scale = to_16(__fsub_rn(high, low));
  if (zero_out) *zero_out = zero, *scale_out = scale;
  const float half = to_float(scale);
  return make_float2(to_float(zero), half == 0.0f ? 0.0f : __fdiv_rn(1.0f, half));
}

// Encodes a lane's elements of a tile and writes them. `ranges`: of all tokens.
__device__ __forceinline__ void encode_values(const Chunk& chunk, const float4* ranges, int tile,
                                              int width, float factor, const float* levels,
                                              u32* out, int g, int t) {
  Operand x;
#pragma unroll
  for (int s = 0; s < 2; ++s)
#pragma unroll
    for (int e = 0; e < 2; ++e) chunk.take(x.w[s][e], 8 * tile + g + s * (HEAD_DIM / 2), 2 * t + e);
  encode_tile<false>(width, x, levels, out, [&](int k, float (&n)[2][2]) {
    const float4 both = ranges[4 * k + t];  // tokens 8 k + 2 t and the next one
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      n[s][0] = __fmul_rn(__fsub_rn(__fmul_rn(n[s][0], factor), both.x), both.y);
      n[s][1] = __fmul_rn(__fsub_rn(__fmul_rn(n[s][1], factor), both.z), both.w);
    }
  });
}

// `zeros` and `scales`: [blocks, BLOCK_SIZE] or, with RANGE_PER_HEAD, [blocks, NUM_KV_HEADS,
// BLOCK_SIZE]. `workspace`: zeros, of TICKET_WORDS and CHUNK_WORDS for each chunk; null with
// RANGE_PER_HEAD. `phases`: FIND_ENDS, then ENCODE in another launch with the same workspace, or
// both.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
    pack_allocated_values(const PackSource source, u8* codes, int* status, u16* zeros, u16* scales,
                          const PackTables tables, u32* workspace, int phases) {
  __shared__ Chunk chunk_smem;
  __shared__ float levels_smem[LEVEL_ROW];
  __shared__ float4 ranges_smem[CHUNK / 2];
  __shared__ u32 ends_smem[CHUNK_ENDS];
  __shared__ int ticket;
  const int tid = threadIdx.x, lane_idx = tid & 31, warp_idx = tid >> 5;
  int unit = blockIdx.x;
  if (!RANGE_PER_HEAD && phases == (FIND_ENDS | ENCODE)) {
    if (tid == 0) ticket = atomicAdd((int*)workspace, 1);
    __syncthreads();
    unit = ticket;
  }
  const int kv_head_idx = unit % NUM_KV_HEADS, chunk_idx = unit / NUM_KV_HEADS;
  const int block_idx = chunk_idx / CHUNKS, chunk = chunk_idx % CHUNKS;
  const int octet = tid % OCTETS, u = tid / OCTETS;
  const float factor = __ldg(tables.inverses + kv_head_idx);
  u32* ends = RANGE_PER_HEAD ? ends_smem : workspace + TICKET_WORDS + (i64)chunk_idx * CHUNK_WORDS;
  Piece piece;
  piece.load(block_start(source, block_idx) + kv_head_idx * source.head_stride +
                 (chunk * CHUNK + u) * source.token_stride + 8 * octet,
             source.token_stride);
  if (phases & FIND_ENDS) {
    const u32 found = find_ends(piece, octet);
    if (octet < 8) {
      if (geu2(absolute(found), INFINITY_BITS * BOTH_HALVES)) status[1] = 1;
      u32* at = ends + (octet >> 2) * CHUNK + 16 * (octet & 3) + u;
      if constexpr (RANGE_PER_HEAD) {
        at[0] = end_key(found & 0xFFFF, factor), at[8] = end_key(found >> 16, factor);
      } else {
        atomicMax(at, end_key(found & 0xFFFF, factor));
        atomicMax(at + 8, end_key(found >> 16, factor));
      }
    }
  }
  if (!(phases & ENCODE)) return;
  piece.store(chunk_smem, octet, u);
  __syncthreads();
  const bool waits = !RANGE_PER_HEAD && (phases & FIND_ENDS);
  if (waits && tid == 0) count_up(ends + CHUNK_ENDS);
  const TilePlace first(tables, kv_head_idx, 0);  // all of a head's tiles have one width
#pragma unroll 1
  for (int i = tid; i < LEVEL_ROW; i += THREADS)
    levels_smem[i] = __ldg(tables.levels + (first.width - 1) * LEVEL_ROW + i);
  if (waits && tid == 0) wait_for(ends + CHUNK_ENDS, NUM_KV_HEADS);
  __syncthreads();
  if (tid < CHUNK) {
    const bool writes = RANGE_PER_HEAD || kv_head_idx == 0;
    const i64 row = RANGE_PER_HEAD ? (i64)block_idx * NUM_KV_HEADS + kv_head_idx : block_idx;
    const i64 at = row * BLOCK_SIZE + chunk * CHUNK + tid;
    const u32 most = RANGE_PER_HEAD ? ends[tid] : load_fresh(ends + tid);
    const u32 negated = RANGE_PER_HEAD ? ends[CHUNK + tid] : load_fresh(ends + CHUNK + tid);
    ((float2*)ranges_smem)[tid] =
        token_range(most, negated, writes ? zeros + at : nullptr, writes ? scales + at : nullptr);
  }
  __syncthreads();
#pragma unroll 1
  for (int i = 0; i < TILES_PER_WARP; ++i) {
    const int tile = warp_idx + i * WARPS;
    const TilePlace place(tables, kv_head_idx, tile);
    encode_values(chunk_smem, ranges_smem, tile, place.width, factor, levels_smem,
                  place.words(codes, tables, block_idx, chunk) + lane_idx, lane_idx >> 2,
                  lane_idx & 3);
  }
}
