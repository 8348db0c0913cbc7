// Langevin dynamics of independent particles in built-in potentials on the CPU.
#pragma once

#include "kernels/common.h"

namespace entropic::cpu {

// The order of names in ops/langevin.py.
enum LangevinPotential { RING = 0, RIDGE = 1, CHANNEL = 2 };
enum LangevinScheme { EULER_MARUYAMA = 0, LEIMKUHLER_MATTHEWS = 1, BAOAB = 2 };

// Coordinates of a particle at most (LARGEST_DIM in ops/langevin.py); a lane's lie on the stack.
constexpr int LANGEVIN_DIM = 16;

template <typename T>
struct Langevin {
  T* x;            // [N, D], updated in place
  T* v;            // [N, D], updated in place; null for overdamped schemes
  i64 particles, dim;
  LangevinPotential potential;
  double parameters[4];  // as in reference/langevin_forces.py
  LangevinScheme scheme;
  double drift, decay, noise;  // as in reference/langevin.py
  i64 steps, first_step, first_particle;
  std::uint64_t seed;
};

template <typename T>
void langevin_advance(const Langevin<T>& call, int threads);

// Two normal numbers from every two words in [0, 2^32).
template <typename T>
void langevin_box_muller(const i64* words /*[pairs, 2]*/, T* normal /*[pairs, 2]*/, i64 pairs);

}  // namespace entropic::cpu
