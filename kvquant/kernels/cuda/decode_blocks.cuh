// How a warp finds its blocks and brings their data into shared memory.
//
// The blocks of a thread block are dealt out to its warps: warp w takes those at the indices w,
// w + NUM_WARPS, ...
#pragma once

#include "decode_storage.cuh"

// Calls f(i) for every i below N, each thread of the thread block for some of them.
//
// \tparam N  number of calls
// \tparam F  callable that takes an int
template <int N, typename F> __device__ __forceinline__ void thread_block_loop(F f) {
#pragma unroll
  for (int begin = 0; begin < N; begin += NUM_THREADS)
    if (begin + NUM_THREADS <= N || begin + (int)threadIdx.x < N) f(begin + (int)threadIdx.x);
}

// The number of elements between `p` and the multiple of 16 bytes at or before it.
//
// \tparam E  type of the elements
template <typename E> __device__ __forceinline__ int elements_before(const E* p) {
  return (int)((u64)p & 15) / (int)sizeof(E);
}

// Begins to copy the 16-byte pieces that hold the elements of two arrays: half of the lanes copy
// the one, the others the other.
//
// \tparam MAX_COUNT  most elements per array
// \tparam A, B       types of the elements
template <int MAX_COUNT, typename A, typename B>
__device__ __forceinline__ void stage_arrays(A* to_a, const A* from_a, B* to_b, const B* from_b,
                                             int count, int lane_idx) {
  const bool second = lane_idx & 16;
  const u8* const from = second ? (const u8*)from_b : (const u8*)from_a;
  u8* const to = second ? (u8*)to_b : (u8*)to_a;
  const u8* const begin = (const u8*)((u64)from & ~(u64)15);
  const int bytes = (second ? (int)sizeof(B) : (int)sizeof(A)) * count + (int)(from - begin);
#pragma unroll
  for (int i = 0; i < MAX_COUNT * (int)max(sizeof(A), sizeof(B)) + 15; i += 256) {
    const int at = i + lane_idx % 16 * 16;
    if (at < bytes) cp_async_16(to + at, begin + at);
  }
}

// A block's outliers of one side: the first STAGED_OUTLIERS in shared memory, all in global memory.
struct OutlierView {
  int count;
  const position_t *positions, *staged_positions;
  const u16 *values, *staged_values;

  __device__ __forceinline__ OutlierView(const BlockEntry& block, const StagedOutliers& staged,
                                         int side)
      : count(block.num_outliers[side]),
        positions(block.positions[side]),
        values(block.outliers[side]) {
    staged_positions = staged.positions + elements_before(positions);
    staged_values = staged.values + elements_before(values);
  }
};
__device__ __forceinline__ void stage_outliers(StagedOutliers& staged, const BlockEntry& block,
                                               int side, int lane_idx) {
  const int count = min(block.num_outliers[side], STAGED_OUTLIERS);
  stage_arrays<STAGED_OUTLIERS>(staged.positions, block.positions[side], staged.values,
                                block.outliers[side], count, lane_idx);
}

// Begins to copy the outliers of one side of the warp's blocks.
__device__ __forceinline__ void stage_warp_outliers(SharedStorage& smem, int side, int num_blocks,
                                                    int warp_idx, int lane_idx) {
#pragma unroll 1
  for (int j = 0; j < MAX_BLOCKS_PER_WARP; j++) {
    const int block_idx = warp_idx + j * NUM_WARPS;
    if (block_idx < num_blocks)
      stage_outliers(smem.staged[block_idx], smem.blocks[block_idx], side, lane_idx);
  }
}

constexpr int NUM_FIELDS_READ = HAS_VALUE_OUTLIERS ? NUM_ARENA_FIELDS
                                : HAS_OUTLIERS     ? VALUE_BEGIN
                                                   : KEY_BEGIN;

// Looks up the warp's blocks, one per lane. Each step reads what the last one found, so other work
// between the steps hides the waiting.
struct BlockFinder {
  bool found;
  u32 block_number;
  i64 address[NUM_ARENA_FIELDS];
  int begin[2], count[2];

  // Reads the block numbers. `capacity`: entries of the table, of which later ones may hold no
  // block.
  __device__ __forceinline__ void read_numbers(const int* block_table, int capacity, int warp_idx,
                                               int lane_idx) {
    found = lane_idx < MAX_BLOCKS_PER_WARP && warp_idx + lane_idx * NUM_WARPS < capacity;
    block_number = found ? (u32)__ldg(block_table + warp_idx + lane_idx * NUM_WARPS) : 0;
  }
  __device__ __forceinline__ void limit(int num_blocks, int warp_idx, int lane_idx) {
    found = found && warp_idx + lane_idx * NUM_WARPS < num_blocks;
  }
  __device__ __forceinline__ void read_arena(const DecodeParams& params) {
    if (!found) return;
    const i64* arena = params.arenas + (i64)(block_number >> PLACE_BITS) * NUM_ARENA_FIELDS;
#pragma unroll
    for (int i = 0; i < NUM_FIELDS_READ; i++) address[i] = __ldg(arena + i);
  }
  __device__ __forceinline__ u32 place() const { return block_number & ((1u << PLACE_BITS) - 1); }
  __device__ __forceinline__ void read_outlier_lists(const DecodeParams& params, int kv_head_idx) {
    if constexpr (HAS_OUTLIERS) {
      if (!found) return;
      const i64 list = (i64)place() * params.num_kv_heads + kv_head_idx;
      begin[KEYS] = __ldg((const int*)address[KEY_BEGIN] + list);
      count[KEYS] = __ldg((const count_t*)address[KEY_COUNT] + list);
      if constexpr (HAS_VALUE_OUTLIERS) {
        begin[VALUES] = __ldg((const int*)address[VALUE_BEGIN] + list);
        count[VALUES] = __ldg((const count_t*)address[VALUE_COUNT] + list);
      }
    }
  }
  __device__ __forceinline__ void store(const DecodeParams& params, SharedStorage& smem,
                                        const CodePlaces& places, int kv_head_idx, int warp_idx,
                                        int lane_idx) const {
    if (!found) return;
    const i64 token_block = place(), ranges = VALUE_RANGE_PER_HEAD
                                                  ? token_block * params.num_kv_heads + kv_head_idx
                                                  : token_block;
    BlockEntry& block = smem.blocks[warp_idx + lane_idx * NUM_WARPS];
    block.codes[KEYS] = (const u8*)address[KEY_CODES] + places.block_offset(token_block, KEYS);
    block.codes[VALUES] =
        (const u8*)address[VALUE_CODES] + places.block_offset(token_block, VALUES);
    block.v_zeros = (const u16*)address[VALUE_ZEROS] + ranges * BLOCK_SIZE;
    block.v_scales = (const u16*)address[VALUE_SCALES] + ranges * BLOCK_SIZE;
    if constexpr (HAS_OUTLIERS) {
      block.num_outliers[KEYS] = count[KEYS];
      block.positions[KEYS] = (const position_t*)address[KEY_POSITIONS] + begin[KEYS];
      block.outliers[KEYS] = (const u16*)address[KEY_OUTLIERS] + begin[KEYS];
      if constexpr (HAS_VALUE_OUTLIERS) {
        block.num_outliers[VALUES] = count[VALUES];
        block.positions[VALUES] = (const position_t*)address[VALUE_POSITIONS] + begin[VALUES];
        block.outliers[VALUES] = (const u16*)address[VALUE_OUTLIERS] + begin[VALUES];
      }
    }
  }
};

// Where a chunk's codes of one side begin; of a chunk behind the last one, any codes.
__device__ __forceinline__ const u8* chunk_codes(const SharedStorage& smem, int side,
                                                 int kv_chunk_idx, int num_chunks) {
  return smem.blocks[kv_chunk_idx < num_chunks ? kv_chunk_idx / CHUNKS_PER_BLOCK : 0].codes[side] +
         kv_chunk_idx % CHUNKS_PER_BLOCK * chunk_bytes(smem.head_table, side);
}

// Fetches the codes of a chunk into the L2 cache. They begin at any multiple of 16 bytes.
__device__ __forceinline__ void prefetch_chunk(const u8* codes, int bytes, int lane_idx) {
  for (int i = lane_idx * 128; i < bytes; i += 32 * 128) prefetch_l2(codes + i);
}
