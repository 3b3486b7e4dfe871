// Sizes that the decode kernel derives from the constants of the cache's shape.
//
// `generated.cuh` defines:
//   BITS               bits per code: 2, 3 or 4
//   HEAD_DIM           64, 128 or 256
//   GROUP_SIZE         query heads per kv head, 1 to 8
//   BLOCK_SIZE         tokens per block of the cache: 32 or a multiple of 64
//   HAS_OUTLIERS       whether the cache keeps exact outliers of keys
//   HAS_VALUE_OUTLIERS  the same of values
//   VALUE_RANGE_PER_HEAD  whether each head of a token has a range of values, or all have one
//   SOFT_CAP           whether scores are squeezed into a range by the hyperbolic tangent
//   WIDE_POSITIONS, WIDE_COUNTS  whether the outliers' index arrays are of 32 bits
//   BF16               whether 16-bit numbers of the cache are bfloat16 (else fp16)
//   NUM_WARPS          warps per thread block
//   MIN_BLOCKS_PER_SM  thread blocks that a multiprocessor shall hold at once
//   KEY_TILES          tiles of 16 tokens of keys that a warp takes together
//   MAX_CHUNKS         most chunks that a thread block takes
//   OUTLIER_ROUNDS     outliers per lane and block that are staged in shared memory
//   SMEM_BYTES         bytes of shared memory, as cuda_decode.py counts them
#pragma once

#include "types.cuh"

constexpr int NUM_THREADS = NUM_WARPS * 32;

// A chunk is what a warp takes at a time, a tile what one tensor-core instruction takes.
constexpr int CHUNK_SIZE = BLOCK_SIZE < 64 ? BLOCK_SIZE : 64;  // tokens
constexpr int CHUNKS_PER_BLOCK = BLOCK_SIZE / CHUNK_SIZE;
constexpr int TILES_PER_CHUNK = CHUNK_SIZE / 16;
constexpr int PAIRS_PER_CHUNK = CHUNK_SIZE / 2;  // pairs of neighbouring tokens
constexpr int MAX_BLOCKS = MAX_CHUNKS / CHUNKS_PER_BLOCK;
constexpr int MAX_BLOCKS_PER_WARP = (MAX_BLOCKS + NUM_WARPS - 1) / NUM_WARPS;

constexpr int HALF_DIM = HEAD_DIM / 2;  // RoPE turns channels c and c + HALF_DIM together
constexpr int TOKEN_BYTES = HEAD_DIM * BITS / 8;
constexpr int NUM_LEVELS = 1 << BITS;
constexpr int LEVEL_WORDS = NUM_LEVELS > 8 ? 4 : 2;  // words of the levels' high (or low) bytes

// What a thread holds of a token's codes, whose lower two bits make a plane of HEAD_DIM / 4 bytes.
constexpr int KEY_WORDS = HEAD_DIM / 64;      // words of the plane, of keys
constexpr int KEY_SELECTORS = 2 * KEY_WORDS;  // selector words that these become
constexpr int VALUE_BYTES = HEAD_DIM / 32;    // bytes of the plane, of values
constexpr int VALUE_WORDS = VALUE_BYTES >= 4 ? VALUE_BYTES / 4 : 1;
// Selectors look up four levels at a time; of 2-byte words one half is empty.
constexpr int VALUE_HALVES = VALUE_BYTES >= 4 ? 2 : 1;
constexpr int CODE_PLANES = BITS == 4 ? 2 : 1;  // planes of two bits

// Strides in shared memory, padded so that threads that read together meet different banks.
constexpr int ROPE_STRIDE = HALF_DIM * 4 + 64;             // bytes per token
constexpr int QUERY_STRIDE = KEY_SELECTORS * 4 + 1;        // operands per query
constexpr int SCORE_STRIDE = MAX_CHUNKS * CHUNK_SIZE + 8;  // scores per query
constexpr int PADDED_GROUP_SIZE = GROUP_SIZE > 4 ? 8 : GROUP_SIZE == 3 ? 4 : GROUP_SIZE;

constexpr int STAGED_OUTLIERS = OUTLIER_ROUNDS * 32;  // per block

// Units of integer sums, as shares of their largest part. A token's score has up to HEAD_DIM parts,
// a channel's output one from each token of the thread block.
constexpr float SCORE_UNIT = 0x1p-22f;
constexpr float OUTPUT_UNIT =
    MAX_CHUNKS * CHUNK_SIZE > 256 ? 0x1p-30f * (MAX_CHUNKS * CHUNK_SIZE) : 0x1p-22f;

constexpr float NO_SCORE = -1e30f;  // below every score

enum Side { KEYS, VALUES };
