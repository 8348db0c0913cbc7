// A block of numbers of some rows, as a table of functions. Every instruction set fills one table
// (cpu/simd/random_bits.cpp); cpu/random_bits.cpp walks the blocks and owns the threads.
#pragma once

#include "kernels/random_bits.h"

namespace entropic::cpu {

// Rows of a block at most, and words of a row: 16 KB, which stay in the first cache.
constexpr i64 RANDOM_ROWS = 8;
constexpr i64 RANDOM_WORDS = 512;

struct RandomBlocks {
  // Numbers begin to end (from 0 on) of rows [first, last), row = stream number x seeds + seed.
  void (*fill)(const RandomFill& call, i64 first, i64 last, i64 begin, i64 end);
  // Counters begin to end of one row.
  void (*philox)(const RandomPhilox& call, i64 row, i64 begin, i64 end);
};

namespace portable {
extern const RandomBlocks random_bits;
}
namespace avx2 {
extern const RandomBlocks random_bits;
}
namespace avx512 {
extern const RandomBlocks random_bits;
}

}  // namespace entropic::cpu
