// Per-example gradients of normalization layers on the CPU; all tensors contiguous.
#pragma once

#include "cpu/isa.h"
#include "kernels/common.h"

namespace entropic::cpu {

template <typename T>
struct NormGrads {
  const T* x;       // [n, S, C]
  const T* g;       // [n, S, C]
  const T* mean;    // at e * mean_example + s * mean_position + c * mean_channel
  const T* rstd;    // as mean
  const T* weight;  // [C], read where grad_x is asked for
  T* grad_x;        // [n, S, C] or null; then mean and rstd depend on the channel alone
  T* dscale;        // [n, C]
  T* dshift;        // [n, C]
  i64 examples, positions, channels;
  i64 mean_example, mean_position, mean_channel;
};

// dscale = sum_s g (x - mean) rstd, dshift = sum_s g, grad_x = g rstd weight.
template <typename T>
void norm_grads(const NormGrads<T>& call, int threads);

// ---- one block of work --------------------------------------------------------------------------
//
// Normalization gradients of one example, as a table of functions. Every instruction set fills one
// table (cpu/simd/norm_example_grads.cpp); cpu/norm_example_grads.cpp walks the examples and owns
// the threads.

template <typename T>
struct NormExample {
  const T* x;       // [S, C]
  const T* g;       // [S, C]
  const T* mean;    // at s * stat_position + c * stat_channel
  const T* rstd;    // as mean
  const T* factor;  // [C], what g is multiplied with; null for no grad_x
  T* grad_x;        // [S, C]
  T* dscale;        // [C]
  T* dshift;        // [C]
  i64 positions, channels;
  i64 stat_position, stat_channel;  // stat_channel is 0 or 1
  double* sums;                     // scratch, norm_scratch(C) doubles
};

// Lanes of the widest vector; fewer channels than lanes are folded, LANES positions to a row.
constexpr i64 NORM_LANES = 16;

constexpr i64 norm_scratch(i64 channels) {
  const i64 slots = channels < NORM_LANES ? channels * NORM_LANES : channels + NORM_LANES;
  return 4 * slots;
}

ENTROPIC_FOR_EACH_ISA(extern void (*const norm_f32)(const NormExample<float>&);
                      extern void (*const norm_f64)(const NormExample<double>&);)

}  // namespace entropic::cpu
