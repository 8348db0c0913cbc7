// The launchers of csrc/cuda/random_bits.h as C functions that ctypes can call.
#include "cuda/random_bits.h"
#include "entries.h"

using namespace entropic;

ENTRY random_fill(void* out, i64 streams, i64 seeds, i64 count, i64 by_stream, i64 by_seed,
                  i64 by_number, const i64* keys, u64 key, u64 first_stream, i64 start, i64 kind,
                  i64 type) {
  return guarded([&] {
    cuda::random_fill({out, streams, seeds, count, {by_stream, by_seed, by_number}, keys, key,
                       first_stream, start, RandomKind(kind), RandomType(type)},
                      0, nullptr);
  });
}

ENTRY random_philox(const i64* counters, const i64* keys, const i64* streams, i64* out, i64 rows,
                    i64 count, i64 by_row, i64 by_counter) {
  return guarded([&] {
    cuda::random_philox({counters, {by_row, by_counter}, keys, streams, out, rows, count}, 0,
                        nullptr);
  });
}
