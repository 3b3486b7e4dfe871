// Phases 1 and 4 of `decode.cu`: exact outliers of keys and values.

// The elements of a 16-byte piece of memory that stand before `p`.
template <typename E> DEVICE int before(const E* p) { return (int)((u64)p & 15) / (int)sizeof(E); }

// Begins to copy the 16-byte pieces that hold the elements of two arrays, MOST of each at most: half of
// the lanes copy one, the others the other.
template <int MOST, typename A, typename B>
DEVICE void stage(A* to_a, const A* from_a, B* to_b, const B* from_b, int count, int lane) {
  const bool second = lane & 16;
  const u8* const from = second ? (const u8*)from_b : (const u8*)from_a;
  u8* const to = second ? (u8*)to_b : (u8*)to_a;
  const u8* const begin = (const u8*)((u64)from & ~(u64)15);
  const int bytes = (second ? (int)sizeof(B) : (int)sizeof(A)) * count + (int)(from - begin);
#pragma unroll
  for (int i = 0; i < MOST * (int)max(sizeof(A), sizeof(B)) + 15; i += 256) {
    const int at = i + lane % 16 * 16;
    if (at < bytes) copy16(to + at, begin + at);
  }
}

// A block's outliers of one side: the first CAP in shared memory, the others where they are.
struct Outliers {
  int count;
  const pos_t *positions, *near_positions;
  const u16 *values, *near_values;

  MEMBER Outliers(const Entry& entry, const List& list, int side)
      : count(entry.count[side]), positions(entry.positions[side]), values(entry.outliers[side]) {
    near_positions = list.at + before(positions);
    near_values = list.value + before(values);
  }
};
DEVICE void copy_outliers(List& list, const Entry& entry, int side, int lane) {
  const int near = min(entry.count[side], CAP);
  stage<CAP>(list.at, entry.positions[side], list.value, entry.outliers[side], near, lane);
}

// Finds the warp's blocks, a lane a block. Each step reads what the last one found, so other work
// between the steps hides the waiting.
struct Finder {
  bool there;
  u32 number;
  i64 at[FIELDS];
  int begin[2], count[2];

  // Of `room` numbers of the table; how many of them are blocks may not be known yet.
  MEMBER void numbers(const int* table, int room, int warp, int lane) {
    there = lane < SHARE && warp + lane * WARPS < room;
    number = there ? (u32)__ldg(table + warp + lane * WARPS) : 0;
  }
  MEMBER void among(int blocks, int warp, int lane) { there = there && warp + lane * WARPS < blocks; }
  MEMBER void arenas(const Args& p) {
    if (!there) return;
    const i64* arena = p.arenas + (i64)(number >> 20) * FIELDS;
#pragma unroll
    for (int i = 0; i < (OUTLIERS ? FIELDS : KBEGIN); i++) at[i] = __ldg(arena + i);
  }
  MEMBER void begins(const Args& p, int head) {
#if OUTLIERS
    if (!there) return;
    const i64 of_head = (i64)(number & 0xFFFFF) * p.heads + head;
    begin[KEYS] = __ldg((const int*)at[KBEGIN] + of_head);
    begin[VALUES] = __ldg((const int*)at[VBEGIN] + of_head);
    count[KEYS] = __ldg((const count_t*)at[KCOUNT] + of_head);
    count[VALUES] = __ldg((const count_t*)at[VCOUNT] + of_head);
#endif
  }
  MEMBER void store(const Args& p, Space& sh, int head, int warp, int lane) const {
    if (!there) return;
    const i64 block = number & 0xFFFFF, of_head = block * p.heads + head;
    Entry& entry = sh.entries[warp + lane * WARPS];
    entry.codes[KEYS] = (const u8*)at[KCODES] + of_head * SIZE * ROW;
    entry.codes[VALUES] = (const u8*)at[VCODES] + of_head * SIZE * ROW;
    entry.zeros = (const u16*)at[VZERO] + block * SIZE;
    entry.scales = (const u16*)at[VSCALE] + block * SIZE;
#if OUTLIERS
    entry.count[KEYS] = count[KEYS];
    entry.count[VALUES] = count[VALUES];
    entry.positions[KEYS] = (const pos_t*)at[KPOS] + begin[KEYS];
    entry.positions[VALUES] = (const pos_t*)at[VPOS] + begin[VALUES];
    entry.outliers[KEYS] = (const u16*)at[KVAL] + begin[KEYS];
    entry.outliers[VALUES] = (const u16*)at[VVAL] + begin[VALUES];
#endif
  }
};

// The largest outlier of one side of the warp's blocks, without its sign.
DEVICE u32 largest_outlier(const Space& sh, int side, int blocks, int warp, int lane) {
  u32 largest = 0;
#pragma unroll 1
  for (int j = 0; j < SHARE; j++) {
    const int place = warp + j * WARPS;
    if (place >= blocks) break;
    const Outliers block(sh.entries[place], sh.lists[place], side);
#pragma unroll
    for (int r = 0; r < ROUNDS; r++)
      if (r * 32 + lane < block.count) largest = max(largest, (u32)(block.near_values[r * 32 + lane] & 0x7FFF));
#pragma unroll 1
    for (int i = CAP + lane; i < block.count; i += 32) largest = max(largest, (u32)(__ldg(block.values + i) & 0x7FFF));
  }
  return __reduce_max_sync(~0u, largest);
}

// Phase 1. Corrections of the scores of the warp's blocks, in a unit of the warp.
DEVICE void key_outliers(Space& sh, int blocks, int warp, int lane, float strength) {
  // An outlier differs from its level by no more than the largest of both.
  const float reach = sqrtf(warp_max(lane < WARPS ? sh.reach[lane] : 0.0f)) * 1.01f;
  const float most = load16((u16)largest_outlier(sh, KEYS, blocks, warp, lane)) + sh.table.furthest;
  const float unit = most * reach * strength * SCORE_UNIT, inverse = unit > 1e-30f ? strength / unit : 0.0f;
#pragma unroll 1
  for (int j = 0; j < SHARE; j++) {
    const int place = warp + j * WARPS;
    if (place >= blocks) break;
    const Outliers block(sh.entries[place], sh.lists[place], KEYS);
    if (lane == 0) sh.units[place] = unit;
    // (exact - dequantized), turned: an outlier is outside the range, so its dense code is that of an end.
    auto turned = [&](int at, float x) {
      const int token = at / DIM, c = at % DIM, chunk = CPB > 1 ? token / T : 0;
      const Channel channel = sh.channels[c];
      const float low = low_of(channel.ends), high = high_of(channel.ends);
      const float d = (x - (x + x > low + high ? high : low)) * inverse;
      const float angle = fmaf((float)(token - chunk * T), channel.theta, sh.tables.phases[place * CPB + chunk][c % HALF]);
      return make_float2(d * cosine(angle), d * sine(angle));
    };
    auto add = [&](int at, float2 d, const Wave& wave) {
#pragma unroll
      for (int q = 0; q < GROUP; q++) {
        const float a = load16((u16)(wave.query[q] & 0xFFFF)), b = load16((u16)(wave.query[q] >> 16));
        atomicAdd(&sh.change[q][place * SIZE + at / DIM], integer(b, d.y, a, d.x));
      }
    };
#pragma unroll
    for (int r = 0; r < ROUNDS; r += 2) {
      const int i = r * 32 + lane, k = i + 32;
      if (r * 32 >= block.count) break;
      const int first = i < block.count ? (int)block.near_positions[i] : 0;
      const float2 near = turned(first, load16(block.near_values[i]));
      const Wave near_wave = sh.wave[first % DIM];
      if (r + 1 < ROUNDS && (r + 1) * 32 < block.count) {
        // Loads cannot pass the additions, so those of two rounds come before them.
        const int second = k < block.count ? (int)block.near_positions[k] : 0;
        const float2 next = turned(second, load16(block.near_values[k]));
        const Wave next_wave = sh.wave[second % DIM];
        if (k < block.count) add(second, next, next_wave);
      }
      if (i < block.count) add(first, near, near_wave);
    }
#pragma unroll 1
    for (int i = CAP + lane; i < block.count; i += 32) {
      const int far = (int)__ldg(block.positions + i);
      add(far, turned(far, load16(__ldg(block.values + i))), sh.wave[far % DIM]);
    }
  }
}

// The dense code's level as the packer found it from the same number; needed in flat tokens only.
APART float exact_level(const float* middles, const float* levels, float away, float scale) {
  const float normalized = away * (scale == 0.0f ? 0.0f : __fdiv_rn(1.0f, scale));
  int code = 0;
  for (int k = LEVELS / 2; k; k >>= 1) code += normalized > middles[code + k - 1] ? k : 0;
  return from_half(to_half(levels[code]));
}

// Phase 4. Corrections of the output by the warp's blocks, in units of all.
DEVICE void value_outliers(const Args& p, Space& sh, int blocks, int warp, int lane, float unit) {
  const float inverse = unit > 1e-30f ? 1.0f / unit : 0.0f;
  const float high = sh.table.ends_of_levels[0], low = sh.table.ends_of_levels[1];
  const float bound = 1.001f * fmaxf(fmaxf(sh.table.middles[LEVELS - 2], -sh.table.middles[0]), 0.0f);
#pragma unroll 1
  for (int j = 0; j < SHARE; j++) {
    const int place = warp + j * WARPS;
    if (place >= blocks) break;
    const Outliers block(sh.entries[place], sh.lists[place], VALUES);
    const u16 *zeros = (const u16*)sh.zeros[place], *scales = (const u16*)sh.scales[place];
    auto difference = [&](int at, float x) {
      const float zero = load16(zeros[at / DIM]), scale = load16(scales[at / DIM]), away = x - zero;
      float level = away > 0.0f ? high : low;  // almost always: it is outside the others' range
      if (fabsf(away) <= scale * bound) level = exact_level(sh.table.middles, p.value_levels, away, scale);
      return (x - fmaf(level, scale, zero)) * inverse;
    };
    auto look = [&](int at, u32 (&w)[GROUP]) {
      const int token = place * SIZE + at / DIM;
#pragma unroll
      for (int q = 0; q < GROUP; q++) w[q] = ((const u16*)&sh.weight[q][token / 2].y)[token % 2];
    };
    auto add = [&](int at, float d, const u32 (&w)[GROUP]) {
#pragma unroll
      for (int q = 0; q < GROUP; q++)
        atomicAdd(&sh.moved[q][at % DIM], integer(from_half((u16)w[q]), d));
    };
#pragma unroll
    for (int r = 0; r < ROUNDS; r += 2) {
      if (r * 32 >= block.count) break;
      const int i = r * 32 + lane, j = i + 32;
      const int first = i < block.count ? (int)block.near_positions[i] : 0;
      u32 near[GROUP];
      look(first, near);
      const float d = i < block.count ? difference(first, load16(block.near_values[i])) : 0.0f;
      if (r + 1 < ROUNDS && (r + 1) * 32 < block.count) {
        // Loads cannot pass the additions, so those of two rounds come before them.
        const int second = j < block.count ? (int)block.near_positions[j] : 0;
        u32 next[GROUP];
        look(second, next);
        const float e = j < block.count ? difference(second, load16(block.near_values[j])) : 0.0f;
        if (j < block.count) add(second, e, next);
      }
      if (i < block.count) add(first, d, near);
    }
#pragma unroll 1
    for (int i = CAP + lane; i < block.count; i += 32) {
      const int far = (int)__ldg(block.positions + i);
      u32 w[GROUP];
      look(far, w);
      add(far, difference(far, load16(__ldg(block.values + i))), w);
    }
  }
}
