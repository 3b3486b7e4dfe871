// Quantize and pack: one layer's keys and values are read once and leave as codes and exact
// outliers.
//
// Compiled at run time (cuda_build.py); pack_shape.cuh lists the constants, pack_codes.cuh tells
// how codes are found. Three kernels:
//   pack_keys     one thread block per (block, kv head); outliers go straight to their list
//   pack_values   a thread block takes tokens of all kv heads; outliers go to a list per token
//   group_values  sorts the tokens' lists of a block by kv head

#include "pack_keys.cuh"
#include "pack_values.cuh"
