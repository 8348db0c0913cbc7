// Deals particles out to threads. Each is advanced alone, so results do not depend on the number of
// threads nor on how many particles there are.
#include "cpu/langevin.h"

#include "cpu/isa.h"
#include "cpu/langevin_blocks.h"

namespace entropic::cpu {
namespace {

// Groups of a task: few registers, so that threads end together.
constexpr i64 TASK = 64;

// Below this many particle-steps (some nanoseconds each) a second thread costs more than it brings.
constexpr i64 PARALLEL_FROM = 20000;

template <typename T>
const LangevinBlocks<T>& blocks();

#define ENTROPIC_BLOCKS(T, table)           \
  template <>                               \
  const LangevinBlocks<T>& blocks<T>() {    \
    switch (current_isa()) {                \
      ENTROPIC_AVX512(table)                \
      ENTROPIC_AVX2(table)                  \
      default:                              \
        return portable::table;             \
    }                                       \
  }
#ifdef ENTROPIC_HAS_AVX512
#define ENTROPIC_AVX512(table) \
  case AVX512:                 \
    return avx512::table;
#else
#define ENTROPIC_AVX512(table)
#endif
#ifdef ENTROPIC_HAS_AVX2
#define ENTROPIC_AVX2(table) \
  case AVX2:                 \
    return avx2::table;
#else
#define ENTROPIC_AVX2(table)
#endif
ENTROPIC_BLOCKS(float, langevin_f32)
ENTROPIC_BLOCKS(double, langevin_f64)

}  // namespace

template <typename T>
void langevin_advance(const Langevin<T>& call, int threads) {
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

#define ENTROPIC_INSTANTIATE(T)                             \
  template void langevin_advance<T>(const Langevin<T>&, int); \
  template void langevin_box_muller<T>(const i64*, T*, i64);
ENTROPIC_INSTANTIATE(float)
ENTROPIC_INSTANTIATE(double)
#undef ENTROPIC_INSTANTIATE

}  // namespace entropic::cpu
