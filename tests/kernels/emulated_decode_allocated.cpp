// The decode kernel of allocated codes as a library for a CPU.
#define DECODE_SOURCE "decode_allocated.cu"
#include "emulated_decode.cpp"
