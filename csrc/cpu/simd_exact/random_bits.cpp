// Compiled once for each instruction set, with ENTROPIC_ISA naming it. Only functions with internal
// linkage here, and no standard library. Words of a block are made in vectors of counters and left
// in the first cache, in order; then they become numbers where these belong.
#include "cpu/random_bits.h"

#include "cpu/simd/normal.h"
#include "cpu/simd/transpose.h"

namespace entropic::cpu {
namespace {

#define EF_INLINE __attribute__((always_inline))

constexpr int WIDE = LANES<double>;  // counters of a register

// Words [WIDE, 4] of a register's counters, in order; what is in the high halves is dropped.
EF_FN void store_words(const Wide* words, u32* to) {
  using V = Vector<std::int64_t, WIDE>::type;
  const V a = (V)((words[0] & 0xffffffffu) | (words[1] << 32));
  const V b = (V)((words[2] & 0xffffffffu) | (words[3] << 32));
  V low, high;
  interleave<std::int64_t, WIDE>(a, b, &low, &high);
  __builtin_memcpy(to, &low, BYTES);
  __builtin_memcpy(to + 2 * WIDE, &high, BYTES);
}

// Words of counters first to first + count, rounded up to whole registers.
EF_FN void words_from(u64 first, i64 count, u64 stream, u64 key, u32* to) {
  Wide index;
  for (int l = 0; l < WIDE; ++l) index[l] = u64(l);
  for (i64 i = 0; i < count; i += WIDE) {
    Wide words[4];
    philox(index + (first + u64(i)), stream, key, words);
    store_words(words, to + 4 * i);
  }
}

// Numbers [count] of `rows` rows whose words are `apart` words apart, number by number: rows are
// next to one another in memory, numbers of a row are not.
template <typename Number, int ROWS>
EF_FN void store_across(const u32* words, i64 apart, int rows, i64 count,
                        typename Number::Type* const* to, i64 stride) {
  for (i64 j = 0; j < count; ++j) {
#pragma GCC unroll 8
    for (int r = 0; r < (ROWS > 0 ? ROWS : rows); ++r) {
      const auto number = Number::of(words + r * apart + j * Number::WORDS);
      (ROWS > 0 ? to[0] + r : to[r])[j * stride] = number;
    }
  }
}

template <typename Number>
EF_FN void store_along(const u32* words, i64 count, typename Number::Type* to, i64 stride) {
  if (stride == 1)
    for (i64 j = 0; j < count; ++j) to[j] = Number::of(words + j * Number::WORDS);
  else
    for (i64 j = 0; j < count; ++j) to[j * stride] = Number::of(words + j * Number::WORDS);
}

void fill(const RandomFill& call, i64 first, i64 last, i64 begin, i64 end) {
  constexpr i64 APART = RANDOM_WORDS + 4 + 4 * WIDE;
  alignas(64) u32 words[RANDOM_ROWS][APART];
  const int rows = int(last - first);
  const int each_words = call.kind == SORT_KEYS ? 2 : 1;
  const u64 from = u64(call.start + begin) * u64(each_words);
  const u64 counter = from / 4;
  const i64 skip = i64(from % 4);
  const i64 counters = ceil_div(skip + (end - begin) * each_words, 4);
  for (int r = 0; r < rows; ++r) {
    const i64 row = first + r;
    const u64 key = call.keys == nullptr ? call.key : u64(call.keys[row % call.seeds]);
    words_from(counter, counters, call.first_stream + u64(row / call.seeds), key, words[r]);
  }
  with_number(call.kind, call.type, [&](auto number) EF_INLINE {
    using Number = decltype(number);
    using T = typename Number::Type;
    T* to[RANDOM_ROWS];
    bool together = rows == RANDOM_ROWS;
    for (int r = 0; r < rows; ++r) {
      const i64 row = first + r;
      to[r] = static_cast<T*>(call.out) + row / call.seeds * call.strides[0] +
              row % call.seeds * call.strides[1] + begin * call.strides[2];
      together = together && to[r] == to[0] + r;
    }
    const i64 stride = call.strides[2];
    if (stride == 1 || rows == 1)
      for (int r = 0; r < rows; ++r)
        store_along<Number>(words[r] + skip, end - begin, to[r], stride);
    else if (together)
      store_across<Number, int(RANDOM_ROWS)>(words[0] + skip, APART, rows, end - begin, to, stride);
    else
      store_across<Number, 0>(words[0] + skip, APART, rows, end - begin, to, stride);
  });
}

void philox_row(const RandomPhilox& call, i64 row, i64 begin, i64 end) {
  const i64* counters = call.counters + row * call.strides[0];
  i64* to = call.out + 4 * row * call.count;
  for (i64 i = begin; i < end; i += WIDE) {
    const int n = int(end - i < WIDE ? end - i : WIDE);
    Wide counter = {}, words[4];
    for (int l = 0; l < n; ++l) counter[l] = u64(counters[(i + l) * call.strides[1]]);
    philox(counter, u64(call.streams[row]), u64(call.keys[row]), words);
    u32 lanes[4 * WIDE];
    store_words(words, lanes);
    for (int l = 0; l < 4 * n; ++l) to[4 * i + l] = i64(lanes[l]);
  }
}

}  // namespace

namespace ENTROPIC_ISA {
extern const RandomBlocks random_bits;
const RandomBlocks random_bits = {fill, philox_row};
}  // namespace ENTROPIC_ISA

}  // namespace entropic::cpu
