// What every kernel header needs. No torch, no standard library containers.
#pragma once

#include <cstdint>

// Kernel functions have internal linkage: the same header is compiled for several instruction
// sets, and a function merged by the linker would run AVX-512 code on a processor without it.
#if defined(__CUDACC__)
#define EF_FN static __host__ __device__ __forceinline__
#else
#define EF_FN static inline __attribute__((always_inline))
#endif

namespace entropic {

using i64 = std::int64_t;

EF_FN i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }

#if defined(__CUDA_ARCH__)
EF_FN float square_root(float x) { return sqrtf(x); }
EF_FN double square_root(double x) { return sqrt(x); }
#else
EF_FN float square_root(float x) { return __builtin_sqrtf(x); }
EF_FN double square_root(double x) { return __builtin_sqrt(x); }
#endif

}  // namespace entropic
