// The outliers of a token of values, by rank, and the ends of what is left.
//
// A bound with a little more than OUTLIERS_PER_SIDE threads' largest elements at or above it picks
// a few candidates, which are ranked. Ties or a crowd that make too many candidates are cut off by
// a search for the exact place. Side 0 is the upper end; side 1 the lower one, by negated elements.
#pragma once

#include "pack_instructions.cuh"
#include "pack_params.cuh"
#include "pack_shape.cuh"

// A sort key: larger for larger elements, and of equal ones for the lower channel. The last bit
// keeps the sign of a zero.
__device__ __forceinline__ int sort_key(u32 raw, int channel) {
  return ordered(raw) * 65536 + 2 * (NUM_CHANNELS - 1 - channel) + ((raw & 0xFFFF) == 0x8000);
}
__device__ __forceinline__ u32 element_of(int key) {
  return unordered(key >> 16) | (key & 1 ? 0x8000u : 0u);
}
__device__ __forceinline__ int channel_of(int key) {
  return NUM_CHANNELS - 1 - ((key & 0xFFFF) >> 1);
}

// A token, counted over all blocks, in the first kv head.
__device__ __forceinline__ const u16* token_start(const PackSource& source, int token_idx) {
  return block_start(source, token_idx / BLOCK_SIZE) +
         (i64)(token_idx % BLOCK_SIZE) * source.token_stride;
}

// What a thread has of a token: its units' pairs of channels.
struct TokenRow {
  u32 w[UNITS_PER_THREAD][8];

  __device__ __forceinline__ void load(const PackSource& source, int token_idx) {
    const u16* x = token_start(source, token_idx);
#pragma unroll
    for (int u = 0; u < UNITS_PER_THREAD; ++u) {
      int unit = threadIdx.x + u * VALUE_THREADS;
      if (EVEN_UNITS || unit < NUM_UNITS) {
        const u16* p =
            x + (unit / THREADS_PER_ROW) * source.head_stride + 2 * (unit % THREADS_PER_ROW);
#pragma unroll
        for (int j = 0; j < 8; ++j) w[u][j] = load2(p + j * LANE_CHANNELS);
      }
    }
  }
};

// Calls f(unit, lane, two elements) for all that a thread has.
//
// \tparam F  callable that takes two ints and a u32
template <typename F> __device__ __forceinline__ void for_pairs(const TokenRow& row, F f) {
#pragma unroll
  for (int u = 0; u < UNITS_PER_THREAD; ++u)
    if (EVEN_UNITS || threadIdx.x + u * VALUE_THREADS < NUM_UNITS)
#pragma unroll
      for (int j = 0; j < 8; ++j) f(u, j, row.w[u][j]);
}

// Shared memory of a token.
struct Selection {
  u32 extremes[2][VALUE_THREADS];  // each thread's largest elements
  u32 bound[2];
  int count[2], tally;
  int candidates[2][MAX_CANDIDATES];
  int inlier_end[2];  // the largest that is no outlier, as an ordered integer
  u32 thresholds[NUM_THRESHOLDS];
};

// Finds a bound with a little more than OUTLIERS_PER_SIDE of the threads' largest elements at or
// above it. One warp.
__device__ __forceinline__ u32 find_bound(const u32* extremes, int lane_idx) {
  u32 words[VALUE_THREADS / 32];
  int low = INFINITY_BITS, high = -INFINITY_BITS;
#pragma unroll
  for (int i = 0; i < VALUE_THREADS / 32; ++i) {
    u32 w = words[i] = extremes[i * 32 + lane_idx];
    int a = ordered(w & 0xFFFF), b = ordered(w >> 16);
    low = min(low, min(a, b));
    high = max(high, max(a, b));
  }
  low = warp_min(low);
  high = warp_max(high);
  int held = 2 * VALUE_THREADS;
  while (low < high && held > OUTLIERS_PER_SIDE + 1 + BOUND_SLACK) {
    int middle = low + ((high - low + 1) >> 1);
    u32 bound = unordered(middle) * BOTH_HALVES, sum = 0;
#pragma unroll
    for (int i = 0; i < VALUE_THREADS / 32; ++i) sum -= ge2(words[i], bound);
    sum = warp_sum(sum);  // a + (b - a) 2^16 for a lower and b upper halves
    int number = ((int)sum >> 16) + 2 * (int)(sum & 0xFFFF);
    if (number > OUTLIERS_PER_SIDE) low = middle, held = number;
    else high = middle - 1;
  }
  return unordered(low) * BOTH_HALVES;
}

// Finds the OUTLIERS_PER_SIDE + 1 largest elements by a search over sort keys, where ties or a
// crowd make too many candidates. This is rare, and the row is read again in each step, which costs
// other tokens no registers.
__device__ __forceinline__ void search_exactly(const u16* x, const PackSource& source,
                                               Selection& smem, int side) {
  const u32 flip = side ? 0x8000u : 0u;
  i64 low = -2147483647, high = 2147483647;
  while (low < high) {
    int middle = (int)((low + high + 1) >> 1), number = 0;
#pragma unroll 4
    for (int c = threadIdx.x; c < NUM_CHANNELS; c += VALUE_THREADS)
      number += sort_key(x[(c / HEAD_DIM) * source.head_stride + c % HEAD_DIM] ^ flip, c) >= middle;
    number = warp_sum(number);
    if (threadIdx.x == 0) smem.tally = 0;
    __syncthreads();
    if ((threadIdx.x & 31) == 0) atomicAdd(&smem.tally, number);
    __syncthreads();
    if (smem.tally > OUTLIERS_PER_SIDE) low = middle;
    else high = (i64)middle - 1;
    __syncthreads();
  }
  if (threadIdx.x == 0) smem.count[side] = 0;
  __syncthreads();
#pragma unroll 1
  for (int c = threadIdx.x; c < NUM_CHANNELS; c += VALUE_THREADS) {
    int key = sort_key(x[(c / HEAD_DIM) * source.head_stride + c % HEAD_DIM] ^ flip, c);
    if (key >= low)
      smem.candidates[side][min(atomicAdd(&smem.count[side], 1), MAX_CANDIDATES - 1)] = key;
  }
}

// Writes the bounds of both sides to shared memory.
__device__ __forceinline__ void find_bounds(Selection& smem) {
  const int tid = threadIdx.x, lane_idx = tid & 31;
  if (VALUE_THREADS == 32) {
    smem.bound[0] = find_bound(smem.extremes[0], lane_idx);
    smem.bound[1] = find_bound(smem.extremes[1], lane_idx);
  } else if (tid < 64) {
    u32 bound = find_bound(smem.extremes[tid >> 5], lane_idx);
    if (lane_idx == 0) smem.bound[tid >> 5] = bound;
  }
  __syncthreads();
}

// Lists the channels of the elements at or beyond a bound.
__device__ __forceinline__ void collect_candidates(const TokenRow& row, Selection& smem, u32 above,
                                                   u32 below) {
  u32 marks[UNITS_PER_THREAD] =
      {};  // bits 0..7 of a half: lanes at or above the bound, 8..15: below theirs
  for_pairs(row, [&](int u, int j, u32 w) {
    marks[u] |= ge2(w, above) & (BOTH_HALVES << j);
    marks[u] |= le2(w, below) & (BOTH_HALVES << (8 + j));
  });
#pragma unroll
  for (int u = 0; u < UNITS_PER_THREAD; ++u) {
    u32 remaining = marks[u];
    const int unit = threadIdx.x + u * VALUE_THREADS,
              base = (unit / THREADS_PER_ROW) * HEAD_DIM + 2 * (unit % THREADS_PER_ROW);
    while (remaining) {
      int bit = __ffs(remaining) - 1, side = (bit >> 3) & 1;
      remaining &= remaining - 1;
      int slot = atomicAdd(&smem.count[side], 1);
      if (slot < MAX_CANDIDATES)
        smem.candidates[side][slot] = base + (bit & 7) * LANE_CHANNELS + (bit >> 4);
    }
  }
  __syncthreads();
}

// Whether an element of the lower end is an outlier of the upper end as well, which happens in a
// nearly constant token. `mirror`: its sort key on side 0.
__device__ __forceinline__ bool is_upper_outlier(const Selection& smem, int mirror) {
  int rank = 0, found = 0;
#pragma unroll 1
  for (int k = 0; k < min(smem.count[0], MAX_CANDIDATES); ++k) {
    rank += smem.candidates[0][k] > mirror;
    found |= smem.candidates[0][k] == mirror;
  }
  return found && rank < OUTLIERS_PER_SIDE;
}

// Ranks the candidates of one side and writes the outliers among them.
__device__ __forceinline__ void rank_candidates(Selection& smem, int side, int own, u32 flip,
                                                u32 above, u32* token_outliers) {
  const int* candidates = smem.candidates[side];
  const int number = min(smem.count[side], MAX_CANDIDATES), least = ordered(above & 0xFFFF);
  for (int i = own; i < number; i += VALUE_THREADS / 2) {
    const int key = candidates[i];
    int rank = 0;
    for (int k = 0; k < number; ++k) rank += candidates[k] > key;
    if (rank < OUTLIERS_PER_SIDE) {
      u32 raw = element_of(key) ^ flip, entry = raw << 16 | (u32)channel_of(key);
      if (side) {
        const int mirror = sort_key(raw, channel_of(key));
        if (mirror >> 16 >= least) {
          if (is_upper_outlier(smem, mirror)) entry = NO_OUTLIER;
        }
      }
      token_outliers[side * OUTLIERS_PER_SIDE + rank] = entry;
    }
    if (rank == OUTLIERS_PER_SIDE) smem.inlier_end[side] = key >> 16;
  }
  __syncthreads();
}

// Writes the token's outliers to `token_outliers` and the ends of the rest to shared memory.
__device__ __forceinline__ void select_outliers(const TokenRow& row, const u16* x,
                                                const PackSource& source, Selection& smem,
                                                u32* token_outliers) {
  const int tid = threadIdx.x;
  find_bounds(smem);
  const u32 above = smem.bound[0], below = smem.bound[1] ^ 0x80008000u;
  collect_candidates(row, smem, above, below);
  // From here on, one half of the threads for each end.
  const int side = tid / (VALUE_THREADS / 2), own = tid % (VALUE_THREADS / 2);
  const u32 flip = side ? 0x8000u : 0u;
  int* candidates = smem.candidates[side];
  const bool too_many_above = smem.count[0] > MAX_CANDIDATES,
             too_many_below = smem.count[1] > MAX_CANDIDATES;
  for (int i = own; i < min(smem.count[side], MAX_CANDIDATES); i += VALUE_THREADS / 2) {
    int channel = candidates[i];
    candidates[i] =
        sort_key(x[(channel / HEAD_DIM) * source.head_stride + channel % HEAD_DIM] ^ flip, channel);
  }
  __syncthreads();
  if (too_many_above || too_many_below) {
#pragma unroll 1
    for (int end = 0; end < 2; ++end)
      if (end ? too_many_below : too_many_above) search_exactly(x, source, smem, end);
    __syncthreads();
  }
  rank_candidates(smem, side, own, flip, above, token_outliers);
}
