// Compiled once for each instruction set, with ENTROPIC_ISA naming it, and with contraction to
// fused multiply-adds. Only functions with internal linkage here, and no standard library: see
// kernels/common.h.
#include "cpu/conv_example_grads.h"

namespace entropic::cpu {
namespace {

// Accumulators of a tile stay in registers over all positions: ROWS * VECTORS of them, beside
// VECTORS of the input and one of the gradient.
#if defined(__AVX512F__)
constexpr int BYTES = 64;
constexpr int ROWS = 8;
constexpr int VECTORS = 3;
#elif defined(__AVX2__)
constexpr int BYTES = 32;
constexpr int ROWS = 4;
constexpr int VECTORS = 3;
#else
constexpr int BYTES = 16;
constexpr int ROWS = 4;
constexpr int VECTORS = 2;
#endif
// Sums of squares are held in eight registers of doubles.
constexpr int LANES = BYTES;
// Kernel offsets of a depthwise convolution that are summed together.
constexpr int TAPS = 12;

template <typename T>
constexpr int WIDTH = BYTES / int(sizeof(T));

template <typename T>
struct Vector {
  typedef T type __attribute__((vector_size(BYTES)));
  typedef T unaligned __attribute__((vector_size(BYTES), aligned(alignof(T)), may_alias));
};
template <typename T>
using Vec = typename Vector<T>::type;

template <typename T>
EF_FN Vec<T> load(const T* address) {
  return *reinterpret_cast<const typename Vector<T>::unaligned*>(address);
}

template <typename T>
EF_FN void save(T* address, Vec<T> value) {
  *reinterpret_cast<typename Vector<T>::unaligned*>(address) = value;
}

template <typename T>
EF_FN Vec<T> broadcast(T value) {
  return value - Vec<T>{};
}

// sums[m, v] = sum_p g[p, m] a[p, columns[v].from ...]
template <typename T, int M, int V>
EF_FN void accumulate(const ConvWalk& walk, const T* a, const T* g, const ConvColumns* columns,
                      Vec<T> (&sums)[M][V]) {
  i64 from[V];
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) from[v] = columns[v].from;
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) sums[m][v] = Vec<T>{};
  const i64 width = walk.positions[2], a_step = walk.a_steps[2], g_step = walk.g_steps[2];
  for (i64 i = 0; i < walk.positions[0]; ++i)
    for (i64 j = 0; j < walk.positions[1]; ++j) {
      const T* a_at = a + i * walk.a_steps[0] + j * walk.a_steps[1];
      const T* g_at = g + i * walk.g_steps[0] + j * walk.g_steps[1];
      for (i64 k = 0; k < width; ++k) {
        Vec<T> inputs[V];
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) inputs[v] = load(a_at + from[v]);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
          const Vec<T> gradient = broadcast(g_at[m]);
#pragma GCC unroll 16
          for (int v = 0; v < V; ++v) sums[m][v] += gradient * inputs[v];
        }
        a_at += a_step;
        g_at += g_step;
      }
    }
}

template <typename T, int M, int V>
void store_tile(const ConvWalk& walk, const T* a, const T* g, const ConvColumns* columns, T* out,
                i64 row_stride, bool add) {
  Vec<T> sums[M][V];
  accumulate<T, M, V>(walk, a, g, columns, sums);
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) {
    T* to = out + columns[v].to;
    const int count = columns[v].count;
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m, to += row_stride) {
      if (count == WIDTH<T>) {
        save(to, add ? load(to) + sums[m][v] : sums[m][v]);
      } else {
        T lanes[WIDTH<T>];
        save(lanes, sums[m][v]);
        for (int l = 0; l < count; ++l) to[l] = add ? to[l] + lanes[l] : lanes[l];
      }
    }
  }
}

// Adds the squares of a tile to `lanes`. In double: the square of a float32 gradient can underflow.
template <typename T, int M, int V>
void square_tile(const ConvWalk& walk, const T* a, const T* g, const ConvColumns* columns,
                 double* lanes) {
  Vec<T> sums[M][V];
  accumulate<T, M, V>(walk, a, g, columns, sums);
  T values[(M * V * WIDTH<T> + LANES - 1) / LANES * LANES] = {};
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) save(values + (m * V + v) * WIDTH<T>, sums[m][v]);
  for (int v = 0; v < V; ++v)
    for (int l = columns[v].count; l < WIDTH<T>; ++l)
      for (int m = 0; m < M; ++m) values[(m * V + v) * WIDTH<T> + l] = T(0);
  for (int at = 0; at < M * V * WIDTH<T>; at += LANES)
    for (int l = 0; l < LANES; ++l) lanes[l] += double(values[at + l]) * double(values[at + l]);
}

template <typename T>
using StoreTile = void (*)(const ConvWalk&, const T*, const T*, const ConvColumns*, T*, i64, bool);
template <typename T>
using SquareTile = void (*)(const ConvWalk&, const T*, const T*, const ConvColumns*, double*);

// Tile functions by rows and vectors, both counted from 1.
template <typename T>
struct Tiles {
  StoreTile<T> store[ROWS][VECTORS];
  SquareTile<T> squares[ROWS][VECTORS];
};

template <typename T, int M, int V>
constexpr void fill(Tiles<T>& tiles) {
  tiles.store[M - 1][V - 1] = store_tile<T, M, V>;
  tiles.squares[M - 1][V - 1] = square_tile<T, M, V>;
  if constexpr (V > 1)
    fill<T, M, V - 1>(tiles);
  else if constexpr (M > 1)
    fill<T, M - 1, VECTORS>(tiles);
}

template <typename T>
constexpr Tiles<T> all_tiles() {
  Tiles<T> tiles{};
  fill<T, ROWS, VECTORS>(tiles);
  return tiles;
}

template <typename T>
constexpr Tiles<T> TILES = all_tiles<T>();

// Calls tile(first, count) for parts of nearly equal size, of at most `most`.
template <typename Tile>
EF_FN void for_each_tile(i64 total, i64 most, const Tile& tile) {
  const i64 tiles = ceil_div(total, most);
  for (i64 t = 0; t < tiles; ++t) {
    const i64 first = t * total / tiles;
    tile(first, int((t + 1) * total / tiles - first));
  }
}

template <typename T>
void store(const ConvWalk& walk, const T* a, const T* g, int rows, const ConvColumns* columns,
           i64 vectors, T* out, i64 row_stride, bool add) {
  for_each_tile(vectors, VECTORS, [&](i64 first, int count) {
    TILES<T>.store[rows - 1][count - 1](walk, a, g, columns + first, out, row_stride, add);
  });
}

template <typename T>
double squares(const ConvWalk& walk, const T* a, const T* g, int rows, const ConvColumns* columns,
               i64 vectors) {
  double lanes[LANES] = {};
  for_each_tile(vectors, VECTORS, [&](i64 first, int count) {
    TILES<T>.squares[rows - 1][count - 1](walk, a, g, columns + first, lanes);
  });
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  return lanes[0];
}

template <typename T, int N>
void lanes_of_taps(const ConvWalk& walk, const T* a, const T* g, const i64* taps, T* out) {
  Vec<T> sums[N];
#pragma GCC unroll 16
  for (int t = 0; t < N; ++t) sums[t] = Vec<T>{};
  for (i64 i = 0; i < walk.positions[0]; ++i)
    for (i64 j = 0; j < walk.positions[1]; ++j) {
      const T* a_at = a + i * walk.a_steps[0] + j * walk.a_steps[1];
      const T* g_at = g + i * walk.g_steps[0] + j * walk.g_steps[1];
      for (i64 k = 0; k < walk.positions[2]; ++k) {
        const Vec<T> gradient = load(g_at + k * walk.g_steps[2]);
        const T* here = a_at + k * walk.a_steps[2];
#pragma GCC unroll 16
        for (int t = 0; t < N; ++t) sums[t] += gradient * load(here + taps[t]);
      }
    }
#pragma GCC unroll 16
  for (int t = 0; t < N; ++t) save(out + t * WIDTH<T>, load(out + t * WIDTH<T>) + sums[t]);
}

template <typename T>
using LaneTile = void (*)(const ConvWalk&, const T*, const T*, const i64*, T*);

template <typename T>
struct LaneTiles {
  LaneTile<T> sum[TAPS];
};

template <typename T, int N>
constexpr void fill(LaneTiles<T>& tiles) {
  tiles.sum[N - 1] = lanes_of_taps<T, N>;
  if constexpr (N > 1) fill<T, N - 1>(tiles);
}

template <typename T>
constexpr LaneTiles<T> all_lane_tiles() {
  LaneTiles<T> tiles{};
  fill<T, TAPS>(tiles);
  return tiles;
}

template <typename T>
constexpr LaneTiles<T> LANE_TILES = all_lane_tiles<T>();

template <typename T>
void lanes(const ConvWalk& walk, const T* a, const T* g, const i64* taps, i64 count, T* sums) {
  for_each_tile(count, TAPS, [&](i64 first, int n) {
    LANE_TILES<T>.sum[n - 1](walk, a, g, taps + first, sums + first * WIDTH<T>);
  });
}

}  // namespace

namespace ENTROPIC_ISA {
extern const ConvBlocks<float> conv_f32;
extern const ConvBlocks<double> conv_f64;
const ConvBlocks<float> conv_f32 = {WIDTH<float>, ROWS, store<float>, squares<float>, lanes<float>};
const ConvBlocks<double> conv_f64 = {WIDTH<double>, ROWS, store<double>, squares<double>,
                                     lanes<double>};
}  // namespace ENTROPIC_ISA

}  // namespace entropic::cpu
