// Random numbers of many streams (ops/random_bits/reference.py says which): what the CPU and the
// CUDA kernels share. Number j of a stream comes from the words of counter j WORDS / 4.
#pragma once

#include "kernels/common.h"

namespace entropic {

using u32 = std::uint32_t;
using u64 = std::uint64_t;

// The order of KINDS and DTYPES in ops/random_bits/reference.py and native.py.
enum RandomKind { WORDS = 0, UNIFORM = 1, SIGNS = 2, SORT_KEYS = 3 };
enum RandomType { INT64 = 0, FLOAT64 = 1, FLOAT32 = 2, FLOAT16 = 3, BFLOAT16 = 4 };

// Numbers start to start + count of streams first_stream to first_stream + streams, of each seed.
struct RandomFill {
  void* out;  // [streams, seeds, count], strides in elements
  i64 streams, seeds, count;
  i64 strides[3];
  const i64* keys;  // [seeds], or null: `key` is the only seed
  u64 key, first_stream;
  i64 start;
  RandomKind kind;
  RandomType type;
};

// Words [rows, count, 4] at counters [rows, count], with a seed and a stream per row.
struct RandomPhilox {
  const i64* counters;  // strides in elements
  i64 strides[2];
  const i64* keys;     // [rows]
  const i64* streams;  // [rows]
  i64* out;            // contiguous
  i64 rows, count;
};

// The calls' values (registry.h) in the order in which ops/random_bits/native.py passes them.
template <typename Values>
static inline RandomFill random_fill_of(Values& v) {
  RandomFill call{};
  v.into(call.out, call.streams, call.seeds, call.count);
  v.into(call.strides[0], call.strides[1], call.strides[2]);
  v.into(call.keys, call.key, call.first_stream, call.start);
  call.kind = RandomKind(int(v));
  call.type = RandomType(int(v));
  return call;
}

template <typename Values>
static inline RandomPhilox random_philox_of(Values& v) {
  RandomPhilox call{};
  v.into(call.counters, call.keys, call.streams, call.out, call.rows, call.count);
  v.into(call.strides[0], call.strides[1]);
  return call;
}

// How words become a number. Signs are 1 with the word's highest bit as the opposite of their sign.
struct WordNumber {
  using Type = i64;
  static constexpr int WORDS = 1;
  EF_FN i64 of(const u32* w) { return i64(w[0]); }
};
struct SortKeyNumber {
  using Type = i64;
  static constexpr int WORDS = 2;
  EF_FN i64 of(const u32* w) { return (i64(w[0]) << 31) ^ i64(w[1]); }
};
template <typename T>
struct UniformNumber {
  using Type = T;
  static constexpr int WORDS = 1;
  EF_FN T of(const u32* w) { return T((double(w[0]) + 0.5) * (1.0 / 4294967296.0)); }
};
template <typename Bits, Bits ONE>
struct SignNumber {
  using Type = Bits;
  static constexpr int WORDS = 1;
  EF_FN Bits of(const u32* w) { return Bits(Bits(~w[0] >> 31) << (8 * sizeof(Bits) - 1)) | ONE; }
};
using SignFloat64 = SignNumber<u64, 0x3ff0000000000000u>;
using SignFloat32 = SignNumber<u32, 0x3f800000u>;
using SignFloat16 = SignNumber<std::uint16_t, 0x3c00u>;
using SignBfloat16 = SignNumber<std::uint16_t, 0x3f80u>;

// each(Number{}) for the call's kind and type, which ops/random_bits has checked.
template <typename Each>
static inline void with_number(RandomKind kind, RandomType type, Each&& each) {
  switch (kind) {
    case WORDS:
      return each(WordNumber{});
    case SORT_KEYS:
      return each(SortKeyNumber{});
    case UNIFORM:
      return type == FLOAT64 ? each(UniformNumber<double>{}) : each(UniformNumber<float>{});
    case SIGNS:
      switch (type) {
        case FLOAT64:
          return each(SignFloat64{});
        case FLOAT16:
          return each(SignFloat16{});
        case BFLOAT16:
          return each(SignBfloat16{});
        default:
          return each(SignFloat32{});
      }
  }
}

}  // namespace entropic
