// Deals blocks of numbers out to threads. A number depends on its seed, stream and index alone, so
// results do not depend on the number of threads.
#include "cpu/random_bits.h"

#include "cpu/isa.h"
#include "cpu/random_bits_blocks.h"

namespace entropic::cpu {
namespace {

// Below this many words (about 2 ns each) a second thread costs more than it brings.
constexpr i64 PARALLEL_FROM = 1 << 15;

const RandomBlocks& blocks() {
  switch (current_isa()) {
#ifdef ENTROPIC_HAS_AVX512
    case AVX512:
      return avx512::random_bits;
#endif
#ifdef ENTROPIC_HAS_AVX2
    case AVX2:
      return avx2::random_bits;
#endif
    default:
      return portable::random_bits;
  }
}

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

}  // namespace entropic::cpu
