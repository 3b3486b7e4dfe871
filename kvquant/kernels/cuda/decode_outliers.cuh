// Phases 1 and 4 of `decode.cu`: exact outliers of keys and values.

// The elements of a 16-byte piece of memory that stand before `p`.
template <typename E> DEVICE int before(const E* p) { return (int)((u64)p & 15) / (int)sizeof(E); }

// Begins to copy the 16-byte pieces that hold `count` elements, MOST at most.
template <int MOST, typename E> DEVICE void stage(E* to, const E* from, int count, int lane) {
  const u8* begin = (const u8*)((u64)from & ~(u64)15);
  const int pieces = ((before(from) + count) * (int)sizeof(E) + 15) / 16;
#pragma unroll
  for (int i = 0; i < MOST * (int)sizeof(E) / 16 + 1; i += 32)
    if (i + lane < pieces) copy16((u8*)to + 16 * (i + lane), begin + 16 * (i + lane));
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
  stage<CAP>(list.at, entry.positions[side], near, lane);
  stage<CAP>(list.value, entry.outliers[side], near, lane);
}

// Finds the warp's blocks, a lane a block.
DEVICE void find_blocks(const Args& p, Space& sh, const int* table, int blocks, int head, int warp, int lane) {
  const int place = warp + lane * WARPS;
  if (lane >= SHARE || place >= blocks) return;
  const u32 number = __ldg(table + place);
  const i64* arena = p.arenas + (i64)(number >> 20) * FIELDS;
  const i64 block = number & 0xFFFFF, of_head = block * p.heads + head;
  Entry& entry = sh.entries[place];
  entry.codes[KEYS] = (const u8*)__ldg(arena + KCODES) + of_head * SIZE * ROW;
  entry.codes[VALUES] = (const u8*)__ldg(arena + VCODES) + of_head * SIZE * ROW;
  entry.zeros = (const u16*)__ldg(arena + VZERO) + block * SIZE;
  entry.scales = (const u16*)__ldg(arena + VSCALE) + block * SIZE;
#if OUTLIERS
  const int begin[2] = {__ldg((const int*)__ldg(arena + KBEGIN) + of_head), __ldg((const int*)__ldg(arena + VBEGIN) + of_head)};
  entry.count[KEYS] = __ldg((const count_t*)__ldg(arena + KCOUNT) + of_head);
  entry.count[VALUES] = __ldg((const count_t*)__ldg(arena + VCOUNT) + of_head);
  entry.positions[KEYS] = (const pos_t*)__ldg(arena + KPOS) + begin[KEYS];
  entry.positions[VALUES] = (const pos_t*)__ldg(arena + VPOS) + begin[VALUES];
  entry.outliers[KEYS] = (const u16*)__ldg(arena + KVAL) + begin[KEYS];
  entry.outliers[VALUES] = (const u16*)__ldg(arena + VVAL) + begin[VALUES];
#endif
}

// Phase 1. Corrections of the scores of the warp's blocks, in a unit of each block.
DEVICE void key_outliers(Space& sh, int blocks, int warp, int lane, float strength) {
  const float reach = sqrtf(__uint_as_float(sh.reach)) * 1.01f;
#pragma unroll 1
  for (int j = 0; j < SHARE; j++) {
    const int place = warp + j * WARPS;
    if (place >= blocks) break;
    const Outliers block(sh.entries[place], sh.lists[place], KEYS);
    // (exact - dequantized): an outlier is outside the range, so its dense code is that of an end.
    auto difference = [&](int at, float x) {
      const u32 ends = sh.channels[at % DIM].ends;
      const float low = low_of(ends), high = high_of(ends);
      return x - (x + x > low + high ? high : low);
    };
    auto turned = [&](int at, float d) {
      const int token = at / DIM, c = at % DIM;
      const float angle = fmaf((float)(token % T), sh.channels[c].theta, sh.tables.phases[place * CPB + token / T][c % HALF]);
      return make_float2(d * cosine(angle), d * sine(angle));
    };
    auto add = [&](int at, float2 d, const Wave& wave) {
#pragma unroll
      for (int q = 0; q < GROUP; q++) {
        const float a = load16((u16)(wave.query[q] & 0xFFFF)), b = load16((u16)(wave.query[q] >> 16));
        const int x = __float_as_int(fmaf(b, d.y, fmaf(a, d.x, MAGIC))) - MAGIC_BITS;
        atomicAdd(&sh.change[q][place * SIZE + at / DIM], x);
      }
    };
    int at[ROUNDS];
    float d[ROUNDS], most = 0.0f;
#pragma unroll
    for (int r = 0; r < ROUNDS; r++) {
      const int i = r * 32 + lane;
      at[r] = -1;
      d[r] = 0.0f;
      if (i < block.count) {
        at[r] = (int)block.near_positions[i];
        d[r] = difference(at[r], load16(block.near_values[i]));
        most = fmaxf(most, fabsf(d[r]));
      }
    }
#pragma unroll 1
    for (int i = CAP + lane; i < block.count; i += 32)
      most = fmaxf(most, fabsf(difference((int)__ldg(block.positions + i), load16(__ldg(block.values + i)))));
    const float unit = warp_max(most) * reach * strength * SCORE_UNIT, inverse = unit > 1e-30f ? strength / unit : 0.0f;
    if (lane == 0) sh.units[place] = unit;
    auto look = [&](int r) { return sh.wave[max(at[r], 0) % DIM]; };
#pragma unroll
    for (int r = 0; r < ROUNDS; r += 2) {
      if (r * 32 >= block.count) break;
      const float2 first = turned(max(at[r], 0), d[r] * inverse);
      const Wave near = look(r);
      if (r + 1 < ROUNDS && (r + 1) * 32 < block.count) {
        // Loads cannot pass the additions, so those of two rounds come before them.
        const int s = r + 1 < ROUNDS ? r + 1 : r;
        const float2 second = turned(max(at[s], 0), d[s] * inverse);
        const Wave next = look(s);
        if (at[s] >= 0) add(at[s], second, next);
      }
      if (at[r] >= 0) add(at[r], first, near);
    }
#pragma unroll 1
    for (int i = CAP + lane; i < block.count; i += 32) {
      const int far = (int)__ldg(block.positions + i);
      add(far, turned(far, difference(far, load16(__ldg(block.values + i))) * inverse), sh.wave[far % DIM]);
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

// The largest outlier of values of the warp's blocks, without its sign.
DEVICE void largest_value(Space& sh, int blocks, int warp, int lane) {
  u32 largest = 0;
#pragma unroll 1
  for (int j = 0; j < SHARE; j++) {
    const int place = warp + j * WARPS;
    if (place >= blocks) break;
    const Outliers block(sh.entries[place], sh.lists[place], VALUES);
#pragma unroll
    for (int r = 0; r < ROUNDS; r++)
      if (r * 32 + lane < block.count) largest = max(largest, (u32)(block.near_values[r * 32 + lane] & 0x7FFF));
#pragma unroll 1
    for (int i = CAP + lane; i < block.count; i += 32) largest = max(largest, (u32)(__ldg(block.values + i) & 0x7FFF));
  }
  largest = __reduce_max_sync(~0u, largest);
  if (lane == 0) atomicMax(&sh.largest, largest);
}

// Phase 4. Corrections of the output by the warp's blocks, in units of all.
DEVICE void value_outliers(const Args& p, Space& sh, int blocks, int warp, int lane, float unit) {
  const float inverse = unit > 1e-30f ? 1.0f / unit : 0.0f;
  const float high = sh.ends_of_levels[0], low = sh.ends_of_levels[1];
  const float bound = 1.001f * fmaxf(fmaxf(sh.middles[LEVELS - 2], -sh.middles[0]), 0.0f);
#pragma unroll 1
  for (int j = 0; j < SHARE; j++) {
    const int place = warp + j * WARPS;
    if (place >= blocks) break;
    const Outliers block(sh.entries[place], sh.lists[place], VALUES);
    const u16 *zeros = (const u16*)sh.zeros[place], *scales = (const u16*)sh.scales[place];
    auto difference = [&](int at, float x) {
      const float zero = load16(zeros[at / DIM]), scale = load16(scales[at / DIM]), away = x - zero;
      float level = away > 0.0f ? high : low;  // almost always: it is outside the others' range
      if (fabsf(away) <= scale * bound) level = exact_level(sh.middles, p.value_levels, away, scale);
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
        atomicAdd(&sh.moved[q][at % DIM], __float_as_int(fmaf(from_half((u16)w[q]), d, MAGIC)) - MAGIC_BITS);
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
