// One tangent over one block of pixels, as tables of functions. Every instruction set fills one
// table (cpu/simd/jet.cpp); cpu/jet.cpp walks blocks and tangents and owns the threads.
//
// A block is read as one run of elements, cut into rows of `width`: a whole number of pixels, so
// that what depends on the channel alone is the same for every row and C may be anything. Only what
// is left of a row after whole vectors is taken one element at a time, 15 of a block at most; rows
// are multiples of 16 elements unless C is odd and large.
#pragma once

#include "kernels/common.h"

namespace entropic::cpu {

// Rows are multiples of the widest vector's lanes and of what is summed in registers at a time.
constexpr i64 JET_LANES = 16;
constexpr i64 JET_WIDTH = 64;

// A dense tensor's block; what is absent is one row of zeros or ones, read again for every row.
template <typename T>
struct JetSource {
  const T* at;
  i64 step;  // from row to row: width or 0
};

// A block of each dense tensor of K, and the same of the block that comes next, to be fetched.
template <typename T>
struct JetStream {
  T* at;
  T* next;
};

// Pixels `step` apart; C apart unless C is a multiple of JET_LANES.
template <typename T>
struct JetPixels {
  const T* at;
  const T* next;
  i64 step;
};

// Null `at`: absent.
template <typename T>
struct PushBlock {
  JetStream<T> u, out;
  JetStream<const T> residual;
  JetPixels<T> extra;  // if absent, u is not written
  JetSource<T> normal, slope, cotangent, bend;
  const T* scale;   // [width]
  const T* tscale;  // [width]
  const T* tshift;  // [width]
  double* sums;     // [width], added to; or null
  double* form;     // one number, added to; or null
  i64 elements, width, channels;
};

template <typename T>
struct PullBlock {
  JetStream<T> u, out;
  JetStream<const T> residual, ty;
  JetPixels<T> extra;
  JetSource<T> slope, normal;
  JetSource<T> out_cotangent, ty_cotangent;  // the same, or zeros where only one is wanted
  const T* scale;   // [width]
  const T* tscale;  // [width]
  const T* rstd;    // [width]
  double* dscale;   // [width], added to
  double* dshift;   // [width], added to
  i64 elements, width, channels;
};

template <typename T>
struct NormaliseBlock {
  const T* y;
  JetSource<T> residual;
  const T* mean;    // [width]
  const T* rstd;    // [width]
  const T* weight;  // [width]
  const T* bias;    // [width]
  T *z, *normal;
  T* slope;  // null: no ReLU
  i64 elements, width;
};

template <typename T>
struct InnerBlock {
  JetStream<const T> a;
  JetPixels<T> b;
  double* result;  // one number, added to
  i64 elements, width, channels;
};

template <typename T>
struct JetBlocks {
  void (*push)(const PushBlock<T>&);
  void (*pull)(const PullBlock<T>&);
  void (*normalise)(const NormaliseBlock<T>&);
  void (*inner)(const InnerBlock<T>&);
  // `rows` pixels of `channels` elements side by side.
  void (*gather)(const JetPixels<T>& from, i64 rows, i64 channels, T* to);
};

#define ENTROPIC_DECLARE(isa)             \
  namespace isa {                         \
  extern const JetBlocks<float> jet_f32;  \
  extern const JetBlocks<double> jet_f64; \
  }
ENTROPIC_DECLARE(portable)
ENTROPIC_DECLARE(avx2)
ENTROPIC_DECLARE(avx512)
#undef ENTROPIC_DECLARE

}  // namespace entropic::cpu
