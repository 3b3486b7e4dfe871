// Arguments of the packing kernels. Python fills the same structs (cuda_structs.py); the
// instantiated templates below refuse a field that lies elsewhere.
#pragma once

#include "types.cuh"

// Blocks [blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM]; strides in elements.
struct PackSource {
  const u16* x;
  i64 block_stride, head_stride, token_stride;
};
template struct PackSourceLayout<PackSource>;

// Where codes and outliers go.
struct PackTarget {
  u8* codes;
  int* status;  // outliers that found no slot, then whether a number was not finite
  int* begin;
  count_t* count;
  position_t* positions;
  u16* outliers;
  int* cursor;  // the next free slot
  int num_slots;
};
template struct PackTargetLayout<PackTarget>;

// Opens the list of a (block, kv head) and counts the entries that find no slot.
__device__ __forceinline__ void open_list(const PackTarget& target, int list, int base, int total) {
  int first = min(base, target.num_slots), written = min(base + total, target.num_slots) - first;
  target.begin[list] = first;
  target.count[list] = (count_t)written;
  if (written < total) atomicAdd(target.status, total - written);
}
