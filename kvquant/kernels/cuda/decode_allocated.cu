// Decode attention straight from packed blocks of allocated codes; decode.cu says how it works.
//
// A chunk's codes of a tile of 16 channels lie in the order of a warp's tensor-core operands
// (formats/lane_layout.py), so that a warp loads 128 contiguous bytes per bit of the width and no
// code changes lanes. The width of a tile of keys is the same for all tokens and known to the whole
// warp, which branches once per tile and chunk. Codes of 2 and 3 bits, and of
// values of 4 bits where their codebook is fitted, are looked up by byte permutations; others,
// whose levels are evenly spaced, become fp16 numbers by shifting and masking alone.

#define ALLOCATED_CODES
#include "allocated_output.cuh"
#include "allocated_scores.cuh"

#include "decode_kernel.cuh"
