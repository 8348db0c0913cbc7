// Random numbers of many streams on the CPU.
#pragma once

#include "kernels/random_bits.h"

namespace entropic::cpu {

void random_fill(const RandomFill& call, int threads);
void random_philox(const RandomPhilox& call, int threads);

}  // namespace entropic::cpu
