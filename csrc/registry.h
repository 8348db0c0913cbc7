// The kernels of the compiled module. Each driver file adds its own when the module is loaded, and
// bindings.cpp gives them to Python; neither lists the other. Tensors are addresses, sizes and
// strides: no torch header anywhere, so one build serves every torch version.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <vector>

namespace entropic {

// One value of a call: an address, an integer (also as a real number), or a real number.
struct Value {
  std::int64_t integer;
  double real;
};

// The values of a call, read one after another in the order in which Python passes them. A braced
// list `{values, values, ...}` initializes the members of a struct in their order.
class Values {
 public:
  Values(const Value* begin, const Value* end) : next_(begin), end_(end) {}

  template <typename T>
  operator T*() {
    return reinterpret_cast<T*>(take().integer);
  }
  operator std::int64_t() { return take().integer; }
  operator std::uint64_t() { return std::uint64_t(take().integer); }
  operator int() { return int(take().integer); }
  operator bool() { return take().integer != 0; }
  operator double() { return take().real; }

  // Reads into several variables.
  template <typename... T>
  void into(T&... variables) {
    ((variables = T(*this)), ...);
  }

  bool all_read() const { return next_ == end_; }

 private:
  const Value& take() {
    if (next_ == end_) throw std::logic_error("a kernel was called with too few values");
    return *next_++;
  }

  const Value* next_;
  const Value* end_;
};

using Kernel = void (*)(Values&);

struct NamedKernel {
  const char* name;  // <function>_<device>[_<dtype>]
  Kernel run;
};

inline std::vector<NamedKernel>& kernels() {
  static std::vector<NamedKernel> all;
  return all;
}

// Adds a kernel: `static const RegisterKernel ADDED[] = {{"name_cpu_float32", function<float>}}`.
struct RegisterKernel {
  RegisterKernel(const char* name, Kernel run) { kernels().push_back({name, run}); }
};

}  // namespace entropic
