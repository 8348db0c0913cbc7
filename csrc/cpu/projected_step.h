// Fused projection step on the CPU: parameters of the calls, all tensors contiguous.
#pragma once

#include "cpu/isa.h"
#include "kernels/projected_step.h"

namespace entropic::cpu {

template <typename T>
struct StepShape {
  T* theta;          // [R, P], updated in place
  const T* pivots;   // [M, P]
  double* products;  // [R, 2, M]
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

// ---- one block of work --------------------------------------------------------------------------
//
// The fused step's work on one block of one replica, as a table of functions. Every instruction
// set fills one table (cpu/simd_exact/projected_step.cpp); cpu/projected_step.cpp walks the blocks
// and owns the threads.

template <typename T>
struct StepBlocks {
  void (*sgd)(T* theta, const T* grad, T* buffer, i64 n, SgdKind kind, SgdCoefficients<T> c);
  void (*adam)(T* theta, const T* grad, T* exp_avg, T* exp_avg_sq, i64 n, AdamCoefficients<T> c);
  // squares[m] = |theta - p_m|^2 and along[m] = <theta - p_m, p_{m+1} - p_m> over n elements;
  // along[count - 1] = 0. Pivot m starts at pivots + m * stride.
  void (*products)(const T* theta, const T* pivots, i64 stride, i64 count, i64 n, double* squares,
                   double* along);
  // theta <- p + t (next - p); returns the squared distance moved.
  double (*project)(T* theta, const T* p, const T* next, double t, i64 n);
};

ENTROPIC_FOR_EACH_ISA(extern const StepBlocks<float> step_f32;
                      extern const StepBlocks<double> step_f64;)

}  // namespace entropic::cpu
