// Compiled once for each instruction set, with ENTROPIC_ISA naming it, and with contraction to
// fused multiply-adds. Only functions with internal linkage here, and no standard library.
#include "cpu/row_norm_tangents.h"

#include "cpu/simd/vectors.h"

namespace entropic::cpu {
namespace {

// Sums of a row in lanes. Two chains hide the latency of addition.
template <typename T, int COUNT>
struct Sums {
  Lanes<T> lanes[2][COUNT] = {};
  T single[COUNT] = {};
  template <int CHAIN>
  __attribute__((always_inline)) inline void add(int which, Lanes<T> value) {
    lanes[CHAIN][which] += value;
  }
  template <int CHAIN>
  __attribute__((always_inline)) inline void add(int which, T value) {
    single[which] += value;
  }
  __attribute__((always_inline)) inline T total(int which) const {
    T parts[LANES<T>];
    store(parts, lanes[0][which] + lanes[1][which]);
    double sum = double(single[which]);
    for (int l = 0; l < LANES<T>; ++l) sum += double(parts[l]);
    return T(sum);
  }
};

template <int CHAIN_>
struct Chain {
  static constexpr int CHAIN = CHAIN_;
};

// Calls each(j, V(), chain) for the columns of a row.
template <typename T, typename Each>
EF_FN void columns(i64 width, Each each) {
  using V = Lanes<T>;
  constexpr int L = LANES<T>;
  i64 j = 0;
  for (; j + 2 * L <= width; j += 2 * L) {
    each(j, V(), Chain<0>());
    each(j + L, V(), Chain<1>());
  }
  if (j + L <= width) {
    each(j, V(), Chain<0>());
    j += L;
  }
  for (; j < width; ++j) each(j, T(), Chain<0>());
}

// The weight's column j, or 1.
template <typename V, typename T>
EF_FN V scale_at(const T* weight, i64 j) {
  return weight == nullptr ? V() + T(1) : load<V>(weight + j);
}

// What a row's tangent t does to mean and rstd.
template <typename T>
struct Moved {
  T mean;   // mean of t
  T along;  // mean of normal t
};

template <typename T>
EF_FN Moved<T> moved(const T* t, const T* normal, i64 width, bool centered) {
  Sums<T, 2> sums;
  columns<T>(width, [&](i64 j, auto v, auto chain) __attribute__((always_inline)) {
    using V = decltype(v);
    constexpr int CHAIN = decltype(chain)::CHAIN;
    const V value = load<V>(t + j);
    sums.template add<CHAIN>(0, value);
    sums.template add<CHAIN>(1, value * load<V>(normal + j));
  });
  return {centered ? sums.total(0) / T(width) : T(0), sums.total(1) / T(width)};
}

template <bool TERM, typename T>
EF_FN void jvp_row(const RowNormJvp<T>& c, i64 row, double* terms) {
  const i64 d = c.width;
  const T* normal = c.normal + row * d;
  const T* cotangent = TERM ? c.cotangent + row * d : nullptr;
  const T rstd = c.rstd[row];
  T weighted = 0;  // sum of weight cotangent normal
  if constexpr (TERM) {
    Sums<T, 1> sums;
    columns<T>(d, [&](i64 j, auto v, auto chain) __attribute__((always_inline)) {
      using V = decltype(v);
      const V h = scale_at<V>(c.weight, j) * load<V>(cotangent + j);
      sums.template add<decltype(chain)::CHAIN>(0, h * load<V>(normal + j));
    });
    weighted = sums.total(0);
  }
  for (i64 k = 0; k < c.tangents; ++k) {
    const T* t = c.t + (k * c.rows + row) * d;
    T* out = c.out + (k * c.rows + row) * d;
    const T* tweight = c.tweight == nullptr ? nullptr : c.tweight + k * d;
    const T* tbias = c.tbias == nullptr ? nullptr : c.tbias + k * d;
    const Moved<T> m = moved(t, normal, d, c.centered);
    Sums<T, TERM ? 3 : 1> sums;
    columns<T>(d, [&](i64 j, auto v, auto chain) __attribute__((always_inline)) {
      using V = decltype(v);
      constexpr int CHAIN = decltype(chain)::CHAIN;
      const V n = load<V>(normal + j), scale = scale_at<V>(c.weight, j);
      const V centered = load<V>(t + j) - m.mean;
      const V tn = rstd * (centered - n * m.along);
      V y = scale * tn;
      if (tweight != nullptr) y += load<V>(tweight + j) * n;
      if (tbias != nullptr) y += load<V>(tbias + j);
      store<V>(out + j, y);
      if constexpr (TERM) {
        const V g = load<V>(cotangent + j);
        sums.template add<CHAIN>(0, scale * g * centered);
        sums.template add<CHAIN>(1, centered * centered);
        if (tweight != nullptr) sums.template add<CHAIN>(2, g * load<V>(tweight + j) * tn);
      }
    });
    if constexpr (TERM) {
      const double s = double(m.along), r = double(rstd), q = double(sums.total(1)) / double(d);
      terms[k] += 2 * double(sums.total(2)) + r * r * ((3 * s * s - q) * double(weighted) -
                                                       2 * s * double(sums.total(0)));
    }
  }
}

template <typename T>
void jvp(const RowNormJvp<T>& call, i64 first, i64 last, double* terms) {
  for (i64 row = first; row < last; ++row)
    terms == nullptr ? jvp_row<false>(call, row, terms) : jvp_row<true>(call, row, terms);
}

template <bool U, bool MOVES, bool WEIGHTS, typename T>
EF_FN void vjp_row(const RowNormVjpTangent<T>& c, i64 row, T* dweight, T* dbias) {
  const i64 d = c.width;
  const T* normal = c.normal + row * d;
  const T* g = c.cotangent == nullptr ? nullptr : c.cotangent + row * d;
  const T rstd = c.rstd[row];
  T mean_h = 0, along_h = 0;  // of h = weight g
  if constexpr (MOVES) {
    Sums<T, 2> sums;
    columns<T>(d, [&](i64 j, auto v, auto chain) __attribute__((always_inline)) {
      using V = decltype(v);
      constexpr int CHAIN = decltype(chain)::CHAIN;
      const V h = scale_at<V>(c.weight, j) * load<V>(g + j);
      sums.template add<CHAIN>(0, h);
      sums.template add<CHAIN>(1, h * load<V>(normal + j));
    });
    mean_h = c.centered ? sums.total(0) / T(d) : T(0);
    along_h = sums.total(1) / T(d);
  }
  for (i64 k = 0; k < c.tangents; ++k) {
    const i64 at = (k * c.rows + row) * d;
    const T* u = U ? c.u + at : nullptr;
    const T* t = MOVES ? c.t + at : nullptr;
    const T* tweight = WEIGHTS ? c.tweight + k * d : nullptr;
    T* out = c.out + at;
    Moved<T> m{};
    if constexpr (MOVES) m = moved(t, normal, d, c.centered);
    const auto tangent_of_h = [&](i64 j, auto v) __attribute__((always_inline)) {
      using V = decltype(v);
      V th = V();
      if constexpr (U) th += scale_at<V>(c.weight, j) * load<V>(u + j);
      if constexpr (WEIGHTS) th += load<V>(tweight + j) * load<V>(g + j);
      return th;
    };
    const auto tangent_of_n = [&](i64 j, auto v) __attribute__((always_inline)) {
      using V = decltype(v);
      return rstd * ((load<V>(t + j) - m.mean) - load<V>(normal + j) * m.along);
    };
    Sums<T, 2> sums;
    columns<T>(d, [&](i64 j, auto v, auto chain) __attribute__((always_inline)) {
      using V = decltype(v);
      constexpr int CHAIN = decltype(chain)::CHAIN;
      const V th = tangent_of_h(j, v);
      V product = load<V>(normal + j) * th;
      if constexpr (MOVES)
        product += tangent_of_n(j, v) * scale_at<V>(c.weight, j) * load<V>(g + j);
      sums.template add<CHAIN>(0, th);
      sums.template add<CHAIN>(1, product);
    });
    const T mean_th = c.centered ? sums.total(0) / T(d) : T(0);
    const T along_th = sums.total(1) / T(d);
    const T tr = -rstd * rstd * m.along;  // the tangent of rstd
    T* dw = dweight == nullptr ? nullptr : dweight + k * d;
    T* db = dbias == nullptr ? nullptr : dbias + k * d;
    columns<T>(d, [&](i64 j, auto v, auto) __attribute__((always_inline)) {
      using V = decltype(v);
      const V n = load<V>(normal + j);
      V inner = tangent_of_h(j, v) - mean_th - n * along_th;
      V dscale = V();
      V x = V();
      if constexpr (MOVES) {
        const V gradient = load<V>(g + j), tn = tangent_of_n(j, v);
        inner -= tn * along_h;
        x = tr * (scale_at<V>(c.weight, j) * gradient - mean_h - n * along_h);
        dscale += gradient * tn;
      }
      store<V>(out + j, x + rstd * inner);
      if constexpr (U) dscale += load<V>(u + j) * n;
      if (dw != nullptr) store<V>(dw + j, load<V>(dw + j) + dscale);
      if constexpr (U)
        if (db != nullptr) store<V>(db + j, load<V>(db + j) + load<V>(u + j));
    });
  }
}

template <typename T>
void vjp_tangent(const RowNormVjpTangent<T>& c, i64 first, i64 last, T* dweight, T* dbias) {
  const bool u = c.u != nullptr, known = c.cotangent != nullptr;
  const int kind = (u ? 4 : 0) + (known && c.t != nullptr ? 2 : 0) +
                   (known && c.tweight != nullptr ? 1 : 0);
  for (i64 row = first; row < last; ++row) switch (kind) {
      case 7: vjp_row<true, true, true>(c, row, dweight, dbias); break;
      case 6: vjp_row<true, true, false>(c, row, dweight, dbias); break;
      case 5: vjp_row<true, false, true>(c, row, dweight, dbias); break;
      case 4: vjp_row<true, false, false>(c, row, dweight, dbias); break;
      case 3: vjp_row<false, true, true>(c, row, dweight, dbias); break;
      case 2: vjp_row<false, true, false>(c, row, dweight, dbias); break;
      case 1: vjp_row<false, false, true>(c, row, dweight, dbias); break;
      default: vjp_row<false, false, false>(c, row, dweight, dbias);
    }
}

}  // namespace

namespace ENTROPIC_ISA {
extern const RowNormTable<float> row_norm_tangents_f32;
extern const RowNormTable<double> row_norm_tangents_f64;
const RowNormTable<float> row_norm_tangents_f32 = {jvp<float>, vjp_tangent<float>};
const RowNormTable<double> row_norm_tangents_f64 = {jvp<double>, vjp_tangent<double>};
}  // namespace ENTROPIC_ISA

}  // namespace entropic::cpu
