// The expansion of allocated codes as a library for a CPU; arguments as cuLaunchKernel has them.
#include "expand_allocated.cu"

#define ARGUMENT(type, i) (*(type*)arguments[i])

#pragma GCC visibility push(default)
extern "C" void launch_expand(int x, int y, int z, int threads, void** arguments) {
  launch(x, y, z, threads, [=] { expand(ARGUMENT(ExpandParams, 0)); });
}
