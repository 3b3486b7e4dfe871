// The decode kernel, whatever the codes are; decode.cu says how it works.
//
// The source that includes this file has included before what knows the codes: `HeadTable` and the
// places in it, `copy_rope`, `unrotate_queries`, `compute_scores`, `correct_output` and
// `accumulate_values`.
#pragma once

#include "decode_16bit.cuh"
#include "decode_outliers.cuh"
#include "decode_prepare.cuh"
#include "decode_softmax.cuh"

// Phases 1 to 5 over the packed chunks of a split. Returns the unit of `smem.out_change`.
__device__ __forceinline__ float attend_packed(const DecodeParams& params, SharedStorage& smem,
                                               float score_scale, int num_chunks, int warp_idx,
                                               int lane_idx, int g, int t) {
  const int num_blocks = num_chunks / CHUNKS_PER_BLOCK;
  float unit = 0.0f;
  if constexpr (HAS_OUTLIERS) {
    correct_scores(smem, num_blocks, warp_idx, lane_idx, score_scale);
    if constexpr (HAS_VALUE_OUTLIERS) {
      __syncwarp();  // the keys' outliers have been read
      stage_warp_outliers(smem, VALUES, num_blocks, warp_idx, lane_idx);
    }
    if (CHUNKS_PER_BLOCK > 1) __syncthreads();
    else __syncwarp();  // a warp reads what it wrote
  }
  compute_scores(params, smem, num_chunks, warp_idx, lane_idx);
  if constexpr (HAS_VALUE_OUTLIERS) {
    cp_async_wait_all();
    __syncwarp();
    const u32 largest = largest_outlier(smem, VALUES, num_blocks, warp_idx, lane_idx);
    if (lane_idx == 0) atomicMax(&smem.largest_value_outlier, largest);
  }
  __syncthreads();
  compute_weights(smem, num_chunks, warp_idx, lane_idx);
  if constexpr (HAS_VALUE_OUTLIERS) {
    if (CHUNKS_PER_BLOCK > 1) __syncthreads();
    else __syncwarp();
    // A token's levels lie between its outliers, so no difference is larger than twice the largest.
    unit = 2.5f * load16((u16)smem.largest_value_outlier) * OUTPUT_UNIT;
    correct_output(params, smem, num_blocks, warp_idx, lane_idx, unit);
  }
  __syncwarp();
  float out[HEAD_DIM / 16][4];
#pragma unroll
  for (int i = 0; i < HEAD_DIM / 16; i++) out[i][0] = out[i][1] = out[i][2] = out[i][3] = 0.0f;
  accumulate_values(smem, num_chunks, warp_idx, lane_idx, out);
  store_accumulators(smem, out, warp_idx, g, t);
  return unit;
}

// Adds up the warps' outputs and writes the split's state: maximum, sum and output of each query.
// `state`: index of the split's first query.
__device__ __forceinline__ void write_state(const DecodeParams& params, const SharedStorage& smem,
                                            i64 state, float unit) {
  for (int i = threadIdx.x; i < GROUP_SIZE * HEAD_DIM; i += NUM_THREADS) {
    const int q = i / HEAD_DIM, c = i % HEAD_DIM;
    float value = (float)smem.out_change[q][c] * unit;
#pragma unroll
    for (int w = 0; w < NUM_WARPS; w++) value += smem.out[w][q][c];
#pragma unroll
    for (int w = 0; w < NUM_WARPS; w += 4) {
      const float4 zeros = *(const float4*)&smem.zero_sum[q][w];
      value += zeros.x + zeros.y + (zeros.z + zeros.w);
    }
    params.partial_out[state * HEAD_DIM + i] = value;
    if (c == 0) {
      float maximum = NO_SCORE, sum = 0.0f;
      for (int w = 0; w < NUM_WARPS; w++) {
        maximum = fmaxf(maximum, smem.score_max[q][w]);
        sum += smem.weight_sum[q][w];
      }
      params.partial_state[(state + q) * 2] = maximum;
      params.partial_state[(state + q) * 2 + 1] = sum;
    }
  }
}

// All phases of a thread block.
__device__ __forceinline__ void attend_split(const DecodeParams& params, SharedStorage& smem,
                                             BlockFinder& finder, i64 state, bool in_16bit,
                                             int first_chunk, int num_chunks, int batch_idx,
                                             int kv_head_idx, int warp_idx, int lane_idx) {
  const int g = lane_idx / 4, t = lane_idx % 4;
  // Loads are issued before what needs them; the dependent steps of finding the blocks are spread
  // among them.
  finder.read_arena(params);
  const float score_scale = __ldg(params.thetas + HALF_DIM) * params.score_scale;
  const CodePlaces places(params, kv_head_idx);
  QueryLoads queries;
  queries.load(params.query +
               (i64)(batch_idx * params.num_kv_heads + kv_head_idx) * GROUP_SIZE * HEAD_DIM);
  copy_tables(params, smem, kv_head_idx, first_chunk, num_chunks);
  finder.read_outlier_lists(params, kv_head_idx);
  queries.store(smem, score_scale, warp_idx, lane_idx);
  if (threadIdx.x == 0) smem.largest_value_outlier = 0;
  finder.store(params, smem, places, kv_head_idx, warp_idx, lane_idx);
  __syncwarp();  // the warp's entries are there
  copy_blocks(smem, num_chunks, places.chunk_bytes(KEYS), places.chunk_bytes(VALUES), warp_idx,
              lane_idx);
  cp_async_wait_all();
  __syncthreads();
  float unit = 0.0f;
  if (in_16bit) attend_16bit(params, smem, batch_idx, kv_head_idx, warp_idx, lane_idx);
  else unit = attend_packed(params, smem, score_scale, num_chunks, warp_idx, lane_idx, g, t);
  __syncthreads();
  write_state(params, smem, state, unit);
}

// Grid: [num_kv_heads, batch, splits]. Heads come first, so that the splits in 16 bits, which take
// a short time, start last and fill what the last wave of thread blocks leaves free.
extern "C" __global__ void __launch_bounds__(NUM_THREADS, MIN_BLOCKS_PER_SM)
    decode(const DecodeParams params) {
  DYNAMIC_SHARED(smem_raw, SMEM_BYTES);
  SharedStorage& smem = *(SharedStorage*)smem_raw;
  const int warp_idx = threadIdx.x / 32, lane_idx = threadIdx.x % 32;
  const int kv_head_idx = blockIdx.x, batch_idx = blockIdx.y, split_idx = blockIdx.z,
            num_splits = gridDim.z;
  const int row = batch_idx * params.num_kv_heads + kv_head_idx;
  const i64 state = ((i64)row * num_splits + split_idx) * GROUP_SIZE;
  const bool in_16bit = split_idx == num_splits - 1;
  const int first_chunk = in_16bit ? 0 : split_idx * params.chunks_per_split;
  BlockFinder finder;
  finder.read_numbers(params.block_table + (i64)batch_idx * params.block_table_stride +
                          first_chunk / CHUNKS_PER_BLOCK,
                      params.block_table_stride - first_chunk / CHUNKS_PER_BLOCK, warp_idx,
                      lane_idx);
  const int num_chunks =
      in_16bit ? 0
               : min(params.chunks_per_split,
                     params.lengths[batch_idx * 3 + 1] * CHUNKS_PER_BLOCK - first_chunk);
  finder.limit(num_chunks / CHUNKS_PER_BLOCK, warp_idx, lane_idx);
  if (in_16bit || num_chunks > 0) {
    attend_split(params, smem, finder, state, in_16bit, first_chunk, num_chunks, batch_idx,
                 kv_head_idx, warp_idx, lane_idx);
  } else if (threadIdx.x < GROUP_SIZE) {
    params.partial_state[(state + threadIdx.x) * 2] = NO_SCORE;
    params.partial_state[(state + threadIdx.x) * 2 + 1] = 0.0f;
  }
}

constexpr int COMBINE_THREADS = 256;
constexpr int COMBINE_WARPS = COMBINE_THREADS / 32;
constexpr int SPLITS_PER_WARP = 32 / COMBINE_WARPS;  // of the first 32 splits
constexpr float LOG2_E = 1.44269504f;

// Adds up the splits of one query head of a sequence, weighted by their maxima. A thread block has
// little to do but to wait for memory, so its warps share the splits, and what they read first, the
// outputs of the first 32 splits, does not depend on the rest.
//
// \tparam SINKS  whether `sink_logits`, 16-bit numbers of the cache, take a share of the softmax
template <bool SINKS>
__device__ __forceinline__ void combine_splits(const float* __restrict__ partial_out,
                                               const float* __restrict__ partial_state,
                                               u16* __restrict__ out, int num_splits,
                                               const u16* __restrict__ sink_logits,
                                               int num_query_heads) {
  __shared__ float rows[COMBINE_WARPS][HEAD_DIM];
  const int row = blockIdx.x, warp_idx = threadIdx.x / 32, lane_idx = threadIdx.x % 32;
  const i64 first = (i64)(row / GROUP_SIZE) * num_splits * GROUP_SIZE + row % GROUP_SIZE;
  const float2* const states = (const float2*)partial_state + first;
  const float* const outs = partial_out + first * HEAD_DIM + lane_idx;
  float ahead[SPLITS_PER_WARP][HEAD_DIM / 32], sum[HEAD_DIM / 32];
#pragma unroll
  for (int k = 0; k < SPLITS_PER_WARP; k++)
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 32; i++)
      if (warp_idx + k * COMBINE_WARPS < num_splits)
        ahead[k][i] = __ldg(outs + (warp_idx + k * COMBINE_WARPS) * GROUP_SIZE * HEAD_DIM + i * 32);
  const float2 own =
      lane_idx < num_splits ? __ldg(states + lane_idx * GROUP_SIZE) : make_float2(NO_SCORE, 0.0f);
  float maximum = own.x;
  for (int s = lane_idx + 32; s < num_splits; s += 32)
    maximum = fmaxf(maximum, __ldg(&states[s * GROUP_SIZE].x));
  maximum = warp_max_signed(maximum);
  float sink = NO_SCORE;
  if constexpr (SINKS) {
    sink = LOG2_E * load16(__ldg(sink_logits + row % num_query_heads));
    maximum = fmaxf(maximum, sink);
  }
  float factor = own.y > 0.0f ? exp2(own.x - maximum) : 0.0f;  // an empty split wrote no output
  float total = factor * own.y;
#pragma unroll
  for (int i = 0; i < HEAD_DIM / 32; i++) sum[i] = 0.0f;
#pragma unroll
  for (int k = 0; k < SPLITS_PER_WARP; k++) {
    const float f = __shfl_sync(~0u, factor, warp_idx + k * COMBINE_WARPS);
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 32; i++)
      if (f > 0.0f) sum[i] = fmaf(f, ahead[k][i], sum[i]);
  }
  for (int begin = 32; begin < num_splits; begin += 32) {
    const float2 more = begin + lane_idx < num_splits
                            ? __ldg(states + (begin + lane_idx) * GROUP_SIZE)
                            : make_float2(NO_SCORE, 0.0f);
    factor = more.y > 0.0f ? exp2(more.x - maximum) : 0.0f;
    total = fmaf(factor, more.y, total);
#pragma unroll
    for (int k = 0; k < SPLITS_PER_WARP; k++) {
      const float f = __shfl_sync(~0u, factor, warp_idx + k * COMBINE_WARPS);
#pragma unroll
      for (int i = 0; i < HEAD_DIM / 32; i++)
        if (f > 0.0f)
          sum[i] = fmaf(
              f,
              __ldg(outs + (begin + warp_idx + k * COMBINE_WARPS) * GROUP_SIZE * HEAD_DIM + i * 32),
              sum[i]);
    }
  }
#pragma unroll
  for (int d = 16; d; d >>= 1) total += __shfl_xor_sync(~0u, total, d);
  if constexpr (SINKS) total += exp2(sink - maximum);
#pragma unroll
  for (int i = 0; i < HEAD_DIM / 32; i++) rows[warp_idx][i * 32 + lane_idx] = sum[i];
  __syncthreads();
  if (threadIdx.x >= HEAD_DIM) return;
  float value = 0.0f;
#pragma unroll
  for (int w = 0; w < COMBINE_WARPS; w++) value += rows[w][threadIdx.x];
  out[(i64)row * HEAD_DIM + threadIdx.x] = store16(total > 0.0f ? value / total : 0.0f);
}

extern "C" __global__ void __launch_bounds__(COMBINE_THREADS, 1)
    combine(const float* __restrict__ partial_out, const float* __restrict__ partial_state,
            u16* __restrict__ out, int num_splits) {
  combine_splits<false>(partial_out, partial_state, out, num_splits, nullptr, 0);
}

// The same with attention sinks, whose logits take their share here, once.
extern "C" __global__ void __launch_bounds__(COMBINE_THREADS, 1)
    combine_with_sinks(const float* __restrict__ partial_out,
                       const float* __restrict__ partial_state, u16* __restrict__ out,
                       int num_splits, const u16* __restrict__ sink_logits, int num_query_heads) {
  combine_splits<true>(partial_out, partial_state, out, num_splits, sink_logits, num_query_heads);
}
