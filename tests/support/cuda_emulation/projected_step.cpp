// The launchers of csrc/cuda/projected_step.h as C functions that ctypes can call. Each returns nothing, or
// the message of what was thrown.
#include "cuda/projected_step.h"
#include "entries.h"

using namespace entropic;

namespace {

struct Place {
  void *theta, *pivots, *products, *workspace;
  i64 replicas, size, pivot_count;
};

template <typename T>
cuda::StepShape<T> shape(const Place& p) {
  return {static_cast<T*>(p.theta), static_cast<const T*>(p.pivots),
          static_cast<double*>(p.products), static_cast<double*>(p.workspace),
          p.replicas, p.size, p.pivot_count, 0, nullptr};
}

}  // namespace

#define ENTRIES(T, NAME)                                                                          \
  ENTRY sgd_step_##NAME(Place p, T* grad, T* buffer, double* lr, double momentum,                 \
                        double dampening, double weight_decay, int nesterov, int first) {         \
    return guarded([&] {                                                                          \
      cuda::sgd_step<T>(shape<T>(p), grad, buffer, lr,                                            \
                        {momentum, dampening, weight_decay, nesterov != 0, first != 0});          \
    });                                                                                           \
  }                                                                                               \
  ENTRY adam_step_##NAME(Place p, T* grad, T* exp_avg, T* exp_avg_sq, i64* step, double* lr,      \
                         double beta1, double beta2, double eps, double weight_decay,             \
                         int decoupled) {                                                         \
    return guarded([&] {                                                                          \
      cuda::adam_step<T>(shape<T>(p), grad, exp_avg, exp_avg_sq, step, lr,                        \
                         {beta1, beta2, eps, weight_decay, decoupled != 0});                      \
    });                                                                                           \
  }                                                                                               \
  ENTRY project_step_##NAME(Place p, double* segment_squares, i64* segment, double* t,            \
                            double* distance) {                                                   \
    return guarded(                                                                               \
        [&] { cuda::project_step<T>(shape<T>(p), segment_squares, segment, t, distance); });      \
  }
ENTRIES(float, float32)
ENTRIES(double, float64)
#undef ENTRIES

EXPORTED i64 step_workspace(i64 replicas, i64 size, i64 pivot_count) {
  return cuda::step_workspace(replicas, size, pivot_count);
}
