// Cuts the rows into chunks. Sums over rows are those of fixed chunks, added in order: results do
// not depend on the number of threads.
#include "cpu/row_norm_tangents.h"

#include <algorithm>
#include <cstddef>
#include <type_traits>
#include <vector>

#include "cpu/isa.h"
#include "registry.h"

namespace entropic::cpu {
namespace {

// Below this many elements a second thread costs more than it brings.
constexpr i64 PARALLEL_FROM = 32768;
// Rows whose weight gradients are summed in type T before the sums go to doubles.
constexpr i64 BLOCK_ROWS = 32;
// At most this many chunks: each holds separate sums [K, d].
constexpr i64 MOST_CHUNKS = 64;

template <typename T>
const RowNormTable<T>& table() {
  if constexpr (std::is_same_v<T, float>)
    return ENTROPIC_TABLE(row_norm_tangents_f32);
  else
    return ENTROPIC_TABLE(row_norm_tangents_f64);
}

struct Chunks {
  i64 rows, size, count;
  explicit Chunks(i64 rows)
      : rows(rows),
        size(std::max(BLOCK_ROWS, ceil_div(ceil_div(rows, MOST_CHUNKS), BLOCK_ROWS) * BLOCK_ROWS)),
        count(ceil_div(rows, size)) {}
  i64 first(i64 chunk) const { return chunk * size; }
  i64 last(i64 chunk) const { return std::min(rows, (chunk + 1) * size); }
};

std::vector<double> zeros(i64 size) {
  return std::vector<double>(static_cast<std::size_t>(size));
}

// The sum over chunks of sums [chunks, size].
template <typename T>
void add_up(const std::vector<double>& sums, i64 chunks, i64 size, T* to) {
  for (i64 i = 0; i < size; ++i) {
    double sum = 0.0;
    for (i64 chunk = 0; chunk < chunks; ++chunk) sum += sums[std::size_t(chunk * size + i)];
    to[i] = T(sum);
  }
}

}  // namespace

template <typename T>
void row_norm_jvp(const RowNormJvp<T>& call, int threads) {
  const auto run = table<T>().jvp;
  const Chunks chunks(call.rows);
  const bool wanted = call.cotangent != nullptr;
  std::vector<double> terms = zeros(wanted ? chunks.count * call.tangents : 0);
  if (call.tangents * call.rows * call.width < PARALLEL_FROM) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (i64 chunk = 0; chunk < chunks.count; ++chunk)
    run(call, chunks.first(chunk), chunks.last(chunk),
        wanted ? terms.data() + chunk * call.tangents : nullptr);
  if (wanted) add_up(terms, chunks.count, call.tangents, call.terms);
}

template <typename T>
void row_norm_vjp_tangent(const RowNormVjpTangent<T>& call, int threads) {
  const auto run = table<T>().vjp_tangent;
  const Chunks chunks(call.rows);
  const i64 size = call.tangents * call.width;
  const bool scale = call.dweight != nullptr, shift = call.dbias != nullptr;
  std::vector<double> dweight = zeros(scale ? chunks.count * size : 0);
  std::vector<double> dbias = zeros(shift ? chunks.count * size : 0);
  if (size * call.rows < PARALLEL_FROM) threads = 1;
#pragma omp parallel num_threads(threads)
  {
    std::vector<T> sums(static_cast<std::size_t>(2 * size));
    T* one = scale ? sums.data() : nullptr;
    T* other = shift ? sums.data() + size : nullptr;
#pragma omp for schedule(static)
    for (i64 chunk = 0; chunk < chunks.count; ++chunk) {
      for (i64 row = chunks.first(chunk); row < chunks.last(chunk); row += BLOCK_ROWS) {
        std::fill(sums.begin(), sums.end(), T(0));
        run(call, row, std::min(row + BLOCK_ROWS, chunks.last(chunk)), one, other);
        for (i64 i = 0; i < size; ++i) {
          if (scale) dweight[std::size_t(chunk * size + i)] += double(one[i]);
          if (shift) dbias[std::size_t(chunk * size + i)] += double(other[i]);
        }
      }
    }
  }
  if (scale) add_up(dweight, chunks.count, size, call.dweight);
  if (shift) add_up(dbias, chunks.count, size, call.dbias);
}

namespace {

// Values in the order of the struct's members.
template <typename T>
void jvp_kernel(Values& v) {
  const RowNormJvp<T> call{v, v, v, v, v, v, v, v, v, v, v, v, v};
  row_norm_jvp(call, int(v));
}

template <typename T>
void vjp_tangent_kernel(Values& v) {
  const RowNormVjpTangent<T> call{v, v, v, v, v, v, v, v, v, v, v, v, v, v};
  row_norm_vjp_tangent(call, int(v));
}

const RegisterKernel ADDED[] = {
    {"row_norm_jvp_cpu_float32", jvp_kernel<float>},
    {"row_norm_jvp_cpu_float64", jvp_kernel<double>},
    {"row_norm_vjp_tangent_cpu_float32", vjp_tangent_kernel<float>},
    {"row_norm_vjp_tangent_cpu_float64", vjp_tangent_kernel<double>},
};

}  // namespace

}  // namespace entropic::cpu
