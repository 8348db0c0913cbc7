// The Gram update's work on panels, as a table of functions. Every instruction set fills one table
// (cpu/simd/score_gram.cpp); cpu/score_gram.cpp walks the panels and owns the threads.
#pragma once

#include "kernels/common.h"

namespace entropic::cpu {

constexpr i64 GRAM_DEPTH = 256;  // columns of one panel, and of one sum in type Product

template <typename Source, typename Product>
struct GramBlocks {
  // Rows of one panel: a [depth, width] copy of `width` rows, aligned to a cache line.
  i64 width;
  // Copies `columns` columns of `count` rows into a panel; rows beyond count that `update` reads
  // become zero.
  void (*pack)(const Source* rows, i64 stride, i64 count, i64 columns, Product* panel);
  // out[i, j] += sum over depth of a[:, i] b[:, j], i < rows, j < columns (j <= i if `lower`).
  void (*update)(double* out, i64 stride, const Product* a, const Product* b, i64 rows,
                 i64 columns, bool lower, i64 depth);
};

#define ENTROPIC_DECLARE(isa)                              \
  namespace isa {                                          \
  extern const GramBlocks<float, float> gram_f32_f32;      \
  extern const GramBlocks<float, double> gram_f32_f64;     \
  extern const GramBlocks<double, double> gram_f64_f64;    \
  }
ENTROPIC_DECLARE(portable)
ENTROPIC_DECLARE(avx2)
ENTROPIC_DECLARE(avx512)
#undef ENTROPIC_DECLARE

}  // namespace entropic::cpu
