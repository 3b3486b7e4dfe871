// Types of all kernels, and what a CPU has another word for.

#ifdef EMULATED
#include "emulated.h"  // tests only
#else
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef long long i64;
typedef unsigned long long u64;

#define DEVICE __device__ __forceinline__
#define KERNEL(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)
#define SHARED __shared__
#endif

// Of an outlier: its place in a block, and how many a block has.
#if POS32
typedef int pos_t;
#else
typedef u16 pos_t;
#endif
#if COUNT32
typedef int count_t;
#else
typedef short count_t;
#endif
