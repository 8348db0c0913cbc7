// One thread per counter: four words, and the numbers that they make. Which of rows and counters
// neighboring threads differ in goes by the strides of the result, so that they write side by side.
#include "cuda/device.h"
#include "cuda/random_bits.h"
#include "registry.h"

namespace entropic::cuda {
namespace {

constexpr int THREADS = 256;
// Thread blocks at most, some 60 per multiprocessor; threads then go on to further counters.
constexpr i64 LARGEST_GRID = 8192;

// Philox-4x32-10 (Salmon et al., SC 2011).
__device__ __forceinline__ void philox(u64 counter, u64 stream, u64 key, u32* words) {
  u32 c0 = u32(counter), c1 = u32(counter >> 32), c2 = u32(stream), c3 = u32(stream >> 32);
  u32 k0 = u32(key), k1 = u32(key >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const u64 p0 = u64(c0) * 0xD2511F53u, p1 = u64(c2) * 0xCD9E8D57u;
    c0 = u32(p1 >> 32) ^ c1 ^ k0;
    c2 = u32(p0 >> 32) ^ c3 ^ k1;
    c1 = u32(p1);
    c3 = u32(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

template <typename Number>
__global__ void __launch_bounds__(THREADS)
    fill_kernel(RandomFill call, u64 first_counter, i64 counters, bool rows_first) {
  using T = typename Number::Type;
  constexpr int NUMBERS = 4 / Number::WORDS;
  const i64 rows = call.streams * call.seeds, total = rows * counters;
  const i64 step = i64(gridDim.x) * THREADS;
  for (i64 i = i64(blockIdx.x) * THREADS + threadIdx.x; i < total; i += step) {
    const i64 row = rows_first ? i % rows : i / counters;
    const i64 c = rows_first ? i / rows : i % counters;
    const i64 s = row % call.seeds, t = row / call.seeds;
    u32 words[4];
    philox(first_counter + u64(c), call.first_stream + u64(t),
           call.keys == nullptr ? call.key : u64(call.keys[s]), words);
    T* to = static_cast<T*>(call.out) + t * call.strides[0] + s * call.strides[1];
    const i64 first = i64((first_counter + u64(c)) * NUMBERS) - call.start;
#pragma unroll
    for (int n = 0; n < NUMBERS; ++n) {
      const i64 j = first + n;
      if (j >= 0 && j < call.count) to[j * call.strides[2]] = Number::of(words + n * Number::WORDS);
    }
  }
}

__global__ void __launch_bounds__(THREADS) philox_kernel(RandomPhilox call) {
  const i64 total = call.rows * call.count, step = i64(gridDim.x) * THREADS;
  for (i64 i = i64(blockIdx.x) * THREADS + threadIdx.x; i < total; i += step) {
    const i64 row = i / call.count, c = i % call.count;
    u32 words[4];
    philox(u64(call.counters[row * call.strides[0] + c * call.strides[1]]), u64(call.streams[row]),
           u64(call.keys[row]), words);
#pragma unroll
    for (int n = 0; n < 4; ++n) call.out[4 * i + n] = i64(words[n]);
  }
}

unsigned grid_size(i64 total) {
  const i64 blocks = ceil_div(total, THREADS);
  return unsigned(blocks < LARGEST_GRID ? blocks : LARGEST_GRID);
}

i64 magnitude(i64 stride) { return stride < 0 ? -stride : stride; }

}  // namespace

void random_fill(const RandomFill& call, int device, void* stream) {
  const i64 rows = call.streams * call.seeds;
  if (rows == 0 || call.count == 0) return;
  const DeviceGuard guard(device);
  const auto queue = static_cast<cudaStream_t>(stream);
  with_number(call.kind, call.type, [&](auto number) {
    using Number = decltype(number);
    constexpr u64 NUMBERS = 4 / Number::WORDS;
    const u64 first = u64(call.start) / NUMBERS;
    const u64 last = u64(call.start + call.count - 1) / NUMBERS;
    const i64 counters = i64(last - first) + 1;
    const i64 across = magnitude(call.strides[call.seeds > 1 ? 1 : 0]);
    const bool rows_first = rows > 1 && across < magnitude(call.strides[2]);
    fill_kernel<Number>
        <<<grid_size(rows * counters), THREADS, 0, queue>>>(call, first, counters, rows_first);
  });
  check_launch("random_fill");
}

void random_philox(const RandomPhilox& call, int device, void* stream) {
  if (call.rows == 0 || call.count == 0) return;
  const DeviceGuard guard(device);
  const auto queue = static_cast<cudaStream_t>(stream);
  philox_kernel<<<grid_size(call.rows * call.count), THREADS, 0, queue>>>(call);
  check_launch("random_philox");
}

namespace {

void random_fill_kernel(Values& v) {
  const RandomFill call = random_fill_of(v);
  const int device = v;
  random_fill(call, device, static_cast<void*>(v));
}

void random_philox_kernel(Values& v) {
  const RandomPhilox call = random_philox_of(v);
  const int device = v;
  random_philox(call, device, static_cast<void*>(v));
}

const RegisterKernel ADDED[] = {
    {"random_fill_cuda", random_fill_kernel},
    {"random_philox_cuda", random_philox_kernel},
};

}  // namespace

}  // namespace entropic::cuda
