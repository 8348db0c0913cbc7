// Directional derivatives through normalization and activation on the CPU. [K, m, C] tensors have
// channels one element apart; those with a stride for k alone have pixels C elements apart.
#pragma once

#include "cpu/isa.h"
#include "kernels/common.h"

namespace entropic::cpu {

struct TangentSizes {
  i64 tangents, pixels, channels;  // K, m, C
};

// y = u + extra, pre = scale y + tscale normal + tshift + residual, out = slope pre,
// sums[k, c] = sum cotangent y, forms[k] = sum bend pre^2. Null: that piece is left out.
template <typename T>
struct NormActJvp {
  TangentSizes sizes;
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
struct NormActVjpTangent {
  TangentSizes sizes;
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

// normal = (y - mean) rstd, z = weight normal + bias + residual; with slope: its ReLU, slope = z >
// 0. Every tensor's pixels are C elements apart.
template <typename T>
struct NormAct {
  TangentSizes sizes;  // tangents: 1
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
struct InnerProducts {
  TangentSizes sizes;
  const T* a;      // [K, m, C]
  const T* b;      // [K, m, C]
  double* result;  // [K], sums of a b
  i64 a_k, b_k, b_pixel;
};

template <typename T>
void jvp(const NormActJvp<T>& call, int threads);
template <typename T>
void vjp_tangent(const NormActVjpTangent<T>& call, int threads);
template <typename T>
void norm_act(const NormAct<T>& call, int threads);
template <typename T>
void inner_products(const InnerProducts<T>& call, int threads);

// ---- one block of work --------------------------------------------------------------------------
//
// One tangent over one block of pixels, as tables of functions. Every instruction set fills one
// table (cpu/simd/norm_act_tangents.cpp); cpu/norm_act_tangents.cpp walks blocks and tangents and
// owns the threads.
//
// A block is read as one run of elements, cut into rows of `width`: a whole number of pixels, so
// that what depends on the channel alone is the same for every row and C may be anything. Only what
// is left of a row after whole vectors is taken one element at a time, 15 of a block at most; rows
// are multiples of 16 elements unless C is odd and large.

// Rows are multiples of the widest vector's lanes and of what is summed in registers at a time.
constexpr i64 TANGENT_LANES = 16;
constexpr i64 TANGENT_WIDTH = 64;

// A dense tensor's block; what is absent is one row of zeros or ones, read again for every row.
template <typename T>
struct SharedRows {
  const T* at;
  i64 step;  // from row to row: width or 0
};

// A block of each dense tensor of K, and the same of the block that comes next, to be fetched.
template <typename T>
struct TangentRows {
  T* at;
  T* next;
};

// Pixels `step` apart; C apart unless C is a multiple of TANGENT_LANES.
template <typename T>
struct TangentPixels {
  const T* at;
  const T* next;
  i64 step;
};

// Null `at`: absent.
template <typename T>
struct JvpBlock {
  TangentRows<T> u, out;
  TangentRows<const T> residual;
  TangentPixels<T> extra;  // if absent, u is not written
  SharedRows<T> normal, slope, cotangent, bend;
  const T* scale;   // [width]
  const T* tscale;  // [width]
  const T* tshift;  // [width]
  double* sums;     // [width], added to; or null
  double* form;     // one number, added to; or null
  i64 elements, width, channels;
};

template <typename T>
struct VjpTangentBlock {
  TangentRows<T> u, out;
  TangentRows<const T> residual, ty;
  TangentPixels<T> extra;
  SharedRows<T> slope, normal;
  SharedRows<T> out_cotangent, ty_cotangent;  // the same, or zeros where only one is wanted
  const T* scale;                             // [width]
  const T* tscale;                            // [width]
  const T* rstd;                              // [width]
  double* dscale;                             // [width], added to
  double* dshift;                             // [width], added to
  i64 elements, width, channels;
};

template <typename T>
struct NormActBlock {
  const T* y;
  SharedRows<T> residual;
  const T* mean;    // [width]
  const T* rstd;    // [width]
  const T* weight;  // [width]
  const T* bias;    // [width]
  T *z, *normal;
  T* slope;  // null: no ReLU
  i64 elements, width;
};

template <typename T>
struct InnerProductsBlock {
  TangentRows<const T> a;
  TangentPixels<T> b;
  double* result;  // one number, added to
  i64 elements, width, channels;
};

template <typename T>
struct TangentBlocks {
  void (*jvp)(const JvpBlock<T>&);
  void (*vjp_tangent)(const VjpTangentBlock<T>&);
  void (*norm_act)(const NormActBlock<T>&);
  void (*inner_products)(const InnerProductsBlock<T>&);
  // `rows` pixels of `channels` elements side by side.
  void (*gather)(const TangentPixels<T>& from, i64 rows, i64 channels, T* to);
};

ENTROPIC_FOR_EACH_ISA(extern const TangentBlocks<float> norm_act_tangents_f32;
                      extern const TangentBlocks<double> norm_act_tangents_f64;)

}  // namespace entropic::cpu
