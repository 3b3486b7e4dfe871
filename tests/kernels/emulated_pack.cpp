// The packing kernels as a library for a CPU; arguments as cuLaunchKernel has them.
#include "pack.cu"

#define ARGUMENT(type, i) (*(type*)arguments[i])

#pragma GCC visibility push(default)
extern "C" void launch_pack_keys(int x, int y, int z, int threads, void** arguments) {
  launch(x, y, z, threads, [=] {
    pack_keys(ARGUMENT(PackSource, 0), ARGUMENT(PackTarget, 1), ARGUMENT(const uint4*, 2));
  });
}
extern "C" void launch_pack_values(int x, int y, int z, int threads, void** arguments) {
  launch(x, y, z, threads, [=] {
    pack_values(ARGUMENT(PackSource, 0), ARGUMENT(u8*, 1), ARGUMENT(int*, 2), ARGUMENT(u16*, 3),
                ARGUMENT(u16*, 4), ARGUMENT(const float*, 5), ARGUMENT(u32*, 6), ARGUMENT(int, 7),
                ARGUMENT(int, 8));
  });
}
extern "C" void launch_group_values(int x, int y, int z, int threads, void** arguments) {
  launch(x, y, z, threads, [=] { group_values(ARGUMENT(PackTarget, 0), ARGUMENT(const u32*, 1)); });
}
