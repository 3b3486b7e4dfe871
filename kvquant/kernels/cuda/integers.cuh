// Integer types, and what an emulator has another word for.
#pragma once

#ifdef EMULATED
#include "emulated.h"  // tests only: CUDA's words for a CPU
#else
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef long long i64;
typedef unsigned long long u64;

// The dynamic shared memory of a launch; an emulator must know its size.
#define DYNAMIC_SHARED(name, bytes) extern __shared__ __align__(256) u8 name[]
#endif
