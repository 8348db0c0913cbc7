// Langevin dynamics of independent particles in built-in potentials on the CPU.
#pragma once

#include "cpu/isa.h"
#include "kernels/common.h"

namespace entropic::cpu {

// The order of names in ops/langevin/checks.py and forces.py.
enum LangevinPotential { RING = 0, RIDGE = 1, CHANNEL = 2 };
enum LangevinScheme { EULER_MARUYAMA = 0, LEIMKUHLER_MATTHEWS = 1, BAOAB = 2 };

// Coordinates of a particle at most (LARGEST_DIM in ops/langevin); a lane's lie on the stack.
constexpr int LANGEVIN_DIM = 16;

template <typename T>
struct Langevin {
  T* x;  // [N, D], updated in place
  T* v;  // [N, D], updated in place; null for overdamped schemes
  i64 particles, dim;
  LangevinPotential potential;
  double parameters[4];  // as in ops/langevin/forces.py
  LangevinScheme scheme;
  double drift, decay, noise;  // as in ops/langevin/reference.py
  i64 steps, first_step, first_particle;
  std::uint64_t seed;
};

template <typename T>
void langevin_steps(const Langevin<T>& call, int threads);

// Two normal numbers from every two words in [0, 2^32).
template <typename T>
void langevin_box_muller(const i64* words /*[pairs, 2]*/, T* normal /*[pairs, 2]*/, i64 pairs);

// ---- one block of work --------------------------------------------------------------------------
//
// Langevin dynamics of some particles, as a table of functions. Every instruction set fills one
// table (cpu/simd/langevin.cpp); cpu/langevin.cpp deals the particles out to threads.
//
// Normal number d of particle i is number i D + d of a step's stream, and a counter gives four. A
// *group* is the fewest particles that begin with a counter of their own: one lane of a register.

// Particles of a group: times `dim` a multiple of four.
EF_FN i64 langevin_group(i64 dim) { return dim % 2 != 0 ? 4 : dim % 4 != 0 ? 2 : 1; }

template <typename T>
struct LangevinBlocks {
  // All steps of groups begin .. end, numbered from particle 0.
  void (*advance)(const Langevin<T>& call, i64 begin, i64 end);
  void (*box_muller)(const i64* words, T* normal, i64 pairs);
};

ENTROPIC_FOR_EACH_ISA(extern const LangevinBlocks<float> langevin_f32;
                      extern const LangevinBlocks<double> langevin_f64;)

}  // namespace entropic::cpu
