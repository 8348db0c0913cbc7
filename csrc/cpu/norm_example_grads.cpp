// Walks the examples. An example is summed by one thread in a fixed order, so results do not depend
// on the number of threads.
#include "cpu/norm_example_grads.h"

#include <cstddef>
#include <type_traits>
#include <vector>

#include "cpu/isa.h"
#include "registry.h"

namespace entropic::cpu {
namespace {

// Below this many elements a second thread costs more than it brings.
constexpr i64 PARALLEL_FROM = 32768;

template <typename T>
using Norm = void (*)(const NormExample<T>&);

template <typename T>
Norm<T> kernel() {
  if constexpr (std::is_same_v<T, float>)
    return ENTROPIC_TABLE(norm_f32);
  else
    return ENTROPIC_TABLE(norm_f64);
}

}  // namespace

template <typename T>
void norm_grads(const NormGrads<T>& call, int threads) {
  const Norm<T> norm = kernel<T>();
  const i64 channels = call.channels;
  const i64 size = call.positions * channels;
  std::vector<T> factor;
  if (call.grad_x != nullptr)
    for (i64 c = 0; c < channels; ++c) factor.push_back(call.rstd[c] * call.weight[c]);
  if (call.examples * size < PARALLEL_FROM) threads = 1;

#pragma omp parallel num_threads(threads)
  {
    std::vector<double> sums(static_cast<std::size_t>(norm_scratch(channels)));
#pragma omp for schedule(static)
    for (i64 e = 0; e < call.examples; ++e) {
      NormExample<T> one;
      one.x = call.x + e * size;
      one.g = call.g + e * size;
      one.mean = call.mean + e * call.mean_example;
      one.rstd = call.rstd + e * call.mean_example;
      one.factor = call.grad_x == nullptr ? nullptr : factor.data();
      one.grad_x = call.grad_x == nullptr ? nullptr : call.grad_x + e * size;
      one.dscale = call.dscale + e * channels;
      one.dshift = call.dshift + e * channels;
      one.positions = call.positions;
      one.channels = channels;
      one.stat_position = call.mean_position;
      one.stat_channel = call.mean_channel;
      one.sums = sums.data();
      norm(one);
    }
  }
}

namespace {

template <typename T>
void norm_grads_kernel(Values& v) {
  const NormGrads<T> call{v, v, v, v, v, v, v, v, v, v, v, v, v, v};
  norm_grads(call, int(v));
}

const RegisterKernel ADDED[] = {
    {"norm_grads_cpu_float32", norm_grads_kernel<float>},
    {"norm_grads_cpu_float64", norm_grads_kernel<double>},
};

}  // namespace

}  // namespace entropic::cpu
