// Counter-based normal numbers, a register at a time: Philox-4x32-10 (Salmon et al., SC 2011) and
// the Box-Muller transform, the numbers of entropic_fast/ops/random_bits/streams.py. Internal
// linkage.
#pragma once

#include "cpu/simd/elementary.h"

namespace entropic::cpu {
namespace {

// Words of 32 bits in the low halves of 64.
using Wide = Words<double>;

// Products of low halves with a word; what is in the high halves of a does not matter.
EF_FN Wide multiply(Wide a, std::uint32_t b) {
#if defined(__AVX512F__)
  return (Wide)_mm512_maskz_mul_epu32(0xff, (__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
  return (Wide)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__SSE2__)
  return (Wide)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#else
  return (a & 0xffffffffu) * std::uint64_t(b);
#endif
}

// Four words for each counter; bits 32 and up are arbitrary.
EF_FN void philox(Wide counter, std::uint64_t stream, std::uint64_t seed, Wide* words) {
  std::uint32_t k0 = std::uint32_t(seed), k1 = std::uint32_t(seed >> 32);
  Wide c0 = counter, c1 = counter >> 32, c2 = Wide{} + stream, c3 = Wide{} + (stream >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const Wide p0 = multiply(c0, 0xD2511F53u), p1 = multiply(c2, 0xCD9E8D57u);
    c0 = (p1 >> 32) ^ c1 ^ std::uint64_t(k0);
    c2 = (p0 >> 32) ^ c3 ^ std::uint64_t(k1);
    c1 = p1;
    c3 = p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

// A register of words from each lane's counter.
EF_FN void draw(std::uint64_t first, std::uint64_t step, std::uint64_t stream, std::uint64_t seed,
                Words<double>* words) {
  Wide index;
  for (int l = 0; l < LANES<double>; ++l) index[l] = std::uint64_t(l);
  philox(first + index * step, stream, seed, words);
#pragma GCC unroll 4
  for (int w = 0; w < 4; ++w) words[w] &= 0xffffffffu;
}

EF_FN void draw(std::uint64_t first, std::uint64_t step, std::uint64_t stream, std::uint64_t seed,
                Words<float>* words) {
  Wide index, even[4], odd[4];
  for (int l = 0; l < LANES<double>; ++l) index[l] = std::uint64_t(2 * l);
  const Wide counter = first + index * step;
  philox(counter, stream, seed, even);
  philox(counter + step, stream, seed, odd);
#pragma GCC unroll 4
  for (int w = 0; w < 4; ++w) words[w] = (Words<float>)((even[w] & 0xffffffffu) | (odd[w] << 32));
}

// log((w + 1/2) / 2^32), exact argument.
EF_FN Floats<double> log_of_uniform(Words<double> w) {
  using V = Floats<double>;
  // w in the low bits of 2^52 is 2^52 + w.
  const V u = ((V)(w | 0x4330000000000000u) - (0x1p52 - 0.5)) * 0x1p-32;
  constexpr std::int64_t one = 0x3ff0000000000000;
  const Ints<double> bits = (Ints<double>)u + (one - Format<double>::ROOT_HALF);
  const Ints<double> fraction = (bits & 0x000fffffffffffff) + Format<double>::ROOT_HALF;
  // The exponent, -33 to 0, made a double by the same trick.
  const Words<double> biased = (Words<double>)bits >> 52;
  const V exponent = (V)(biased | 0x4330000000000000u) - (0x1p52 + 1023);
  return log_of_parts<double>((V)fraction - 1, exponent);
}

// w + 1/2, rounded once.
EF_FN Floats<float> plus_half(Words<float> w) {
  using V = Floats<float>;
  // 16 bits each in the low bits of 2^23 and of 2^39.
  const V high = (V)((w >> 16) | 0x53000000u) - 0x1p39f;
  const V low = (V)((w & 0xffffu) | 0x4b000000u) - (0x1p23f - 0.5f);
  return high + low;
}

EF_FN Floats<float> log_of_uniform(Words<float> w) {
  using V = Floats<float>;
  // Near 1 a float has not the digits of 1 - u, which the word has.
  const V close = plus_half(~w) * -0x1p-32f;
  const V u = plus_half(w) * 0x1p-32f;
  const Ints<float> bits = (Ints<float>)u + (0x3f800000 - Format<float>::ROOT_HALF);
  const Ints<float> fraction = (bits & 0x007fffff) + Format<float>::ROOT_HALF;
  const V exponent = (V)(((Words<float>)bits >> 23) | 0x4b000000u) - (0x1p23f + 127);
  // Words from sqrt(1/2) 2^32 on, which as signed numbers are negative.
  const Ints<float> near = ((Ints<float>)w < 0) & ((Ints<float>)w > Ints<float>{} - 1257966796);
  return log_of_parts<float>(near ? close : (V)fraction - 1, near ? V{} : exponent);
}

// Sine and cosine of 2 pi (w + 1/2) / 2^32.
EF_FN void sine_cosine_of_word(Words<double> w, Floats<double>* sine, Floats<double>* cosine) {
  using V = Floats<double>;
  const V turns = ((V)(w | 0x4330000000000000u) - (0x1p52 - 0.5)) * 0x1p-32;
  sine_cosine_of_turns<double>(turns, sine, cosine);
}

EF_FN void sine_cosine_of_word(Words<float> w, Floats<float>* sine, Floats<float>* cosine) {
  const Words<float> quarter = (w + 0x20000000u) >> 30;
  const Ints<float> rest = (Ints<float>)(w - (quarter << 30));  // -2^29 to 2^29 - 1
  const Floats<float> turn = (__builtin_convertvector(rest, Floats<float>) + 0.5f) * 0x1p-30f;
  sine_cosine<float>((Ints<float>)quarter, turn, sine, cosine);
}

// Two normal numbers from two words.
template <typename T>
EF_FN void box_muller(Words<T> w0, Words<T> w1, Floats<T>* z0, Floats<T>* z1) {
  Floats<T> sine, cosine;
  const Floats<T> radius = square_root(-2 * log_of_uniform(w0));
  sine_cosine_of_word(w1, &sine, &cosine);
  *z0 = radius * cosine;
  *z1 = radius * sine;
}

}  // namespace
}  // namespace entropic::cpu
