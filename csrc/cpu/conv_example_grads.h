// Per-example weight gradients of a convolution on the CPU: parameters of the calls.
#pragma once

#include "cpu/isa.h"
#include "kernels/common.h"

namespace entropic::cpu {

// A channels-last tensor [n, size[0], size[1], size[2], channels] of any strides but the last,
// which is 1 (elements).
struct ConvTensor {
  i64 size[3], stride[3];
  i64 example_stride, channels;
};

struct ConvShape {
  ConvTensor a, g;  // input and output gradient
  i64 kernel[3], stride[3], padding[3], dilation[3];
  i64 examples, groups;
  int threads;
};

// out[e * row_stride ...] receives the [O, *kernel, C / groups] gradient of example e.
template <typename T>
void conv_weight_grads(const ConvShape& s, const T* a, const T* g, T* out, i64 row_stride);

// norms[e] receives its squared norm.
template <typename T>
void conv_weight_norms(const ConvShape& s, const T* a, const T* g, double* norms);

// ---- one block of work --------------------------------------------------------------------------
//
// Register tiles of per-example weight gradients, as a table of functions. Every instruction set
// fills one table (cpu/simd/conv_example_grads.cpp); cpu/conv_example_grads.cpp pads, packs and
// owns the threads.

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

ENTROPIC_FOR_EACH_ISA(extern const ConvBlocks<float> conv_f32;
                      extern const ConvBlocks<double> conv_f64;)

}  // namespace entropic::cpu
