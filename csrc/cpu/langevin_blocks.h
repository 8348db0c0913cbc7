// Langevin dynamics of some particles, as a table of functions. Every instruction set fills one
// table (cpu/simd/langevin.cpp); cpu/langevin.cpp deals the particles out to threads.
//
// Normal number d of particle i is number i D + d of a step's stream, and a counter gives four. A
// *group* is the fewest particles that begin with a counter of their own: one lane of a register.
#pragma once

#include "cpu/langevin.h"

namespace entropic::cpu {

// Particles of a group: times `dim` a multiple of four.
EF_FN i64 langevin_group(i64 dim) { return dim % 2 != 0 ? 4 : dim % 4 != 0 ? 2 : 1; }

template <typename T>
struct LangevinBlocks {
  // All steps of groups begin .. end, numbered from particle 0.
  void (*advance)(const Langevin<T>& call, i64 begin, i64 end);
  void (*box_muller)(const i64* words, T* normal, i64 pairs);
};

#define ENTROPIC_DECLARE(isa)                       \
  namespace isa {                                   \
  extern const LangevinBlocks<float> langevin_f32;  \
  extern const LangevinBlocks<double> langevin_f64; \
  }
ENTROPIC_DECLARE(portable)
ENTROPIC_DECLARE(avx2)
ENTROPIC_DECLARE(avx512)
#undef ENTROPIC_DECLARE

}  // namespace entropic::cpu
