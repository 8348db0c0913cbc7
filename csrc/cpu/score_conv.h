// Per-example weight gradients of a convolution on the CPU: parameters of the calls.
#pragma once

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

}  // namespace entropic::cpu
