// Normalization gradients of one example, as a table of functions. Every instruction set fills one
// table (cpu/simd/score_norm.cpp); cpu/score_norm.cpp walks the examples and owns the threads.
#pragma once

#include "kernels/common.h"

namespace entropic::cpu {

template <typename T>
struct NormExample {
  const T* x;         // [S, C]
  const T* g;         // [S, C]
  const T* mean;      // at s * stat_position + c * stat_channel
  const T* rstd;      // as mean
  const T* factor;    // [C], what g is multiplied with; null for no grad_x
  T* grad_x;          // [S, C]
  T* dscale;          // [C]
  T* dshift;          // [C]
  i64 positions, channels;
  i64 stat_position, stat_channel;  // stat_channel is 0 or 1
  double* sums;       // scratch, norm_scratch(C) doubles
};

// Lanes of the widest vector; fewer channels than lanes are folded, LANES positions to a row.
constexpr i64 NORM_LANES = 16;

constexpr i64 norm_scratch(i64 channels) {
  const i64 slots = channels < NORM_LANES ? channels * NORM_LANES : channels + NORM_LANES;
  return 4 * slots;
}

#define ENTROPIC_DECLARE(isa)                                \
  namespace isa {                                            \
  extern void (*const norm_f32)(const NormExample<float>&);  \
  extern void (*const norm_f64)(const NormExample<double>&); \
  }
ENTROPIC_DECLARE(portable)
ENTROPIC_DECLARE(avx2)
ENTROPIC_DECLARE(avx512)
#undef ENTROPIC_DECLARE

}  // namespace entropic::cpu
