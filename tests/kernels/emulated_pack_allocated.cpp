// The kernels that pack allocated codes as a library for a CPU; arguments as cuLaunchKernel has
// them.
#include "pack_allocated.cu"

#define ARGUMENT(type, i) (*(type*)arguments[i])

#pragma GCC visibility push(default)
extern "C" void launch_pack_allocated_keys(int x, int y, int z, int threads, void** arguments) {
  launch(x, y, z, threads, [=] {
    pack_allocated_keys(ARGUMENT(PackSource, 0), ARGUMENT(PackTarget, 1), ARGUMENT(PackTables, 2));
  });
}
extern "C" void launch_pack_allocated_values(int x, int y, int z, int threads, void** arguments) {
  launch(x, y, z, threads, [=] {
    pack_allocated_values(ARGUMENT(PackSource, 0), ARGUMENT(u8*, 1), ARGUMENT(int*, 2),
                          ARGUMENT(u16*, 3), ARGUMENT(u16*, 4), ARGUMENT(PackTables, 5),
                          ARGUMENT(u32*, 6), ARGUMENT(int, 7));
  });
}
