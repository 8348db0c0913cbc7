// Compiled once for each instruction set, with ENTROPIC_ISA naming it. Only functions with
// internal linkage here, and no standard library: see kernels/common.h.
#include "cpu/projected_step.h"

namespace entropic::cpu {
namespace {

// Doubles in one register of this instruction set.
#if defined(__AVX512F__)
constexpr int WIDTH = 8;
#elif defined(__AVX2__)
constexpr int WIDTH = 4;
#else
constexpr int WIDTH = 2;
#endif

// Element j of a block is summed in lane j % LANES on every instruction set, without contraction
// to fused multiply-adds (-ffp-contract=off), so all of them return the same bits.
constexpr int LANES = 16;
constexpr int REGISTERS = LANES / WIDTH;
constexpr int CACHE_LINE = 64;  // bytes

template <typename T>
struct Vector {
  typedef T type __attribute__((vector_size(WIDTH * sizeof(T)), aligned(alignof(T)), may_alias));
};
typedef Vector<double>::type Doubles;

template <typename T>
EF_FN Doubles load(const T* address) {
  return __builtin_convertvector(*reinterpret_cast<const typename Vector<T>::type*>(address),
                                 Doubles);
}

EF_FN double sum_lanes(double* lanes) {
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  return lanes[0];
}

EF_FN void spill(const Doubles* registers, double* lanes) {
  for (int k = 0; k < REGISTERS; ++k)
    for (int w = 0; w < WIDTH; ++w) lanes[k * WIDTH + w] = registers[k][w];
}

template <int KIND, typename T>
void sgd_loop(T* __restrict theta, const T* __restrict grad, T* __restrict buffer, i64 n,
              SgdCoefficients<T> c) {
  for (i64 j = 0; j < n; ++j) {
    T velocity = KIND == SGD_PLAIN ? T(0) : buffer[j];
    theta[j] = sgd_update<KIND>(theta[j], grad[j], &velocity, c);
    if (KIND != SGD_PLAIN) buffer[j] = velocity;
  }
}

template <typename T>
void sgd(T* theta, const T* grad, T* buffer, i64 n, SgdKind kind, SgdCoefficients<T> c) {
  switch (kind) {
    case SGD_PLAIN:
      return sgd_loop<SGD_PLAIN>(theta, grad, buffer, n, c);
    case SGD_FIRST:
      return sgd_loop<SGD_FIRST>(theta, grad, buffer, n, c);
    case SGD_FIRST_NESTEROV:
      return sgd_loop<SGD_FIRST_NESTEROV>(theta, grad, buffer, n, c);
    case SGD_HEAVY_BALL:
      return sgd_loop<SGD_HEAVY_BALL>(theta, grad, buffer, n, c);
    case SGD_NESTEROV:
      return sgd_loop<SGD_NESTEROV>(theta, grad, buffer, n, c);
  }
}

template <typename T>
void adam(T* __restrict theta, const T* __restrict grad, T* __restrict exp_avg,
          T* __restrict exp_avg_sq, i64 n, AdamCoefficients<T> c) {
  for (i64 j = 0; j < n; ++j) {
    T mean = exp_avg[j];
    T square = exp_avg_sq[j];
    theta[j] = adam_update(theta[j], grad[j], &mean, &square, c);
    exp_avg[j] = mean;
    exp_avg_sq[j] = square;
  }
}

// |theta - p|^2 and <theta - p, next - p>. Differences first, in double: products of theta with
// the pivots themselves would lose |theta|^2 / |theta - p|^2 in cancellation. Meanwhile `ahead`,
// what is read next, is called from memory: it lies megabytes away, where the hardware
// prefetcher does not look.
template <typename T>
void pair_products(const T* theta, const T* p, const T* next, const T* ahead, i64 n, double* square,
                   double* along) {
  Doubles squares[REGISTERS] = {};
  Doubles alongs[REGISTERS] = {};
  i64 j = 0;
  for (; j + LANES <= n; j += LANES) {
    for (int byte = 0; byte < LANES * int(sizeof(T)); byte += CACHE_LINE)
      __builtin_prefetch(reinterpret_cast<const char*>(ahead + j) + byte);
    for (int k = 0; k < REGISTERS; ++k) {
      const i64 at = j + k * WIDTH;
      const Doubles start = load(p + at);
      const Doubles delta = load(theta + at) - start;
      squares[k] += delta * delta;
      alongs[k] += delta * (load(next + at) - start);
    }
  }
  double square_lanes[LANES];
  double along_lanes[LANES];
  spill(squares, square_lanes);
  spill(alongs, along_lanes);
  for (int l = 0; j < n; ++j, ++l) {
    const double delta = double(theta[j]) - double(p[j]);
    square_lanes[l] += delta * delta;
    along_lanes[l] += delta * (double(next[j]) - double(p[j]));
  }
  *square = sum_lanes(square_lanes);
  *along = sum_lanes(along_lanes);
}

template <typename T>
void products(const T* theta, const T* pivots, i64 stride, i64 count, i64 n, double* squares,
              double* along) {
  for (i64 m = 0; m < count; ++m) {
    const T* p = pivots + m * stride;
    const T* next = m + 1 < count ? p + stride : p;
    const T* ahead = m + 2 < count ? next + stride : next;
    pair_products(theta, p, next, ahead, n, squares + m, along + m);
  }
  if (count > 0) along[count - 1] = 0.0;
}

template <typename T>
double project(T* __restrict theta, const T* __restrict p, const T* __restrict next, double t,
               i64 n) {
  double lanes[LANES] = {};
  for (i64 j = 0; j < n; j += LANES) {
    const int width = int(n - j < LANES ? n - j : LANES);
    for (int l = 0; l < width; ++l) {
      const double point = point_on_segment(p[j + l], next[j + l], t);
      const double moved = double(theta[j + l]) - point;
      lanes[l] += moved * moved;
      theta[j + l] = T(point);
    }
  }
  return sum_lanes(lanes);
}

}  // namespace

namespace ENTROPIC_ISA {
extern const StepBlocks<float> step_f32;
extern const StepBlocks<double> step_f64;
const StepBlocks<float> step_f32 = {sgd<float>, adam<float>, products<float>, project<float>};
const StepBlocks<double> step_f64 = {sgd<double>, adam<double>, products<double>, project<double>};
}  // namespace ENTROPIC_ISA

}  // namespace entropic::cpu
