// Decode attention straight from packed blocks, with split-KV: one query per sequence.
//
// Compiled at run time (cuda_build.py); decode_shape.cuh lists the constants.
//
// A thread block takes up to MAX_CHUNKS chunks of CHUNK_SIZE tokens of one kv head. It works in
// phases, so that each phase keeps few registers and many warps hide each other's latency:
//   0. Tables, queries and the blocks' lists are copied to shared memory (decode_prepare.cuh).
//   1. Outliers of keys: (exact - dequantized) times the query, added up for each token. An
//      outlier's dense code is known from its value, so nothing else of the cache is read for it,
//      and its rotation is a sine and a cosine of the special function unit (decode_outliers.cuh).
//   2. Scores, one chunk per warp at a time. Codes go from global memory to registers in the order
//      of mma.m16n8k16 operands: a byte permutation looks up four fp16 levels at a time (each byte
//      of the level table separately), two channels of which make an operand register. The products
//      of all queries of a group then cost as much as those of one. Rows are tokens. A key is level
//      * scale + zero of its channel, rotated by its place in the chunk; the query is rotated back
//      by the chunk's first position (decode_scores.cuh).
//   3. Softmax. The scores of the whole thread block are there, so weights need no correction
//   later.
//   4. Outliers of values: (exact - dequantized) times the weight, added up for each channel.
//   5. Output, one chunk per warp at a time; rows are channels. A token's scale goes into its
//   weight
//      and its zero into one sum (decode_output.cuh).
// The sums of phases 1 and 4 are of integers, in units of their largest part, in shared memory:
// they do not depend on the order of the additions, and integer additions are faster there than
// those of floats. What these phases read is copied to shared memory while the thread does
// something else (cp.async), and codes are fetched into the L2 cache one chunk ahead.
//
// The last split of each sequence takes its 16-bit tokens (decode_16bit.cuh). A second kernel,
// `combine`, adds up the splits.
//
// The phases of `nuq` codes are in the files included here, what does not depend on the codes in
// decode_kernel.cuh.

#include "decode_output.cuh"
#include "decode_scores.cuh"
#include "decode_value_outliers.cuh"

#include "decode_kernel.cuh"
