// Attention of many queries with 8-bit products, for Hopper GPUs: scores of INT8, outputs of e4m3.
//
// Compiled at run time (cuda_build.py). A thread block takes 64 rows per consuming warpgroup of one
// query head; a row is a query. One thread of the first warpgroup copies tiles of keys and values
// to shared memory, STAGES at most ahead, from the last one that a row sees to the first. They are
// quantized and lie in memory as the products read them (triton_prompt_pack.py), so that a tile is
// one bulk copy. The warpgroups are not synchronized with each other: while one weighs its scores,
// the products of the others run.
//
// The first tile and those next to a row have most of its weight, so that most of the error would
// come from there. They are fine: queries, keys and values have a second number of 8 bits with what
// the first one left over, and a tile takes two places in the ring of stages.
//
// A warpgroup's work on a tile, online softmax as in FlashAttention (Dao et al., arXiv 2205.14135):
//   1. Scores: integer sums that begin at MAGIC, so that their bits are those of the float 1.5 *
//      2^23 + sum and need no conversion. |sum| <= 127 * 127 * HEAD_DIM < 2^22.
//   2. Weights 2^(score - base + WEIGHT_BITS). The base is the tile's own maximum, so that weights
//      fill the range of e4m3 also where an earlier tile has a much larger one; the running output
//      is kept relative to it, which may make it grow by 2^MAX_DROP.
//   3. Weights become operands where they are: accumulators hold neighbouring columns of two groups
//      of eight, operands four neighbouring ones, so tokens of values are stored in the order that
//      makes up for it.
//   4. Outputs of the tile, 64 channels at a time, added in fp32 to the sum of the tiles before:
//      sums of e4m3 products inside the tensor core have fewer bits than fp32. Behind the last
//      channel comes one that is one for every token, whose output is the sum of the weights.
// Dequantization of values is linear and waits for the end.

#include "prompt_rows.cuh"

constexpr u32 E4M3_ONES = 0x38383838u;

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attend_prompt(const __grid_constant__ PromptParams params) {
  DYNAMIC_SHARED(raw, SHARED_BYTES);
  // Swizzled operands begin at multiples of 1024 bytes.
  SharedStorage& smem = *(SharedStorage*)(raw + ((1024 - (shared_address(raw) & 1023)) & 1023));
  const Work work = find_work(params);
  if (work.first_row >= work.num_rows) return;
  const Tiles tiles = find_tiles(params, work, work.first_row, ROWS);
  if (threadIdx.x == 0) {
    smem.queries_full.init(1);
    for (int i = 0; i < STAGES; i++) {
      smem.keys_full[i].init(1);
      smem.values_full[i].init(1);
      smem.keys_empty[i].init(CONSUMERS);
      smem.values_empty[i].init(CONSUMERS);
    }
    fence_barriers();
  }
  for (int i = threadIdx.x; i < STAGES * ONES_BYTES / 4; i += THREADS) {
    const int word = i % (ONES_BYTES / 4);
    ((u32*)smem.values[i / (ONES_BYTES / 4)].ones)[word] =
        word < KEYS_PER_TILE / 4 ? E4M3_ONES : 0;
  }
  fence_operands();
  __syncthreads();
  const int warpgroup = uniform(threadIdx.x / 128);
  if (warpgroup == 0) {
    give_registers_back<24>();
    if (threadIdx.x == 0) load_tiles(params, smem, work, tiles);
    return;
  }
  take_registers<CONSUMERS == 3 ? 160 : 240>();
  const int consumer = warpgroup - 1, lane = threadIdx.x % 32;
  const bool leader = threadIdx.x % 128 == 0;
  const int first_row = work.first_row + ROWS_PER_WARPGROUP * consumer;
  const Tiles own = find_tiles(params, work, first_row, ROWS_PER_WARPGROUP);
  Rows rows;
  rows.first = first_row + threadIdx.x % 128 / 32 * 16 + lane / 4;
  const float* const query_scales =
      params.query_scales +
      ((i64)work.sequence * params.num_heads + work.head) * params.query_tiles * ROWS_PER_WARPGROUP;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int row = rows.first + 8 * h;
    rows.scale[h] = row < work.num_rows ? query_scales[row] : 0.0f;
    rows.highest[h] = rows.base[h] = LOWEST;
    rows.total[h] = 0.0f;
  }
#pragma unroll
  for (int i = 0; i < PARTS; i++)
#pragma unroll
    for (int k = 0; k < 32; k++) rows.out[i][k] = 0.0f;
  const float* const key_scales =
      params.key_scales +
      ((i64)work.sequence * params.num_kv_heads + work.kv_head) * params.key_tiles;
  const Operand<HEAD_DIM> queries(smem.queries[0][consumer]);
  // Tiles from `full.end` on, and those before `full.begin`, have keys that some row does not see.
  const int last_seen = first_row + work.offset, window_begin = last_seen + 64 - params.window;
  Tiles full;
  full.end = min(last_seen + 1, work.num_keys) / KEYS_PER_TILE;
  full.begin = params.window > 0 ? (max(0, window_begin) + KEYS_PER_TILE - 1) / KEYS_PER_TILE : 0;
  smem.queries_full.wait(0);
  Place place = {0, 0};
  int tile = tiles.end - 1;
  // Tiles that are fine for some row of the block take two places, of which other rows skip one.
  const int near = work.near(work.first_row), own_near = work.near(first_row);
#pragma unroll 1
  for (; tile >= tiles.begin; tile--) {
    const bool seen = tile >= own.begin && tile < own.end, fine = is_fine(tile, own_near);
    const bool masked = tile >= full.end || tile < full.begin;
    const int first_key = tile * KEYS_PER_TILE;
    if (seen && fine)
      attend_tile<true>(params, work, smem, rows, queries, key_scales + tile, place, first_key,
                        masked, leader, lane);
    else if (seen)
      attend_tile<false>(params, work, smem, rows, queries, key_scales + tile, place, first_key,
                         masked, leader, lane);
    else
      skip_tile(smem, place, leader);
    place.advance();
    if (!is_fine(tile, near)) continue;
    if (!seen || !fine) skip_tile(smem, place, leader);
    place.advance();
  }
  write_rows(params, work, rows, lane);
}
