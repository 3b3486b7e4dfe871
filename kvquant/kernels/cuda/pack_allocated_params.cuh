// Arguments of the kernels that pack allocated codes, besides those of pack_params.cuh. Python
// fills the same struct (cuda_pack_allocated.py).
#pragma once

#include "pack_allocated_shape.cuh"
#include "pack_params.cuh"

// The calibration of a layer's keys or of its values.
struct PackTables {
  const int4* tiles;      // [NUM_KV_HEADS, TILES], see TilePlace
  const float* levels;    // [MAX_WIDTH, LEVEL_ROW]
  const uint4* ranges;    // keys: [NUM_KV_HEADS, TILES, 2, 4]: zeros and inverses of two channels
  const u32* channels;    // keys: [NUM_KV_HEADS, TILES, 4]: the first channels of two RoPE pairs
  const float* inverses;  // values: [NUM_KV_HEADS]: factors before ranges are taken
  int planes;             // of all heads, the sum of all tiles' widths
};
template struct PackTablesLayout<PackTables>;

// Where the codes of a tile lie.
struct TilePlace {
  int width;
  int plane;        // of the tile's first bit, among the head's planes
  int head_plane;   // of the head's first tile, among those of all heads
  int head_planes;  // of the head

  __device__ __forceinline__ TilePlace(const PackTables& tables, int kv_head_idx, int tile) {
    const int4 row = __ldg(tables.tiles + kv_head_idx * TILES + tile);
    width = row.x, plane = row.y, head_plane = row.z, head_planes = row.w;
  }
  // The first word of the tile in a chunk of a block.
  __device__ __forceinline__ u32* words(u8* codes, const PackTables& tables, int block_idx,
                                        int chunk) const {
    const i64 planes =
        (i64)CHUNKS * ((i64)block_idx * tables.planes + head_plane) + chunk * head_planes + plane;
    return (u32*)(codes + planes * PLANE_BYTES);
  }
};
