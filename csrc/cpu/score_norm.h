// Per-example gradients of normalization layers on the CPU; all tensors contiguous.
#pragma once

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

}  // namespace entropic::cpu
