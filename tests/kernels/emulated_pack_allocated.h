// Instructions of the kernels that pack allocated codes, for a CPU.
#pragma once

// Eight 16-bit numbers, at an address that a GPU could load at once.
static uint4 load8(const u16* p) {
  if ((uintptr_t)p % 16) abort();
  uint4 d;
  memcpy(&d, p, 16);
  return d;
}
static u32 fma2(u32 a, u32 b, u32 c) {
  return halves(a, b, [](u16 p, u16 q) { return to_16(to_float(p) * to_float(q)); }) |
         halves(c, c, [](u16 p, u16) -> u32 { return is_nan(p) ? 0x7FFF : 0; });
}
static float saturated(float a, float b, float c) {
  const float d = std::fma(a, b, c);
  return d > 0 ? (d < 1 ? d : 1.0f) : 0.0f;
}
static u32 load_fresh(const u32* p) { return *p; }
// Thread blocks run one after the other, so only the last one of a chunk may wait for the others.
static void count_up(u32* counter) { ++*counter; }
static void wait_for(const u32* counter, u32 number) {
  if (*counter < number) abort();
}
