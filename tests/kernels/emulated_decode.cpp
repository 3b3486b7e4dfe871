// The decode kernel as a library for a CPU; arguments as cuLaunchKernel has them.
#ifndef DECODE_SOURCE
#define DECODE_SOURCE "decode.cu"
#endif
#include DECODE_SOURCE

#define ARGUMENT(type, i) (*(type*)arguments[i])

#pragma GCC visibility push(default)
extern "C" void launch_decode(int x, int y, int z, int threads, void** arguments) {
  launch(x, y, z, threads, [=] { decode(ARGUMENT(DecodeParams, 0)); });
}
extern "C" void launch_combine(int x, int y, int z, int threads, void** arguments) {
  launch(x, y, z, threads, [=] {
    combine(ARGUMENT(const float*, 0), ARGUMENT(const float*, 1), ARGUMENT(u16*, 2),
            ARGUMENT(int, 3));
  });
}
extern "C" void launch_combine_with_sinks(int x, int y, int z, int threads, void** arguments) {
  launch(x, y, z, threads, [=] {
    combine_with_sinks(ARGUMENT(const float*, 0), ARGUMENT(const float*, 1), ARGUMENT(u16*, 2),
                       ARGUMENT(int, 3), ARGUMENT(const u16*, 4), ARGUMENT(int, 5));
  });
}
