// Compiled once for each instruction set, with ENTROPIC_ISA naming it, and with contraction to
// fused multiply-adds. Only functions with internal linkage here, and no standard library.
#include "cpu/norm_example_grads.h"

#include "cpu/simd/vectors.h"

namespace entropic::cpu {
namespace {

// Terms that one lane adds in type T before its sum goes to a double.
constexpr int TERMS = 16;

// What mean and rstd depend on: the channel; the position, or nothing; both.
enum Statistics { CHANNEL, POSITION, BOTH };

// Adds one block's sums to doubles.
template <int CHAINS, typename T>
EF_FN void flush(const Lanes<T>* chains, i64 apart, double* sums) {
  Lanes<T> sum = chains[0];
  if constexpr (CHAINS == 2) sum = chains[0] + chains[apart];
  if constexpr (CHAINS == 4)
    sum = (chains[0] + chains[apart]) + (chains[2 * apart] + chains[3 * apart]);
  T lanes[LANES<T>];
  store(lanes, sum);
  for (int l = 0; l < LANES<T>; ++l) sums[l] += double(lanes[l]);
}

// COUNT vectors of channels over `rows` positions, at most TERMS * CHAINS. The chains hide the
// latency of addition. With CHANNEL, rstd is left to the end.
template <int COUNT, int CHAINS, Statistics KIND, bool GRAD, typename T>
EF_FN void block(const NormExample<T>& e, i64 position, i64 rows, const i64* channel,
                 double* scale_sums, double* shift_sums) {
  Lanes<T> scale[CHAINS * COUNT] = {};
  Lanes<T> shift[CHAINS * COUNT] = {};
  // In locals, which a store to grad_x cannot change.
  Lanes<T> mean[COUNT], factor[COUNT];
  i64 offset[COUNT];
#pragma GCC unroll 4
  for (int v = 0; v < COUNT; ++v) {
    offset[v] = channel[v];
    if constexpr (KIND == CHANNEL) mean[v] = load<Lanes<T>>(e.mean + channel[v]);
    if constexpr (GRAD) factor[v] = load<Lanes<T>>(e.factor + channel[v]);
  }
  const i64 width = e.channels, stat_step = e.stat_position;
  const T* x = e.x + position * width;
  const T* g = e.g + position * width;
  T* grad_x = GRAD ? e.grad_x + position * width : nullptr;
  const T* means = e.mean + position * stat_step;
  const T* rstds = e.rstd + position * stat_step;
  const auto row = [&](int chain) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int v = 0; v < COUNT; ++v) {
      if constexpr (COUNT == 4) {  // what follows in this row: the loop goes down the rows first
        __builtin_prefetch(x + offset[v] + COUNT * LANES<T>);
        __builtin_prefetch(g + offset[v] + COUNT * LANES<T>);
      }
      const Lanes<T> value = load<Lanes<T>>(x + offset[v]);
      const Lanes<T> grad = load<Lanes<T>>(g + offset[v]);
      Lanes<T> centered;
      if constexpr (KIND == CHANNEL)
        centered = value - mean[v];
      else if constexpr (KIND == POSITION)
        centered = (value - *means) * *rstds;
      else
        centered = (value - load<Lanes<T>>(means + offset[v])) * load<Lanes<T>>(rstds + offset[v]);
      scale[chain * COUNT + v] += grad * centered;
      shift[chain * COUNT + v] += grad;
      if constexpr (GRAD) store(grad_x + offset[v], grad * factor[v]);
    }
    x += width;
    g += width;
    if constexpr (GRAD) grad_x += width;
    means += stat_step;
    rstds += stat_step;
  };
  i64 r = 0;
  for (; r + CHAINS <= rows; r += CHAINS)
#pragma GCC unroll 4
    for (int chain = 0; chain < CHAINS; ++chain) row(chain);
  for (; r < rows; ++r) row(0);
#pragma GCC unroll 4
  for (int v = 0; v < COUNT; ++v) {
    flush<CHAINS, T>(scale + v, COUNT, scale_sums + v * LANES<T>);
    flush<CHAINS, T>(shift + v, COUNT, shift_sums + v * LANES<T>);
  }
}

EF_FN i64 smaller(i64 a, i64 b) { return a < b ? a : b; }

// Sums of all channels, at least LANES of them. Vector i starts at channel i * LANES, the last one
// where it ends with the channels, and its sums stand at i * LANES whatever it overlaps.
template <Statistics KIND, bool GRAD, typename T>
void wide_sums(const NormExample<T>& e, double* scale_sums, double* shift_sums) {
  constexpr int L = LANES<T>;
  const i64 vectors = ceil_div(e.channels, L);
  for (i64 i = 0; i < vectors * L; ++i) scale_sums[i] = shift_sums[i] = 0.0;
  // A wide block of few rows stays in cache however many channels there are.
  const i64 step = vectors >= 4 ? TERMS : vectors >= 2 ? 2 * TERMS : 4 * TERMS;
  for (i64 s = 0; s < e.positions; s += step) {
    const i64 end = smaller(s + step, e.positions);
    for (i64 i = 0; i < vectors;) {
      i64 channel[4];
      for (int v = 0; v < 4; ++v) channel[v] = smaller((i + v) * L, e.channels - L);
      double* scale = scale_sums + i * L;
      double* shift = shift_sums + i * L;
      const int count = vectors - i >= 4 ? 4 : vectors - i >= 2 ? 2 : 1;
      if (count == 4)
        block<4, 1, KIND, GRAD>(e, s, end - s, channel, scale, shift);
      else if (count == 2)
        for (i64 p = s; p < end; p += 2 * TERMS)
          block<2, 2, KIND, GRAD>(e, p, smaller(2 * TERMS, end - p), channel, scale, shift);
      else
        for (i64 p = s; p < end; p += 4 * TERMS)
          block<1, 4, KIND, GRAD>(e, p, smaller(4 * TERMS, end - p), channel, scale, shift);
      i += count;
    }
  }
}

template <typename T>
EF_FN void wide(const NormExample<T>& e, double* scale_sums, double* shift_sums) {
  if (e.stat_channel == 0) return wide_sums<POSITION, false>(e, scale_sums, shift_sums);
  if (e.stat_position != 0) return wide_sums<BOTH, false>(e, scale_sums, shift_sums);
  if (e.factor == nullptr) return wide_sums<CHANNEL, false>(e, scale_sums, shift_sums);
  wide_sums<CHANNEL, true>(e, scale_sums, shift_sums);
}

// One position at a time, in double; for few channels and what is left over.
template <typename T>
void narrow_sums(const NormExample<T>& e, i64 first, double* scale_sums, double* shift_sums) {
  const bool later = e.stat_channel == 1 && e.stat_position == 0;  // rstd is left to the end
  for (i64 s = first; s < e.positions; ++s)
    for (i64 c = 0; c < e.channels; ++c) {
      const i64 at = s * e.stat_position + c * e.stat_channel;
      const i64 element = s * e.channels + c;
      const double grad = double(e.g[element]);
      const double centered = double(e.x[element]) - double(e.mean[at]);
      scale_sums[c] += grad * (later ? centered : centered * double(e.rstd[at]));
      shift_sums[c] += grad;
      if (e.factor != nullptr) e.grad_x[element] = e.g[element] * e.factor[c];
    }
}

// Fewer channels than lanes: LANES positions are taken for one of LANES times the channels.
template <typename T>
void folded(const NormExample<T>& e, double* scale_sums, double* shift_sums) {
  constexpr int L = LANES<T>;
  const i64 width = e.channels * L;
  const i64 rows = e.positions / L;
  if (rows > 0) {
    T mean[L * L], factor[L * L];
    for (i64 i = 0; i < width; ++i) {
      mean[i] = e.mean[i % e.channels];
      if (e.factor != nullptr) factor[i] = e.factor[i % e.channels];
    }
    NormExample<T> wider = e;
    wider.mean = mean;
    if (e.factor != nullptr) wider.factor = factor;
    wider.positions = rows;
    wider.channels = width;
    wide(wider, scale_sums, shift_sums);
    for (i64 i = e.channels; i < width; ++i) {
      scale_sums[i % e.channels] += scale_sums[i];
      shift_sums[i % e.channels] += shift_sums[i];
    }
  } else {
    for (i64 c = 0; c < e.channels; ++c) scale_sums[c] = shift_sums[c] = 0.0;
  }
  narrow_sums(e, rows * L, scale_sums, shift_sums);
}

template <typename T>
void norm(const NormExample<T>& e) {
  constexpr int L = LANES<T>;
  const bool per_channel = e.stat_channel == 1 && e.stat_position == 0;
  double* scale = e.sums;
  double* shift = e.sums + norm_scratch(e.channels) / 2;
  const bool is_wide = e.channels >= L;
  if (is_wide) {
    wide(e, scale, shift);
  } else if (per_channel) {
    folded(e, scale, shift);
  } else {
    for (i64 c = 0; c < e.channels; ++c) scale[c] = shift[c] = 0.0;
    narrow_sums(e, 0, scale, shift);
  }
  for (i64 c = 0; c < e.channels; ++c) {
    // The last vector ends with the channels.
    const i64 tail = is_wide && e.channels - c < L ? ceil_div(e.channels, L) * L - e.channels : 0;
    const double rstd = per_channel ? double(e.rstd[c]) : 1.0;
    e.dscale[c] = T(scale[c + tail] * rstd);
    e.dshift[c] = T(shift[c + tail]);
  }
}

}  // namespace

namespace ENTROPIC_ISA {
extern void (*const norm_f32)(const NormExample<float>&);
extern void (*const norm_f64)(const NormExample<double>&);
void (*const norm_f32)(const NormExample<float>&) = norm<float>;
void (*const norm_f64)(const NormExample<double>&) = norm<double>;
}  // namespace ENTROPIC_ISA

}  // namespace entropic::cpu
