// Updates of a float64 Gram matrix by products of score rows, on the CPU.
#pragma once

#include "cpu/isa.h"
#include "kernels/common.h"

namespace entropic::cpu {

template <typename Source>
struct GramRows {
  const Source* data;  // columns contiguous
  i64 count, stride;   // stride in elements
};

// out[i, j] += sum_k a[i, k] b[j, k]. Products and sums of at most 256 columns are of type
// Product; each such sum is added to out. With `lower`, b is a, and only j <= i is touched.
template <typename Source, typename Product>
void gram_update(double* out, i64 out_stride, GramRows<Source> a, GramRows<Source> b, i64 columns,
                 bool lower, int threads);

// ---- one block of work --------------------------------------------------------------------------
//
// The Gram update's work on panels, as a table of functions. Every instruction set fills one table
// (cpu/simd/gram_update.cpp); cpu/gram_update.cpp walks the panels and owns the threads.

constexpr i64 GRAM_DEPTH = 256;  // columns of one panel, and of one sum in type Product

template <typename Source, typename Product>
struct GramBlocks {
  // Rows of one panel: a [depth, width] copy of `width` rows, aligned to a cache line.
  i64 width;
  // Copies `columns` columns of `count` rows into a panel; rows beyond count that `update` reads
  // become zero.
  void (*pack)(const Source* rows, i64 stride, i64 count, i64 columns, Product* panel);
  // out[i, j] += sum over depth of a[:, i] b[:, j], i < rows, j < columns (j <= i if `lower`).
  void (*update)(double* out, i64 stride, const Product* a, const Product* b, i64 rows, i64 columns,
                 bool lower, i64 depth);
};

ENTROPIC_FOR_EACH_ISA(extern const GramBlocks<float, float> gram_f32_f32;
                      extern const GramBlocks<float, double> gram_f32_f64;
                      extern const GramBlocks<double, double> gram_f64_f64;)

}  // namespace entropic::cpu
