// Fused projection step on a GPU: launchers, free of CUDA headers so that bindings.cpp can include
// them. All addresses are device addresses of contiguous tensors; nothing synchronizes.
#pragma once

#include "kernels/projected_step.h"

namespace entropic::cuda {

template <typename T>
struct StepShape {
  T* theta;           // [R, P], updated in place
  const T* pivots;    // [M, P]
  double* products;   // [R, 2, M]
  double* workspace;  // step_workspace(R, P, M) doubles
  i64 replicas, size, pivot_count;
  int device;
  void* stream;
};

// Doubles of scratch memory for partial sums.
i64 step_workspace(i64 replicas, i64 size, i64 pivot_count);

template <typename T>
void sgd_step(const StepShape<T>& s, const T* grad, T* buffer, const double* lr,
              const SgdOptions& options);

template <typename T>
void adam_step(const StepShape<T>& s, const T* grad, T* exp_avg, T* exp_avg_sq, const i64* step,
               const double* lr, const AdamOptions& options);

template <typename T>
void project_step(const StepShape<T>& s, const double* segment_squares, i64* segment, double* t,
                  double* distance);

}  // namespace entropic::cuda
