// Copies one example's input into zero-padded scratch memory of its thread, where the columns of a
// kernel row lie side by side, and sums tiles of the weight gradient over all positions. Nothing is
// unfolded. A tile depends on its example alone and the squares of tiles are added in a fixed
// order, so results do not depend on the number of threads.
#include "cpu/score_conv.h"

#include <algorithm>
#include <cstring>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "cpu/isa.h"
#include "cpu/score_conv_blocks.h"

namespace entropic::cpu {
namespace {

template <typename T>
const ConvBlocks<T>& blocks();

template <>
const ConvBlocks<float>& blocks<float>() {
  switch (current_isa()) {
#ifdef ENTROPIC_HAS_AVX512
    case AVX512:
      return avx512::score_conv_f32;
#endif
#ifdef ENTROPIC_HAS_AVX2
    case AVX2:
      return avx2::score_conv_f32;
#endif
    default:
      return portable::score_conv_f32;
  }
}

template <>
const ConvBlocks<double>& blocks<double>() {
  switch (current_isa()) {
#ifdef ENTROPIC_HAS_AVX512
    case AVX512:
      return avx512::score_conv_f64;
#endif
#ifdef ENTROPIC_HAS_AVX2
    case AVX2:
      return avx2::score_conv_f64;
#endif
    default:
      return portable::score_conv_f64;
  }
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

// How pixels of some channels lie in scratch memory.
struct Layout {
  i64 plane, row, pixel, elements;

  Layout(const i64 (&size)[3], i64 channels)
      : plane(size[1] * size[2] * channels),
        row(size[2] * channels),
        pixel(channels),
        elements(size[0] * plane) {}
};

// The compiler makes a few moves of a copy of known length.
template <typename T>
EF_FN void copy_channels(const T* from, i64 count, T* to) {
  if (count * sizeof(T) == 64)
    std::memcpy(to, from, 64);
  else if (count * sizeof(T) == 16)
    std::memcpy(to, from, 16);
  else if (count * sizeof(T) < 64)
    for (i64 c = 0; c < count; ++c) to[c] = from[c];
  else
    std::memcpy(to, from, static_cast<size_t>(count) * sizeof(T));
}

// Copies `count` channels, `step` apart, of size[0] x size[1] x size[2] pixels.
template <typename T>
void copy_pixels(const i64 (&size)[3], i64 count, i64 step, const T* from, const i64 (&stride)[3],
                 T* to, const Layout& layout) {
  const bool whole_rows = step == 1 && count == layout.pixel && stride[2] == count;
  for (i64 i = 0; i < size[0]; ++i)
    for (i64 j = 0; j < size[1]; ++j) {
      const T* source = from + i * stride[0] + j * stride[1];
      T* target = to + i * layout.plane + j * layout.row;
      if (whole_rows) {
        std::memcpy(target, source, static_cast<size_t>(size[2] * count) * sizeof(T));
        continue;
      }
      for (i64 k = 0; k < size[2]; ++k, source += stride[2], target += layout.pixel)
        if (step == 1)
          copy_channels(source, count, target);
        else
          for (i64 c = 0; c < count; ++c) target[c] = source[c * step];
    }
}

// Some channels of one example with zeros around them: everything that some position looks at.
struct Padded {
  i64 size[3];    // pixels
  i64 inside[3];  // how many of them, after the padding, the input has
  Layout layout;

  Padded(const ConvShape& s, i64 channels) : layout(reach(s), channels) {
    for (int d = 0; d < 3; ++d) inside[d] = std::clamp<i64>(size[d] - s.padding[d], 0, s.a.size[d]);
  }

  const i64 (&reach(const ConvShape& s))[3] {
    for (int d = 0; d < 3; ++d) {
      const i64 last = (s.g.size[d] - 1) * s.stride[d] + (s.kernel[d] - 1) * s.dilation[d];
      size[d] = std::max<i64>(0, last + 1);
    }
    return size;
  }

  // Where kernel offset (i, j, k) finds the pixel of position 0.
  i64 offset(const ConvShape& s, i64 i, i64 j, i64 k) const {
    return i * s.dilation[0] * layout.plane + j * s.dilation[1] * layout.row +
           k * s.dilation[2] * layout.pixel;
  }

  ConvWalk walk(const ConvShape& s, i64 g_plane, i64 g_row, i64 g_pixel) const {
    return {{s.g.size[0], s.g.size[1], s.g.size[2]},
            {s.stride[0] * layout.plane, s.stride[1] * layout.row, s.stride[2] * layout.pixel},
            {g_plane, g_row, g_pixel}};
  }

  // The zeros are there already, and nothing else writes on them.
  template <typename T>
  void fill(const ConvShape& s, const T* a, i64 count, T* padded) const {
    padded += s.padding[0] * layout.plane + s.padding[1] * layout.row + s.padding[2] * layout.pixel;
    copy_pixels(inside, count, 1, a, s.a.stride, padded, layout);
  }
};

// Zeroed memory for each thread, starting on a cache line.
template <typename T>
class Scratch {
 public:
  Scratch(int threads, i64 elements)
      : stride_(ceil_div(elements, LINE) * LINE + LINE),
        memory_(static_cast<size_t>(threads * stride_ + LINE)) {}

  T* of_this_thread() {
    i64 thread = 0;
#ifdef _OPENMP
    thread = omp_get_thread_num();
#endif
    const i64 misplaced = reinterpret_cast<std::uintptr_t>(memory_.data()) % 64 / sizeof(T);
    return memory_.data() + (LINE - misplaced) + thread * stride_;
  }

 private:
  static constexpr i64 LINE = 64 / sizeof(T);
  i64 stride_;
  std::vector<T> memory_;
};

// Kernel offsets times input channels of one group, cut into vectors. Without dilation the pixels
// of a kernel row are neighbours and are cut as one.
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

// What becomes of a tile: written to its place, or squared and summed. `part` counts an example's
// tiles.
template <typename T>
struct Store {
  T* out;
  i64 row_stride, row;  // elements from example to example, and of one output channel

  void prepare(i64, i64) {}
  void tile(const ConvBlocks<T>& kernel, const ConvWalk& walk, i64 e, i64, i64 channel, int rows,
            const T* a, const T* g, const std::vector<ConvColumns>& columns) {
    kernel.store(walk, a, g, rows, columns.data(), i64(columns.size()),
                 out + e * row_stride + channel * row, row);
  }
  void lane(i64 e, i64, i64 channel, const T* sums, i64 width) {
    T* to = out + e * row_stride + channel * row;
    for (i64 t = 0; t < row; ++t) to[t] = sums[t * width];
  }
  void finish() {}
};

template <typename T>
struct Square {
  double* norms;
  i64 row;
  i64 examples = 0, parts = 0;
  std::vector<double> partial = {};  // [n, parts]

  void prepare(i64 n, i64 count) {
    examples = n;
    parts = count;
    partial.assign(static_cast<size_t>(n * count), 0.0);
  }
  void tile(const ConvBlocks<T>& kernel, const ConvWalk& walk, i64 e, i64 part, i64, int rows,
            const T* a, const T* g, const std::vector<ConvColumns>& columns) {
    partial[e * parts + part] =
        kernel.squares(walk, a, g, rows, columns.data(), i64(columns.size()));
  }
  void lane(i64 e, i64 part, i64, const T* sums, i64 width) {
    for (i64 t = 0; t < row; ++t)
      partial[e * parts + part] += double(sums[t * width]) * double(sums[t * width]);
  }
  void finish() {
    for (i64 e = 0; e < examples; ++e) {
      norms[e] = 0.0;
      for (i64 part = 0; part < parts; ++part) norms[e] += partial[e * parts + part];
    }
  }
};

// Dense and grouped convolutions, group by group: some output channels times all columns at once.
template <typename T, typename End>
void in_tiles(const ConvShape& s, const T* a, const T* g, End& end) {
  const ConvBlocks<T>& kernel = blocks<T>();
  const i64 inputs = s.a.channels / s.groups, outputs = s.g.channels / s.groups;
  const Padded padded(s, inputs);
  const ConvWalk walk = padded.walk(s, s.g.stride[0], s.g.stride[1], s.g.stride[2]);
  const std::vector<ConvColumns> columns = cut_columns(s, padded, kernel.width);
  const i64 tiles = ceil_div(outputs, kernel.rows);  // of one group, of nearly equal height
  end.prepare(s.examples, s.groups * tiles);

  const int threads = useful_threads(s);
  // Groups of few examples are shared among threads, each with a copy of the input.
  const i64 units = s.examples * s.groups;
  const i64 wanted = threads == 1 || units >= 4 * threads ? 1 : ceil_div(4 * threads, units);
  const i64 slices = std::min(wanted, tiles);
  Scratch<T> scratch(threads, padded.layout.elements + kernel.width);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (i64 task = 0; task < units * slices; ++task) {
    const i64 slice = task % slices, group = task / slices % s.groups;
    const i64 e = task / slices / s.groups;
    T* image = scratch.of_this_thread();
    padded.fill(s, a + e * s.a.example_stride + group * inputs, inputs, image);
    for (i64 t = slice * tiles / slices; t < (slice + 1) * tiles / slices; ++t) {
      const i64 first = t * outputs / tiles, last = (t + 1) * outputs / tiles;
      const i64 channel = group * outputs + first;
      end.tile(kernel, walk, e, group * tiles + t, channel, int(last - first), image,
               g + e * s.g.example_stride + channel, columns);
    }
  }
  end.finish();
}

// Depthwise convolutions: one lane for each input channel. Output channels of one input channel
// come one after the other.
template <typename T, typename End>
void in_lanes(const ConvShape& s, const T* a, const T* g, End& end) {
  const ConvBlocks<T>& kernel = blocks<T>();
  const i64 width = kernel.width, outputs = s.g.channels / s.groups;
  const Padded padded(s, width);
  const Layout gradient(s.g.size, width);
  const ConvWalk walk = padded.walk(s, gradient.plane, gradient.row, gradient.pixel);
  std::vector<i64> taps;
  for (i64 i = 0; i < s.kernel[0]; ++i)
    for (i64 j = 0; j < s.kernel[1]; ++j)
      for (i64 k = 0; k < s.kernel[2]; ++k) taps.push_back(padded.offset(s, i, j, k));
  const i64 count = i64(taps.size()), vectors = ceil_div(s.groups, width);
  end.prepare(s.examples, vectors);

  const int threads = useful_threads(s);
  Scratch<T> scratch(threads, padded.layout.elements + gradient.elements + count * width);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (i64 task = 0; task < s.examples * vectors; ++task) {
    const i64 e = task / vectors, first = task % vectors * width;
    const i64 lanes = std::min(width, s.groups - first);
    T* image = scratch.of_this_thread();
    T* packed = image + padded.layout.elements;
    T* sums = packed + gradient.elements;
    padded.fill(s, a + e * s.a.example_stride + first, lanes, image);
    for (i64 output = 0; output < outputs; ++output) {
      copy_pixels(s.g.size, lanes, outputs,
                  g + e * s.g.example_stride + first * outputs + output, s.g.stride, packed,
                  gradient);
      kernel.lanes(walk, image, packed, taps.data(), count, sums);
      for (i64 l = 0; l < lanes; ++l)
        end.lane(e, task % vectors, (first + l) * outputs + output, sums + l, width);
    }
  }
  end.finish();
}

template <typename T, typename End>
void run(const ConvShape& given, const T* a, const T* g, End end) {
  const ConvShape s = without_skipped_pixels(given);
  const bool depthwise = s.groups > 1 && s.a.channels == s.groups;
  depthwise ? in_lanes(s, a, g, end) : in_tiles(s, a, g, end);
}

// Elements of one output channel's weights.
i64 weights_of_a_channel(const ConvShape& s) {
  return s.kernel[0] * s.kernel[1] * s.kernel[2] * (s.a.channels / s.groups);
}

}  // namespace

template <typename T>
void conv_weight_grads(const ConvShape& s, const T* a, const T* g, T* out, i64 row_stride) {
  run(s, a, g, Store<T>{out, row_stride, weights_of_a_channel(s)});
}

template <typename T>
void conv_weight_norms(const ConvShape& s, const T* a, const T* g, double* norms) {
  run(s, a, g, Square<T>{norms, weights_of_a_channel(s)});
}

#define ENTROPIC_INSTANTIATE(T)                                                         \
  template void conv_weight_grads<T>(const ConvShape&, const T*, const T*, T*, i64);    \
  template void conv_weight_norms<T>(const ConvShape&, const T*, const T*, double*);
ENTROPIC_INSTANTIATE(float)
ENTROPIC_INSTANTIATE(double)
#undef ENTROPIC_INSTANTIATE

}  // namespace entropic::cpu
