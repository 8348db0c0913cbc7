// Directional derivatives through normalisation and activation on the CPU. [K, m, C] tensors have
// channels one element apart; those with a stride for k alone have pixels C elements apart.
#pragma once

#include "kernels/common.h"

namespace entropic::cpu {

struct JetSizes {
  i64 tangents, pixels, channels;  // K, m, C
};

// y = u + extra, pre = scale y + tscale normal + tshift + residual, out = slope pre,
// sums[k, c] = sum cotangent y, forms[k] = sum bend pre^2. Null: that piece is left out.
template <typename T>
struct JetPush {
  JetSizes sizes;
  T* u;                // [K, m, C], overwritten with y if extra is given
  const T* extra;      // [K, m, C]
  const T* normal;     // [m, C], read if tscale is given
  const T* scale;      // [C]
  const T* tscale;     // [K, C]
  const T* tshift;     // [K, C]
  const T* residual;   // [K, m, C]
  const T* slope;      // [m, C]
  const T* cotangent;  // [m, C]
  const T* bend;       // [m, C]
  T* out;              // [K, m, C]
  double* sums;        // [K, C], null without cotangent
  double* forms;       // [K], null without bend
  i64 u_k, extra_k, extra_pixel, residual_k, out_k;
};

// g = slope (u + extra + residual), out = scale g + tscale cotangent,
// dscale[k, c] = sum g normal + rstd cotangent ty, dshift[k, c] = sum g.
template <typename T>
struct JetPull {
  JetSizes sizes;
  T* u;                // [K, m, C], overwritten with g
  const T* extra;      // [K, m, C]
  const T* residual;   // [K, m, C]
  const T* slope;      // [m, C]
  const T* normal;     // [m, C]
  const T* scale;      // [C]
  const T* tscale;     // [K, C]
  const T* cotangent;  // [m, C], given if tscale or ty is
  const T* ty;         // [K, m, C]
  const T* rstd;       // [C]
  T* out;              // [K, m, C]
  T* dscale;           // [K, C]
  T* dshift;           // [K, C]
  i64 u_k, extra_k, extra_pixel, residual_k, ty_k, out_k;
};

// normal = (y - mean) rstd, z = weight normal + bias + residual; with slope: its ReLU, slope = z > 0.
// Every tensor's pixels are C elements apart.
template <typename T>
struct JetNormalise {
  JetSizes sizes;      // tangents: 1
  const T* y;          // [m, C]
  const T* mean;       // [C]
  const T* rstd;       // [C]
  const T* weight;     // [C]
  const T* bias;       // [C]
  const T* residual;   // [m, C]
  T* z;                // [m, C]
  T* normal;           // [m, C]
  T* slope;            // [m, C], null without ReLU
};

template <typename T>
struct JetInner {
  JetSizes sizes;
  const T* a;      // [K, m, C]
  const T* b;      // [K, m, C]
  double* result;  // [K], sums of a b
  i64 a_k, b_k, b_pixel;
};

template <typename T>
void jet_push(const JetPush<T>& call, int threads);
template <typename T>
void jet_pull(const JetPull<T>& call, int threads);
template <typename T>
void jet_normalise(const JetNormalise<T>& call, int threads);
template <typename T>
void jet_inner(const JetInner<T>& call, int threads);

}  // namespace entropic::cpu
