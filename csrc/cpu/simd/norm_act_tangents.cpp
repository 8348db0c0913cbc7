// Compiled once for each instruction set, with ENTROPIC_ISA naming it, and with contraction to
// fused multiply-adds. Only functions with internal linkage here, and no standard library.
#include "cpu/norm_act_tangents.h"

#include "cpu/simd/vectors.h"

namespace entropic::cpu {
namespace {

// Vectors side by side whose channels' coefficients and sums stay in registers down the rows.
constexpr int GROUP = BYTES == 64 ? 4 : 2;

template <typename T, bool VECTORS, int COUNT_>
struct Columns {
  typedef T V;
  static constexpr int COUNT = COUNT_, L = 1;
};
template <typename T, int COUNT_>
struct Columns<T, true, COUNT_> {
  typedef Lanes<T> V;
  static constexpr int COUNT = COUNT_, L = LANES<T>;
};

// Calls columns(first row, rows, i, Columns()) for what begins at column i.
template <typename T, typename Call>
EF_FN void each(i64 elements, i64 width, Call columns) {
  constexpr int L = LANES<T>;
  const auto rows = [&](i64 first, i64 count, i64 end) __attribute__((always_inline)) {
    i64 i = 0;
    for (; i + GROUP * L <= end; i += GROUP * L)
      columns(first, count, i, Columns<T, true, GROUP>());
    for (; i + L <= end; i += L) columns(first, count, i, Columns<T, true, 1>());
    for (; i < end; ++i) columns(first, count, i, Columns<T, false, 1>());
  };
  const i64 whole = elements / width, rest = elements % width;
  if (whole > 0) rows(0, whole, width);
  if (rest > 0) rows(whole, 1, rest);
}

template <int COUNT, typename V, typename T>
EF_FN void load_all(const T* from, V* to) {
#pragma GCC unroll 4
  for (int v = 0; v < COUNT; ++v) to[v] = load<V>(from + v * i64(sizeof(V) / sizeof(T)));
}

template <int COUNT, typename T, typename V>
EF_FN void add_to(double* sums, const V* values) {
  constexpr int L = int(sizeof(V) / sizeof(T));
  T lanes[COUNT * L];
#pragma GCC unroll 4
  for (int v = 0; v < COUNT; ++v) store(lanes + v * L, values[v]);
  for (int l = 0; l < COUNT * L; ++l) sums[l] += double(lanes[l]);
}

// Where the i-th element of a row is whose pixels are `step` apart.
EF_FN i64 element(i64 i, i64 channels, i64 step) { return i / channels * step + i % channels; }

template <int COUNT, typename T, typename V>
EF_FN double total(const V* values) {
  double sums[COUNT * sizeof(V) / sizeof(T)] = {}, sum = 0.0;
  add_to<COUNT, T>(sums, values);
  for (double part : sums) sum += part;
  return sum;
}

// Reading goes down the columns of a block, which no prefetcher foresees, and from tangent to
// tangent, which are far apart: while one block is worked on, the next is fetched into L2.
template <int WIDE>
EF_FN void fetch(const void* address, int v) {
  if (WIDE >= 16 && v * WIDE % 64 == 0) __builtin_prefetch(address, 0, 2);
}

template <bool EXTRA, bool RESIDUAL, bool SUMS, bool FORM, typename T>
void jvp_block(const JvpBlock<T>& b) {
  const i64 width = b.width;
  Lanes<T> form[GROUP] = {};
  double rest = 0.0;
  each<T>(b.elements, width,
          [&](i64 first, i64 rows, i64 i, auto kind) __attribute__((always_inline)) {
            using V = typename decltype(kind)::V;
            constexpr int COUNT = decltype(kind)::COUNT, L = decltype(kind)::L;
            V scale[COUNT], tscale[COUNT], tshift[COUNT], sums[COUNT] = {};
            load_all<COUNT>(b.scale + i, scale);
            load_all<COUNT>(b.tscale + i, tscale);
            load_all<COUNT>(b.tshift + i, tshift);
            const i64 start = first * width + i;
            T *u = b.u.at + start, *out = b.out.at + start;
            const T* residual = b.residual.at + start;
            const i64 next_u = b.u.next - b.u.at, next_out = b.out.next - b.out.at;
            const i64 next_residual = b.residual.next - b.residual.at;
            const T* normal = b.normal.at + first * b.normal.step + i;
            const T* slope = b.slope.at + first * b.slope.step + i;
            const T* cotangent = b.cotangent.at + first * b.cotangent.step + i;
            const T* bend = b.bend.at + first * b.bend.step + i;
            const i64 next_extra = b.extra.next - b.extra.at;
            const i64 extra_step = width / b.channels * b.extra.step;
            const T* extra[COUNT];
            if constexpr (EXTRA)
              for (int v = 0; v < COUNT; ++v)
                extra[v] =
                    b.extra.at + first * extra_step + element(i + v * L, b.channels, b.extra.step);
            for (i64 row = 0; row < rows; ++row) {
              V sum[COUNT], product[COUNT];
#pragma GCC unroll 4
              for (int v = 0; v < COUNT; ++v) {
                V y = load<V>(u + v * L);
                fetch<sizeof(V)>(u + v * L + next_u, v);
                if constexpr (EXTRA) {
                  y += load<V>(extra[v]);
                  fetch<sizeof(V)>(extra[v] + next_extra, v);
                  extra[v] += extra_step;
                }
                V pre = tscale[v] * load<V>(normal + v * L) + tshift[v];
                if constexpr (RESIDUAL) {
                  pre += load<V>(residual + v * L);
                  fetch<sizeof(V)>(residual + v * L + next_residual, v);
                }
                pre += scale[v] * y;
                sum[v] = y;
                product[v] = load<V>(slope + v * L) * pre;
                if constexpr (SUMS) sums[v] += load<V>(cotangent + v * L) * y;
                if constexpr (FORM) {
                  const V term = load<V>(bend + v * L) * pre * pre;
                  if constexpr (L == 1)
                    rest += double(term);
                  else
                    form[v] += term;
                }
              }
#pragma GCC unroll 4
              for (int v = 0; v < COUNT; ++v) {
                if constexpr (EXTRA) store<V>(u + v * L, sum[v]);
                store<V>(out + v * L, product[v]);
                fetch<sizeof(V)>(out + v * L + next_out, v);
              }
              u += width, out += width, residual += width;
              normal += b.normal.step, slope += b.slope.step;
              cotangent += b.cotangent.step, bend += b.bend.step;
            }
            if constexpr (SUMS) add_to<COUNT, T>(b.sums + i, sums);
          });
  if constexpr (FORM) *b.form += total<GROUP, T>(form) + rest;
}

template <bool EXTRA, bool RESIDUAL, bool OUT, bool TY, typename T>
void vjp_tangent_block(const VjpTangentBlock<T>& b) {
  const i64 width = b.width;
  each<T>(
      b.elements, width, [&](i64 first, i64 rows, i64 i, auto kind) __attribute__((always_inline)) {
        using V = typename decltype(kind)::V;
        constexpr int COUNT = decltype(kind)::COUNT, L = decltype(kind)::L;
        V scale[COUNT], tscale[COUNT], rstd[COUNT], dscale[COUNT] = {}, dshift[COUNT] = {};
        load_all<COUNT>(b.scale + i, scale);
        load_all<COUNT>(b.tscale + i, tscale);
        load_all<COUNT>(b.rstd + i, rstd);
        const i64 start = first * width + i;
        T *u = b.u.at + start, *out = b.out.at + start;
        const T *residual = b.residual.at + start, *ty = b.ty.at + start;
        const i64 next_u = b.u.next - b.u.at, next_out = b.out.next - b.out.at;
        const i64 next_residual = b.residual.next - b.residual.at, next_ty = b.ty.next - b.ty.at;
        const T* slope = b.slope.at + first * b.slope.step + i;
        const T* normal = b.normal.at + first * b.normal.step + i;
        const T* out_cotangent = b.out_cotangent.at + first * b.out_cotangent.step + i;
        const T* ty_cotangent = b.ty_cotangent.at + first * b.ty_cotangent.step + i;
        const i64 next_extra = b.extra.next - b.extra.at;
        const i64 extra_step = width / b.channels * b.extra.step;
        const T* extra[COUNT];
        if constexpr (EXTRA)
          for (int v = 0; v < COUNT; ++v)
            extra[v] =
                b.extra.at + first * extra_step + element(i + v * L, b.channels, b.extra.step);
        for (i64 row = 0; row < rows; ++row) {
          V sum[COUNT], product[COUNT];
#pragma GCC unroll 4
          for (int v = 0; v < COUNT; ++v) {
            V g = load<V>(u + v * L);
            fetch<sizeof(V)>(u + v * L + next_u, v);
            if constexpr (EXTRA) {
              g += load<V>(extra[v]);
              fetch<sizeof(V)>(extra[v] + next_extra, v);
              extra[v] += extra_step;
            }
            if constexpr (RESIDUAL) {
              g += load<V>(residual + v * L);
              fetch<sizeof(V)>(residual + v * L + next_residual, v);
            }
            g *= load<V>(slope + v * L);
            sum[v] = g;
            if constexpr (OUT)
              product[v] = scale[v] * g + tscale[v] * load<V>(out_cotangent + v * L);
            dshift[v] += g;
            // A g that is not finite times the zeros of an absent `normal` would be NaN; where
            // there is no `ty` either, the caller leaves dscale out.
            if (!TY || b.normal.step != 0) dscale[v] += g * load<V>(normal + v * L);
            if constexpr (TY) {
              dscale[v] += rstd[v] * load<V>(ty_cotangent + v * L) * load<V>(ty + v * L);
              fetch<sizeof(V)>(ty + v * L + next_ty, v);
            }
          }
#pragma GCC unroll 4
          for (int v = 0; v < COUNT; ++v) {
            store<V>(u + v * L, sum[v]);
            if constexpr (OUT) {
              store<V>(out + v * L, product[v]);
              fetch<sizeof(V)>(out + v * L + next_out, v);
            }
          }
          u += width, out += width, residual += width, ty += width;
          slope += b.slope.step, normal += b.normal.step;
          out_cotangent += b.out_cotangent.step, ty_cotangent += b.ty_cotangent.step;
        }
        add_to<COUNT, T>(b.dscale + i, dscale);
        add_to<COUNT, T>(b.dshift + i, dshift);
      });
}

template <typename T>
void jvp(const JvpBlock<T>& b) {
  constexpr void (*variants[])(const JvpBlock<T>&) = {
      jvp_block<false, false, false, false, T>, jvp_block<false, false, false, true, T>,
      jvp_block<false, false, true, false, T>,  jvp_block<false, false, true, true, T>,
      jvp_block<false, true, false, false, T>,  jvp_block<false, true, false, true, T>,
      jvp_block<false, true, true, false, T>,   jvp_block<false, true, true, true, T>,
      jvp_block<true, false, false, false, T>,  jvp_block<true, false, false, true, T>,
      jvp_block<true, false, true, false, T>,   jvp_block<true, false, true, true, T>,
      jvp_block<true, true, false, false, T>,   jvp_block<true, true, false, true, T>,
      jvp_block<true, true, true, false, T>,    jvp_block<true, true, true, true, T>,
  };
  variants[8 * (b.extra.at != nullptr) + 4 * (b.residual.at != nullptr) + 2 * (b.sums != nullptr) +
           (b.form != nullptr)](b);
}

template <typename T>
void vjp_tangent(const VjpTangentBlock<T>& b) {
  constexpr void (*variants[])(const VjpTangentBlock<T>&) = {
      vjp_tangent_block<false, false, false, false, T>,
      vjp_tangent_block<false, false, false, true, T>,
      vjp_tangent_block<false, false, true, false, T>,
      vjp_tangent_block<false, false, true, true, T>,
      vjp_tangent_block<false, true, false, false, T>,
      vjp_tangent_block<false, true, false, true, T>,
      vjp_tangent_block<false, true, true, false, T>,
      vjp_tangent_block<false, true, true, true, T>,
      vjp_tangent_block<true, false, false, false, T>,
      vjp_tangent_block<true, false, false, true, T>,
      vjp_tangent_block<true, false, true, false, T>,
      vjp_tangent_block<true, false, true, true, T>,
      vjp_tangent_block<true, true, false, false, T>,
      vjp_tangent_block<true, true, false, true, T>,
      vjp_tangent_block<true, true, true, false, T>,
      vjp_tangent_block<true, true, true, true, T>,
  };
  variants[8 * (b.extra.at != nullptr) + 4 * (b.residual.at != nullptr) +
           2 * (b.out.at != nullptr) + (b.ty.at != nullptr)](b);
}

template <bool RELU, typename T>
void norm_act_block(const NormActBlock<T>& b) {
  const i64 width = b.width;
  each<T>(b.elements, width,
          [&](i64 first, i64 rows, i64 i, auto kind) __attribute__((always_inline)) {
            using V = typename decltype(kind)::V;
            constexpr int COUNT = decltype(kind)::COUNT, L = decltype(kind)::L;
            V mean[COUNT], rstd[COUNT], weight[COUNT], bias[COUNT];
            load_all<COUNT>(b.mean + i, mean);
            load_all<COUNT>(b.rstd + i, rstd);
            load_all<COUNT>(b.weight + i, weight);
            load_all<COUNT>(b.bias + i, bias);
            const i64 start = first * width + i;
            const T* residual = b.residual.at + first * b.residual.step + i;
            const V zero = V(), one = zero + T(1);
            for (i64 row = 0; row < rows; ++row, residual += b.residual.step) {
              const i64 at = start + row * width;
#pragma GCC unroll 4
              for (int v = 0; v < COUNT; ++v) {
                const V normal = (load<V>(b.y + at + v * L) - mean[v]) * rstd[v];
                V z = weight[v] * normal + bias[v] + load<V>(residual + v * L);
                store<V>(b.normal + at + v * L, normal);
                if constexpr (RELU) {
                  store<V>(b.slope + at + v * L, z > zero ? one : zero);
                  z = z < zero ? zero : z;  // NaN stays
                }
                store<V>(b.z + at + v * L, z);
              }
            }
          });
}

template <typename T>
void norm_act(const NormActBlock<T>& b) {
  b.slope == nullptr ? norm_act_block<false>(b) : norm_act_block<true>(b);
}

template <typename T>
void inner_products(const InnerProductsBlock<T>& b) {
  const i64 width = b.width, step = width / b.channels * b.b.step;
  const i64 next_a = b.a.next - b.a.at, next_b = b.b.next - b.b.at;
  Lanes<T> sums[GROUP] = {};
  double rest = 0.0;
  each<T>(b.elements, width,
          [&](i64 first, i64 rows, i64 i, auto kind) __attribute__((always_inline)) {
            using V = typename decltype(kind)::V;
            constexpr int COUNT = decltype(kind)::COUNT, L = decltype(kind)::L;
            const T *one = b.a.at + first * width + i, *other[COUNT];
            for (int v = 0; v < COUNT; ++v)
              other[v] = b.b.at + first * step + element(i + v * L, b.channels, b.b.step);
            for (i64 row = 0; row < rows; ++row, one += width)
#pragma GCC unroll 4
              for (int v = 0; v < COUNT; ++v) {
                const V term = load<V>(one + v * L) * load<V>(other[v]);
                fetch<sizeof(V)>(one + v * L + next_a, v);
                fetch<sizeof(V)>(other[v] + next_b, v);
                other[v] += step;
                if constexpr (L == 1)
                  rest += double(term);
                else
                  sums[v] += term;
              }
          });
  *b.result += total<GROUP, T>(sums) + rest;
}

// In pieces of P elements, the last one ending with the pixel whatever it overlaps.
template <int P, typename T>
void gather_pieces(const TangentPixels<T>& pixels, i64 rows, i64 channels, T* to) {
  const T* from = pixels.at;
  const i64 next = pixels.next - pixels.at;
  for (i64 row = 0; row < rows; ++row, from += pixels.step, to += channels) {
    i64 i = 0;
    for (; i + P <= channels; i += P) {
      __builtin_prefetch(from + i + next, 0, 2);
      __builtin_memcpy(to + i, from + i, P * sizeof(T));
    }
    if (i < channels) __builtin_memcpy(to + channels - P, from + channels - P, P * sizeof(T));
  }
}

template <typename T>
void gather(const TangentPixels<T>& from, i64 rows, i64 channels, T* to) {
  if (channels >= 16) return gather_pieces<16>(from, rows, channels, to);
  if (channels >= 8) return gather_pieces<8>(from, rows, channels, to);
  if (channels >= 4) return gather_pieces<4>(from, rows, channels, to);
  if (channels >= 2) return gather_pieces<2>(from, rows, channels, to);
  gather_pieces<1>(from, rows, channels, to);
}

}  // namespace

namespace ENTROPIC_ISA {
extern const TangentBlocks<float> norm_act_tangents_f32;
extern const TangentBlocks<double> norm_act_tangents_f64;
const TangentBlocks<float> norm_act_tangents_f32 = {jvp<float>, vjp_tangent<float>, norm_act<float>,
                                                    inner_products<float>, gather<float>};
const TangentBlocks<double> norm_act_tangents_f64 = {
    jvp<double>, vjp_tangent<double>, norm_act<double>, inner_products<double>, gather<double>};
}  // namespace ENTROPIC_ISA

}  // namespace entropic::cpu
