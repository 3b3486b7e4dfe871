// Types that all kernels share.
//
// `generated.cuh` is written by Python (cuda_header.py): the constants of the cache's shape, the
// encoding of block numbers and arena rows, and the layout of the structs that Python fills.
#pragma once

#include "generated.cuh"

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

template <bool CONDITION, typename A, typename B> struct Select {
  typedef A type;
};
template <typename A, typename B> struct Select<false, A, B> {
  typedef B type;
};

// An outlier's place in its block: token * HEAD_DIM + channel.
typedef Select<WIDE_POSITIONS, int, u16>::type position_t;
// The number of outliers in a block.
typedef Select<WIDE_COUNTS, int, short>::type count_t;
