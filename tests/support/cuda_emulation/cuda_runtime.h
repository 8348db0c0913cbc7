// Enough of CUDA's execution model to run csrc/cuda/*.cu on a CPU, compiled by a C++ compiler.
//
// A CUDA thread is a fiber with a stack of its own; blocks run one after another on one CPU thread.
// Threads of a warp meet at shuffles, threads of a block at barriers. Both see divergence: threads
// that wait at different lines, a shuffle that a lane named in its mask has left, a barrier that
// some threads of the block have left, and a deadlock are each a std::logic_error. A launch of an
// impossible size runs nothing and is an error that cudaGetLastError returns, as on a GPU.
//
// Seed 0 runs blocks, warps and threads in order. Any other seed draws a random order of all three
// and lets a warp run ahead of the others at random, so that a result which lacks a barrier
// changes with the seed. `__shared__` is static memory: a block finds what the one before left.
//
// What a new kernel needs beyond this is added here: the compiler names what is missing.
// tests/emulated_cuda.py rewrites launches, the only part of a .cu file that is not C++.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

typedef int cudaError_t;
typedef void* cudaStream_t;
constexpr cudaError_t cudaSuccess = 0;
constexpr cudaError_t cudaErrorInvalidConfiguration = 9;

namespace emulation {

constexpr int WARP = 32;
constexpr std::size_t STACK = 65536;
constexpr std::size_t LANE = 16;  // bytes that a thread can pass on in a shuffle

enum State { READY, AT_SHUFFLE, AT_BARRIER, ENDED };

struct Fiber {
  ucontext_t context;
  jmp_buf resume_at;
  bool started = false;
  State state = READY;
  int line = 0;  // of the shuffle or barrier it waits at
  dim3 index;
  // What the thread passes on. Two, used in turn: a thread may reach its next shuffle before the
  // others have read this one.
  unsigned char lane[2][LANE];
  int turn = 0;
  void* fake_stack = nullptr;
  std::unique_ptr<char[]> stack{new char[STACK]};
};

inline std::vector<std::unique_ptr<Fiber>> fibers;  // kept from launch to launch
inline std::function<void()> body;
inline std::exception_ptr trouble;
inline ucontext_t scheduler;
inline jmp_buf scheduler_at;
inline const void* scheduler_stack = nullptr;
inline std::size_t scheduler_stack_size = 0;
inline int current = 0, thread_count = 0;
inline dim3 block, block_size, grid_size;
inline std::mt19937 random;
inline unsigned seed = 0;
inline cudaError_t last_error = cudaSuccess;
inline int current_device = 0;

inline Fiber& self() { return *fibers[current]; }

// ---- switching between the scheduler and a fiber ---------------------------------------------
// swapcontext saves the signal mask, a system call each time; longjmp does not, which makes a
// launch ten times as fast. AddressSanitizer knows the former and has to be told of each switch.

#if defined(__SANITIZE_ADDRESS__)
inline void leave(void** fake_stack) {
  __sanitizer_start_switch_fiber(fake_stack, scheduler_stack, scheduler_stack_size);
  swapcontext(&self().context, &scheduler);
  __sanitizer_finish_switch_fiber(self().fake_stack, &scheduler_stack, &scheduler_stack_size);
}
inline void arrive() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
}
inline void suspend() { leave(&self().fake_stack); }
inline void end() { leave(nullptr); }
inline void resume(Fiber& fiber) {
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, fiber.stack.get(), STACK);
  swapcontext(&scheduler, &fiber.context);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}
#else
inline void arrive() {}
inline void end() { _longjmp(scheduler_at, 1); }
inline void suspend() {
  if (_setjmp(self().resume_at) == 0) end();
}
inline void resume(Fiber& fiber) {
  if (_setjmp(scheduler_at) != 0) return;
  if (fiber.started) _longjmp(fiber.resume_at, 1);
  fiber.started = true;
  setcontext(&fiber.context);
}
#endif

inline void run_thread() {
  arrive();
  try {
    body();
  } catch (...) {
    trouble = std::current_exception();
  }
  self().state = ENDED;
  end();
}

inline void wait(State state, int line) {
  self().state = state;
  self().line = line;
  suspend();
}

// ---- the scheduler ---------------------------------------------------------------------------

template <class T>
void reorder(std::vector<T>& order) {
  if (seed) std::shuffle(order.begin(), order.end(), random);
}

inline std::vector<int> range(int begin, int end) {
  std::vector<int> all(end - begin);
  std::iota(all.begin(), all.end(), begin);
  return all;
}

inline int count(State state, int begin, int end) {
  int found = 0;
  for (int i = begin; i < end; ++i) found += fibers[i]->state == state;
  return found;
}

// Threads that wait go on together, from one line.
inline void release(State state, int begin, int end, const char* what) {
  int line = 0;
  for (int i = begin; i < end; ++i) {
    if (fibers[i]->state != state) continue;
    if (line && fibers[i]->line != line)
      throw std::logic_error("threads wait at different " + std::string(what) + "s, of lines " +
                             std::to_string(line) + " and " + std::to_string(fibers[i]->line));
    line = fibers[i]->line;
    fibers[i]->state = READY;
  }
}

// Every thread of a warp that can run, up to its next shuffle or barrier or to its end. Whether
// any could.
inline bool stage(int warp) {
  const int begin = warp * WARP;
  const int end = std::min(thread_count, begin + WARP);
  const int waiting = count(AT_SHUFFLE, begin, end);
  if (waiting && count(READY, begin, end) == 0) {
    if (waiting < end - begin)
      throw std::logic_error("a shuffle that some lanes of its mask have left");
    release(AT_SHUFFLE, begin, end, "shuffle");
  }
  std::vector<int> order = range(begin, end);
  reorder(order);
  bool ran = false;
  for (int i : order) {
    if (fibers[i]->state != READY) continue;
    ran = true;
    current = i;
    resume(*fibers[i]);
    if (trouble) std::rethrow_exception(trouble);
  }
  return ran;
}

inline void start_fiber(int i) {
  Fiber& fiber = *fibers[i];
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = STACK;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, run_thread, 0);
  fiber.started = false;
  fiber.state = READY;
  fiber.turn = 0;
  fiber.index.x = i % block_size.x;
  fiber.index.y = i / block_size.x % block_size.y;
  fiber.index.z = i / block_size.x / block_size.y;
}

inline void run_block() {
  for (int i = 0; i < thread_count; ++i) start_fiber(i);
  std::vector<int> warps = range(0, (thread_count + WARP - 1) / WARP);
  for (int ended = 0; ended < thread_count; ended = count(ENDED, 0, thread_count)) {
    bool moved = false;
    reorder(warps);
    for (int warp : warps)
      while (stage(warp)) {
        moved = true;
        if (seed && random() % 8 == 0) break;  // another warp goes first
      }
    if (moved) continue;
    const int waiting = count(AT_BARRIER, 0, thread_count);
    if (waiting == 0) throw std::logic_error("deadlock: no thread of a block can run");
    if (waiting < thread_count)
      throw std::logic_error("a barrier that some threads of the block have left");
    release(AT_BARRIER, 0, thread_count, "barrier");
  }
}

inline bool possible(dim3 grid, dim3 threads) {
  return grid.x && grid.y && grid.z && threads.x && threads.y && threads.z &&
         grid.x <= 2147483647u && grid.y <= 65535 && grid.z <= 65535 &&
         threads.x * threads.y * threads.z <= 1024;
}

inline void launch(dim3 grid, dim3 threads, std::size_t, cudaStream_t,
                   const std::function<void()>& kernel) {
  if (!possible(grid, threads)) {
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  grid_size = grid;
  block_size = threads;
  thread_count = int(threads.x * threads.y * threads.z);
  while (int(fibers.size()) < thread_count) fibers.emplace_back(new Fiber);
  body = kernel;
  trouble = nullptr;
  random.seed(seed);
  std::vector<int> blocks = range(0, int(grid.x * grid.y * grid.z));
  reorder(blocks);
  for (int b : blocks) {
    block.x = unsigned(b) % grid.x;
    block.y = unsigned(b) / grid.x % grid.y;
    block.z = unsigned(b) / grid.x / grid.y;
    run_block();
  }
}

// What `mask` names has to be all lanes of the warp, as in every kernel so far.
template <class T>
T shuffle_down(unsigned mask, T value, int offset, int line) {
  static_assert(sizeof(T) <= LANE, "a shuffle of more bytes than a lane holds");
  const int warp = current / WARP * WARP;
  if (mask != 0xffffffffu || warp + WARP > thread_count)
    throw std::logic_error("a shuffle of a part of a warp");
  const int here = current;
  const int turn = self().turn;
  self().turn = 1 - turn;
  std::memcpy(self().lane[turn], &value, sizeof value);
  wait(AT_SHUFFLE, line);
  const int there = here + offset < warp + WARP ? here + offset : here;
  T found;
  std::memcpy(&found, fibers[there]->lane[turn], sizeof found);
  return found;
}

}  // namespace emulation

#define threadIdx (emulation::self().index)
#define blockIdx (emulation::block)
#define blockDim (emulation::block_size)
#define gridDim (emulation::grid_size)
#define __syncthreads() emulation::wait(emulation::AT_BARRIER, __LINE__)
#define __shfl_down_sync(mask, value, offset) \
  emulation::shuffle_down(mask, value, offset, __LINE__)

inline double __longlong_as_double(long long bits) {
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration argument"; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = emulation::current_device;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  emulation::current_device = device;
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() {
  const cudaError_t found = emulation::last_error;
  emulation::last_error = cudaSuccess;
  return found;
}
