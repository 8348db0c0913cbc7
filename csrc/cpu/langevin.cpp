// Deals particles out to threads. Each is advanced alone, so results do not depend on the number of
// threads nor on how many particles there are.
#include "cpu/langevin.h"

#include <type_traits>

#include "cpu/isa.h"
#include "registry.h"

namespace entropic::cpu {
namespace {

// Groups of a task: few registers, so that threads end together.
constexpr i64 TASK = 64;

// Below this many particle-steps (some nanoseconds each) a second thread costs more than it brings.
constexpr i64 PARALLEL_FROM = 20000;

template <typename T>
const LangevinBlocks<T>& blocks() {
  if constexpr (std::is_same_v<T, float>)
    return ENTROPIC_TABLE(langevin_f32);
  else
    return ENTROPIC_TABLE(langevin_f64);
}

}  // namespace

template <typename T>
void langevin_steps(const Langevin<T>& call, int threads) {
  const LangevinBlocks<T>& kernel = blocks<T>();
  const i64 group = langevin_group(call.dim);
  const i64 first = call.first_particle / group;
  const i64 last = ceil_div(call.first_particle + call.particles, group);
  if (call.particles == 0 || call.steps == 0) return;
  // Not a product: it may exceed 2^63.
  const bool few = call.particles < PARALLEL_FROM && call.steps < PARALLEL_FROM &&
                   call.particles * call.steps < PARALLEL_FROM;
  [[maybe_unused]] const int used = few ? 1 : threads;
#pragma omp parallel for num_threads(used) schedule(static)
  for (i64 task = 0; task < ceil_div(last - first, TASK); ++task) {
    const i64 begin = first + task * TASK;
    kernel.advance(call, begin, begin + TASK < last ? begin + TASK : last);
  }
}

template <typename T>
void langevin_box_muller(const i64* words, T* normal, i64 pairs) {
  blocks<T>().box_muller(words, normal, pairs);
}

namespace {

template <typename T>
void langevin_steps_kernel(Values& v) {
  Langevin<T> call{};
  v.into(call.x, call.v, call.particles, call.dim);
  call.potential = LangevinPotential(int(v));
  for (double& parameter : call.parameters) parameter = v;
  call.scheme = LangevinScheme(int(v));
  v.into(call.drift, call.decay, call.noise, call.steps, call.first_step, call.first_particle);
  call.seed = v;
  langevin_steps(call, int(v));
}

template <typename T>
void box_muller_kernel(Values& v) {
  const i64* words = v;
  T* normal = v;
  const i64 pairs = v;
  [[maybe_unused]] const int threads = v;
  langevin_box_muller(words, normal, pairs);
}

const RegisterKernel ADDED[] = {
    {"langevin_steps_cpu_float32", langevin_steps_kernel<float>},
    {"langevin_steps_cpu_float64", langevin_steps_kernel<double>},
    {"box_muller_cpu_float32", box_muller_kernel<float>},
    {"box_muller_cpu_float64", box_muller_kernel<double>},
};

}  // namespace

}  // namespace entropic::cpu
