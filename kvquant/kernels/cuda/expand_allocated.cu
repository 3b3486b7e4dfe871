// Expands packed blocks of allocated codes into a 16-bit workspace of rotated keys and values, for
// attention on tiles of queries.
//
// A thread block takes a chunk of CHUNK_SIZE tokens of some kv heads, one after the other: of a
// block, of the sinks or of the unfinished block that the cache keeps in 16 bits. The heads share
// the cosines and sines of the chunk's tokens, in shared memory. A warp expands a tile of channels.
// A lane's codes of keys hold both channels of a RoPE pair (formats/lane_layout.py), so keys are
// dequantized, rotated and written by the lane that read their codes, in the order of the head's
// tiles (`query_offset`), which attention gives its queries, too. Values are turned by the tensor
// cores' transposition and leave through shared memory. All arithmetic is fp32.

#define ALLOCATED_CODES
#include "allocated_codes.cuh"
#include "expand_params.cuh"

constexpr int EXPAND_WARPS = CHANNEL_TILES < 8 ? CHANNEL_TILES : 8;
constexpr int EXPAND_THREADS = 32 * EXPAND_WARPS;
constexpr int LEVELS = 1 << MAX_WIDTH;
// Cosines and sines per RoPE pair. The lanes that read them together have up to four pairs, whose
// rows begin in other banks where 8 is added.
constexpr int ANGLE_STRIDE = 2 * CHUNK_SIZE + 8;
constexpr int VALUE_STRIDE = HEAD_DIM + 8;

struct ExpandStorage {
  float levels[2][MAX_WIDTH][LEVELS];    // of keys, of values; `look_up_byte` needs them first
  float angles[HALF_DIM][ANGLE_STRIDE];  // cosine and sine of each token
  float ranges[2 * CHUNK_SIZE];          // of values: scale and zero of each token
  u32 marks[CHANNEL_TILES][32];          // which codes of a lane are exact outliers of keys
  union {
    u16 exact[CHANNEL_TILES][32][32];  // the marked numbers
    u16 values[CHUNK_SIZE][VALUE_STRIDE];
  };
};
static_assert(sizeof(ExpandStorage) == EXPAND_BYTES, "cuda_expand_allocated.py counts other bytes");

// What a thread block expands.
struct Chunk {
  int first;     // token of the block
  int position;  // of its first token
  i64 place;     // of the block in its arena
  const i64* arena;
};

// What a lane expands of a tile: four times its codes, a byte each, by 16 tokens (m) and e. The bytes
// of a word are the codes of h and s, as in formats/lane_layout.py.
struct Codes {
  u32 bytes[4][2];
};

template <int WIDTH, Side SIDE>
__device__ __forceinline__ void spread_codes(const u32 (&words)[WIDTH], Codes& codes) {
#pragma unroll
  for (int m = 0; m < 4; m++) {
    if constexpr (looked_up(WIDTH, SIDE)) {
      const u32 nibbles = selectors(words, m);
      codes.bytes[m][0] = nibbles << 2 & 0x3C3C3C3Cu;
      codes.bytes[m][1] = nibbles >> 2 & 0x3C3C3C3Cu;
    } else {
      u32 halves[4];  // by h and s: the codes of e in the two halves
#pragma unroll
      for (int i = 0; i < 4; i++) halves[i] = item_codes<WIDTH, 2>(words, 4 * m + i);
      const u32 first = permute_bytes(halves[0], halves[1], 0x6240),
                second = permute_bytes(halves[2], halves[3], 0x6240);
      codes.bytes[m][0] = permute_bytes(first, second, 0x5410);
      codes.bytes[m][1] = permute_bytes(first, second, 0x7632);
    }
  }
}

// The same of a width that is known at run time, so that what follows is compiled once.
template <Side SIDE>
__device__ __forceinline__ Codes spread_codes(const u32 (&words)[MAX_WIDTH], int width) {
  Codes codes;
  auto spread = [&](auto& some) {
    constexpr int WIDTH = sizeof(some) / 4;
#pragma unroll
    for (int i = 0; i < WIDTH; i++) some[i] = words[i];
    spread_codes<WIDTH, SIDE>(some, codes);
  };
  u32 one[1], two[2], three[3], four[4], five[5], six[6];
  switch (width) {
    case 1:
      spread(one);
      break;
    case 2:
      spread(two);
      break;
    case 3:
      spread(three);
      break;
    case 4:
      spread(four);
      break;
    case 5:
      spread(five);
      break;
    default:
      spread(six);
  }
  return codes;
}

// What a lane reads of a tile of keys.
struct KeyTile {
  u32 words[MAX_WIDTH];
  int width;
  u32 pairs;               // of the lane's channels
  float scale[4], zero[4];  // of s and e

  // `codes`: the head's in the chunk. `scales` and `zeros`: of the head's channels.
  __device__ __forceinline__ void load(const HeadTable& table, int tile, const u8* codes,
                                       const float* scales, const float* zeros) {
    const int lane_idx = threadIdx.x % 32, t = lane_idx % 4;
    int before = 0;  // planes of the tiles before this one
#pragma unroll
    for (int i = 0; i < CHANNEL_TILES / 4; i++) {
      const u32 widths = __ldg((const u32*)table.key_widths + i);
      const int skipped = min(max(tile - 4 * i, 0), 4);
      const u32 counted = skipped == 4 ? widths : widths & ((1u << 8 * skipped) - 1);
      before += counted * 0x01010101u >> 24;
      if (skipped < 4 && tile >= 4 * i) width = widths >> 8 * skipped & 0xFF;
    }
    load_codes(words, width, codes + before * PLANE_BYTES + lane_idx * 4);
    pairs = __ldg((const u32*)(table.pairs + 8 * tile + 2 * t));
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int channel = (pairs >> 16 * (i % 2) & 0xFFFF) + i / 2 * HALF_DIM;
      scale[i] = __ldg(scales + channel), zero[i] = __ldg(zeros + channel);
    }
  }
};

// Expands a lane's keys of a tile. `to`: the chunk's first key.
__device__ __forceinline__ void expand_keys(const KeyTile& of, ExpandStorage& smem, int tile,
                                            u16* to) {
  const int lane_idx = threadIdx.x % 32, g = lane_idx / 4, t = lane_idx % 4;
  const float* angles[2];
#pragma unroll
  for (int e = 0; e < 2; e++) angles[e] = smem.angles[of.pairs >> 16 * e & 0xFFFF] + 2 * g;
  u32 marks = 0;
  if constexpr (HAS_OUTLIERS) {
    marks = smem.marks[tile][lane_idx];
    smem.marks[tile][lane_idx] = 0;  // for the next head
  }
  const u16* const exact = smem.exact[tile][lane_idx];
  const float* const levels = smem.levels[KEYS][of.width - 1];
  const Codes codes = spread_codes<KEYS>(of.words, of.width);
  to += g * HEAD_DIM + 16 * tile + 4 * t;
#pragma unroll
  for (int m = 0; m < 4; m++) {
    float x[8];  // by h, s and e
#pragma unroll
    for (int i = 0; i < 8; i++)
      x[i] = look_up_byte(levels, codes.bytes[m][i % 2], i / 2) * of.scale[i % 4] + of.zero[i % 4];
    if (HAS_OUTLIERS && marks >> 8 * m & 0xFF) {
#pragma unroll
      for (int i = 0; i < 8; i++)
        if (marks >> (8 * m + i) & 1) x[i] = load16(exact[8 * m + i]);
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float* const y = x + 4 * h;
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const float2 angle = *(const float2*)(angles[e] + 16 * (2 * m + h));
        const float a = y[e] * angle.x - y[2 + e] * angle.y,
                    b = y[2 + e] * angle.x + y[e] * angle.y;
        y[e] = a, y[2 + e] = b;
      }
      *(uint2*)(to + 8 * (2 * m + h) * HEAD_DIM) =
          make_uint2(pack16(y[0], y[1]), pack16(y[2], y[3]));
    }
  }
}

// Expands a lane's values of a tile to shared memory.
__device__ __forceinline__ void expand_values(const u32 (&words)[MAX_WIDTH], int width,
                                              ExpandStorage& smem, float scale, int tile) {
  const int lane_idx = threadIdx.x % 32, g = lane_idx / 4, t = lane_idx % 4;
  const float* const levels = smem.levels[VALUES][width - 1];
  const Codes codes = spread_codes<VALUES>(words, width);
#pragma unroll
  for (int m = 0; m < 4; m++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int tokens = 16 * m + 8 * h;
      const float4 range = *(const float4*)(smem.ranges + 2 * (tokens + 2 * t));
#pragma unroll
      for (int s = 0; s < 2; s++) {
        const float x = look_up_byte(levels, codes.bytes[m][0], 2 * h + s) * range.x + range.y,
                    y = look_up_byte(levels, codes.bytes[m][1], 2 * h + s) * range.z + range.w;
        // Rounding may exceed what 16 bits hold; packed values are finite.
        const u32 column = finite2(pack16(x * scale, y * scale));
        *(u32*)&smem.values[tokens + g][8 * tile + s * HALF_DIM + 2 * t] = transpose_8x8(column);
      }
    }
}

// A head's list of exact outliers in a block. A thread has the entry of its own index in registers,
// which are filled while the head before is expanded.
struct Outliers {
  int begin, count;
  int at, place;  // of the thread's entry: where it lies in the block, and its pair's place
  u16 number;

  // `list`: the block's head.
  __device__ __forceinline__ void find(const Chunk& chunk, i64 list) {
    begin = __ldg((const int*)chunk.arena[KEY_BEGIN] + list);
    count = __ldg((const count_t*)chunk.arena[KEY_COUNT] + list);
  }
  __device__ __forceinline__ void load(const Chunk& chunk, int i) {
    at = __ldg((const position_t*)chunk.arena[KEY_POSITIONS] + begin + i);
    number = __ldg((const u16*)chunk.arena[KEY_OUTLIERS] + begin + i);
  }
  __device__ __forceinline__ void load_own(const Chunk& chunk) {
    if ((int)threadIdx.x < count) load(chunk, threadIdx.x);
  }
  __device__ __forceinline__ void place_own(const HeadTable& table) {
    if ((int)threadIdx.x < count) place = __ldg(table.places + at % HALF_DIM);
  }
  __device__ __forceinline__ void mark_one(const Chunk& chunk, ExpandStorage& smem) const {
    const int token = at / HEAD_DIM - chunk.first, half = at % HEAD_DIM / HALF_DIM;
    if (token < 0 || token >= CHUNK_SIZE) return;
    const int tile = place / 8, lane = token % 8 * 4 + place % 8 / 2;
    const int bit = token / 8 * 4 + half * 2 + place % 2;
    smem.exact[tile][lane][bit] = number;
    atomicOr(&smem.marks[tile][lane], 1u << bit);
  }
  // Marks all entries of the list that lie in the chunk.
  __device__ __forceinline__ void mark(const Chunk& chunk, ExpandStorage& smem,
                                       const HeadTable& table) {
    for (int i = threadIdx.x; i < count; i += EXPAND_THREADS) {
      if (i >= EXPAND_THREADS) load(chunk, i), place = __ldg(table.places + at % HALF_DIM);
      mark_one(chunk, smem);
    }
  }
};

// Fills the scales and zeros of a chunk's values. `row`: the block, or the block's head.
__device__ __forceinline__ void read_ranges(const Chunk& chunk, ExpandStorage& smem, i64 row) {
  const i64 at = row * BLOCK_SIZE + chunk.first;
  for (int i = threadIdx.x; i < CHUNK_SIZE; i += EXPAND_THREADS) {
    smem.ranges[2 * i] = load16(((const u16*)chunk.arena[VALUE_SCALES])[at + i]);
    smem.ranges[2 * i + 1] = load16(((const u16*)chunk.arena[VALUE_ZEROS])[at + i]);
  }
}

// Expands a chunk of a packed block, head by head. What a head needs first is loaded while the head
// before is expanded. `keys` and `values`: the chunk's first token of head 0; `apart`: numbers from
// a head to the next.
__device__ __forceinline__ void expand_heads(const ExpandParams& params, ExpandStorage& smem,
                                             const Chunk& chunk, int first_head, int end, u16* keys,
                                             u16* values, i64 apart) {
  const int warp_idx = threadIdx.x / 32, lane_idx = threadIdx.x % 32;
  auto table_of = [&](int head) -> const HeadTable& {
    return *(const HeadTable*)(params.head_tables + (i64)head * HEAD_TABLE_STRIDE);
  };
  auto codes_of = [&](const HeadTable& table, int side) {
    return (const u8*)chunk.arena[side == KEYS ? KEY_CODES : VALUE_CODES] +
           chunk.place * __ldg(&table.block_bytes[side]) + __ldg(&table.offset[side]) +
           (i64)(chunk.first / CHUNK_SIZE) * __ldg(&table.chunk_bytes[side]);
  };
  KeyTile key_tile;
  Outliers outliers;
  auto list_of = [&](int head) { return chunk.place * params.num_kv_heads + head; };
  auto load_keys = [&](int head, int tile) {
    const HeadTable& table = table_of(head);
    key_tile.load(table, tile, codes_of(table, KEYS), params.key_scale + head * HEAD_DIM,
                  params.key_zero + head * HEAD_DIM);
  };
  load_keys(first_head, warp_idx);
  if constexpr (HAS_OUTLIERS) {
    outliers.find(chunk, list_of(first_head));
    outliers.load_own(chunk);
    outliers.place_own(table_of(first_head));
  }
  for (int head = first_head; head < end; head++) {
    const HeadTable& table = table_of(head);
    const bool last = head + 1 == end;
    if constexpr (HAS_OUTLIERS) outliers.mark(chunk, smem, table);
    if constexpr (VALUE_RANGE_PER_HEAD) read_ranges(chunk, smem, list_of(head));
    __syncthreads();
    if (HAS_OUTLIERS && !last) outliers.find(chunk, list_of(head + 1));
    for (int tile = warp_idx; tile < CHANNEL_TILES; tile += EXPAND_WARPS) {
      if (tile >= EXPAND_WARPS) load_keys(head, tile);
      expand_keys(key_tile, smem, tile, keys + head * apart);
    }
    const int width = __ldg(&table.chunk_bytes[VALUES]) / (CHANNEL_TILES * PLANE_BYTES);
    const float scale = __ldg(&table.value_scale);
    const u8* const codes = codes_of(table, VALUES) + lane_idx * 4;
    u32 words[MAX_WIDTH] = {};
    load_codes(words, width, codes + warp_idx * width * PLANE_BYTES);
    if (HAS_OUTLIERS && !last) outliers.load_own(chunk);
    __syncthreads();  // exact outliers have been read
    for (int tile = warp_idx; tile < CHANNEL_TILES; tile += EXPAND_WARPS) {
      if (tile >= EXPAND_WARPS) load_codes(words, width, codes + tile * width * PLANE_BYTES);
      expand_values(words, width, smem, scale, tile);
    }
    if (!last) {
      load_keys(head + 1, warp_idx);
      if constexpr (HAS_OUTLIERS) outliers.place_own(table_of(head + 1));
    }
    __syncthreads();
    u16* const to = values + head * apart;
    for (int i = threadIdx.x; i < CHUNK_SIZE * (HEAD_DIM / 8); i += EXPAND_THREADS) {
      const int token = i / (HEAD_DIM / 8), c = i % (HEAD_DIM / 8) * 8;
      *(uint4*)(to + token * HEAD_DIM + c) = *(const uint4*)&smem.values[token][c];
    }
    __syncthreads();  // before outliers of the next head come
  }
}

// Fills what the heads of a packed block share.
__device__ __forceinline__ void prepare(const ExpandParams& params, ExpandStorage& smem,
                                        const Chunk& chunk) {
  for (int i = threadIdx.x; i < CHUNK_SIZE * HALF_DIM; i += EXPAND_THREADS) {
    const int token = i / HALF_DIM, pair = i % HALF_DIM;
    const i64 turn = (i64)chunk.position * HALF_DIM + i;
    *(float2*)&smem.angles[pair][2 * token] =
        make_float2(__ldg(params.cos + turn), __ldg(params.sin + turn));
  }
  for (int i = threadIdx.x; i < MAX_WIDTH * LEVELS; i += EXPAND_THREADS) {
    smem.levels[KEYS][i / LEVELS][i % LEVELS] = __ldg(params.key_levels + i);
    smem.levels[VALUES][i / LEVELS][i % LEVELS] = __ldg(params.value_levels + i);
  }
  for (int i = threadIdx.x; i < CHANNEL_TILES * 32; i += EXPAND_THREADS)
    smem.marks[i / 32][i % 32] = 0;
  if constexpr (!VALUE_RANGE_PER_HEAD) read_ranges(chunk, smem, chunk.place);
  __syncthreads();
}

// Tokens that the cache holds in 16 bits, or in fp32 where they stand for quantized ones.
struct HeldTokens {
  const void *keys, *values;
  bool fp32;

  __device__ __forceinline__ float operator()(const void* from, i64 at) const {
    return fp32 ? ((const float*)from)[at] : load16(((const u16*)from)[at]);
  }
};

// Writes tokens of one head that are held in 16 bits. `at`: the first number of the first token.
__device__ __forceinline__ void copy_head(const ExpandParams& params, const Chunk& chunk, int count,
                                          const HeldTokens& held, i64 at, int kv_head_idx,
                                          u16* keys, u16* values) {
  const HeadTable& table =
      *(const HeadTable*)(params.head_tables + (i64)kv_head_idx * HEAD_TABLE_STRIDE);
  for (int i = threadIdx.x; i < count * HALF_DIM; i += EXPAND_THREADS) {
    const int token = i / HALF_DIM, pair = i % HALF_DIM, to = token * HEAD_DIM;
    const i64 turn = (i64)chunk.position * HALF_DIM + i, from = at + to + pair;
    const float cosine = __ldg(params.cos + turn), sine = __ldg(params.sin + turn);
    const float x = held(held.keys, from), y = held(held.keys, from + HALF_DIM);
    keys[to + query_offset(table, pair)] = store16(x * cosine - y * sine);
    keys[to + query_offset(table, pair + HALF_DIM)] = store16(y * cosine + x * sine);
  }
  for (int i = threadIdx.x; i < count * HEAD_DIM; i += EXPAND_THREADS)
    values[i] = store16(held(held.values, at + i));
}

// Grid: [chunks of the blocks from `low` on, groups of `heads_each` kv heads, batch]. Block -1 are
// the sinks.
extern "C" __global__ void __launch_bounds__(EXPAND_THREADS, EXPAND_BLOCKS)
    expand(const ExpandParams params) {
  DYNAMIC_SHARED(smem_raw, EXPAND_BYTES);
  ExpandStorage& smem = *(ExpandStorage*)smem_raw;
  const int ordinal = params.low + (int)blockIdx.x / params.chunks;
  const int first = (int)blockIdx.x % params.chunks * CHUNK_SIZE, batch_idx = blockIdx.z;
  const int first_head = blockIdx.y * params.heads_each,
            end = min(first_head + params.heads_each, params.num_kv_heads);
  const int* const lengths = params.lengths + batch_idx * 4;
  const bool sinks = ordinal < 0, packed = !sinks && ordinal < lengths[1];
  const int count = (sinks                   ? lengths[0]
                     : packed                ? BLOCK_SIZE
                     : ordinal == lengths[1] ? lengths[2]
                                             : 0) -
                    first;
  if (count <= 0) return;
  const int position = (sinks ? 0 : params.sinks + ordinal * BLOCK_SIZE) + first;
  const i64 rows = (i64)batch_idx * params.num_kv_heads;
  const i64 apart = (i64)params.places * HEAD_DIM;  // from a head to the next
  u16* const keys = params.out + rows * apart + (i64)(position - params.base) * HEAD_DIM;
  u16* const values = keys + (i64)gridDim.z * params.num_kv_heads * apart;
  if (packed) {
    const u32 number = params.table[(i64)batch_idx * params.table_stride + ordinal];
    const Chunk chunk{first, position, (i64)(number & ((1u << PLACE_BITS) - 1)),
                      params.arenas + (i64)(number >> PLACE_BITS) * NUM_ARENA_FIELDS};
    prepare(params, smem, chunk);
    expand_heads(params, smem, chunk, first_head, end, keys, values, apart);
    return;
  }
  const Chunk chunk{first, position, 0, params.arenas};
  const HeldTokens held{sinks ? params.sink_keys : params.tail_keys,
                        sinks ? params.sink_values : params.tail_values,
                        !sinks && params.fp32_tail};
  const i64 room = sinks ? params.sink_room : params.tail_room;
  for (int head = first_head; head < end; head++)
    copy_head(params, chunk, min(count, CHUNK_SIZE), held, ((rows + head) * room + first) * HEAD_DIM,
              head, keys + head * apart, values + head * apart);
}
