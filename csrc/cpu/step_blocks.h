// The fused step's work on one block of one replica, as a table of functions. Every instruction
// set fills one table (cpu/simd/step.cpp); cpu/step.cpp walks the blocks and owns the threads.
#pragma once

#include "kernels/step.h"

namespace entropic::cpu {

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

#define ENTROPIC_DECLARE(isa)                \
  namespace isa {                            \
  extern const StepBlocks<float> step_f32;   \
  extern const StepBlocks<double> step_f64;  \
  }
ENTROPIC_DECLARE(portable)
ENTROPIC_DECLARE(avx2)
ENTROPIC_DECLARE(avx512)
#undef ENTROPIC_DECLARE

}  // namespace entropic::cpu
