// Square blocks of vectors transposed in registers, for one instruction set. Included by
// cpu/simd/*.cpp only: internal linkage.
#pragma once

#include "cpu/simd/vectors.h"

namespace entropic::cpu {
namespace {

#if defined(__clang__) || __GNUC__ >= 12
#define EF_SHUFFLE(a, b, Mask, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define EF_SHUFFLE(a, b, Mask, ...) __builtin_shuffle(a, b, Mask{__VA_ARGS__})
#endif

template <int BYTES>
struct Index;
template <>
struct Index<4> {
  using type = std::int32_t;
};
template <>
struct Index<8> {
  using type = std::int64_t;
};

// a0 b0 a1 b1 ... of the lower halves, and of the upper halves.
template <typename T, int WIDTH>
EF_FN void interleave(typename Vector<T, WIDTH>::type a, typename Vector<T, WIDTH>::type b,
                      typename Vector<T, WIDTH>::type* low, typename Vector<T, WIDTH>::type* high) {
  typedef typename Index<sizeof(T)>::type Element;
  typedef Element Mask __attribute__((vector_size(WIDTH * sizeof(T))));
  static_assert(sizeof(Mask) == sizeof(a), "one index an element");
  if constexpr (WIDTH == 2) {
    *low = EF_SHUFFLE(a, b, Mask, 0, 2);
    *high = EF_SHUFFLE(a, b, Mask, 1, 3);
  } else if constexpr (WIDTH == 4) {
    *low = EF_SHUFFLE(a, b, Mask, 0, 4, 1, 5);
    *high = EF_SHUFFLE(a, b, Mask, 2, 6, 3, 7);
  } else if constexpr (WIDTH == 8) {
    *low = EF_SHUFFLE(a, b, Mask, 0, 8, 1, 9, 2, 10, 3, 11);
    *high = EF_SHUFFLE(a, b, Mask, 4, 12, 5, 13, 6, 14, 7, 15);
  } else {
    static_assert(WIDTH == 16, "widths of 2, 4, 8 and 16");
    *low = EF_SHUFFLE(a, b, Mask, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    *high = EF_SHUFFLE(a, b, Mask, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  }
}

// log2(WIDTH) perfect shuffles of the rows transpose the block.
template <typename T, int WIDTH>
EF_FN void transpose(typename Vector<T, WIDTH>::type* block) {
  typename Vector<T, WIDTH>::type other[WIDTH];
#pragma GCC unroll 4
  for (int stage = 1; stage < WIDTH; stage *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH / 2; ++i)
      interleave<T, WIDTH>(block[i], block[i + WIDTH / 2], &other[2 * i], &other[2 * i + 1]);
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; ++i) block[i] = other[i];
  }
}

}  // namespace
}  // namespace entropic::cpu
