// Deals blocks of numbers out to threads. A number depends on its seed, stream and index alone, so
// results do not depend on the number of threads.
#include "cpu/random_bits.h"

#include "cpu/isa.h"
#include "registry.h"

namespace entropic::cpu {
namespace {

// Below this many words (about 2 ns each) a second thread costs more than it brings.
constexpr i64 PARALLEL_FROM = 1 << 15;

const RandomBlocks& blocks() { return ENTROPIC_TABLE(random_bits); }

// Whether rows x count are enough numbers for several threads; not a product, which may overflow.
bool many(i64 rows, i64 count) { return count >= PARALLEL_FROM / (rows > 0 ? rows : 1); }

}  // namespace

void random_fill(const RandomFill& call, int threads) {
  const RandomBlocks& kernel = blocks();
  const i64 rows = call.streams * call.seeds;
  if (rows == 0 || call.count == 0) return;
  const i64 length = RANDOM_WORDS / (call.kind == SORT_KEYS ? 2 : 1);
  const i64 groups = ceil_div(rows, RANDOM_ROWS), parts = ceil_div(call.count, length);
  [[maybe_unused]] const int used = many(rows, call.count) ? threads : 1;
#pragma omp parallel for num_threads(used) schedule(static)
  for (i64 task = 0; task < groups * parts; ++task) {
    const i64 first = task / parts * RANDOM_ROWS, begin = task % parts * length;
    kernel.fill(call, first, first + RANDOM_ROWS < rows ? first + RANDOM_ROWS : rows, begin,
                begin + length < call.count ? begin + length : call.count);
  }
}

void random_philox(const RandomPhilox& call, int threads) {
  const RandomBlocks& kernel = blocks();
  if (call.rows == 0 || call.count == 0) return;
  const i64 length = RANDOM_WORDS / 4, parts = ceil_div(call.count, length);
  [[maybe_unused]] const int used = many(call.rows, call.count) ? threads : 1;
#pragma omp parallel for num_threads(used) schedule(static)
  for (i64 task = 0; task < call.rows * parts; ++task) {
    const i64 begin = task % parts * length;
    kernel.philox(call, task / parts, begin,
                  begin + length < call.count ? begin + length : call.count);
  }
}

namespace {

void random_fill_kernel(Values& v) {
  const RandomFill call = random_fill_of(v);
  random_fill(call, int(v));
}

void random_philox_kernel(Values& v) {
  const RandomPhilox call = random_philox_of(v);
  random_philox(call, int(v));
}

const RegisterKernel ADDED[] = {
    {"random_fill_cpu", random_fill_kernel},
    {"random_philox_cpu", random_philox_kernel},
};

}  // namespace

}  // namespace entropic::cpu
