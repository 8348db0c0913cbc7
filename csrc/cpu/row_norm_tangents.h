// K tangents through layer and RMS normalization on the CPU; all tensors contiguous.
#pragma once

#include "cpu/isa.h"
#include "kernels/common.h"

namespace entropic::cpu {

// y = weight n + bias, with n = rstd (x - mean) along rows of x; RMS normalization has no mean.
template <typename T>
struct RowNormJvp {
  i64 tangents, rows, width;
  bool centered;
  const T* t;          // [K, M, d] tangents of x
  const T* normal;     // [M, d]
  const T* rstd;       // [M]
  const T* weight;     // [d] or null
  const T* tweight;    // [K, d] or null
  const T* tbias;      // [K, d] or null
  const T* cotangent;  // [M, d] or null; then no terms
  T* out;              // [K, M, d]
  double* terms;       // [K] <cotangent, D^2 y[a', a']>
};

// Tangents of the gradients (dx, dweight, dbias) for tangents of the cotangent g of y and of x.
template <typename T>
struct RowNormVjpTangent {
  i64 tangents, rows, width;
  bool centered;
  const T* u;          // [K, M, d] tangents of g, or null
  const T* t;          // [K, M, d] tangents of x, or null
  const T* normal;     // [M, d]
  const T* rstd;       // [M]
  const T* weight;     // [d] or null
  const T* tweight;    // [K, d] or null
  const T* cotangent;  // [M, d] g, or null: then t and tweight play no part
  T* out;              // [K, M, d]
  T* dweight;          // [K, d] or null
  T* dbias;            // [K, d] or null
};

template <typename T>
void row_norm_jvp(const RowNormJvp<T>& call, int threads);
template <typename T>
void row_norm_vjp_tangent(const RowNormVjpTangent<T>& call, int threads);

// ---- rows ---------------------------------------------------------------------------------------
//
// Every instruction set fills one table (cpu/simd/row_norm_tangents.cpp) with functions of the rows
// [first, last) and all tangents; cpu/row_norm_tangents.cpp owns the threads.

template <typename T>
struct RowNormTable {
  // Adds to terms [K], which may be null.
  void (*jvp)(const RowNormJvp<T>& call, i64 first, i64 last, double* terms);
  // Adds to dweight and dbias [K, d], which may be null.
  void (*vjp_tangent)(const RowNormVjpTangent<T>& call, i64 first, i64 last, T* dweight, T* dbias);
};

ENTROPIC_FOR_EACH_ISA(extern const RowNormTable<float> row_norm_tangents_f32;
                      extern const RowNormTable<double> row_norm_tangents_f64;)

}  // namespace entropic::cpu
