// Phase 0 of the decode kernel: tables, queries and the blocks' lists come to shared memory.
#pragma once

#include "decode_blocks.cuh"

// The channel pairs of the group's queries that a thread reads, to be in flight early.
struct QueryLoads {
  static constexpr int COUNT = (GROUP_SIZE * HALF_DIM + NUM_THREADS - 1) / NUM_THREADS;
  u16 first[COUNT], second[COUNT];

  __device__ __forceinline__ void load(const u16* query) {
#pragma unroll
    for (int k = 0; k < COUNT; k++) {
      const int i = min(k * NUM_THREADS + (int)threadIdx.x, GROUP_SIZE * HALF_DIM - 1);
      first[k] = __ldg(query + i / HALF_DIM * HEAD_DIM + i % HALF_DIM);
      second[k] = __ldg(query + i / HALF_DIM * HEAD_DIM + i % HALF_DIM + HALF_DIM);
    }
  }
  // Writes the pairs to shared memory, the sums of the output's corrections as zeros, and the
  // largest squared length of the warp's pairs.
  __device__ __forceinline__ void store(SharedStorage& smem, float score_scale, int warp_idx,
                                        int lane_idx) const {
    float reach = 0.0f;
#pragma unroll
    for (int k = 0; k < COUNT; k++) {
      const int i = k * NUM_THREADS + threadIdx.x, q = i / HALF_DIM, f = i % HALF_DIM;
      if (GROUP_SIZE * HALF_DIM % NUM_THREADS && i >= GROUP_SIZE * HALF_DIM) break;
      const u32 a = first[k], b = second[k];
      const float x = load16((u16)a), y = load16((u16)b);
      smem.query[q][f] = x * score_scale;
      smem.query[q][f + HALF_DIM] = y * score_scale;
      smem.out_change[q][f] = smem.out_change[q][f + HALF_DIM] = 0;
      if constexpr (HAS_OUTLIERS) {
        smem.query_pairs[f].query[q] = a | b << 16;
        smem.query_pairs[f + HALF_DIM].query[q] = b | (a ^ 0x8000) << 16;
        reach = fmaxf(reach, x * x + y * y);
      }
    }
    if constexpr (HAS_OUTLIERS) {
      reach = warp_max(reach);
      if (lane_idx == 0) smem.query_reach[warp_idx] = reach;
    }
  }
};

// Begins to copy the rotary tables and the kv head's calibration.
__device__ __forceinline__ void copy_tables(const DecodeParams& params, SharedStorage& smem,
                                            int kv_head_idx, int first_chunk, int num_chunks) {
  const u8* const head_table = params.head_tables + (i64)kv_head_idx * HEAD_TABLE_STRIDE;
  copy_rope(params, smem, kv_head_idx);
  thread_block_loop<MAX_CHUNKS * HALF_DIM / 4>([&](int i) {
    if (i < num_chunks * (HALF_DIM / 4))
      cp_async_16((float4*)smem.tables.phases + i,
                  (const float4*)(params.phases + (i64)(first_chunk + 1) * HALF_DIM) + i);
  });
  thread_block_loop<HEAD_TABLE_BYTES / 16>(
      [&](int i) { cp_async_16((uint4*)&smem.head_table + i, (const uint4*)head_table + i); });
  if constexpr (HAS_OUTLIERS) {
    thread_block_loop<2 * HEAD_DIM>([&](int i) {
      cp_async_4((u32*)smem.k_channels + i,
                 i % 2 ? (const u32*)params.thetas + i / 2 % HALF_DIM
                       : (const u32*)(head_table + HEAD_TABLE_BYTES) + i / 2);
    });
    thread_block_loop<GROUP_SIZE * SCORE_STRIDE / 4>(
        [&](int i) { ((int4*)smem.score_change)[i] = make_int4(0, 0, 0, 0); });
  }
}

// Begins to copy zeros, scales and the keys' outliers of the warp's blocks, and fetches the codes
// of its first chunk, which are so many bytes.
__device__ __forceinline__ void copy_blocks(SharedStorage& smem, int num_chunks, int key_bytes,
                                            int value_bytes, int warp_idx, int lane_idx) {
  const int num_blocks = num_chunks / CHUNKS_PER_BLOCK;
#pragma unroll 1
  for (int j = 0; j < MAX_BLOCKS_PER_WARP; j++) {
    const int block_idx = warp_idx + j * NUM_WARPS;
    if (block_idx >= num_blocks) break;
    const BlockEntry& block = smem.blocks[block_idx];
    stage_arrays<BLOCK_SIZE>((u16*)smem.v_zeros[block_idx], block.v_zeros,
                             (u16*)smem.v_scales[block_idx], block.v_scales, BLOCK_SIZE, lane_idx);
    if constexpr (HAS_OUTLIERS) stage_outliers(smem.staged[block_idx], block, KEYS, lane_idx);
  }
  if (CHUNKS_PER_BLOCK == 1 && warp_idx < num_chunks) {  // else the block's entry is another warp's
    prefetch_chunk(smem.blocks[warp_idx].codes[KEYS], key_bytes, lane_idx);
    prefetch_chunk(smem.blocks[warp_idx].codes[VALUES], value_bytes, lane_idx);
  }
}
