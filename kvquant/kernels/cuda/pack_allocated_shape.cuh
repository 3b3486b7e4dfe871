// Sizes of the kernels that pack allocated codes, derived from the constants of the cache's shape.
//
// `generated.cuh` defines:
//   HEAD_DIM           64, 128 or 256
//   NUM_KV_HEADS       kv heads
//   BLOCK_SIZE         tokens per block of the cache, a multiple of 64
//   HAS_KEY_OUTLIERS   whether keys have outliers
//   RANGE_PER_HEAD        whether each head's values have a range of their own (else each token's)
//   WIDE_POSITIONS, WIDE_COUNTS  whether the outliers' index arrays are of 32 bits
//   BF16               whether 16-bit numbers are bfloat16 (else fp16)
//
// A chunk is 64 tokens of a kv head, a tile 16 of its channels. A token of a chunk is 8 k + u.
#pragma once

#include "types.cuh"

constexpr int CHUNK = 64;
constexpr int CHUNKS = BLOCK_SIZE / CHUNK;  // of a block
constexpr int TILES = HEAD_DIM / 16;        // of a head
constexpr int OCTETS = HEAD_DIM / 8;        // runs of 8 channels, which a thread loads at once
constexpr int THREADS = OCTETS * 8;         // each has an octet of 8 tokens
constexpr int WARPS = THREADS / 32;
constexpr int TILES_PER_WARP = TILES / WARPS;
// Thread blocks that a multiprocessor shall hold. They leave a thread 64 registers; with fewer it
// could not have all its loads in flight at once.
constexpr int BLOCKS_PER_SM = 1024 / THREADS;
constexpr int PLANE_BYTES = 128;  // of one bit of a tile's codes in a chunk
constexpr int MAX_WIDTH = 6;

// A row of the table of midpoints: two factors (see pack_allocated_codes.cuh), then the midpoints.
constexpr int LEVEL_ROW = 2 + 64;

// The values' workspace: a ticket, then for each chunk the ends of its tokens' ranges and a
// counter.
constexpr int TICKET_WORDS = 32;
constexpr int CHUNK_ENDS = 2 * CHUNK;
constexpr int CHUNK_WORDS = CHUNK_ENDS + 8;
