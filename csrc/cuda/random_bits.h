// Random numbers of many streams on a GPU: launchers, free of CUDA headers so that bindings.cpp can
// include them. Addresses are device addresses; nothing synchronizes.
#pragma once

#include "kernels/random_bits.h"

namespace entropic::cuda {

void random_fill(const RandomFill& call, int device, void* stream);
void random_philox(const RandomPhilox& call, int device, void* stream);

}  // namespace entropic::cuda
