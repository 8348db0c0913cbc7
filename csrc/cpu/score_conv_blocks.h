// Register tiles of per-example weight gradients, as a table of functions. Every instruction set
// fills one table (cpu/simd/score_conv.cpp); cpu/score_conv.cpp pads, packs and owns the threads.
#pragma once

#include "kernels/common.h"

namespace entropic::cpu {

// The output positions a sum runs over, and how far each of them moves in the padded input and in
// the output gradient (elements).
struct ConvWalk {
  i64 positions[3];
  i64 a_steps[3];
  i64 g_steps[3];
};

// Neighboring columns of the weight gradient that fill one vector: where they start in the padded
// input at position 0 and in a row of the result, and how many of them there are. The others are
// computed from whatever follows in memory and dropped.
struct ConvColumns {
  i64 from, to;
  int count;
};

template <typename T>
struct ConvBlocks {
  int width;  // columns of one vector
  int rows;   // output channels of one tile, at most
  // out[m * row_stride + columns[v].to + lane] = sum_p g[p, m] a[p, columns[v].from + lane] for m
  // < rows, added to what is there if `add`. Reads `width` elements of `a` for each vector.
  void (*store)(const ConvWalk& walk, const T* a, const T* g, int rows, const ConvColumns* columns,
                i64 vectors, T* out, i64 row_stride, bool add);
  // The sum of the squares of the same.
  double (*squares)(const ConvWalk& walk, const T* a, const T* g, int rows,
                    const ConvColumns* columns, i64 vectors);
  // One lane for each group of a depthwise convolution:
  // sums[t, lane] += sum_p g[p, lane] a[p, taps[t] + lane].
  void (*lanes)(const ConvWalk& walk, const T* a, const T* g, const i64* taps, i64 count, T* sums);
};

#define ENTROPIC_DECLARE(isa)                      \
  namespace isa {                                  \
  extern const ConvBlocks<float> score_conv_f32;   \
  extern const ConvBlocks<double> score_conv_f64;  \
  }
ENTROPIC_DECLARE(portable)
ENTROPIC_DECLARE(avx2)
ENTROPIC_DECLARE(avx512)
#undef ENTROPIC_DECLARE

}  // namespace entropic::cpu
