// Blocks for the caches and the threads, after Goto and van de Geijn (2008). Rows are copied into
// panels that all threads share; every entry of the matrix is one thread's within a stage and gains
// its sums of GRAM_DEPTH columns in their order, so results do not depend on the number of threads.
#include "cpu/gram_update.h"

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#include "cpu/isa.h"
#include "registry.h"

namespace entropic::cpu {
namespace {

// Rows and columns of the matrix that one task updates. The panels of 96 rows for a stage of 1024
// columns are 384 kB of float32: those of rows and columns stay in a level-2 cache of 1 MB.
constexpr i64 SQUARE = 96;

// A stage takes as many columns as fit in this many bytes of panels, so that the matrix itself is
// read and written rarely, but not beyond LONGEST, from where that gains nothing more.
constexpr i64 STAGE_BYTES = 16 << 20;
constexpr i64 LONGEST = 4 * GRAM_DEPTH;

// Below this many multiply-adds a second thread costs more than it brings.
constexpr double PARALLEL_FROM = 1 << 20;

constexpr std::size_t CACHE_LINE = 64;

template <typename Source, typename Product>
const GramBlocks<Source, Product>& blocks() {
  if constexpr (std::is_same_v<Source, double>)
    return ENTROPIC_TABLE(gram_f64_f64);
  else if constexpr (std::is_same_v<Product, double>)
    return ENTROPIC_TABLE(gram_f32_f64);
  else
    return ENTROPIC_TABLE(gram_f32_f32);
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

template <typename T>
std::unique_ptr<T, Free> allocate(i64 count) {
  const std::size_t bytes = static_cast<std::size_t>(ceil_div(count * i64(sizeof(T)), CACHE_LINE));
  void* memory = std::aligned_alloc(CACHE_LINE, bytes * CACHE_LINE);
  if (memory == nullptr) throw std::bad_alloc();
  return std::unique_ptr<T, Free>(static_cast<T*>(memory));
}

struct Square {
  i64 row, column;  // in panels
};

// The squares of `side` panels that hold entries to update.
std::vector<Square> squares(i64 row_panels, i64 column_panels, i64 side, bool lower) {
  std::vector<Square> all;
  for (i64 row = 0; row < row_panels; row += side)
    for (i64 column = 0; column < column_panels && (!lower || column <= row); column += side)
      all.push_back({row, column});
  return all;
}

i64 smaller(i64 a, i64 b) { return a < b ? a : b; }

}  // namespace

template <typename Source, typename Product>
void gram_update(double* out, i64 out_stride, GramRows<Source> a, GramRows<Source> b, i64 columns,
                 bool lower, int threads) {
  if (a.count == 0 || b.count == 0) return;
  const GramBlocks<Source, Product>& kernel = blocks<Source, Product>();
  const i64 width = kernel.width;
  const i64 a_panels = ceil_div(a.count, width);
  const i64 b_panels = lower ? 0 : ceil_div(b.count, width);  // packed apart from those of a
  const i64 panels = a_panels + b_panels;
  const i64 panel_size = width * GRAM_DEPTH;

  const i64 fitting = STAGE_BYTES / (panels * panel_size * i64(sizeof(Product)));
  const i64 longest = smaller(LONGEST, ceil_div(columns, GRAM_DEPTH) * GRAM_DEPTH);
  const i64 stage = fitting < 1 ? GRAM_DEPTH : smaller(fitting * GRAM_DEPTH, longest);
  const auto memory = allocate<Product>(panels * panel_size * (stage / GRAM_DEPTH));
  Product* const packed = memory.get();

  if (double(a.count) * double(b.count) * double(columns) < PARALLEL_FROM) threads = 1;
  i64 side = SQUARE / width;
  std::vector<Square> tasks = squares(a_panels, lower ? a_panels : b_panels, side, lower);
  while (threads > 1 && side > 1 && i64(tasks.size()) < 8 * threads) {
    side /= 2;
    tasks = squares(a_panels, lower ? a_panels : b_panels, side, lower);
  }
  const i64 task_count = i64(tasks.size());

#pragma omp parallel num_threads(threads)
  for (i64 start = 0; start < columns; start += stage) {
    const i64 end = smaller(start + stage, columns);
    const i64 depths = ceil_div(end - start, GRAM_DEPTH);

#pragma omp for schedule(static)
    for (i64 i = 0; i < depths * panels; ++i) {
      const i64 column = start + i / panels * GRAM_DEPTH;
      const i64 panel = i % panels;
      const GramRows<Source>& rows = panel < a_panels ? a : b;
      const i64 row = (panel < a_panels ? panel : panel - a_panels) * width;
      kernel.pack(rows.data + row * rows.stride + column, rows.stride,
                  smaller(rows.count - row, width), smaller(end - column, GRAM_DEPTH),
                  packed + i * panel_size);
    }

#pragma omp for schedule(dynamic)
    for (i64 task = 0; task < task_count; ++task) {
      const Square square = tasks[static_cast<std::size_t>(task)];
      for (i64 i = square.row; i < smaller(square.row + side, a_panels); ++i) {
        const i64 past = lower ? i + 1 : b_panels;
        for (i64 j = square.column; j < smaller(square.column + side, past); ++j)
          for (i64 d = 0; d < depths; ++d) {
            const Product* left = packed + d * panels * panel_size;
            const Product* right = left + (lower ? 0 : a_panels * panel_size);
            kernel.update(out + i * width * out_stride + j * width, out_stride,
                          left + i * panel_size, right + j * panel_size,
                          smaller(a.count - i * width, width), smaller(b.count - j * width, width),
                          lower && i == j, smaller(end - start - d * GRAM_DEPTH, GRAM_DEPTH));
          }
      }
    }
  }
}

namespace {

// Addresses of out, a and b; row strides of out, a and b; rows of a and b, columns; then `lower`.
template <typename Source, typename Product>
void gram_update_kernel(Values& v) {
  double* out = v;
  GramRows<Source> a{}, b{};
  i64 out_stride, columns;
  v.into(a.data, b.data, out_stride, a.stride, b.stride, a.count, b.count, columns);
  const bool lower = v;
  gram_update<Source, Product>(out, out_stride, a, b, columns, lower, int(v));
}

const RegisterKernel ADDED[] = {
    {"gram_update_cpu_float32", gram_update_kernel<float, float>},
    {"gram_update_in_double_cpu_float32", gram_update_kernel<float, double>},
    {"gram_update_cpu_float64", gram_update_kernel<double, double>},
};

}  // namespace

}  // namespace entropic::cpu
