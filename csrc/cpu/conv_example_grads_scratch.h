// Scratch memory of per-example weight gradients: boxes of output positions, and zero-padded copies
// of the input they look at.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "cpu/conv_example_grads.h"

namespace entropic::cpu {
namespace {

// How pixels of some channels lie in scratch memory.
struct Layout {
  i64 plane, row, pixel, elements;

  Layout(i64 depth, i64 height, i64 width, i64 channels)
      : plane(height * width * channels),
        row(width * channels),
        pixel(channels),
        elements(depth * plane) {}
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
  if (count * size[2] == 0) return;  // `from` may be null
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

// Output positions that are summed together, a box of whole rows.
struct Box {
  i64 first[3], size[3];
};

// Input and gradient of a box stay in the second-level cache while all tiles read them.
constexpr i64 BOX_BYTES = 256 * 1024;

// At least one, and the first is the largest.
std::vector<Box> cut_positions(const ConvShape& s, i64 bytes_of_a_position) {
  const i64 fit = std::max<i64>(1, BOX_BYTES / std::max<i64>(1, s.g.size[2] * bytes_of_a_position));
  const i64 rows = std::min(fit, s.g.size[1]);
  const i64 planes = std::min(fit / std::max<i64>(1, rows), s.g.size[0]);
  std::vector<Box> boxes;
  for (i64 i = 0; i < s.g.size[0] && rows > 0; i += planes)
    for (i64 j = 0; j < s.g.size[1]; j += rows)
      boxes.push_back(
          {{i, j, 0},
           {std::min(planes, s.g.size[0] - i), std::min(rows, s.g.size[1] - j), s.g.size[2]}});
  if (boxes.empty()) boxes.push_back({{0, 0, 0}, {0, 0, 0}});
  return boxes;
}

// Scratch memory for everything a box's positions look at, with zeros where the input ends.
struct Padded {
  Layout layout;

  Padded(const ConvShape& s, const Box& largest, i64 channels)
      : layout(reach(s, largest, 0), reach(s, largest, 1), reach(s, largest, 2), channels) {}

  // Input pixels between the first and the last that positions of the box look at.
  static i64 reach(const ConvShape& s, const Box& box, int d) {
    return box.size[d] == 0
               ? 0
               : (box.size[d] - 1) * s.stride[d] + (s.kernel[d] - 1) * s.dilation[d] + 1;
  }

  // Where kernel offset (i, j, k) finds the pixel of the box's first position.
  i64 offset(const ConvShape& s, i64 i, i64 j, i64 k) const {
    return i * s.dilation[0] * layout.plane + j * s.dilation[1] * layout.row +
           k * s.dilation[2] * layout.pixel;
  }

  ConvWalk walk(const ConvShape& s, const Box& box, i64 g_plane, i64 g_row, i64 g_pixel) const {
    return {{box.size[0], box.size[1], box.size[2]},
            {s.stride[0] * layout.plane, s.stride[1] * layout.row, s.stride[2] * layout.pixel},
            {g_plane, g_row, g_pixel}};
  }

  // `clear` if another box has been here, whose zeros were elsewhere.
  template <typename T>
  void fill(const ConvShape& s, const Box& box, bool clear, const T* a, i64 count,
            T* padded) const {
    if (clear) std::fill_n(padded, layout.elements, T(0));
    const i64 steps[3] = {layout.plane, layout.row, layout.pixel};
    i64 inside[3];
    for (int d = 0; d < 3; ++d) {
      const i64 start = box.first[d] * s.stride[d] - s.padding[d];  // pixel of `a`, or before it
      const i64 before = std::max<i64>(0, -start), skipped = std::max<i64>(0, start);
      inside[d] = std::max<i64>(0, std::min(reach(s, box, d) - before, s.a.size[d] - skipped));
      a += skipped * s.a.stride[d];
      padded += before * steps[d];
    }
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

}  // namespace
}  // namespace entropic::cpu
