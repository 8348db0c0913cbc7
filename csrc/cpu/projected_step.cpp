// Walks blocks and replicas. Every block's sums depend on the block alone and are added in a fixed
// tree afterwards, so results do not depend on the number of threads.
#include "cpu/projected_step.h"

#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "cpu/isa.h"
#include "registry.h"

namespace entropic::cpu {
namespace {

// Elements of one replica that are summed as one unit. It fixes the order of every reduction,
// whatever the number of threads. Pivots are read a block at a time from M places in memory, and
// the hardware prefetcher needs a few pages of each.
constexpr i64 BLOCK = 8192;

// Below this many elements a second thread costs more than it brings (a parallel region costs
// some microseconds, 32768 float32 elements are 128 kB).
constexpr i64 PARALLEL_FROM = 32768;

// Replicas handled together, so that a block of a pivot read from memory serves all of them.
constexpr i64 GROUP = 8;

template <typename T>
const StepBlocks<T>& blocks() {
  if constexpr (std::is_same_v<T, float>)
    return ENTROPIC_TABLE(step_f32);
  else
    return ENTROPIC_TABLE(step_f64);
}

// Pairwise sum of values[0], values[stride], ...: error grows with log(count), order is fixed.
double tree_sum(const double* values, i64 stride, i64 count) {
  if (count <= 8) {
    double sum = 0.0;
    for (i64 i = 0; i < count; ++i) sum += values[i * stride];
    return sum;
  }
  const i64 half = count / 2;
  return tree_sum(values, stride, half) + tree_sum(values + half * stride, stride, count - half);
}

// update(r, begin, n) advances elements begin .. begin + n of replica r; the products of the new
// values follow at once, while the block is in cache: with all pivots, or with the two of the
// segment that s.near names.
template <typename T, typename Update>
void update_and_products(const StepShape<T>& s, const Update& update) {
  const StepBlocks<T>& kernel = blocks<T>();
  const i64 block_count = ceil_div(s.size, BLOCK);
  const i64 count = s.near ? 2 : s.pivot_count;
  const i64 sums = 2 * count;
  std::vector<double> partial(static_cast<size_t>(s.replicas * block_count * sums));
  const i64 groups = ceil_div(s.replicas, GROUP);
  [[maybe_unused]] const int threads = s.replicas * s.size < PARALLEL_FROM ? 1 : s.threads;

#pragma omp parallel for num_threads(threads) schedule(static)
  for (i64 task = 0; task < groups * block_count; ++task) {
    const i64 block = task / groups;
    const i64 first = (task % groups) * GROUP;
    const i64 last = first + GROUP < s.replicas ? first + GROUP : s.replicas;
    const i64 begin = block * BLOCK;
    const i64 n = begin + BLOCK < s.size ? BLOCK : s.size - begin;
    for (i64 r = first; r < last; ++r) {
      update(r, begin, n);
      double* out = partial.data() + (r * block_count + block) * sums;
      const i64 pivot = s.near ? s.near[r] : 0;
      kernel.products(s.theta + r * s.size + begin, s.pivots + pivot * s.size + begin, s.size,
                      count, n, out, out + count);
    }
  }

  if (sums == 0) return;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (i64 i = 0; i < s.replicas * sums; ++i) {
    const i64 r = i / sums, which = i % sums / count, m = i % count;
    const double* from = partial.data() + r * block_count * sums + i % sums;
    const i64 pivot = s.near ? s.near[r] : 0;
    s.products[(2 * r + which) * s.pivot_count + pivot + m] = tree_sum(from, sums, block_count);
  }
}

// Products of replica r with pivots first .. first + count, in place of what s.products holds.
template <typename T>
void take_products(const StepShape<T>& s, i64 r, i64 first, i64 count, int threads) {
  const StepBlocks<T>& kernel = blocks<T>();
  const i64 block_count = ceil_div(s.size, BLOCK);
  const i64 sums = 2 * count;
  std::vector<double> partial(static_cast<size_t>(block_count * sums));
#pragma omp parallel for num_threads(threads) schedule(static)
  for (i64 block = 0; block < block_count; ++block) {
    const i64 begin = block * BLOCK;
    const i64 n = begin + BLOCK < s.size ? BLOCK : s.size - begin;
    double* out = partial.data() + block * sums;
    kernel.products(s.theta + r * s.size + begin, s.pivots + first * s.size + begin, s.size, count,
                    n, out, out + count);
  }
  for (i64 i = 0; i < sums; ++i)
    s.products[(2 * r + i / count) * s.pivot_count + first + i % count] =
        tree_sum(partial.data() + i, sums, block_count);
}

// Lowest segment among the nearest of first .. last; t is NaN when any product is not finite.
template <typename T>
void choose_segment(const StepShape<T>& s, const double* products, const double* segment_squares,
                    i64 first, i64 last, i64* segment, double* t) {
  const double* squares = products;
  const double* along = products + s.pivot_count;
  double best = std::numeric_limits<double>::infinity();
  *segment = 0;
  *t = std::numeric_limits<double>::quiet_NaN();
  for (i64 m = first; m <= last + 1; ++m)
    if (!std::isfinite(squares[m]) || (m <= last && !std::isfinite(along[m]))) return;
  for (i64 m = 0; m + 1 < s.pivot_count; ++m)
    if (!std::isfinite(segment_squares[m])) return;
  for (i64 m = first; m <= last; ++m) {
    const double length = segment_squares[m];
    const Candidate c = nearest_on_segment(squares[m], squares[m + 1], along[m], length);
    if (c.squared_distance < best) {
      best = c.squared_distance;
      *segment = m;
      *t = c.t;
    }
  }
}

// Distances are compared as if they were off by this share of the path's largest squared one: far
// more than rounding makes of them.
constexpr double SLACK = 1e-12;

// The segments that may hold the point nearest to replica r, given its nearest point x on segment
// `near`, at distance d: the others keep farther from x than 2 d, and so, by the triangle
// inequality, farther from the replica than x is. |x - p|^2 for a pivot p follows from the pivots'
// squared distances alone (Stewart's theorem). All segments, where a product is not finite.
template <typename T>
void segments_in_reach(const StepShape<T>& s, i64 r, i64* first, i64* last) {
  const i64 near = s.near[r], count = s.pivot_count;
  const double* squares = s.products + 2 * r * count;
  const double along = squares[count + near];
  const double length = s.between[near * count + near + 1];
  *first = 0, *last = count - 2;
  double largest = 0.0;
  for (i64 i = 0; i < count * count; ++i) {
    if (!std::isfinite(s.between[i])) return;
    largest = s.between[i] > largest ? s.between[i] : largest;
  }
  const Candidate x = nearest_on_segment(squares[near], squares[near + 1], along, length);
  const double slack = SLACK * (largest + squares[near]);
  const double reach = 4.0 * x.squared_distance + slack;
  if (!std::isfinite(reach) || !std::isfinite(along)) return;
  const auto to_pivot = [&](i64 j) {
    const double* row = s.between + j * count;
    return (1.0 - x.t) * row[near] + x.t * row[near + 1] - x.t * (1.0 - x.t) * length;
  };
  const auto beyond = [&](i64 j) {
    const double here = to_pivot(j), next = to_pivot(j + 1), each = s.between[j * count + j + 1];
    const double ahead = 0.5 * (here + each - next);
    return nearest_on_segment(here, next, ahead, each).squared_distance > reach;
  };
  while (*first < near && beyond(*first)) ++*first;
  while (*last > near && beyond(*last)) --*last;
}

}  // namespace

template <typename T>
void sgd_step(const StepShape<T>& s, const T* grad, T* buffer, const double* lr,
              const SgdOptions& options) {
  const StepBlocks<T>& kernel = blocks<T>();
  const SgdKind kind = sgd_kind(options);
  update_and_products(s, [&](i64 r, i64 begin, i64 n) {
    const i64 at = r * s.size + begin;
    T* velocity = kind == SGD_PLAIN ? nullptr : buffer + at;
    kernel.sgd(s.theta + at, grad + at, velocity, n, kind, sgd_coefficients<T>(options, lr[r]));
  });
}

template <typename T>
void adam_step(const StepShape<T>& s, const T* grad, T* exp_avg, T* exp_avg_sq, const i64* step,
               const double* lr, const AdamOptions& options) {
  const StepBlocks<T>& kernel = blocks<T>();
  std::vector<AdamCoefficients<T>> coefficients(static_cast<size_t>(s.replicas));
  for (i64 r = 0; r < s.replicas; ++r) {
    const double power1 = std::pow(options.beta1, double(step[r]));
    const double power2 = std::pow(options.beta2, double(step[r]));
    coefficients[r] = adam_coefficients<T>(options, lr[r], power1, power2);
  }
  update_and_products(s, [&](i64 r, i64 begin, i64 n) {
    const i64 at = r * s.size + begin;
    kernel.adam(s.theta + at, grad + at, exp_avg + at, exp_avg_sq + at, n, coefficients[r]);
  });
}

template <typename T>
void project_step(const StepShape<T>& s, const double* segment_squares, i64* segment, double* t,
                  double* distance) {
  const StepBlocks<T>& kernel = blocks<T>();
  [[maybe_unused]] const int threads = s.replicas * s.size < PARALLEL_FROM ? 1 : s.threads;
  for (i64 r = 0; r < s.replicas; ++r) {
    i64 first = 0, last = s.pivot_count - 2;
    if (s.near) {
      segments_in_reach(s, r, &first, &last);
      if (first != last) take_products(s, r, first, last - first + 2, threads);
    }
    choose_segment(s, s.products + r * 2 * s.pivot_count, segment_squares, first, last, segment + r,
                   t + r);
  }

  const i64 block_count = ceil_div(s.size, BLOCK);
  std::vector<double> partial(static_cast<size_t>(s.replicas * block_count));
#pragma omp parallel for num_threads(threads) schedule(static)
  for (i64 task = 0; task < s.replicas * block_count; ++task) {
    const i64 r = task / block_count;
    const i64 begin = (task % block_count) * BLOCK;
    const i64 n = begin + BLOCK < s.size ? BLOCK : s.size - begin;
    const T* p = s.pivots + segment[r] * s.size + begin;
    partial[task] = kernel.project(s.theta + r * s.size + begin, p, p + s.size, t[r], n);
  }
  for (i64 r = 0; r < s.replicas; ++r) {
    const double squared = tree_sum(partial.data() + r * block_count, 1, block_count);
    // With no elements there is nothing to carry a NaN, so t carries it.
    distance[r] = std::isnan(t[r]) ? t[r] : std::sqrt(squared);
  }
}

namespace {

// The values of every kernel begin with these, and end with where it runs.
template <typename T>
StepShape<T> shape(Values& v) {
  return {v, v, v, v, v, v, /*threads=*/1, v, v};
}

template <typename T>
void sgd_step_kernel(Values& v) {
  auto s = shape<T>(v);
  const T* grad = v;
  T* buffer = v;
  const double* lr = v;
  const SgdOptions options{v, v, v, v, v};
  s.threads = v;
  sgd_step(s, grad, buffer, lr, options);
}

template <typename T>
void adam_step_kernel(Values& v) {
  auto s = shape<T>(v);
  const T* grad = v;
  T *exp_avg = v, *exp_avg_sq = v;
  const i64* step = v;
  const double* lr = v;
  const AdamOptions options{v, v, v, v, v};
  s.threads = v;
  adam_step(s, grad, exp_avg, exp_avg_sq, step, lr, options);
}

template <typename T>
void project_step_kernel(Values& v) {
  auto s = shape<T>(v);
  const double* segment_squares = v;
  i64* segment = v;
  double *t = v, *distance = v;
  s.threads = v;
  project_step(s, segment_squares, segment, t, distance);
}

const RegisterKernel ADDED[] = {
    {"sgd_step_cpu_float32", sgd_step_kernel<float>},
    {"sgd_step_cpu_float64", sgd_step_kernel<double>},
    {"adam_step_cpu_float32", adam_step_kernel<float>},
    {"adam_step_cpu_float64", adam_step_kernel<double>},
    {"project_step_cpu_float32", project_step_kernel<float>},
    {"project_step_cpu_float64", project_step_kernel<double>},
};

}  // namespace

}  // namespace entropic::cpu
