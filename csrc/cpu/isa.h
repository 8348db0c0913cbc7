// Which instruction set the CPU kernels run on, chosen when the process starts.
#pragma once

namespace entropic::cpu {

enum Isa { PORTABLE = 0, AVX2 = 1, AVX512 = 2 };

// The set in use: the best that was compiled and that this processor has, unless forced.
Isa current_isa();
const char* isa_name(Isa isa);

// Forces a set by name; throws std::invalid_argument if unknown, not compiled or not supported.
// "" returns to the automatic choice.
void use_isa(const char* name);

// Names of the sets that can run here, separated by spaces, slowest first.
const char* runnable_isas();

}  // namespace entropic::cpu
