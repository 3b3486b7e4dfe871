// `decode.cu` as a library for a CPU; arguments as cuLaunchKernel has them.
#include "decode.cu"

#define A(type, i) (*(type*)a[i])

extern "C" void launch_decode(int x, int y, int z, int threads, void** a) {
  launch(x, y, z, threads, [=] { decode(A(Args, 0)); });
}
extern "C" void launch_combine(int x, int y, int z, int threads, void** a) {
  launch(x, y, z, threads,
         [=] { combine(A(const float*, 0), A(const float*, 1), A(u16*, 2), A(int, 3)); });
}
