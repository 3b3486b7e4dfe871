// Expands packed blocks of allocated codes into a 16-bit workspace of rotated keys and values, for
// attention on tiles of queries.
//
// A thread block takes a chunk of CHUNK_SIZE tokens of one kv head: of a block, of the sinks or of
// the unfinished block that the cache keeps in 16 bits. Its warps read codes in the order of their
// lanes (formats/lane_layout.py) and write what these stand for to shared memory, where exact
// outliers replace it. From there keys are rotated and written, token by token. All arithmetic is
// that of PyTorch, in fp32.

#define ALLOCATED_CODES
#include "allocated_codes.cuh"
#include "expand_params.cuh"

constexpr int EXPAND_THREADS = 256, EXPAND_WARPS = EXPAND_THREADS / 32;
constexpr int ROW_STRIDE = HEAD_DIM + 2;  // fp32 numbers per token in shared memory
constexpr int LEVELS = 1 << MAX_WIDTH;

constexpr float LARGEST = BF16 ? 0x1.FEp127f : 65504.0f;  // number of the cache

struct ExpandStorage {
  float rows[CHUNK_SIZE][ROW_STRIDE];
  float levels[MAX_WIDTH][LEVELS];
};
static_assert(sizeof(ExpandStorage) == EXPAND_BYTES, "cuda_expand_allocated.py counts other bytes");

// Calls f(token, channel of the tile, code) for each code of a lane.
template <int WIDTH, Side SIDE, typename F>
__device__ __forceinline__ void for_codes(const u32 (&words)[WIDTH], int g, int t, F f) {
#pragma unroll
  for (int m = 0; m < 4; m++)
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int s = 0; s < 2; s++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          u32 code;
          if constexpr (looked_up(WIDTH, SIDE))
            code = selectors(words, m) >> (4 * (4 * h + 2 * s + e)) & ((1u << WIDTH) - 1);
          else code = item_codes<WIDTH, 0>(words, 4 * m + 2 * h + s) >> (16 * e) & 0xFFFF;
          f(16 * m + 8 * h + (SIDE == KEYS ? g : 2 * t + e), 8 * s + (SIDE == KEYS ? 2 * t + e : g),
            code);
        }
}

// The same for a width that is known at run time. `tile`: where the tile's codes begin.
template <Side SIDE, typename F>
__device__ __forceinline__ void for_tile(int width, const u8* tile, int lane_idx, F f) {
  const int g = lane_idx / 4, t = lane_idx % 4;
  auto each = [&](auto& words) {
    constexpr int WIDTH = sizeof(words) / 4;
    load_codes(words, tile + lane_idx * 4);
    for_codes<WIDTH, SIDE>(words, g, t, f);
  };
  u32 one[1], two[2], three[3], four[4], five[5], six[6];
  switch (width) {
    case 1:
      return each(one);
    case 2:
      return each(two);
    case 3:
      return each(three);
    case 4:
      return each(four);
    case 5:
      return each(five);
    default:
      return each(six);
  }
}

// Copies the codebooks of one side to shared memory.
__device__ __forceinline__ void copy_levels(ExpandStorage& smem, const float* levels) {
  for (int i = threadIdx.x; i < MAX_WIDTH * LEVELS; i += EXPAND_THREADS)
    smem.levels[i / LEVELS][i % LEVELS] = __ldg(levels + i);
}

// Writes tokens of the workspace, two channels at a time. `read(token, channel)` gives a number.
template <typename F> __device__ __forceinline__ void write_values(u16* to, int count, F read) {
  for (int i = threadIdx.x; i < count * (HEAD_DIM / 2); i += EXPAND_THREADS) {
    const int token = i / (HEAD_DIM / 2), c = i % (HEAD_DIM / 2) * 2;
    const u32 low = store16(read(token, c)), high = store16(read(token, c + 1));
    *(u32*)(to + (i64)token * HEAD_DIM + c) = low | high << 16;
  }
}

// The same of keys, which are rotated by their positions.
template <typename F>
__device__ __forceinline__ void write_keys(const ExpandParams& params, u16* to, int count,
                                           int position, F read) {
  for (int i = threadIdx.x; i < count * (HALF_DIM / 2); i += EXPAND_THREADS) {
    const int token = i / (HALF_DIM / 2), c = i % (HALF_DIM / 2) * 2;
    const i64 turn = (i64)(position + token) * HALF_DIM + c;
    const float2 cosines = *(const float2*)(params.cos + turn),
                 sines = *(const float2*)(params.sin + turn);
    const float x[2] = {read(token, c), read(token, c + 1)},
                y[2] = {read(token, c + HALF_DIM), read(token, c + 1 + HALF_DIM)};
    const u32 low = store16(x[0] * cosines.x - y[0] * sines.x),
              high = store16(x[1] * cosines.y - y[1] * sines.y),
              paired_low = store16(y[0] * cosines.x + x[0] * sines.x),
              paired_high = store16(y[1] * cosines.y + x[1] * sines.y);
    u16* const row = to + (i64)token * HEAD_DIM + c;
    *(u32*)row = low | high << 16;
    *(u32*)(row + HALF_DIM) = paired_low | paired_high << 16;
  }
}

// Tokens that the cache holds in 16 bits, or in fp32 where they stand for quantized ones.
struct HeldTokens {
  const void *keys, *values;
  bool fp32;

  __device__ __forceinline__ float operator()(const void* from, i64 at) const {
    return fp32 ? ((const float*)from)[at] : load16(((const u16*)from)[at]);
  }
};

// Expands a chunk of a packed block.
__device__ __forceinline__ void expand_block(const ExpandParams& params, ExpandStorage& smem,
                                             u32 number, int kv_head_idx, int chunk, int position,
                                             u16* keys, u16* values) {
  const int warp_idx = threadIdx.x / 32, lane_idx = threadIdx.x % 32;
  const i64* const arena = params.arenas + (i64)(number >> PLACE_BITS) * NUM_ARENA_FIELDS;
  const i64 place = number & ((1u << PLACE_BITS) - 1);
  const HeadTable& table =
      *(const HeadTable*)(params.head_tables + (i64)kv_head_idx * HEAD_TABLE_STRIDE);
  auto chunk_of = [&](int side) {
    return (const u8*)arena[side == KEYS ? KEY_CODES : VALUE_CODES] +
           place * table.block_bytes[side] + table.offset[side] +
           (i64)chunk * table.chunk_bytes[side];
  };
  copy_levels(smem, params.key_levels);
  __syncthreads();
  const float *const scales = params.key_scale + kv_head_idx * HEAD_DIM, *const zeros =
                                                                             params.key_zero +
                                                                             kv_head_idx * HEAD_DIM;
  const u8* codes = chunk_of(KEYS);
  for (int tile = 0; tile < CHANNEL_TILES; tile++) {
    const int width = table.key_widths[tile];
    if (tile % EXPAND_WARPS == warp_idx)
      for_tile<KEYS>(width, codes, lane_idx, [&](int token, int i, u32 code) {
        const int c = table.pairs[8 * tile + i % 8] + i / 8 * HALF_DIM;
        smem.rows[token][c] = smem.levels[width - 1][code] * __ldg(scales + c) + __ldg(zeros + c);
      });
    codes += width * PLANE_BYTES;
  }
  __syncthreads();
  if constexpr (HAS_OUTLIERS) {
    const i64 list = place * params.num_kv_heads + kv_head_idx;
    const int begin = ((const int*)arena[KEY_BEGIN])[list];
    const int count = ((const count_t*)arena[KEY_COUNT])[list];
    for (int i = threadIdx.x; i < count; i += EXPAND_THREADS) {
      const int at = ((const position_t*)arena[KEY_POSITIONS])[begin + i];
      const int token = at / HEAD_DIM - chunk * CHUNK_SIZE;
      if (token >= 0 && token < CHUNK_SIZE)
        smem.rows[token][at % HEAD_DIM] = load16(((const u16*)arena[KEY_OUTLIERS])[begin + i]);
    }
    __syncthreads();
  }
  auto read = [&](int token, int c) { return smem.rows[token][c]; };
  write_keys(params, keys, CHUNK_SIZE, position, read);
  __syncthreads();
  copy_levels(smem, params.value_levels);
  __syncthreads();
  const i64 ranges = ((VALUE_RANGE_PER_HEAD ? place * params.num_kv_heads + kv_head_idx : place) *
                          (BLOCK_SIZE / CHUNK_SIZE) +
                      chunk) *
                     CHUNK_SIZE;
  const u16 *const v_zeros = (const u16*)arena[VALUE_ZEROS] + ranges, *const v_scales =
                                                                          (const u16*)
                                                                              arena[VALUE_SCALES] +
                                                                          ranges;
  const int width = table.chunk_bytes[VALUES] / (CHANNEL_TILES * PLANE_BYTES);
  codes = chunk_of(VALUES);
  for (int tile = warp_idx; tile < CHANNEL_TILES; tile += EXPAND_WARPS)
    for_tile<VALUES>(
        width, codes + tile * width * PLANE_BYTES, lane_idx, [&](int token, int i, u32 code) {
          const float x =
              (smem.levels[width - 1][code] * load16(v_scales[token]) + load16(v_zeros[token])) *
              table.value_scale;
          // Rounding may exceed what 16 bits hold; packed values are finite.
          smem.rows[token][8 * tile + i % 8 + i / 8 * HALF_DIM] =
              fminf(fmaxf(x, -LARGEST), LARGEST);
        });
  __syncthreads();
  write_values(values, CHUNK_SIZE, read);
}

// Grid: [chunks of the blocks from `low` on, num_kv_heads, batch]. Block -1 are the sinks.
extern "C" __global__ void __launch_bounds__(EXPAND_THREADS, 2) expand(const ExpandParams params) {
  DYNAMIC_SHARED(smem_raw, EXPAND_BYTES);
  ExpandStorage& smem = *(ExpandStorage*)smem_raw;
  const int ordinal = params.low + (int)blockIdx.x / params.chunks;
  const int first = (int)blockIdx.x % params.chunks * CHUNK_SIZE;  // token of the block
  const int kv_head_idx = blockIdx.y, batch_idx = blockIdx.z;
  const int* const lengths = params.lengths + batch_idx * 4;
  const bool sinks = ordinal < 0, packed = !sinks && ordinal < lengths[1];
  const int count = (sinks                   ? lengths[0]
                     : packed                ? BLOCK_SIZE
                     : ordinal == lengths[1] ? lengths[2]
                                             : 0) -
                    first;
  if (count <= 0) return;
  const int position = (sinks ? 0 : params.sinks + ordinal * BLOCK_SIZE) + first;
  const i64 row = (i64)batch_idx * params.num_kv_heads + kv_head_idx;
  u16* const keys = params.out + (row * params.places + position - params.base) * HEAD_DIM;
  u16* const values = keys + (i64)gridDim.z * params.num_kv_heads * params.places * HEAD_DIM;
  if (packed) {
    const u32 number = params.table[(i64)batch_idx * params.table_stride + ordinal];
    expand_block(params, smem, number, kv_head_idx, first / CHUNK_SIZE, position, keys, values);
    return;
  }
  const HeldTokens held{sinks ? params.sink_keys : params.tail_keys,
                        sinks ? params.sink_values : params.tail_values,
                        !sinks && params.fp32_tail};
  const i64 at = (row * (sinks ? params.sink_room : params.tail_room) + first) * HEAD_DIM;
  const int tokens = min(count, CHUNK_SIZE);
  write_keys(params, keys, tokens, position,
             [&](int token, int c) { return held(held.keys, at + token * HEAD_DIM + c); });
  write_values(values, tokens,
               [&](int token, int c) { return held(held.values, at + token * HEAD_DIM + c); });
}
