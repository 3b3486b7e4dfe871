// Keys: one thread block per (block, kv head). Zero and scale are static, so the thresholds come
// from a table.
#pragma once

#include "pack_codes.cuh"
#include "pack_params.cuh"

// The rows of a thread: two channels of each of eight lanes.
struct KeyRows {
  u32 w[ROWS_PER_THREAD][8];

  __device__ __forceinline__ void load(const u16* x, int first_row, i64 token_stride) {
#pragma unroll
    for (int i = 0; i < ROWS_PER_THREAD; ++i) {
      const u16* p = x + (first_row + i * ROW_STRIDE) * token_stride;
#pragma unroll
      for (int j = 0; j < 8; ++j) w[i][j] = load2(p + j * LANE_CHANNELS);
    }
  }
};

// Encodes a thread's rows. `marks`: a bit per outlier, for row i, lane j and channel c or c + 1 in
// word i / 2, bit 8 * (i % 2) + j of the lower or the upper half. `bad`: whether a number is not
// finite, where there are no outliers (else those are checked).
__device__ __forceinline__ void encode_rows(CodeBits (&codes)[ROWS_PER_THREAD],
                                            u32 (&marks)[ROWS_PER_THREAD / 2], u32& bad,
                                            const KeyRows& rows, const uint4* table) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    u32 thresholds[THRESHOLD_VECTORS * 4];
#pragma unroll
    for (int v = 0; v < THRESHOLD_VECTORS; ++v) {
      uint4 four = table[(j * THRESHOLD_VECTORS + v) * THREADS_PER_ROW];
      thresholds[4 * v] = four.x, thresholds[4 * v + 1] = four.y;
      thresholds[4 * v + 2] = four.z, thresholds[4 * v + 3] = four.w;
    }
#pragma unroll
    for (int i = 0; i < ROWS_PER_THREAD; ++i) {
      encode(codes[i], rows.w[i][j], thresholds, j);
      if constexpr (HAS_KEY_OUTLIERS) {
        u32 outside = le2(rows.w[i][j], thresholds[NUM_THRESHOLDS]) |
                      geu2(rows.w[i][j], thresholds[NUM_THRESHOLDS + HAS_KEY_OUTLIERS]);
        marks[i / 2] |= outside & (BOTH_HALVES << (8 * (i & 1) + j));
      } else {
        bad |= geu2(absolute(rows.w[i][j]), INFINITY_BITS * BOTH_HALVES);
      }
    }
  }
}

// Writes a thread's outliers from `slot` on; returns whether one is not finite.
__device__ __forceinline__ u32 write_outliers(const PackTarget& target, const u16* x,
                                              i64 token_stride,
                                              const u32 (&marks)[ROWS_PER_THREAD / 2], int count,
                                              int slot, int first_row, int pair) {
  u32 bad = 0, remaining = marks[0];
  int half = 0;
  while (count--) {
    if (!remaining) remaining = marks[1], half = 2;
    int bit = __ffs(remaining) - 1;
    remaining &= remaining - 1;
    int row = first_row + (half + ((bit >> 3) & 1)) * ROW_STRIDE;
    int channel = (bit & 7) * LANE_CHANNELS + (bit >> 4);  // from the thread's first
    u16 value = x[row * token_stride + channel];
    bad |= not_finite(value);
    if (slot < target.num_slots) {
      target.outliers[slot] = value;
      target.positions[slot] = (position_t)(row * HEAD_DIM + 2 * pair + channel);
    }
    ++slot;
  }
  return bad;
}

// `table` [NUM_KV_HEADS, 8 lanes, THRESHOLD_VECTORS, THREADS_PER_ROW]: the thresholds, then the
// largest number that is an outlier below the range and the smallest one above.
extern "C" __global__ void __launch_bounds__(KEY_THREADS, MIN_KEY_BLOCKS_PER_SM)
    pack_keys(const PackSource source, const PackTarget target, const uint4* __restrict__ table) {
  __shared__ __align__(16) u8 code_smem[BLOCK_SIZE * ROW_BYTES];
  __shared__ int warp_counts[KEY_WARPS];
  __shared__ int first_slot;
  const int tid = threadIdx.x, list = blockIdx.x;
  const int kv_head_idx = list % NUM_KV_HEADS, block_idx = list / NUM_KV_HEADS;
  const int pair = tid % THREADS_PER_ROW, first_row = tid / THREADS_PER_ROW;
  const u16* x = block_start(source, block_idx) + kv_head_idx * source.head_stride + 2 * pair;
  KeyRows rows;
  rows.load(x, first_row, source.token_stride);
  CodeBits codes[ROWS_PER_THREAD];
  u32 marks[ROWS_PER_THREAD / 2] = {}, bad = 0;
  encode_rows(codes, marks, bad, rows,
              table + kv_head_idx * (8 * THRESHOLD_VECTORS * THREADS_PER_ROW) + pair);
#pragma unroll
  for (int i = 0; i < ROWS_PER_THREAD; ++i)
    store_codes(code_smem + (first_row + i * ROW_STRIDE) * ROW_BYTES + 2 * pair, codes[i]);
  const int lane_idx = tid & 31, warp_idx = tid >> 5;
  int count = 0, prefix = 0;
  if constexpr (HAS_KEY_OUTLIERS) {
    count = __popc(marks[0]) + __popc(marks[1]);
    prefix = inclusive_sum(count, lane_idx);
    if (lane_idx == 31) warp_counts[warp_idx] = prefix;
  }
  __syncthreads();
  uint4* out = (uint4*)(target.codes + (i64)list * (BLOCK_SIZE * ROW_BYTES));
#pragma unroll
  for (int k = 0; k < BLOCK_SIZE * ROW_BYTES / 16; k += KEY_THREADS)
    if (k + tid < BLOCK_SIZE * ROW_BYTES / 16) out[k + tid] = ((const uint4*)code_smem)[k + tid];
  if constexpr (HAS_KEY_OUTLIERS) {
    int before = 0, total = 0;
#pragma unroll
    for (int i = 0; i < KEY_WARPS; ++i) {
      before += i < warp_idx ? warp_counts[i] : 0;
      total += warp_counts[i];
    }
    if (tid == 0) {
      first_slot = atomicAdd(target.cursor, total);
      open_list(target, list, first_slot, total);
    }
    __syncthreads();
    bad |= write_outliers(target, x, source.token_stride, marks, count,
                          first_slot + before + prefix - count, first_row, pair);
  }
  if (bad) target.status[1] = 1;
}
