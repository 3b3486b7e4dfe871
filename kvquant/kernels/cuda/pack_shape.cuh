// Sizes that the packing kernels derive from the constants of the cache's shape.
//
// `generated.cuh` defines:
//   BITS               bits per code: 2, 3 or 4
//   HEAD_DIM           64, 128 or 256
//   NUM_KV_HEADS       kv heads
//   BLOCK_SIZE         tokens per block of the cache
//   HAS_KEY_OUTLIERS   whether keys have outliers
//   OUTLIERS_PER_SIDE  outliers at each end of a token's values
//   VALUE_THREADS      threads per token of values
//   MIN_KEY_BLOCKS_PER_SM, MIN_VALUE_BLOCKS_PER_SM  thread blocks that a multiprocessor shall hold
//   WIDE_POSITIONS, WIDE_COUNTS  whether the outliers' index arrays are of 32 bits
//   BF16               whether 16-bit numbers are bfloat16 (else fp16)
//
// A row is one token of one kv head. Its bytes hold channels of eight "lanes" of HEAD_DIM / 8
// channels (formats/packing.py); a thread takes channels c, c + 1 of all lanes, whose codes make
// whole bytes.
#pragma once

#include "types.cuh"

constexpr int LANE_CHANNELS = HEAD_DIM / 8;
constexpr int THREADS_PER_ROW = HEAD_DIM / 16;
constexpr int ROW_BYTES = HEAD_DIM * BITS / 8;
constexpr int NUM_THRESHOLDS = (1 << BITS) - 1;
constexpr int NUM_CHANNELS = NUM_KV_HEADS * HEAD_DIM;

// Keys: one thread block per (block, kv head).
constexpr int ROWS_PER_THREAD = 4;
constexpr int ROW_STRIDE = BLOCK_SIZE / ROWS_PER_THREAD;  // between the rows of a thread
constexpr int KEY_THREADS = ROW_STRIDE * THREADS_PER_ROW;
constexpr int KEY_WARPS = KEY_THREADS / 32;
constexpr int THRESHOLD_VECTORS = (NUM_THRESHOLDS + 2 * HAS_KEY_OUTLIERS + 3) / 4;  // of four each

// Values: one thread block for some tokens of all kv heads. A unit is what one thread of a row has.
constexpr int NUM_UNITS = NUM_KV_HEADS * THREADS_PER_ROW;
constexpr int UNITS_PER_THREAD = (NUM_UNITS + VALUE_THREADS - 1) / VALUE_THREADS;
constexpr bool EVEN_UNITS = NUM_UNITS % VALUE_THREADS == 0;
constexpr int MAX_CANDIDATES = 4 * OUTLIERS_PER_SIDE + 36;  // per end
constexpr int BOUND_SLACK = OUTLIERS_PER_SIDE / 4 + 3;      // elements that a bound may let through
constexpr int OUTLIERS_PER_TOKEN = 2 * OUTLIERS_PER_SIDE;
constexpr int LIST_LENGTH = OUTLIERS_PER_TOKEN > 0 ? OUTLIERS_PER_TOKEN : 1;
constexpr int GROUP_THREADS = 256;
constexpr u32 NO_OUTLIER = 0xFFFFu;  // a channel that does not exist
