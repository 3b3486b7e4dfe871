// Arguments of the packing kernels. Python fills the same structs (cuda_structs.py); the
// instantiated templates below refuse a field that lies elsewhere.
#pragma once

#include "types.cuh"

// Tokens [sequences, NUM_KV_HEADS, tokens, HEAD_DIM]; strides in elements.
struct PackSource {
  const u16* x;
  const int* places;  // [blocks, 2] sequence and first token; null: a sequence is a block
  i64 sequence_stride, head_stride, token_stride;
};
template struct PackSourceLayout<PackSource>;

// The first token of a block in the first kv head.
__device__ __forceinline__ const u16* block_start(const PackSource& source, int block_idx) {
  if (source.places == nullptr) return source.x + block_idx * source.sequence_stride;
  const int sequence_idx = __ldg(source.places + 2 * block_idx),
            token_idx = __ldg(source.places + 2 * block_idx + 1);
  return source.x + sequence_idx * source.sequence_stride + token_idx * source.token_stride;
}

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
