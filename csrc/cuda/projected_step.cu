// Pass one: every thread block owns BLOCK elements of one replica, advances them and keeps
// them in registers while it reads each pivot once. Pass two: a warp per replica chooses the
// segment, then all blocks move theta there. Sums over blocks are taken in a fixed order by a
// kernel of their own: no atomics, so the same input gives the same bits.
#include "cuda/device.h"
#include "cuda/projected_step.h"
#include "registry.h"

namespace entropic::cuda {
namespace {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int ITEMS = 8;
constexpr i64 BLOCK = THREADS * ITEMS;
// Pivots whose warp sums wait in shared memory between two barriers (32 x 8 x 16 bytes = 4 kB).
constexpr int TILE = 32;

__device__ __forceinline__ double warp_sum(double value) {
  for (int offset = 16; offset > 0; offset /= 2)
    value += __shfl_down_sync(0xffffffffu, value, offset);
  return value;
}

// Sum over the thread block, valid in thread 0. `scratch` holds WARPS doubles.
__device__ double block_sum(double value, double* scratch) {
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  double total = 0.0;
  if (threadIdx.x == 0)
    for (int w = 0; w < WARPS; ++w) total += scratch[w];
  return total;
}

// A rule loads an element's state, applies the update and stores the state. Loads of all a
// thread's elements come before the first store, so that they are in flight together.
template <typename T, int KIND>
struct SgdRule {
  using Coefficients = SgdCoefficients<T>;
  struct State {
    T grad, velocity;
  };
  const T* grad;
  T* buffer;
  const double* lr;
  SgdOptions options;

  __device__ Coefficients coefficients(i64 r) const { return sgd_coefficients<T>(options, lr[r]); }
  __device__ State load(i64 at) const {
    const bool reads = KIND == SGD_HEAVY_BALL || KIND == SGD_NESTEROV;
    return {grad[at], reads ? buffer[at] : T(0)};
  }
  __device__ T apply(T theta, State& s, const Coefficients& c) const {
    return sgd_update<KIND>(theta, s.grad, &s.velocity, c);
  }
  __device__ void store(i64 at, const State& s) const {
    if (KIND != SGD_PLAIN) buffer[at] = s.velocity;
  }
};

template <typename T>
struct AdamRule {
  using Coefficients = AdamCoefficients<T>;
  struct State {
    T grad, mean, square;
  };
  const T* grad;
  T* exp_avg;
  T* exp_avg_sq;
  const i64* step;
  const double* lr;
  AdamOptions options;

  __device__ Coefficients coefficients(i64 r) const {
    const double count = double(step[r]);
    return adam_coefficients<T>(options, lr[r], pow(options.beta1, count),
                                pow(options.beta2, count));
  }
  __device__ State load(i64 at) const { return {grad[at], exp_avg[at], exp_avg_sq[at]}; }
  __device__ T apply(T theta, State& s, const Coefficients& c) const {
    return adam_update(theta, s.grad, &s.mean, &s.square, c);
  }
  __device__ void store(i64 at, const State& s) const {
    exp_avg[at] = s.mean;
    exp_avg_sq[at] = s.square;
  }
};

// Grid: one thread block per (block, replica), replicas innermost so that a block of a pivot,
// once in L2, serves all of them. partial is [R, 2 M, block_count].
template <typename T, typename Rule>
__global__ void __launch_bounds__(THREADS)
    update_and_products(T* theta, const T* pivots, double* partial, Rule rule, i64 replicas,
                        i64 size, i64 pivot_count, i64 block_count) {
  __shared__ double scratch[TILE][WARPS][2];
  __shared__ typename Rule::Coefficients shared_coefficients;
  const i64 r = i64(blockIdx.x) % replicas;
  const i64 block = i64(blockIdx.x) / replicas;
  const i64 begin = block * BLOCK + threadIdx.x;
  // Adam's two powers are dear in double precision: one thread takes them for all.
  if (threadIdx.x == 0) shared_coefficients = rule.coefficients(r);

  T here[ITEMS];
  typename Rule::State state[ITEMS];
#pragma unroll
  for (int k = 0; k < ITEMS; ++k) {
    const i64 j = begin + k * THREADS;
    here[k] = T(0);
    if (j < size) {
      here[k] = theta[r * size + j];
      state[k] = rule.load(r * size + j);
    }
  }
  __syncthreads();
  const typename Rule::Coefficients c = shared_coefficients;
#pragma unroll
  for (int k = 0; k < ITEMS; ++k) {
    const i64 j = begin + k * THREADS;
    if (j < size) {
      here[k] = rule.apply(here[k], state[k], c);
      theta[r * size + j] = here[k];
      rule.store(r * size + j, state[k]);
    }
  }
  if (pivot_count == 0) return;

  T p[ITEMS];
#pragma unroll
  for (int k = 0; k < ITEMS; ++k) {
    const i64 j = begin + k * THREADS;
    p[k] = j < size ? pivots[j] : T(0);
  }
  for (i64 tile = 0; tile < pivot_count; tile += TILE) {
    const int count = int(pivot_count - tile < TILE ? pivot_count - tile : TILE);
    for (int i = 0; i < count; ++i) {
      const i64 m = tile + i;
      const bool last = m + 1 == pivot_count;
      double square = 0.0;
      double along = 0.0;
#pragma unroll
      for (int k = 0; k < ITEMS; ++k) {
        const i64 j = begin + k * THREADS;
        const T next = !last && j < size ? pivots[(m + 1) * size + j] : p[k];
        const double delta = double(here[k]) - double(p[k]);
        square += delta * delta;
        along += delta * (double(next) - double(p[k]));
        p[k] = next;
      }
      square = warp_sum(square);
      along = warp_sum(along);
      if (threadIdx.x % 32 == 0) {
        scratch[i][threadIdx.x / 32][0] = square;
        scratch[i][threadIdx.x / 32][1] = last ? 0.0 : along;
      }
    }
    __syncthreads();
    if (int(threadIdx.x) < 2 * count) {
      const int i = threadIdx.x / 2;
      const int which = threadIdx.x % 2;
      double total = 0.0;
      for (int w = 0; w < WARPS; ++w) total += scratch[i][w][which];
      const i64 row = r * 2 * pivot_count + which * pivot_count + tile + i;
      partial[row * block_count + block] = total;
    }
    __syncthreads();
  }
}

// One thread block per row: sums[row] = sum over partial[row, :].
__global__ void __launch_bounds__(THREADS)
    sum_rows(const double* partial, double* sums, i64 count) {
  __shared__ double scratch[WARPS];
  const i64 row = blockIdx.x;
  double value = 0.0;
  for (i64 i = threadIdx.x; i < count; i += THREADS) value += partial[row * count + i];
  const double total = block_sum(value, scratch);
  if (threadIdx.x == 0) sums[row] = total;
}

// One warp per replica: the lowest among the nearest segments; t is NaN when any product is not
// finite.
__global__ void choose_segments(const double* products, const double* segment_squares,
                                i64 pivot_count, i64* segment, double* t) {
  const i64 r = blockIdx.x;
  const int lane = threadIdx.x;
  const double* squares = products + r * 2 * pivot_count;
  const double* along = squares + pivot_count;
  const double infinity = __longlong_as_double(0x7ff0000000000000LL);
  double best = infinity;
  double best_t = 0.0;
  i64 best_m = pivot_count;
  double poison = 0.0;  // x - x is 0 for a finite x and NaN otherwise
  for (i64 m = lane; m < pivot_count; m += 32) {
    poison += (squares[m] - squares[m]) + (along[m] - along[m]);
    if (m + 1 == pivot_count) continue;
    const double length = segment_squares[m];
    poison += length - length;
    const Candidate c = nearest_on_segment(squares[m], squares[m + 1], along[m], length);
    if (c.squared_distance < best) {
      best = c.squared_distance;
      best_t = c.t;
      best_m = m;
    }
  }
  for (int offset = 16; offset > 0; offset /= 2) {
    const double other = __shfl_down_sync(0xffffffffu, best, offset);
    const double other_t = __shfl_down_sync(0xffffffffu, best_t, offset);
    const i64 other_m = __shfl_down_sync(0xffffffffu, (long long)best_m, offset);
    poison += __shfl_down_sync(0xffffffffu, poison, offset);
    if (other < best || (other == best && other_m < best_m)) {
      best = other;
      best_t = other_t;
      best_m = other_m;
    }
  }
  if (lane == 0) {
    const bool finite = poison == 0.0 && best_m < pivot_count;
    segment[r] = finite ? best_m : 0;
    t[r] = finite ? best_t : infinity - infinity;
  }
}

// theta <- p + t (p' - p); partial [R, block_count] gets the squared distances moved.
template <typename T>
__global__ void __launch_bounds__(THREADS)
    move_to_path(T* theta, const T* pivots, const i64* segment, const double* t, double* partial,
                 i64 replicas, i64 size, i64 block_count) {
  __shared__ double scratch[WARPS];
  const i64 r = i64(blockIdx.x) % replicas;
  const i64 block = i64(blockIdx.x) / replicas;
  const T* p = pivots + segment[r] * size;
  const double position = t[r];
  double value = 0.0;
#pragma unroll
  for (int k = 0; k < ITEMS; ++k) {
    const i64 j = block * BLOCK + k * THREADS + threadIdx.x;
    if (j < size) {
      const double point = point_on_segment(p[j], p[size + j], position);
      const double moved = double(theta[r * size + j]) - point;
      value += moved * moved;
      theta[r * size + j] = T(point);
    }
  }
  const double total = block_sum(value, scratch);
  if (threadIdx.x == 0) partial[r * block_count + block] = total;
}

// distance[r] = sqrt(sum over partial[r, :]); NaN where t is NaN.
__global__ void __launch_bounds__(THREADS)
    root_of_rows(const double* partial, const double* t, double* distance, i64 count) {
  __shared__ double scratch[WARPS];
  const i64 r = blockIdx.x;
  double value = 0.0;
  for (i64 i = threadIdx.x; i < count; i += THREADS) value += partial[r * count + i];
  const double total = block_sum(value, scratch);
  // With no elements there is nothing to carry a NaN, so t carries it.
  if (threadIdx.x == 0) distance[r] = t[r] == t[r] ? sqrt(total) : t[r];
}

unsigned grid_size(i64 blocks) {
  if (blocks > 2147483647)
    throw std::invalid_argument("theta needs " + std::to_string(blocks) +
                                " thread blocks, a launch holds 2147483647: use fewer replicas");
  return unsigned(blocks);
}

template <typename T, typename Rule>
void launch_update(const StepShape<T>& s, const Rule& rule) {
  if (s.replicas == 0) return;
  const DeviceGuard guard(s.device);
  const auto stream = static_cast<cudaStream_t>(s.stream);
  const i64 block_count = ceil_div(s.size, BLOCK);
  if (block_count > 0) {
    update_and_products<T, Rule><<<grid_size(s.replicas * block_count), THREADS, 0, stream>>>(
        s.theta, s.pivots, s.workspace, rule, s.replicas, s.size, s.pivot_count, block_count);
    check_launch("update_and_products");
  }
  if (s.pivot_count > 0) {
    sum_rows<<<grid_size(s.replicas * 2 * s.pivot_count), THREADS, 0, stream>>>(
        s.workspace, s.products, block_count);
    check_launch("sum_rows");
  }
}

}  // namespace

i64 step_workspace(i64 replicas, i64 size, i64 pivot_count) {
  const i64 rows = 2 * pivot_count > 1 ? 2 * pivot_count : 1;
  return replicas * rows * ceil_div(size, BLOCK);
}

template <typename T>
void sgd_step(const StepShape<T>& s, const T* grad, T* buffer, const double* lr,
              const SgdOptions& options) {
  switch (sgd_kind(options)) {
    case SGD_PLAIN:
      return launch_update(s, SgdRule<T, SGD_PLAIN>{grad, buffer, lr, options});
    case SGD_FIRST:
      return launch_update(s, SgdRule<T, SGD_FIRST>{grad, buffer, lr, options});
    case SGD_FIRST_NESTEROV:
      return launch_update(s, SgdRule<T, SGD_FIRST_NESTEROV>{grad, buffer, lr, options});
    case SGD_HEAVY_BALL:
      return launch_update(s, SgdRule<T, SGD_HEAVY_BALL>{grad, buffer, lr, options});
    case SGD_NESTEROV:
      return launch_update(s, SgdRule<T, SGD_NESTEROV>{grad, buffer, lr, options});
  }
}

template <typename T>
void adam_step(const StepShape<T>& s, const T* grad, T* exp_avg, T* exp_avg_sq, const i64* step,
               const double* lr, const AdamOptions& options) {
  launch_update(s, AdamRule<T>{grad, exp_avg, exp_avg_sq, step, lr, options});
}

template <typename T>
void project_step(const StepShape<T>& s, const double* segment_squares, i64* segment, double* t,
                  double* distance) {
  if (s.replicas == 0) return;
  const DeviceGuard guard(s.device);
  const auto stream = static_cast<cudaStream_t>(s.stream);
  const i64 block_count = ceil_div(s.size, BLOCK);
  choose_segments<<<grid_size(s.replicas), 32, 0, stream>>>(s.products, segment_squares,
                                                            s.pivot_count, segment, t);
  check_launch("choose_segments");
  if (block_count > 0) {
    move_to_path<T><<<grid_size(s.replicas * block_count), THREADS, 0, stream>>>(
        s.theta, s.pivots, segment, t, s.workspace, s.replicas, s.size, block_count);
    check_launch("move_to_path");
  }
  root_of_rows<<<grid_size(s.replicas), THREADS, 0, stream>>>(s.workspace, t, distance,
                                                              block_count);
  check_launch("root_of_rows");
}

#define ENTROPIC_INSTANTIATE(T)                                                                   \
  template void sgd_step<T>(const StepShape<T>&, const T*, T*, const double*, const SgdOptions&); \
  template void adam_step<T>(const StepShape<T>&, const T*, T*, T*, const i64*, const double*,    \
                             const AdamOptions&);                                                 \
  template void project_step<T>(const StepShape<T>&, const double*, i64*, double*, double*);
ENTROPIC_INSTANTIATE(float)
ENTROPIC_INSTANTIATE(double)
#undef ENTROPIC_INSTANTIATE

namespace {

// The values of every kernel begin with these, and end with where it runs.
template <typename T>
StepShape<T> shape(Values& v) {
  return {v, v, v, v, v, v, v, 0, nullptr};
}

template <typename T>
void sgd_step_kernel(Values& v) {
  auto s = shape<T>(v);
  const T* grad = v;
  T* buffer = v;
  const double* lr = v;
  const SgdOptions options{v, v, v, v, v};
  v.into(s.device, s.stream);
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
  v.into(s.device, s.stream);
  adam_step(s, grad, exp_avg, exp_avg_sq, step, lr, options);
}

template <typename T>
void project_step_kernel(Values& v) {
  auto s = shape<T>(v);
  const double* segment_squares = v;
  i64* segment = v;
  double *t = v, *distance = v;
  v.into(s.device, s.stream);
  project_step(s, segment_squares, segment, t, distance);
}

const RegisterKernel ADDED[] = {
    {"sgd_step_cuda_float32", sgd_step_kernel<float>},
    {"sgd_step_cuda_float64", sgd_step_kernel<double>},
    {"adam_step_cuda_float32", adam_step_kernel<float>},
    {"adam_step_cuda_float64", adam_step_kernel<double>},
    {"project_step_cuda_float32", project_step_kernel<float>},
    {"project_step_cuda_float64", project_step_kernel<double>},
};

}  // namespace

}  // namespace entropic::cuda
