// Random numbers of many streams on the CPU.
#pragma once

#include "cpu/isa.h"
#include "kernels/random_bits.h"

namespace entropic::cpu {

void random_fill(const RandomFill& call, int threads);
void random_philox(const RandomPhilox& call, int threads);

// ---- one block of work --------------------------------------------------------------------------
//
// A block of numbers of some rows, as a table of functions. Every instruction set fills one table
// (cpu/simd_exact/random_bits.cpp); cpu/random_bits.cpp walks the blocks and owns the threads.

// Rows of a block at most, and words of a row: 16 KB, which stay in the first cache.
constexpr i64 RANDOM_ROWS = 8;
constexpr i64 RANDOM_WORDS = 512;

struct RandomBlocks {
  // Numbers begin to end (from 0 on) of rows [first, last), row = stream number x seeds + seed.
  void (*fill)(const RandomFill& call, i64 first, i64 last, i64 begin, i64 end);
  // Counters begin to end of one row.
  void (*philox)(const RandomPhilox& call, i64 row, i64 begin, i64 end);
};

ENTROPIC_FOR_EACH_ISA(extern const RandomBlocks random_bits;)

}  // namespace entropic::cpu
