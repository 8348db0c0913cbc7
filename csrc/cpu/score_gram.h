// Updates of a float64 Gram matrix by products of score rows, on the CPU.
#pragma once

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

}  // namespace entropic::cpu
