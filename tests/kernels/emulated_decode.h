// The instructions that the decode kernel names by itself, for a CPU.
#pragma once

static u32 permute_bytes(u32 a, u32 b, u32 s) { return __byte_perm(a, b, s & 0x7777); }
static u32 select_bits(u32 mask, u32 yes, u32 no) { return (yes & mask) | (no & ~mask); }
static float from_half(u16 x) {
  _Float16 h;
  memcpy(&h, &x, 2);
  return (float)h;
}
static u16 to_half(float x) {
  _Float16 h = (_Float16)x;
  u16 d;
  memcpy(&d, &h, 2);
  return d;
}
static u16 to_bfloat(float x) {
  u32 wide = bits_of(x);
  return (u16)((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16);
}
static u32 pack2(float low, float high) { return to_half(low) | (u32)to_half(high) << 16; }
static u32 pack16(float low, float high) { return to_16(low) | (u32)to_16(high) << 16; }
static u32 finite2(u32 a) {
  const u16 largest = BF16 ? 0x7F7F : 0x7BFF;
  auto one = [=](u16 x) { return (x & 0x7FFF) > largest ? (u16)(largest | (x & 0x8000)) : x; };
  return one((u16)a) | (u32)one((u16)(a >> 16)) << 16;
}
static float look_up_byte(const float* table, u32 offsets, int i) {
  return table[(offsets >> (8 * i) & 0xFF) / 4];
}
static u32 transpose_8x8(u32 a) {
  const int lane = threadIdx.x % 32, row = lane / 4, column = lane % 4 * 2;
  u32 d = 0;
  exchange(&a, 1, [&](const Thread* warp) {
    for (int i = 0; i < 2; ++i)
      d |= (warp[4 * (column + i) + row / 2].shown[0] >> (16 * (row % 2)) & 0xFFFF) << (16 * i);
  });
  return d;
}
static u32 fma2(u32 a, u32 b, u32 c) {
  auto one = [](u32 x, u32 y, u32 z) {  // exact in double
    return to_half((float)((double)from_half((u16)x) * from_half((u16)y) + from_half((u16)z)));
  };
  return one(a & 0xFFFF, b & 0xFFFF, c & 0xFFFF) | (u32)one(a >> 16, b >> 16, c >> 16) << 16;
}
static u32 mul2(u32 a, u32 b) { return fma2(a, b, 0x80008000u); }
static u32 neg2(u32 a) { return a ^ 0x80008000u; }
static float reciprocal(float x) { return 1.0f / x; }
static float cosine(float x) { return cosf(x); }
static float sine(float x) { return sinf(x); }
static void cp_async_16(void* to, const void* from) { memcpy(to, from, 16); }
static void cp_async_wait_all() {}
static void prefetch_l2(const u8*) {}
template <int N> static void load_words(u32 (&w)[N], const u8* p) { memcpy(w, p, 4 * N); }
static void cp_async_4(void* to, const void* from) { memcpy(to, from, 4); }
template <int OFFSET> static u32 load_word(const u8* p) {
  u32 w;
  memcpy(&w, p + OFFSET, 4);
  return w;
}
static u32 load_short(const u8* p) {
  u16 x;
  memcpy(&x, p, 2);
  return x;
}
// mma.m16n8k16: rows of A are lane / 4 and that + 8, columns of B are lane / 4.
static void mma_m16n8k16(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  const u32 mine[6] = {a0, a1, a2, a3, b0, b1};
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  exchange(mine, 6, [&](const Thread* warp) {
    for (int i = 0; i < 4; ++i) {
      const int row = i / 2, column = 2 * t + i % 2;
      for (int k = 0; k < 4; ++k)
        for (int half = 0; half < 2; ++half) {
          const u32 *a = warp[4 * g + k].shown, *b = warp[4 * column + k].shown;
          for (int part = 0; part < 2; ++part)
            d[i] += from_half((u16)(a[row + 2 * half] >> (16 * part))) *
                    from_half((u16)(b[4 + half] >> (16 * part)));
        }
    }
  });
}
