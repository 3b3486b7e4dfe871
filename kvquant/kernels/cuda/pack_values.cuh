// Values: a thread block takes tokens of all kv heads. Zero and scale of a token come from the
// range that is left without its outliers; then each of NUM_THRESHOLDS threads finds a threshold.
#pragma once

#include "pack_codes.cuh"
#include "pack_params.cuh"
#include "pack_selection.cuh"

// The smallest 16-bit number that is above a midpoint when normalized; infinity if none is.
__device__ __forceinline__ u32 find_threshold(float zero, float inverse, float scale,
                                              float midpoint) {
  auto above = [&](int order) {
    float x = to_float((u16)unordered(order));
    return __fmul_rn(__fsub_rn(x, zero), inverse) > midpoint;
  };
  int low = 1 - INFINITY_BITS, high = INFINITY_BITS;  // low <= answer <= high
  // It is next to the midpoint's place, unless the zero is much larger than the result.
  int guess = ordered(to_16(midpoint * scale + zero));
  int below = max(guess - 4, low), beyond = min(guess + 3, high - 1);
  if (below < beyond) {
    if (above(below)) high = below;
    else low = below + 1;
    if (above(beyond)) high = min(high, beyond);
    else low = max(low, beyond + 1);
  }
  while (low < high) {
    int middle = (low + high) >> 1;  // rounds down: infinity itself is never asked
    if (above(middle)) high = middle;
    else low = middle + 1;
  }
  return unordered(low);
}

// Offers each thread's largest elements to the selection; on side 1 those of the negated elements.
__device__ __forceinline__ void offer_extremes(const TokenRow& row, Selection& smem, int* status) {
  const int tid = threadIdx.x;
  u32 largest = 0, smallest = 0;
  bool begun = false;
  for_pairs(row, [&](int, int, u32 w) {
    largest = begun ? max2(largest, w) : w;
    smallest = begun ? min2(smallest, w) : w;
    begun = true;
  });
  if (geu2(absolute(largest), INFINITY_BITS * BOTH_HALVES) |
      geu2(absolute(smallest), INFINITY_BITS * BOTH_HALVES))
    status[1] = 1;
  if (!EVEN_UNITS && tid >= NUM_UNITS)
    largest = (0x8000 | INFINITY_BITS) * BOTH_HALVES, smallest = INFINITY_BITS * BOTH_HALVES;
  smem.extremes[0][tid] = largest;
  smem.extremes[1][tid] = smallest ^ 0x80008000u;
  if (tid < 2) smem.count[tid] = 0;
}

// The ends of the range of a token without outliers. One warp per side, or one for both.
__device__ __forceinline__ void find_ends(Selection& smem) {
  const int tid = threadIdx.x;
  if (tid < 64 || VALUE_THREADS == 32) {
    for (int side = VALUE_THREADS == 32 ? 0 : tid >> 5;
         side < (VALUE_THREADS == 32 ? 2 : 1 + (tid >> 5)); ++side) {
      int largest = -INFINITY_BITS;
      for (int i = tid & 31; i < VALUE_THREADS; i += 32) {
        u32 w = smem.extremes[side][i];
        largest = max(largest, max(ordered(w & 0xFFFF), ordered(w >> 16)));
      }
      smem.inlier_end[side] = warp_max(largest);
    }
  }
  __syncthreads();
}

// Zero and scale from the ends of the range; each thread finds one threshold.
__device__ __forceinline__ void find_thresholds(Selection& smem, const float* midpoints, u16* zeros,
                                                u16* scales, int token_idx) {
  const int tid = threadIdx.x;
  if (tid < NUM_THRESHOLDS) {
    float high = to_float((u16)unordered(smem.inlier_end[0]));
    float low = -to_float((u16)unordered(smem.inlier_end[1]));
    u16 zero = to_16(__fmul_rn(__fadd_rn(high, low), 0.5f));
    u16 scale = to_16(__fmul_rn(__fsub_rn(high, low), 0.5f));
    float z = to_float(zero), half = to_float(scale);
    float inverse = half == 0.0f ? 0.0f : __fdiv_rn(1.0f, half);
    smem.thresholds[tid] = find_threshold(z, inverse, half, midpoints[tid]) * BOTH_HALVES;
    if (tid == 0) zeros[token_idx] = zero, scales[token_idx] = scale;
  }
  __syncthreads();
}

__device__ __forceinline__ void encode_token(const TokenRow& row, const Selection& smem, u8* out) {
  u32 thresholds[NUM_THRESHOLDS];
#pragma unroll
  for (int i = 0; i < NUM_THRESHOLDS; ++i) thresholds[i] = smem.thresholds[i];
#pragma unroll
  for (int u = 0; u < UNITS_PER_THREAD; ++u) {
    int unit = threadIdx.x + u * VALUE_THREADS;
    if (EVEN_UNITS || unit < NUM_UNITS) {
      CodeBits codes;
#pragma unroll
      for (int j = 0; j < 8; ++j) encode(codes, row.w[u][j], thresholds, j);
      store_codes(
          out + (unit / THREADS_PER_ROW) * (BLOCK_SIZE * ROW_BYTES) + 2 * (unit % THREADS_PER_ROW),
          codes);
    }
  }
}

// A thread block takes `tokens_per_block` of all `num_tokens`. `token_outliers` [num_tokens,
// OUTLIERS_PER_TOKEN]: element and channel.
extern "C" __global__ void __launch_bounds__(VALUE_THREADS, MIN_VALUE_BLOCKS_PER_SM)
    pack_values(const PackSource source, u8* __restrict__ codes, int* status,
                u16* __restrict__ zeros, u16* __restrict__ scales,
                const float* __restrict__ midpoints, u32* __restrict__ token_outliers,
                int num_tokens, int tokens_per_block) {
  __shared__ Selection smem;
  int token_idx = blockIdx.x * tokens_per_block;
  const int stop = min(token_idx + tokens_per_block, num_tokens);
  if (token_idx >= stop) return;
  TokenRow row;
  for (; token_idx < stop; ++token_idx) {
    row.load(source, token_idx);
    offer_extremes(row, smem, status);
    __syncthreads();
    if constexpr (OUTLIERS_PER_SIDE > 0) {
      const u16* x = token_start(source, token_idx);
      select_outliers(row, x, source, smem, token_outliers + (i64)token_idx * OUTLIERS_PER_TOKEN);
    } else {
      find_ends(smem);
    }
    find_thresholds(smem, midpoints, zeros, scales, token_idx);
    encode_token(row, smem,
                 codes + (i64)(token_idx / BLOCK_SIZE) * (NUM_KV_HEADS * BLOCK_SIZE * ROW_BYTES) +
                     (token_idx % BLOCK_SIZE) * ROW_BYTES);
  }
}

// Hands out the slots of a block's lists, one list per kv head. One warp.
__device__ __forceinline__ void open_lists(const PackTarget& target, const int* head_counts,
                                           int* next_slot, int block_idx) {
  const int lane_idx = threadIdx.x;
  int total = 0, base = 0;
  for (int h = lane_idx; h < NUM_KV_HEADS; h += 32) total += head_counts[h];
  total = warp_sum(total);
  if (lane_idx == 0) base = atomicAdd(target.cursor, total);
  base = warp_sum(base);  // all other lanes give 0
  for (int first = 0; first < NUM_KV_HEADS; first += 32) {
    int h = first + lane_idx, own = h < NUM_KV_HEADS ? head_counts[h] : 0, prefix = own;
    for (int d = 1; d < 32; d *= 2) {
      int below = from_lane_below(prefix, d);
      if (lane_idx >= d) prefix += below;
    }
    if (h < NUM_KV_HEADS) {
      next_slot[h] = base + prefix - own;
      open_list(target, block_idx * NUM_KV_HEADS + h, base + prefix - own, own);
    }
    base += warp_sum(own);
  }
}

// Sorts the lists of a block's tokens by kv head. One thread block per block.
extern "C" __global__ void __launch_bounds__(GROUP_THREADS, 1)
    group_values(const PackTarget target, const u32* __restrict__ token_outliers) {
  __shared__ int head_counts[NUM_KV_HEADS], next_slot[NUM_KV_HEADS];
  const int tid = threadIdx.x, block_idx = blockIdx.x,
            num_entries = BLOCK_SIZE * OUTLIERS_PER_TOKEN;
  token_outliers += (i64)block_idx * num_entries;
  for (int h = tid; h < NUM_KV_HEADS; h += GROUP_THREADS) head_counts[h] = 0;
  __syncthreads();
  // A list that NaN cut short holds anything; no channel beyond the token's is followed.
  for (int i = tid; i < num_entries; i += GROUP_THREADS) {
    u32 channel = token_outliers[i] & 0xFFFF;
    if (channel < NUM_CHANNELS) atomicAdd(&head_counts[channel / HEAD_DIM], 1);
  }
  __syncthreads();
  if (tid < 32) open_lists(target, head_counts, next_slot, block_idx);
  __syncthreads();
  for (int i = tid; i < num_entries; i += GROUP_THREADS) {
    u32 entry = token_outliers[i], channel = entry & 0xFFFF;
    if (channel >= NUM_CHANNELS) continue;
    int slot = atomicAdd(&next_slot[channel / HEAD_DIM], 1);
    if (slot < target.num_slots) {
      target.outliers[slot] = (u16)(entry >> 16);
      target.positions[slot] = (position_t)((i / LIST_LENGTH) * HEAD_DIM + channel % HEAD_DIM);
    }
  }
}
