// Types that all kernels share.
//
// `generated.cuh` is written by Python (cuda_header.py): the constants of the cache's shape, the
// encoding of block numbers and arena rows, and the layout of the structs that Python fills.
#pragma once

#include "generated.cuh"
#include "integers.cuh"

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
