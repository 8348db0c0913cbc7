// Compiled once for each instruction set, with ENTROPIC_ISA naming it, and with contraction to
// fused multiply-adds. Only functions with internal linkage here, and no standard library.
//
// A lane holds one group of particles: of two in the plane, whose four coordinates take one counter
// a step. From the first step to the last everything stays in registers (on the stack, in more than
// two dimensions).
#include "cpu/langevin.h"

#include "cpu/simd/normal.h"

namespace entropic::cpu {
namespace {

#define EF_INLINE __attribute__((always_inline))

// work(i) for i < n; unrolled if N says how many.
template <int N, typename Work>
EF_FN void repeat(int n, Work work) {
  if constexpr (N > 0) {
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) work(i);
  } else {
    for (int i = 0; i < n; ++i) work(i);
  }
}

// ---- forces of one particle (formulas: ops/langevin/forces.py) ----------------------------

template <typename T, int DIM>
struct Ring {
  using V = Floats<T>;
  T stiffness, contrast, half;
  int modes;

  EF_INLINE Ring(const double* p, int)
      : stiffness(T(p[0])),
        contrast(T(p[1])),
        half(T(0.5 * p[0] * p[1] * p[2])),
        modes(int(p[2])) {}

  EF_INLINE void force(const V* x, V* f) const {
    const V r = square_root(x[0] * x[0] + x[1] * x[1]);
    const V inverse = r > 0 ? 1 / r : V{};
    const V cosine = x[0] * inverse, sine = x[1] * inverse;
    V c = cosine, s = sine;
    for (int m = 1; m < modes; ++m) {
      const V next = c * cosine - s * sine;
      s = s * cosine + c * sine;
      c = next;
    }
    const V u = r - 1;
    const V radial = -stiffness * (1 + contrast * c) * u;
    const V angular = half * s * u * u * inverse;
    f[0] = radial * cosine - angular * sine;
    f[1] = radial * sine + angular * cosine;
  }
};

// Forces of 1/2 g |x|^2 across; the sum of squares.
template <typename V, int DIM>
EF_FN V across(const V* x, V* f, V g, int dim) {
  V square = V{};
  repeat<DIM == 0 ? 0 : DIM - 1>(dim - 1, [&](int d) EF_INLINE {
    f[d] = -g * x[d];
    square += x[d] * x[d];
  });
  return square;
}

template <typename T, int DIM>
struct Ridge {
  using V = Floats<T>;
  T stiff, slope, length, wall;
  int dim;

  EF_INLINE Ridge(const double* p, int d)
      : stiff(T(p[0])), slope(T(p[1])), length(T(p[2])), wall(T(p[3])), dim(d) {}

  EF_INLINE void force(const V* x, V* f) const {
    const V y = x[dim - 1];
    const V g = stiff * exponential<T>(slope * y);
    const V above = y - length;
    const V beyond = y < 0 ? y : above > 0 ? above : y - y;
    const V square = across<V, DIM>(x, f, g, dim);
    f[dim - 1] = T(-0.5) * slope * g * square - wall * beyond;
  }
};

template <typename T, int DIM>
struct Channel {
  using V = Floats<T>;
  T stiffness, contrast, turns, half;
  int dim;

  EF_INLINE Channel(const double* p, int d)
      : stiffness(T(p[0])),
        contrast(T(p[1])),
        turns(T(1 / p[2])),
        half(T(0.5 * p[1] * 6.28318530717958647692 / p[2])),
        dim(d) {}

  EF_INLINE void force(const V* x, V* f) const {
    V sine, cosine;
    sine_cosine_of_turns<T>(x[dim - 1] * turns, &sine, &cosine);
    const V g = stiffness * exponential<T>(contrast * cosine);
    const V square = across<V, DIM>(x, f, g, dim);
    f[dim - 1] = half * g * sine * square;
  }
};

// ---- integrators --------------------------------------------------------------------------------

// DIM 0: known when called.
template <typename T, template <typename, int> class Potential, LangevinScheme SCHEME, int DIM>
void advance(const Langevin<T>& call, i64 begin, i64 end) {
  using V = Floats<T>;
  constexpr int SIZE = DIM == 2 ? 4 : 4 * LANGEVIN_DIM;  // coordinates of a group
  constexpr int PARTICLES = DIM == 2 ? 2 : 0, COORDINATES = DIM == 2 ? 4 : 0;
  constexpr int COUNTERS = DIM == 2 ? 1 : 0;
  const int dim = DIM == 0 ? int(call.dim) : DIM;
  const int particles = int(langevin_group(dim)), size = particles * dim;
  const Potential<T, DIM> potential(call.parameters, dim);
  const bool noisy = call.noise != 0;
  const T drift = T(call.drift), decay = T(call.decay);
  const T noise = T(SCHEME == LEIMKUHLER_MATTHEWS ? 0.5 * call.noise : call.noise);
  const i64 before = call.first_particle * dim, count = call.particles * dim;

  for (i64 group = begin; group < end; group += LANES<T>) {
    V x[SIZE], v[SIZE], f[SIZE], z[SIZE] = {};
    const auto forces = [&]() EF_INLINE {
      repeat<PARTICLES>(particles,
                        [&](int p) EF_INLINE { potential.force(x + p * dim, f + p * dim); });
    };
    const auto normals = [&](i64 step, V* to) EF_INLINE {
      repeat<COUNTERS>(size / 4, [&](int m) EF_INLINE {
        Words<T> words[4];
        draw(std::uint64_t(group) * std::uint64_t(size / 4) + std::uint64_t(m),
             std::uint64_t(size / 4), std::uint64_t(step), call.seed, words);
        box_muller<T>(words[0], words[1], to + 4 * m, to + 4 * m + 1);
        box_muller<T>(words[2], words[3], to + 4 * m + 2, to + 4 * m + 3);
      });
    };
    // Calls each(lane's element j, its place in x) for what belongs to the call.
    const auto places = [&](auto each) EF_INLINE {
      for (int j = 0; j < size; ++j)
        for (int l = 0; l < LANES<T>; ++l) {
          const i64 at = (group + l) * size + j - before;
          if (group + l < end && at >= 0 && at < count) each(j, l, at);
        }
    };
    // Via memory: elements of registers by a number known at run time only.
    const auto load = [&](const T* from, V* to) EF_INLINE {
      T lanes[SIZE][LANES<T>] = {};
      places([&](int j, int l, i64 at) EF_INLINE { lanes[j][l] = from[at]; });
      repeat<COORDINATES>(size,
                          [&](int j) EF_INLINE { __builtin_memcpy(to + j, lanes[j], BYTES); });
    };
    const auto store = [&](const V* from, T* to) EF_INLINE {
      T lanes[SIZE][LANES<T>];
      repeat<COORDINATES>(size,
                          [&](int j) EF_INLINE { __builtin_memcpy(lanes[j], from + j, BYTES); });
      places([&](int j, int l, i64 at) EF_INLINE { to[at] = lanes[j][l]; });
    };

    load(call.x, x);
    if constexpr (SCHEME == BAOAB) {
      load(call.v, v);
      forces();
    }
    if (SCHEME == LEIMKUHLER_MATTHEWS && noisy) normals(call.first_step, z);
    const i64 past = call.first_step + call.steps;
    for (i64 step = call.first_step; step < past; ++step) {
      if constexpr (SCHEME == BAOAB) {
        repeat<COORDINATES>(size, [&](int j) EF_INLINE {
          v[j] += drift * f[j];
          x[j] += drift * v[j];
          v[j] *= decay;
        });
        if (noisy) {
          normals(step, z);
          repeat<COORDINATES>(size, [&](int j) EF_INLINE { v[j] += noise * z[j]; });
        }
        repeat<COORDINATES>(size, [&](int j) EF_INLINE { x[j] += drift * v[j]; });
        forces();
        repeat<COORDINATES>(size, [&](int j) EF_INLINE { v[j] += drift * f[j]; });
      } else {
        forces();
        repeat<COORDINATES>(size, [&](int j) EF_INLINE { x[j] += drift * f[j]; });
        if (noisy && SCHEME == EULER_MARUYAMA) {
          normals(step, z);
          repeat<COORDINATES>(size, [&](int j) EF_INLINE { x[j] += noise * z[j]; });
        } else if (noisy) {
          V next[SIZE];
          normals(step + 1, next);
          repeat<COORDINATES>(size, [&](int j) EF_INLINE {
            x[j] += noise * (z[j] + next[j]);
            z[j] = next[j];
          });
        }
      }
    }
    store(x, call.x);
    if constexpr (SCHEME == BAOAB) store(v, call.v);
  }
}

template <typename T, template <typename, int> class Potential, int DIM>
void by_scheme(const Langevin<T>& call, i64 begin, i64 end) {
  switch (call.scheme) {
    case EULER_MARUYAMA:
      return advance<T, Potential, EULER_MARUYAMA, DIM>(call, begin, end);
    case LEIMKUHLER_MATTHEWS:
      return advance<T, Potential, LEIMKUHLER_MATTHEWS, DIM>(call, begin, end);
    case BAOAB:
      return advance<T, Potential, BAOAB, DIM>(call, begin, end);
  }
}

template <typename T>
void by_potential(const Langevin<T>& call, i64 begin, i64 end) {
  const bool planar = call.dim == 2;
  switch (call.potential) {
    case RING:
      return by_scheme<T, Ring, 2>(call, begin, end);
    case RIDGE:
      return (planar ? by_scheme<T, Ridge, 2> : by_scheme<T, Ridge, 0>)(call, begin, end);
    case CHANNEL:
      return (planar ? by_scheme<T, Channel, 2> : by_scheme<T, Channel, 0>)(call, begin, end);
  }
}

template <typename T>
void box_muller_block(const i64* words, T* normal, i64 pairs) {
  for (i64 i = 0; i < pairs; i += LANES<T>) {
    const int n = int(pairs - i < LANES<T> ? pairs - i : LANES<T>);
    Words<T> w0 = {}, w1 = {};
    for (int l = 0; l < n; ++l) {
      w0[l] = std::uint32_t(words[2 * (i + l)]);
      w1[l] = std::uint32_t(words[2 * (i + l) + 1]);
    }
    Floats<T> z0, z1;
    box_muller<T>(w0, w1, &z0, &z1);
    for (int l = 0; l < n; ++l) {
      normal[2 * (i + l)] = z0[l];
      normal[2 * (i + l) + 1] = z1[l];
    }
  }
}

}  // namespace

namespace ENTROPIC_ISA {
extern const LangevinBlocks<float> langevin_f32;
extern const LangevinBlocks<double> langevin_f64;
const LangevinBlocks<float> langevin_f32 = {by_potential<float>, box_muller_block<float>};
const LangevinBlocks<double> langevin_f64 = {by_potential<double>, box_muller_block<double>};
}  // namespace ENTROPIC_ISA

}  // namespace entropic::cpu
