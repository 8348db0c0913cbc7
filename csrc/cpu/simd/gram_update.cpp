// Compiled once for each instruction set, with ENTROPIC_ISA naming it, and with contraction to
// fused multiply-adds. Only functions with internal linkage here, and no standard library.
#include "cpu/gram_update.h"

#include "cpu/simd/transpose.h"

namespace entropic::cpu {
namespace {

// A register tile is ROWS broadcast elements times VECTORS vectors. It leaves registers for the
// vectors and one broadcast: 24 + 3 + 1 of 32, 12 + 3 + 1 of 16; without fused multiply-adds the
// product needs one more, 8 + 2 + 2 of 16.
#if defined(__AVX512F__)
constexpr int ROWS = 8, VECTORS = 3;
#elif defined(__AVX2__)
constexpr int ROWS = 4, VECTORS = 3;
#else
constexpr int ROWS = 4, VECTORS = 2;
#endif

// A panel of 48 kB does not stay in the level-1 cache: fetched this many rows before it is read.
constexpr int AHEAD = 4;

template <typename T>
constexpr int WIDTH = VECTORS * LANES<T>;  // of a panel: whole tiles of rows, whole vectors

// ---- packing
// -------------------------------------------------------------------------------------

template <typename Source, typename T>
EF_FN Lanes<T> load_as(const Source* address) {
  return __builtin_convertvector(
      *reinterpret_cast<const typename Vector<Source, LANES<T>>::type*>(address), Lanes<T>);
}

// One square block of the panel: at most LANES rows of `rows`, LANES columns of them, of which
// `columns` are kept.
template <typename Source, typename T>
EF_FN void pack_square(const Source* rows, i64 stride, i64 count, int columns, T* panel) {
  Lanes<T> block[LANES<T>];
  for (int r = 0; r < LANES<T>; ++r)
    block[r] = r < count ? load_as<Source, T>(rows + r * stride) : Lanes<T>{};
  transpose<T, LANES<T>>(block);
  for (int c = 0; c < LANES<T>; ++c)
    if (c < columns) *reinterpret_cast<Lanes<T>*>(panel + c * WIDTH<T>) = block[c];
}

template <typename Source, typename T>
void pack(const Source* rows, i64 stride, i64 count, i64 columns, T* panel) {
  constexpr int L = LANES<T>;
  const i64 used = ceil_div(count, ROWS) * ROWS;  // rows that a register tile reads
  for (int first = 0; first < WIDTH<T> && first < used; first += L) {
    const Source* from = rows + first * stride;
    const i64 present = count - first < L ? count - first : L;
    i64 c = 0;
    if (present == L) {
      for (; c + L <= columns; c += L)
        pack_square<Source, T>(from + c, stride, L, L, panel + c * WIDTH<T> + first);
    } else {
      for (; c + L <= columns; c += L)
        pack_square<Source, T>(from + c, stride, present, L, panel + c * WIDTH<T> + first);
    }
    if (c < columns) {  // the last columns, from a copy padded with zeros
      const int n = int(columns - c);
      Source square[L * L] = {};
      for (i64 r = 0; r < present; ++r)
        for (int k = 0; k < n; ++k) square[r * L + k] = from[r * stride + c + k];
      pack_square<Source, T>(square, L, L, n, panel + c * WIDTH<T> + first);
    }
  }
}

// ---- products
// ------------------------------------------------------------------------------------

// tile[r, :] = sum over depth of a[:, r] b[:, 0 .. COUNT * LANES)
template <int COUNT, typename T>
EF_FN void multiply(const T* a, const T* b, i64 depth, T* tile) {
  Lanes<T> sums[ROWS][COUNT] = {};
  for (i64 k = 0; k < depth; ++k) {
    Lanes<T> right[COUNT];
#pragma GCC unroll 3
    for (int v = 0; v < COUNT; ++v) __builtin_prefetch(b + (k + AHEAD) * WIDTH<T> + v * LANES<T>);
#pragma GCC unroll 3
    for (int v = 0; v < COUNT; ++v)
      right[v] = *reinterpret_cast<const Lanes<T>*>(b + k * WIDTH<T> + v * LANES<T>);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const Lanes<T> left = a[k * WIDTH<T> + r] - Lanes<T>{};  // broadcast
#pragma GCC unroll 3
      for (int v = 0; v < COUNT; ++v) sums[r][v] += left * right[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < COUNT; ++v)
      *reinterpret_cast<Lanes<T>*>(tile + r * WIDTH<T> + v * LANES<T>) = sums[r][v];
}

template <typename T>
void update(double* out, i64 stride, const T* a, const T* b, i64 rows, i64 columns, bool lower,
            i64 depth) {
  T tile[ROWS * WIDTH<T>] __attribute__((aligned(BYTES)));
  for (i64 first = 0; first < rows; first += ROWS) {
    const i64 last = first + ROWS < rows ? first + ROWS : rows;
    const i64 used = lower && last < columns ? last : columns;
    for (i64 r = first; r < last; ++r)
      for (i64 c = 0; c < used; c += 8) __builtin_prefetch(out + r * stride + c, 1);
    if (used > 2 * LANES<T>)
      multiply<VECTORS, T>(a + first, b, depth, tile);
    else if (used > LANES<T>)
      multiply<2, T>(a + first, b, depth, tile);
    else
      multiply<1, T>(a + first, b, depth, tile);
    for (i64 r = first; r < last; ++r) {
      double* to = out + r * stride;
      const T* sums = tile + (r - first) * WIDTH<T>;
      const i64 n = lower && r + 1 < columns ? r + 1 : columns;
      if (n == WIDTH<T>)
        for (int c = 0; c < WIDTH<T>; ++c) to[c] += double(sums[c]);
      else
        for (i64 c = 0; c < n; ++c) to[c] += double(sums[c]);
    }
  }
}

}  // namespace

namespace ENTROPIC_ISA {
extern const GramBlocks<float, float> gram_f32_f32;
extern const GramBlocks<float, double> gram_f32_f64;
extern const GramBlocks<double, double> gram_f64_f64;
const GramBlocks<float, float> gram_f32_f32 = {WIDTH<float>, pack<float, float>, update<float>};
const GramBlocks<float, double> gram_f32_f64 = {WIDTH<double>, pack<float, double>, update<double>};
const GramBlocks<double, double> gram_f64_f64 = {WIDTH<double>, pack<double, double>,
                                                 update<double>};
}  // namespace ENTROPIC_ISA

}  // namespace entropic::cpu
