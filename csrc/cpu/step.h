// Fused projection step on the CPU: parameters of the calls, all tensors contiguous.
#pragma once

#include "kernels/step.h"

namespace entropic::cpu {

template <typename T>
struct StepShape {
  T* theta;         // [R, P], updated in place
  const T* pivots;  // [M, P]
  double* products; // [R, 2, M]
  i64 replicas, size, pivot_count;
  int threads;
  const i64* near;        // [R], the segment whose products are enough to begin with, or null
  const double* between;  // [M, M] squared distances of pivots, for a projection with `near`
};

template <typename T>
void sgd_step(const StepShape<T>& s, const T* grad /*[R, P]*/, T* buffer /*[R, P]*/,
              const double* lr /*[R]*/, const SgdOptions& options);

template <typename T>
void adam_step(const StepShape<T>& s, const T* grad /*[R, P]*/, T* exp_avg /*[R, P]*/,
               T* exp_avg_sq /*[R, P]*/, const i64* step /*[R]*/, const double* lr /*[R]*/,
               const AdamOptions& options);

// Reads s.products, and with s.near computes those that are found to be needed besides; segment, t,
// distance are [R], segment_squares is [M - 1].
template <typename T>
void project_step(const StepShape<T>& s, const double* segment_squares, i64* segment, double* t,
                  double* distance);

}  // namespace entropic::cpu
