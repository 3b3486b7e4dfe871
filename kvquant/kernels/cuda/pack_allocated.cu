// Quantize and pack with allocated widths: one layer's keys and values are read once and leave as
// codes in the order of a warp's tensor-core operands (formats/lane_layout.py).
//
// Compiled at run time (cuda_build.py); pack_allocated_shape.cuh lists the constants. Two kernels:
//   pack_allocated_keys    one thread block per (block, kv head), chunk after chunk
//   pack_allocated_values  one thread block per (chunk, kv head)

#include "pack_allocated_keys.cuh"
#include "pack_allocated_values.cuh"
