// Vectors of the instruction set that a file is compiled for. Included by cpu/simd/*.cpp only:
// internal linkage.
#pragma once

#include "kernels/common.h"

namespace entropic::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int BYTES = 64;
#elif defined(__AVX2__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif

template <typename T>
constexpr int LANES = BYTES / int(sizeof(T));

// May stand anywhere in memory.
template <typename T, int WIDTH = LANES<T>>
struct Vector {
  typedef T type __attribute__((vector_size(WIDTH * sizeof(T)), aligned(alignof(T)), may_alias));
};
template <typename T>
using Lanes = typename Vector<T>::type;

// V is a vector of T, or T itself for what is left of a row.
template <typename V, typename T>
EF_FN V load(const T* address) {
  return *reinterpret_cast<const V*>(address);
}
template <typename V, typename T>
EF_FN void store(T* address, V value) {
  *reinterpret_cast<V*>(address) = value;
}

}  // namespace
}  // namespace entropic::cpu
