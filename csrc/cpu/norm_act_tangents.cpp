// Walks blocks of pixels, and for each the tangents, so that what they share is read from memory
// once. Sums are taken over fixed sets of pixels and added in order: results do not depend on the
// number of threads.
#include "cpu/norm_act_tangents.h"

#include <algorithm>
#include <cstddef>
#include <new>
#include <numeric>
#include <type_traits>
#include <vector>

#include "cpu/isa.h"
#include "registry.h"

namespace entropic::cpu {
namespace {

// Bytes of a block of one tensor: blocks of a tangent and of what is shared stay in cache together.
constexpr i64 BLOCK_BYTES = 8192;
// A chunk is what one thread sums: of so many elements a tangent, and of so many pixels, so that
// the chunks' sums are few beside the tensors.
constexpr i64 CHUNK_ELEMENTS = 16384;
constexpr i64 CHUNK_PIXELS = 128;
// Below this many elements a second thread costs more than it brings.
constexpr i64 PARALLEL_FROM = 32768;

// Cache lines: the widest vectors are as long, and slow where they lie across two.
template <typename T>
struct Aligned {
  using value_type = T;
  static constexpr std::align_val_t LINE{64};
  Aligned() = default;
  template <typename U>
  Aligned(const Aligned<U>&) {}
  T* allocate(std::size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), LINE)); }
  void deallocate(T* memory, std::size_t) { ::operator delete(memory, LINE); }
  bool operator==(const Aligned&) const { return true; }
  bool operator!=(const Aligned&) const { return false; }
};

template <typename T>
using Buffer = std::vector<T, Aligned<T>>;

template <typename T>
Buffer<T> buffer(i64 size, T value = T(0)) {
  return Buffer<T>(static_cast<std::size_t>(size), value);
}

template <typename T>
const TangentBlocks<T>& blocks() {
  if constexpr (std::is_same_v<T, float>)
    return ENTROPIC_TABLE(norm_act_tangents_f32);
  else
    return ENTROPIC_TABLE(norm_act_tangents_f64);
}

// How pixels are cut into rows, blocks and chunks (cpu/norm_act_tangents.h).
struct Plan {
  TangentSizes sizes;
  i64 width, block, chunk, chunks;
};

template <typename T>
Plan make_plan(const TangentSizes& sizes) {
  const i64 channels = std::max<i64>(sizes.channels, 1);
  i64 row = TANGENT_LANES / std::gcd(channels, TANGENT_LANES);
  while (row * channels < TANGENT_WIDTH) row *= 2;
  i64 block = std::max<i64>(BLOCK_BYTES / i64(sizeof(T)) / channels, 1);
  if (block > row) block -= block % row;
  const i64 chunk = ceil_div(std::max(CHUNK_ELEMENTS / channels, CHUNK_PIXELS), block) * block;
  const bool empty = sizes.tangents == 0 || sizes.channels == 0;
  return {sizes, std::min(row, block) * sizes.channels, block, chunk,
          empty ? 0 : ceil_div(sizes.pixels, chunk)};
}

// What depends on the channel alone, as rows; `fallback` where it is absent.
template <typename T>
Buffer<T> rows_of(const Plan& plan, const T* values, i64 count, T fallback) {
  if (values == nullptr) return buffer(count * plan.width, fallback);
  Buffer<T> rows;
  rows.reserve(static_cast<std::size_t>(count * plan.width));
  for (i64 k = 0; k < count; ++k, values += plan.sizes.channels)
    for (i64 i = 0; i < plan.width; i += plan.sizes.channels)
      rows.insert(rows.end(), values, values + plan.sizes.channels);
  return rows;
}

// Rows of tangent k, or those that all tangents share.
template <typename T>
const T* rows_at(const Plan& plan, const Buffer<T>& rows, i64 k) {
  const bool shared = i64(rows.size()) == plan.width;
  return rows.data() + (shared ? 0 : k * plan.width);
}

template <typename T>
struct Constants {
  Buffer<T> zeros, ones;
  explicit Constants(const Plan& plan)
      : zeros(buffer<T>(plan.width)), ones(buffer<T>(plan.width, T(1))) {}
};

template <typename T>
SharedRows<T> source(const Plan& plan, const T* tensor, i64 offset, const Buffer<T>& fallback) {
  if (tensor == nullptr) return {fallback.data(), 0};
  return {tensor + offset, plan.width};
}

// One thread's memory: sums of a chunk as rows, and pixels put side by side.
template <typename T>
struct Scratch {
  Buffer<T> gathered;
  Buffer<double> sums, forms;  // [kinds, K, width], [K]

  Scratch(const Plan& plan, int kinds)
      : gathered(buffer<T>(plan.block * plan.sizes.channels)),
        sums(buffer<double>(kinds * plan.sizes.tangents * plan.width)),
        forms(buffer<double>(plan.sizes.tangents)) {}
};

// A tangent's block.
struct Place {
  i64 k, pixel;
};

template <typename T>
TangentRows<T> stream(T* tensor, i64 stride, i64 channels, Place now, Place next) {
  if (tensor == nullptr) return {nullptr, nullptr};
  return {tensor + now.k * stride + now.pixel * channels,
          tensor + next.k * stride + next.pixel * channels};
}

template <typename T>
TangentPixels<T> pixels_of(const T* tensor, i64 stride, i64 step, i64 channels, Place now,
                           Place next, i64 count, Scratch<T>& scratch) {
  if (tensor == nullptr) return {nullptr, nullptr, channels};
  const TangentPixels<T> pixels = {tensor + now.k * stride + now.pixel * step,
                                   tensor + next.k * stride + next.pixel * step, step};
  if (step == channels || channels % TANGENT_LANES == 0) return pixels;
  blocks<T>().gather(pixels, count, channels, scratch.gathered.data());
  return {scratch.gathered.data(), scratch.gathered.data(), channels};
}

struct Sums {
  Buffer<double> channels, forms;  // [kinds, K, C], [K]
};

// Calls work(k, first pixel, pixels, scratch) for every block and tangent; returns the sums.
template <typename T, typename Work>
Sums walk(const Plan& plan, int kinds, int threads, Work work) {
  const i64 tangents = plan.sizes.tangents, channels = plan.sizes.channels;
  const i64 sums = kinds * tangents;
  Buffer<double> of_chunks = buffer<double>(plan.chunks * sums * channels);
  Buffer<double> form_of_chunks = buffer<double>(plan.chunks * tangents);
  if (tangents * plan.sizes.pixels * channels < PARALLEL_FROM) threads = 1;

#pragma omp parallel num_threads(threads)
  {
    Scratch<T> scratch(plan, kinds);
#pragma omp for schedule(static)
    for (i64 chunk = 0; chunk < plan.chunks; ++chunk) {
      std::fill(scratch.sums.begin(), scratch.sums.end(), 0.0);
      std::fill(scratch.forms.begin(), scratch.forms.end(), 0.0);
      const i64 end = std::min((chunk + 1) * plan.chunk, plan.sizes.pixels);
      for (i64 p = chunk * plan.chunk; p < end; p += plan.block)
        for (i64 k = 0; k < tangents; ++k) {
          const i64 pixels = std::min(plan.block, end - p);
          const bool last = k + 1 == tangents;
          const bool stay = last && p + pixels == end;
          const Place next{last && !stay ? 0 : stay ? k : k + 1, last && !stay ? p + pixels : p};
          work({k, p}, next, pixels, scratch);
        }
      double* to = of_chunks.data() + chunk * sums * channels;
      const double* row = scratch.sums.data();
      for (i64 s = 0; s < sums; ++s, to += channels)
        for (const double* next = row + plan.width; row < next; row += channels)
          for (i64 c = 0; c < channels; ++c) to[c] += row[c];
      std::copy(scratch.forms.begin(), scratch.forms.end(),
                form_of_chunks.begin() + chunk * tangents);
    }
  }
  Sums total{buffer<double>(sums * channels), buffer<double>(tangents)};
  const auto add = [&](Buffer<double>& to, const Buffer<double>& parts) {
    const i64 size = i64(to.size());
    for (i64 chunk = 0; chunk < plan.chunks; ++chunk)
      for (i64 i = 0; i < size; ++i) to[i] += parts[chunk * size + i];
  };
  add(total.channels, of_chunks);
  add(total.forms, form_of_chunks);
  return total;
}

}  // namespace

template <typename T>
void jvp(const NormActJvp<T>& j, int threads) {
  const Plan plan = make_plan<T>(j.sizes);
  const i64 tangents = j.sizes.tangents, channels = j.sizes.channels;
  const Constants<T> constants(plan);
  const auto scale = rows_of(plan, j.scale, 1, T(1));
  const auto tscale = rows_of(plan, j.tscale, j.tscale == nullptr ? 1 : tangents, T(0));
  const auto tshift = rows_of(plan, j.tshift, j.tshift == nullptr ? 1 : tangents, T(0));
  const T* normal = j.tscale == nullptr ? nullptr : j.normal;
  const auto run = blocks<T>().jvp;
  const bool sums = j.sums != nullptr;  // an empty cotangent has no address

  const auto work = [&](Place now, Place next, i64 pixels, Scratch<T>& scratch) {
    const i64 at = now.pixel * channels;
    run({stream(j.u, j.u_k, channels, now, next), stream(j.out, j.out_k, channels, now, next),
         stream(j.residual, j.residual_k, channels, now, next),
         pixels_of(j.extra, j.extra_k, j.extra_pixel, channels, now, next, pixels, scratch),
         source(plan, normal, at, constants.zeros), source(plan, j.slope, at, constants.ones),
         source(plan, j.cotangent, at, constants.zeros), source(plan, j.bend, at, constants.zeros),
         scale.data(), rows_at(plan, tscale, now.k), rows_at(plan, tshift, now.k),
         sums ? scratch.sums.data() + now.k * plan.width : nullptr,
         j.forms == nullptr ? nullptr : scratch.forms.data() + now.k, pixels * channels, plan.width,
         channels});
  };
  const Sums total = walk<T>(plan, sums ? 1 : 0, threads, work);
  if (sums) std::copy(total.channels.begin(), total.channels.end(), j.sums);
  if (j.forms != nullptr) std::copy(total.forms.begin(), total.forms.end(), j.forms);
}

template <typename T>
void vjp_tangent(const NormActVjpTangent<T>& j, int threads) {
  const Plan plan = make_plan<T>(j.sizes);
  const i64 tangents = j.sizes.tangents, channels = j.sizes.channels;
  const Constants<T> constants(plan);
  const auto scale = rows_of(plan, j.scale, 1, T(1));
  const auto tscale = rows_of(plan, j.tscale, j.tscale == nullptr ? 1 : tangents, T(0));
  const auto rstd = rows_of(plan, j.rstd, 1, T(1));
  const T* out_cotangent = j.tscale == nullptr ? nullptr : j.cotangent;
  const auto run = blocks<T>().vjp_tangent;

  const auto work = [&](Place now, Place next, i64 pixels, Scratch<T>& scratch) {
    const i64 at = now.pixel * channels;
    double* dscale = scratch.sums.data() + now.k * plan.width;
    run({stream(j.u, j.u_k, channels, now, next), stream(j.out, j.out_k, channels, now, next),
         stream(j.residual, j.residual_k, channels, now, next),
         stream(j.ty, j.ty_k, channels, now, next),
         pixels_of(j.extra, j.extra_k, j.extra_pixel, channels, now, next, pixels, scratch),
         source(plan, j.slope, at, constants.ones), source(plan, j.normal, at, constants.zeros),
         source(plan, out_cotangent, at, constants.zeros),
         source(plan, j.cotangent, at, constants.zeros), scale.data(), rows_at(plan, tscale, now.k),
         rstd.data(), dscale, dscale + tangents * plan.width, pixels * channels, plan.width,
         channels});
  };
  const Sums total = walk<T>(plan, 2, threads, work);
  const i64 size = tangents * channels;
  const bool scales = j.normal != nullptr || j.ty != nullptr;
  for (i64 i = 0; i < size; ++i) {
    j.dscale[i] = scales ? T(total.channels[i]) : T(0);
    j.dshift[i] = T(total.channels[size + i]);
  }
}

template <typename T>
void norm_act(const NormAct<T>& j, int threads) {
  const Plan plan = make_plan<T>(j.sizes);
  const i64 channels = j.sizes.channels, pixels = j.sizes.pixels;
  const Constants<T> constants(plan);
  const auto mean = rows_of(plan, j.mean, 1, T(0));
  const auto rstd = rows_of(plan, j.rstd, 1, T(1));
  const auto weight = rows_of(plan, j.weight, 1, T(1));
  const auto bias = rows_of(plan, j.bias, 1, T(0));
  const auto run = blocks<T>().norm_act;
  if (pixels * channels < PARALLEL_FROM) threads = 1;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (i64 chunk = 0; chunk < plan.chunks; ++chunk) {
    const i64 first = chunk * plan.chunk, at = first * channels;
    run({j.y + at, source(plan, j.residual, at, constants.zeros), mean.data(), rstd.data(),
         weight.data(), bias.data(), j.z + at, j.normal + at,
         j.slope == nullptr ? nullptr : j.slope + at,
         std::min(plan.chunk, pixels - first) * channels, plan.width});
  }
}

template <typename T>
void inner_products(const InnerProducts<T>& j, int threads) {
  const Plan plan = make_plan<T>(j.sizes);
  const i64 channels = j.sizes.channels;
  const auto run = blocks<T>().inner_products;
  const auto work = [&](Place now, Place next, i64 pixels, Scratch<T>& scratch) {
    run({stream(j.a, j.a_k, channels, now, next),
         pixels_of(j.b, j.b_k, j.b_pixel, channels, now, next, pixels, scratch),
         scratch.forms.data() + now.k, pixels * channels, plan.width, channels});
  };
  const Sums total = walk<T>(plan, 0, threads, work);
  std::copy(total.forms.begin(), total.forms.end(), j.result);
}

namespace {

// Values in the order of the struct's members: sizes, addresses, strides.
template <typename T>
void jvp_kernel(Values& v) {
  const NormActJvp<T> call{{v, v, v}, v, v, v, v, v, v, v, v, v, v, v, v, v, v, v, v, v, v};
  jvp(call, int(v));
}

template <typename T>
void vjp_tangent_kernel(Values& v) {
  const NormActVjpTangent<T> call{{v, v, v}, v, v, v, v, v, v, v, v, v,
                                  v,         v, v, v, v, v, v, v, v, v};
  vjp_tangent(call, int(v));
}

template <typename T>
void norm_act_kernel(Values& v) {
  const NormAct<T> call{{v, v, v}, v, v, v, v, v, v, v, v, v};
  norm_act(call, int(v));
}

template <typename T>
void inner_products_kernel(Values& v) {
  const InnerProducts<T> call{{v, v, v}, v, v, v, v, v, v};
  inner_products(call, int(v));
}

const RegisterKernel ADDED[] = {
    {"jvp_cpu_float32", jvp_kernel<float>},
    {"jvp_cpu_float64", jvp_kernel<double>},
    {"vjp_tangent_cpu_float32", vjp_tangent_kernel<float>},
    {"vjp_tangent_cpu_float64", vjp_tangent_kernel<double>},
    {"norm_act_cpu_float32", norm_act_kernel<float>},
    {"norm_act_cpu_float64", norm_act_kernel<double>},
    {"inner_products_cpu_float32", inner_products_kernel<float>},
    {"inner_products_cpu_float64", inner_products_kernel<double>},
};

}  // namespace

}  // namespace entropic::cpu
