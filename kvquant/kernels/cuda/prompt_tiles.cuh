// Tiles of keys and values in the attention of prompts: which ones a thread block reads, and their
// way into the ring of stages in shared memory.
#pragma once

#include "hopper.cuh"
#include "prompt_params.cuh"

constexpr int ONES_BYTES = 8 * KEYS_PER_TILE;  // eight channels: a one for every token, and zeros

struct Values {
  u8 channels[TILE_BYTES];
  u8 ones[ONES_BYTES];
};
struct SharedStorage {
  u8 queries[2][CONSUMERS][QUERY_BYTES];  // the second numbers behind the first ones
  u8 keys[STAGES][TILE_BYTES];
  Values values[STAGES];
  Barrier queries_full, keys_full[STAGES], values_full[STAGES], keys_empty[STAGES],
      values_empty[STAGES];
};
static_assert(sizeof(SharedStorage) + 1024 <= SHARED_BYTES, "SHARED_BYTES");
static_assert(STAGES >= 2, "a fine tile holds two places at once");

// The part of the work of a thread block.
struct Work {
  int sequence, head, kv_head, first_row, num_rows, num_keys, offset;

  // The first tile that is next to a row, and those behind it.
  __device__ __forceinline__ int near(int row) const {
    return max(0, row + offset) / KEYS_PER_TILE - NEAR_TILES;
  }
};
__device__ __forceinline__ bool is_fine(int tile, int near) { return tile == 0 || tile >= near; }

// A number that is the same in all lanes, which the compiler cannot know otherwise.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(~0u, x, 0); }

// Heads take turns in groups, so that their keys and values stay in the L2 cache; in a group the
// rows with most keys come first.
__device__ __forceinline__ Work find_work(const PromptParams& params) {
  const int row_tiles = (params.query_tiles + CONSUMERS - 1) / CONSUMERS;
  const int per_group = row_tiles * params.heads_together;
  const int groups = params.num_heads / params.heads_together;
  const int group = blockIdx.x / per_group, inside = blockIdx.x % per_group;
  Work work;
  work.sequence = group / groups;
  work.head = group % groups * params.heads_together + inside % params.heads_together;
  work.kv_head = work.head / (params.num_heads / params.num_kv_heads);
  work.first_row = (row_tiles - 1 - inside / params.heads_together) * ROWS;
  const int* const counts = params.counts + 3 * work.sequence;
  work.num_rows = uniform(counts[0]);
  work.num_keys = uniform(counts[1]);
  work.offset = uniform(counts[2]);
  return work;
}

// The first tile of keys that some of `rows` rows see, and the one behind the last.
struct Tiles {
  int begin, end;
};
__device__ __forceinline__ Tiles find_tiles(const PromptParams& params, const Work& work,
                                            int first_row, int rows) {
  const int stop = min(first_row + rows, work.num_rows);  // behind the last row
  if (stop <= first_row) return {1 << 30, 0};
  const int keys = min(work.num_keys, stop + work.offset);
  const int unseen = params.window > 0 ? max(0, first_row + work.offset + 1 - params.window) : 0;
  return {unseen / KEYS_PER_TILE, (keys + KEYS_PER_TILE - 1) / KEYS_PER_TILE};
}

// The producer: copies queries, then keys and values of the tiles from the last to the first.
__device__ __forceinline__ void load_tiles(const PromptParams& params, SharedStorage& smem,
                                           const Work& work, Tiles tiles) {
  const int first_tile = work.first_row / ROWS_PER_WARPGROUP;
  const int bytes = min(CONSUMERS, params.query_tiles - first_tile) * QUERY_BYTES;
  const i64 head = (i64)work.sequence * params.num_heads + work.head;
  smem.queries_full.arrive_with(2 * bytes);
  const i64 row_tile = head * params.query_tiles + first_tile;
  const i64 kv_head = (i64)work.sequence * params.num_kv_heads + work.kv_head;
#pragma unroll
  for (int part = 0; part < 2; part++)
    copy_bulk(smem.queries[part], params.queries[part] + row_tile * QUERY_BYTES, bytes,
              smem.queries_full);
  const int near = work.near(work.first_row);
  int place = 0;
  for (int tile = tiles.end - 1; tile >= tiles.begin; tile--) {
    const i64 at = (kv_head * params.key_tiles + tile) * TILE_BYTES;
    const int parts = is_fine(tile, near) ? 2 : 1;
    for (int part = 0; part < parts; part++, place++) {
      const int stage = place % STAGES, round = place / STAGES;
      if (round) smem.keys_empty[stage].wait((round - 1) & 1);
      smem.keys_full[stage].arrive_with(TILE_BYTES);
      copy_bulk(smem.keys[stage], (part ? params.keys[1] : params.keys[0]) + at, TILE_BYTES,
                smem.keys_full[stage]);
      if (round) smem.values_empty[stage].wait((round - 1) & 1);
      smem.values_full[stage].arrive_with(TILE_BYTES);
      copy_bulk(smem.values[stage].channels, (part ? params.values[1] : params.values[0]) + at,
                TILE_BYTES, smem.values_full[stage]);
    }
  }
}

// The place of a tile in the ring of stages.
struct Place {
  int stage;
  u32 parity;

  __device__ __forceinline__ void advance() {
    if (++stage == STAGES) {
      stage = 0;
      parity ^= 1;
    }
  }
  __device__ __forceinline__ Place next() const {
    Place place = *this;
    place.advance();
    return place;
  }
};

// Lets the producer overwrite a tile that no row of this warpgroup sees. Its warps wait for each
// other, as products would make them: one that fell two rounds behind would wait for ever.
__device__ __forceinline__ void skip_tile(SharedStorage& smem, Place place, bool leader) {
  smem.keys_full[place.stage].wait(place.parity);
  smem.values_full[place.stage].wait(place.parity);
  synchronize_warpgroup();
  if (leader) {
    smem.keys_empty[place.stage].arrive();
    smem.values_empty[place.stage].arrive();
  }
}
