// Square root, logarithm, sine and cosine, exponential of one register of float or double. Errors
// against exact values are measured in tests/ops/test_langevin_normal.py. Included by
// cpu/simd/*.cpp only: internal linkage.
#pragma once

#include "cpu/simd/vectors.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace entropic::cpu {
namespace {

template <typename T>
struct Register;
#define EF_REGISTER(T, Signed, Unsigned)                        \
  template <>                                                   \
  struct Register<T> {                                          \
    typedef T Floats __attribute__((vector_size(BYTES)));       \
    typedef Signed Ints __attribute__((vector_size(BYTES)));    \
    typedef Unsigned Words __attribute__((vector_size(BYTES))); \
  };
EF_REGISTER(float, std::int32_t, std::uint32_t)
EF_REGISTER(double, std::int64_t, std::uint64_t)
#undef EF_REGISTER

template <typename T>
using Floats = typename Register<T>::Floats;
template <typename T>
using Ints = typename Register<T>::Ints;
template <typename T>
using Words = typename Register<T>::Words;

template <typename T>
EF_FN Floats<T> all(T value) {
  return Floats<T>{} + value;
}

EF_FN Floats<double> square_root(Floats<double> x) {
#if defined(__AVX512F__)
  return (Floats<double>)_mm512_maskz_sqrt_pd(0xff, (__m512d)x);
#elif defined(__AVX2__)
  return (Floats<double>)_mm256_sqrt_pd((__m256d)x);
#elif defined(__SSE2__)
  return (Floats<double>)_mm_sqrt_pd((__m128d)x);
#else
  for (int l = 0; l < LANES<double>; ++l) x[l] = __builtin_sqrt(x[l]);
  return x;
#endif
}

EF_FN Floats<float> square_root(Floats<float> x) {
#if defined(__AVX512F__)
  return (Floats<float>)_mm512_maskz_sqrt_ps(0xffff, (__m512)x);
#elif defined(__AVX2__)
  return (Floats<float>)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__)
  return (Floats<float>)_mm_sqrt_ps((__m128)x);
#else
  for (int l = 0; l < LANES<float>; ++l) x[l] = __builtin_sqrtf(x[l]);
  return x;
#endif
}

// What differs between the two formats. Adding SHIFT rounds to a whole number, which is then in the
// low bits.
template <typename T>
struct Format;
template <>
struct Format<float> {
  static constexpr int MANTISSA = 23, BIAS = 127;
  static constexpr std::int32_t ROOT_HALF = 0x3f3504f3;
  static constexpr float SHIFT = 0x1.8p23f, LN2_HIGH = 0x1.62e3p-1f, LN2_LOW = 0x1.2fefa4p-17f;
  static constexpr float EXP_LARGEST = 88.0f, EXP_SMALLEST = -87.0f;
};
template <>
struct Format<double> {
  static constexpr int MANTISSA = 52, BIAS = 1023;
  static constexpr std::int64_t ROOT_HALF = 0x3fe6a09e667f3bcd;
  static constexpr double SHIFT = 0x1.8p52, LN2_HIGH = 0x1.62e42feep-1;
  static constexpr double LN2_LOW = 0x1.a39ef35793c76p-33;
  static constexpr double EXP_LARGEST = 709.0, EXP_SMALLEST = -708.0;
};

// Coefficients of log, sine and cosine: fdlibm's (double) and the float ones of FreeBSD's logf and
// of Cephes.
template <typename T, typename V, int N>
EF_FN V horner(V x, const T (&coefficients)[N]) {
  V sum = all<T>(coefficients[N - 1]);
#pragma GCC unroll 16
  for (int i = N - 2; i >= 0; --i) sum = sum * x + coefficients[i];
  return sum;
}

// log(2^exponent (1 + f)), f in [sqrt(1/2) - 1, sqrt(2) - 1]
template <typename T>
EF_FN Floats<T> log_of_parts(Floats<T> f, Floats<T> exponent) {
  using V = Floats<T>;
  const V s = f / (2 + f), z = s * s, half_square = T(0.5) * f * f;
  V tail;
  if constexpr (sizeof(T) == 8) {
    tail = z * horner<T>(
                   z, {6.666666666666735130e-01, 3.999999999940941908e-01, 2.857142874366239149e-01,
                       2.222219843214978396e-01, 1.818357216161805012e-01, 1.531383769920937332e-01,
                       1.479819860511658591e-01});
  } else {
    tail = z * horner<T>(z, {0xaaaaaa.0p-24f, 0xccce13.0p-25f, 0x91e9ee.0p-25f, 0xf89e26.0p-26f});
  }
  const V small = s * (half_square + tail) + exponent * Format<T>::LN2_LOW;
  return exponent * Format<T>::LN2_HIGH - ((half_square - small) - f);
}

// Sine and cosine of quarter (pi / 2) + turn (pi / 2), |turn| <= 1/2.
template <typename T>
EF_FN void sine_cosine(Ints<T> quarter, Floats<T> turn, Floats<T>* sine, Floats<T>* cosine) {
  using V = Floats<T>;
  const V x = turn * T(1.57079632679489661923), z = x * x;
  V s, c;
  if constexpr (sizeof(T) == 8) {
    s = horner<T>(
        z, {-1.66666666666666324348e-01, 8.33333333332248946124e-03, -1.98412698298579493134e-04,
            2.75573137070700676789e-06, -2.50507602534068634195e-08, 1.58969099521155010221e-10});
    c = horner<T>(
        z, {4.16666666666666019037e-02, -1.38888888888741095749e-03, 2.48015872894767294178e-05,
            -2.75573143513906633035e-07, 2.08757232129817482790e-09, -1.13596475577881948265e-11});
  } else {
    s = horner<T>(z, {-1.6666654611e-1f, 8.3321608736e-3f, -1.9515295891e-4f});
    c = horner<T>(z, {4.166664568298827e-2f, -1.388731625493765e-3f, 2.443315711809948e-5f});
  }
  s = x + x * (z * s);
  // 1 - z / 2 rounds; what it loses is added to the small term.
  const V half = T(0.5) * z, whole = 1 - half;
  c = whole + (((1 - whole) - half) + z * (z * c));
  const Ints<T> swap = (quarter & 1) != 0;
  const V first = swap ? c : s, second = swap ? s : c;
  *sine = (quarter & 2) != 0 ? -first : first;
  *cosine = ((quarter + 1) & 2) != 0 ? -second : second;
}

// Sine and cosine of 2 pi x. Beyond 2^50 (2^21 for float) quarter turns: of no meaning.
template <typename T>
EF_FN void sine_cosine_of_turns(Floats<T> x, Floats<T>* sine, Floats<T>* cosine) {
  const Floats<T> quarters = 4 * x, shifted = quarters + Format<T>::SHIFT;
  const Floats<T> turn = quarters - (shifted - Format<T>::SHIFT);
  sine_cosine<T>((Ints<T>)shifted, turn, sine, cosine);
}

// e^x; infinity from Format::EXP_LARGEST on, 0 below EXP_SMALLEST.
template <typename T>
EF_FN Floats<T> exponential(Floats<T> x) {
  using V = Floats<T>;
  const V shifted = x * T(1.44269504088896340736) + Format<T>::SHIFT;
  const V power = shifted - Format<T>::SHIFT;
  const V r = (x - power * Format<T>::LN2_HIGH) - power * Format<T>::LN2_LOW;
  V series;  // (e^r - 1 - r) / r^2 by Taylor, |r| <= ln(2) / 2
  if constexpr (sizeof(T) == 8) {
    series = horner<T>(
        r, {1.0 / 2, 1.0 / 6, 1.0 / 24, 1.0 / 120, 1.0 / 720, 1.0 / 5040, 1.0 / 40320, 1.0 / 362880,
            1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800.0});
  } else {
    series = horner<T>(r, {1.0f / 2, 1.0f / 6, 1.0f / 24, 1.0f / 120, 1.0f / 720, 1.0f / 5040});
  }
  // The low bits of a shifted number move into the exponent, what is above them falls out.
  const Words<T> bits = ((Words<T>)shifted + Format<T>::BIAS) << Format<T>::MANTISSA;
  V result = (1 + (r + r * r * series)) * (V)bits;
  result = x > Format<T>::EXP_LARGEST ? all<T>(T(__builtin_inf())) : result;
  return x < Format<T>::EXP_SMALLEST ? V{} : result;
}

}  // namespace
}  // namespace entropic::cpu
