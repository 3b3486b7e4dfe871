// `pack.cu` as a library for a CPU; arguments as cuLaunchKernel has them.
#include "pack.cu"

#define A(type, i) (*(type*)a[i])

extern "C" void launch_pack_keys(int x, int y, int z, int threads, void** a) {
  launch(x, y, z, threads, [=] { pack_keys(A(Source, 0), A(Target, 1), A(const uint4*, 2)); });
}
extern "C" void launch_pack_values(int x, int y, int z, int threads, void** a) {
  launch(x, y, z, threads, [=] {
    pack_values(A(Source, 0), A(u8*, 1), A(int*, 2), A(u16*, 3), A(u16*, 4), A(const float*, 5),
                A(u32*, 6), A(int, 7), A(int, 8));
  });
}
#if PER_SIDE
extern "C" void launch_group_values(int x, int y, int z, int threads, void** a) {
  launch(x, y, z, threads, [=] { group_values(A(Target, 0), A(const u32*, 1)); });
}
#endif
