// The arithmetic of the fused projection step, one element or one segment at a time, shared by
// the CPU and CUDA kernels. The order of operations is that of torch.optim (single-tensor path).
#pragma once

#include "kernels/common.h"

namespace entropic {

// ---- stochastic gradient descent -------------------------------------------------------------

struct SgdOptions {
  double momentum;
  double dampening;
  double weight_decay;
  bool nesterov;
  bool first;  // no earlier step: the momentum buffer holds nothing yet
};

// Which terms a loop needs, decided once outside it.
enum SgdKind { SGD_PLAIN, SGD_FIRST, SGD_FIRST_NESTEROV, SGD_HEAVY_BALL, SGD_NESTEROV };

EF_FN SgdKind sgd_kind(const SgdOptions& o) {
  if (o.momentum == 0.0) return SGD_PLAIN;
  if (o.first) return o.nesterov ? SGD_FIRST_NESTEROV : SGD_FIRST;
  return o.nesterov ? SGD_NESTEROV : SGD_HEAVY_BALL;
}

template <typename T>
struct SgdCoefficients {
  T minus_lr, momentum, take, weight_decay;  // take = 1 - dampening
};

template <typename T>
EF_FN SgdCoefficients<T> sgd_coefficients(const SgdOptions& o, double lr) {
  return {T(-lr), T(o.momentum), T(1.0 - o.dampening), T(o.weight_decay)};
}

// The new parameter; the momentum buffer is read and written unless KIND is SGD_PLAIN.
template <int KIND, typename T>
EF_FN T sgd_update(T theta, T grad, T* buffer, const SgdCoefficients<T>& c) {
  T direction = grad + c.weight_decay * theta;
  if (KIND != SGD_PLAIN) {
    const bool first = KIND == SGD_FIRST || KIND == SGD_FIRST_NESTEROV;
    const T velocity = first ? direction : *buffer * c.momentum + c.take * direction;
    *buffer = velocity;
    const bool nesterov = KIND == SGD_NESTEROV || KIND == SGD_FIRST_NESTEROV;
    direction = nesterov ? direction + c.momentum * velocity : velocity;
  }
  return theta + c.minus_lr * direction;
}

// ---- Adam and AdamW --------------------------------------------------------------------------

struct AdamOptions {
  double beta1;
  double beta2;
  double eps;
  double weight_decay;
  bool decoupled;  // AdamW: the decay acts on theta, not through the gradient
};

template <typename T>
struct AdamCoefficients {
  T take1, beta2, take2, eps, weight_decay, keep, minus_step_size, root_correction2;
};

// power1 = beta1^step, power2 = beta2^step, with step counted from one.
template <typename T>
EF_FN AdamCoefficients<T> adam_coefficients(const AdamOptions& o, double lr, double power1,
                                            double power2) {
  AdamCoefficients<T> c;
  c.take1 = T(1.0 - o.beta1);
  c.beta2 = T(o.beta2);
  c.take2 = T(1.0 - o.beta2);
  c.eps = T(o.eps);
  c.weight_decay = o.decoupled ? T(0) : T(o.weight_decay);
  c.keep = o.decoupled ? T(1.0 - lr * o.weight_decay) : T(1);
  c.minus_step_size = T(-lr / (1.0 - power1));
  c.root_correction2 = T(square_root(1.0 - power2));
  return c;
}

template <typename T>
EF_FN T adam_update(T theta, T grad, T* exp_avg, T* exp_avg_sq, const AdamCoefficients<T>& c) {
  theta = theta * c.keep;
  grad = grad + c.weight_decay * theta;
  const T mean = *exp_avg + c.take1 * (grad - *exp_avg);
  const T square = *exp_avg_sq * c.beta2 + c.take2 * grad * grad;
  *exp_avg = mean;
  *exp_avg_sq = square;
  const T denominator = square_root(square) / c.root_correction2 + c.eps;
  return theta + c.minus_step_size * (mean / denominator);
}

// ---- projection onto a polyline --------------------------------------------------------------

struct Candidate {
  double t;                 // position on the segment, 0 to 1
  double squared_distance;  // from theta to the nearest point of the segment
};

// The nearest point of the segment p -> p' to theta, from
//   here  = |theta - p|^2,  next = |theta - p'|^2,
//   along = <theta - p, p' - p>,  length = |p' - p|^2.
// At a clamped end the distance is the pivot's own, so the two segments that share a pivot tie
// exactly and the caller's "lowest wins" decides.
EF_FN Candidate nearest_on_segment(double here, double next, double along, double length) {
  if (!(along > 0.0) || length == 0.0) return {0.0, here};
  if (along >= length) return {1.0, next};
  const double t = along / length;
  const double squared = here - along * t;
  return {t, squared > 0.0 ? squared : 0.0};
}

// p + t (p' - p) in double, exactly p' at t = 1.
template <typename T>
EF_FN double point_on_segment(T p, T next, double t) {
  const double start = double(p);
  const double end = double(next);
  return t == 1.0 ? end : start + t * (end - start);
}

}  // namespace entropic
