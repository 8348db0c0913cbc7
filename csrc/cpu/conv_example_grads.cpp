// Copies one example's input into zero-padded scratch memory of its thread, where the columns of a
// kernel row lie side by side, and sums tiles of the weight gradient over all positions. Nothing is
// unfolded. A tile depends on its example alone and the squares of tiles are added in a fixed
// order, so results do not depend on the number of threads.
#include "cpu/conv_example_grads.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "cpu/conv_example_grads_scratch.h"
#include "cpu/isa.h"
#include "registry.h"

namespace entropic::cpu {
namespace {

template <typename T>
const ConvBlocks<T>& blocks() {
  if constexpr (std::is_same_v<T, float>)
    return ENTROPIC_TABLE(conv_f32);
  else
    return ENTROPIC_TABLE(conv_f64);
}

// A kernel of size 1 without padding looks at every stride-th pixel: the others do not exist.
ConvShape without_skipped_pixels(ConvShape s) {
  for (int d = 0; d < 3; ++d)
    if (s.kernel[d] == 1 && s.padding[d] == 0) {
      s.a.size[d] = ceil_div(s.a.size[d], s.stride[d]);
      s.a.stride[d] *= s.stride[d];
      s.stride[d] = 1;
    }
  return s;
}

// Kernel offsets times input channels of one group, cut into vectors. Without dilation the pixels
// of a kernel row are neighbors and are cut as one.
std::vector<ConvColumns> cut_columns(const ConvShape& s, const Padded& padded, int width) {
  const i64 channels = padded.layout.pixel;
  const i64 joined = s.dilation[2] == 1 ? s.kernel[2] : 1;
  std::vector<ConvColumns> columns;
  i64 to = 0;
  for (i64 i = 0; i < s.kernel[0]; ++i)
    for (i64 j = 0; j < s.kernel[1]; ++j)
      for (i64 k = 0; k < s.kernel[2]; k += joined) {
        const i64 from = padded.offset(s, i, j, k);
        const i64 length = joined * channels;
        for (i64 c = 0; c < length; c += width)
          columns.push_back({from + c, to + c, int(std::min<i64>(width, length - c))});
        to += length;
      }
  return columns;
}

// Below this many multiplications a second thread costs more than it brings.
constexpr double PARALLEL_FROM = 200000;

int useful_threads(const ConvShape& s) {
  const double kernel = double(s.kernel[0]) * double(s.kernel[1]) * double(s.kernel[2]);
  const double positions = double(s.g.size[0]) * double(s.g.size[1]) * double(s.g.size[2]);
  const double channels = double(s.a.channels) / double(s.groups) * double(s.g.channels);
  return double(s.examples) * positions * kernel * channels < PARALLEL_FROM ? 1 : s.threads;
}

// What is asked for: the gradients, or the squared norms if `out` is null.
template <typename T>
struct Result {
  T* out;          // [n, O, row]
  i64 row_stride;  // from example to example
  double* norms;   // [n]
  i64 row;         // elements of one output channel's weights
};

template <typename T>
double sum_of_squares(const T* values, i64 count) {
  constexpr int LANES = 8;
  double lanes[LANES] = {};
  i64 at = 0;
  for (; at + LANES <= count; at += LANES)
    for (int l = 0; l < LANES; ++l) lanes[l] += double(values[at + l]) * double(values[at + l]);
  for (int l = 0; at < count; ++at, ++l) lanes[l] += double(values[at]) * double(values[at]);
  for (int l = 1; l < LANES; ++l) lanes[0] += lanes[l];
  return lanes[0];
}

// Squares of an example's parts, added in their order.
void add_up(const std::vector<double>& partial, i64 examples, double* norms) {
  const i64 parts = i64(partial.size()) / std::max<i64>(1, examples);
  for (i64 e = 0; e < examples; ++e) {
    norms[e] = 0.0;
    for (i64 part = 0; part < parts; ++part) norms[e] += partial[e * parts + part];
  }
}

// Dense and grouped convolutions, group by group: some output channels times all columns at once.
template <typename T>
void in_tiles(const ConvShape& s, const T* a, const T* g, const Result<T>& result) {
  const ConvBlocks<T>& kernel = blocks<T>();
  const i64 inputs = s.a.channels / s.groups, outputs = s.g.channels / s.groups, row = result.row;
  const i64 bytes = (s.stride[1] * s.stride[2] * inputs + outputs) * i64(sizeof(T));
  const std::vector<Box> boxes = cut_positions(s, bytes);
  const bool whole = boxes.size() == 1;
  const Padded padded(s, boxes[0], inputs);
  const std::vector<ConvColumns> columns = cut_columns(s, padded, kernel.width);
  const i64 vectors = i64(columns.size());
  const i64 tiles = ceil_div(outputs, kernel.rows);  // of one group, of nearly equal height
  const i64 parts = s.groups * tiles;
  std::vector<double> partial(result.out ? 0 : static_cast<size_t>(s.examples * parts));

  [[maybe_unused]] const int threads = useful_threads(s);
  // Groups of few examples are shared among threads, each with a copy of the input.
  const i64 units = s.examples * s.groups;
  const i64 wanted =
      threads == 1 || units >= 4 * threads ? 1 : 4 * threads / std::max<i64>(1, units);
  const i64 slices = std::min(wanted, tiles);
  const i64 image_elements = padded.layout.elements + kernel.width;
  Scratch<T> scratch(threads, image_elements + (result.out || whole ? 0 : outputs * row));
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (i64 task = 0; task < units * slices; ++task) {
    const i64 slice = task % slices, group = task / slices % s.groups;
    const i64 e = task / slices / s.groups;
    const i64 begin = slice * tiles / slices, end = (slice + 1) * tiles / slices;
    const T* a_of_group = a + e * s.a.example_stride + group * inputs;
    const T* g_of_group = g + e * s.g.example_stride + group * outputs;
    T* image = scratch.of_this_thread();
    T* gradient = result.out ? result.out + e * result.row_stride + group * outputs * row
                             : image + image_elements;
    double* squares = partial.data() + e * parts + group * tiles;
    for (const Box& box : boxes) {
      const bool first = &box == &boxes[0];
      padded.fill(s, box, !whole, a_of_group, inputs, image);
      const ConvWalk walk = padded.walk(s, box, s.g.stride[0], s.g.stride[1], s.g.stride[2]);
      const T* g_of_box = g_of_group + box.first[0] * s.g.stride[0] + box.first[1] * s.g.stride[1];
      for (i64 t = begin; t < end; ++t) {
        const i64 from = t * outputs / tiles;
        const int rows = int((t + 1) * outputs / tiles - from);
        if (whole && !result.out)
          squares[t] = kernel.squares(walk, image, g_of_box + from, rows, columns.data(), vectors);
        else
          kernel.store(walk, image, g_of_box + from, rows, columns.data(), vectors,
                       gradient + from * row, row, !first);
      }
    }
    for (i64 t = begin; t < end && !whole && !result.out; ++t) {
      const i64 from = t * outputs / tiles;
      squares[t] = sum_of_squares(gradient + from * row, ((t + 1) * outputs / tiles - from) * row);
    }
  }
  if (!result.out) add_up(partial, s.examples, result.norms);
}

// Vectors of channels copied together: neighbors in memory come from afar at one go.
constexpr i64 LANE_VECTORS = 4;

// Depthwise convolutions: one lane for each input channel. Output channels of one input channel
// come one after the other.
template <typename T>
void in_lanes(const ConvShape& s, const T* a, const T* g, const Result<T>& result) {
  const ConvBlocks<T>& kernel = blocks<T>();
  const i64 width = kernel.width, outputs = s.g.channels / s.groups, row = result.row;
  const i64 block = width * std::min(LANE_VECTORS, ceil_div(s.groups, width));  // channels
  const i64 bytes = (s.stride[1] * s.stride[2] + 1) * block * i64(sizeof(T));
  const std::vector<Box> boxes = cut_positions(s, bytes);
  const Padded padded(s, boxes[0], block);
  const Layout packed(boxes[0].size[0], boxes[0].size[1], boxes[0].size[2], block);
  std::vector<i64> taps;
  for (i64 i = 0; i < s.kernel[0]; ++i)
    for (i64 j = 0; j < s.kernel[1]; ++j)
      for (i64 k = 0; k < s.kernel[2]; ++k) taps.push_back(padded.offset(s, i, j, k));
  const i64 parts = ceil_div(s.groups, block);
  std::vector<double> partial(result.out ? 0 : static_cast<size_t>(s.examples * parts));

  [[maybe_unused]] const int threads = useful_threads(s);
  const i64 sums_elements = outputs * row * block;
  Scratch<T> scratch(threads, padded.layout.elements + packed.elements + sums_elements);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (i64 task = 0; task < s.examples * parts; ++task) {
    const i64 e = task / parts, channel = task % parts * block;
    const i64 lanes = std::min(block, s.groups - channel);
    const T* a_of_lanes = a + e * s.a.example_stride + channel;
    const T* g_of_lanes = g + e * s.g.example_stride + channel * outputs;
    T* image = scratch.of_this_thread();
    T* gradient = image + padded.layout.elements;
    T* sums = gradient + packed.elements;  // [block / width, outputs, row, width]
    std::fill_n(sums, sums_elements, T(0));
    for (const Box& box : boxes) {
      padded.fill(s, box, boxes.size() > 1, a_of_lanes, lanes, image);
      const ConvWalk walk = padded.walk(s, box, packed.plane, packed.row, packed.pixel);
      const T* g_of_box = g_of_lanes + box.first[0] * s.g.stride[0] + box.first[1] * s.g.stride[1];
      for (i64 o = 0; o < outputs; ++o) {
        copy_pixels(box.size, lanes, outputs, g_of_box + o, s.g.stride, gradient, packed);
        for (i64 l = 0; l < lanes; l += width)
          kernel.lanes(walk, image + l, gradient + l, taps.data(), row,
                       sums + (l * outputs + o * width) * row);
      }
    }
    double square = 0.0;
    for (i64 l = 0; l < lanes; ++l)
      for (i64 o = 0; o < outputs; ++o) {
        const T* from = sums + (l / width * outputs + o) * row * width + l % width;
        if (result.out) {
          T* to = result.out + e * result.row_stride + ((channel + l) * outputs + o) * row;
          for (i64 t = 0; t < row; ++t) to[t] = from[t * width];
        } else {
          for (i64 t = 0; t < row; ++t) square += double(from[t * width]) * double(from[t * width]);
        }
      }
    if (!result.out) partial[task] = square;
  }
  if (!result.out) add_up(partial, s.examples, result.norms);
}

template <typename T>
void run(const ConvShape& given, const T* a, const T* g, const Result<T>& result) {
  const ConvShape s = without_skipped_pixels(given);
  const bool depthwise = s.groups > 1 && s.a.channels == s.groups;
  depthwise ? in_lanes(s, a, g, result) : in_tiles(s, a, g, result);
}

// Elements of one output channel's weights.
i64 weights_of_a_channel(const ConvShape& s) {
  return s.kernel[0] * s.kernel[1] * s.kernel[2] * (s.a.channels / s.groups);
}

}  // namespace

template <typename T>
void conv_weight_grads(const ConvShape& s, const T* a, const T* g, T* out, i64 row_stride) {
  if (out == nullptr) return;  // nothing to write
  run(s, a, g, Result<T>{out, row_stride, nullptr, weights_of_a_channel(s)});
}

template <typename T>
void conv_weight_norms(const ConvShape& s, const T* a, const T* g, double* norms) {
  run(s, a, g, Result<T>{nullptr, 0, norms, weights_of_a_channel(s)});
}

namespace {

// Examples and groups; size, strides, example stride and channels of a, then of g; kernel, stride,
// padding and dilation; threads.
ConvShape conv_shape(Values& v) {
  ConvShape s{};
  v.into(s.examples, s.groups);
  for (ConvTensor* tensor : {&s.a, &s.g}) {
    for (i64& value : tensor->size) value = v;
    for (i64& value : tensor->stride) value = v;
    v.into(tensor->example_stride, tensor->channels);
  }
  for (auto* values : {&s.kernel, &s.stride, &s.padding, &s.dilation})
    for (i64& value : *values) value = v;
  s.threads = v;
  return s;
}

template <typename T>
void conv_weight_grads_kernel(Values& v) {
  const T *a = v, *g = v;
  T* out = v;
  const i64 row_stride = v;
  conv_weight_grads(conv_shape(v), a, g, out, row_stride);
}

template <typename T>
void conv_weight_norms_kernel(Values& v) {
  const T *a = v, *g = v;
  double* norms = v;
  conv_weight_norms(conv_shape(v), a, g, norms);
}

const RegisterKernel ADDED[] = {
    {"conv_weight_grads_cpu_float32", conv_weight_grads_kernel<float>},
    {"conv_weight_grads_cpu_float64", conv_weight_grads_kernel<double>},
    {"conv_weight_norms_cpu_float32", conv_weight_norms_kernel<float>},
    {"conv_weight_norms_cpu_float64", conv_weight_norms_kernel<double>},
};

}  // namespace

}  // namespace entropic::cpu
