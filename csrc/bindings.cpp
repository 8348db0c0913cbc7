// The only pybind11 file. Whoever calls the kernels (entropic_fast/ops, nobody else) has already
// checked dtype, device, shape, contiguity and overlap.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "cpu/isa.h"
#include "registry.h"
#include "cpu/conv_example_grads.h"
#include "cpu/gram_update.h"
#include "cpu/langevin.h"
#include "cpu/norm_act_tangents.h"
#include "cpu/norm_example_grads.h"
#include "cpu/projected_step.h"
#include "cpu/random_bits.h"
#ifdef ENTROPIC_HAS_CUDA
#include "cuda/projected_step.h"
#include "cuda/random_bits.h"
#endif

namespace py = pybind11;

namespace {

py::dict build_config() {
  py::dict config;
#if defined(__clang__)
  config["compiler"] = "clang " __clang_version__;
#else
  config["compiler"] = "gcc " __VERSION__;
#endif
#ifdef _OPENMP
  config["openmp"] = _OPENMP;
#else
  config["openmp"] = 0;
#endif
  config["isas"] = py::str(ENTROPIC_ISAS).attr("split")();
#ifdef ENTROPIC_HAS_CUDA
  config["cuda"] = true;
#else
  config["cuda"] = false;
#endif
  config["cuda_compiler"] = ENTROPIC_CUDA_STORY;
  config["cuda_archs"] = py::str(ENTROPIC_CUDA_ARCHS).attr("split")();
  return config;
}

// Threads a parallel region gets when nobody asks for a number: torch.set_num_threads governs it
// where the module shares torch's OpenMP runtime.
int default_threads() {
  int threads = 1;
#ifdef _OPENMP
#pragma omp parallel
#pragma omp single
  threads = omp_get_num_threads();
#endif
  return threads;
}

entropic::Value value_of(PyObject* object) {
  if (object == Py_None) return {0, 0.0};  // an absent tensor
  if (PyFloat_Check(object)) return {0, PyFloat_AS_DOUBLE(object)};
  if (PyLong_Check(object)) {
    // Seeds use all 64 bits: the same number modulo 2^64, negative or not.
    const unsigned long long bits = PyLong_AsUnsignedLongLongMask(object);
    if (PyErr_Occurred()) throw py::error_already_set();
    const auto integer = static_cast<std::int64_t>(bits);
    return {integer, static_cast<double>(integer)};
  }
  const double real = PyFloat_AsDouble(object);  // numbers of other packages
  if (PyErr_Occurred()) throw py::error_already_set();
  return {0, real};
}

void call(entropic::Kernel run, const py::list& arguments) {
  std::vector<entropic::Value> values;
  values.reserve(arguments.size());
  for (const py::handle& argument : arguments) values.push_back(value_of(argument.ptr()));
  entropic::Values reader(values.data(), values.data() + values.size());
  py::gil_scoped_release release;
  run(reader);
  if (!reader.all_read()) throw std::logic_error("a kernel was called with too many values");
}

// Entry points under their former names; none is used any more.
namespace legacy {

using entropic::AdamOptions;
using entropic::i64;
using entropic::SgdOptions;
using Address = std::uintptr_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// The shape of a call: theta, pivots and products, sizes, then where it runs.
template <typename T>
struct Cpu {
  static entropic::cpu::StepShape<T> shape(const py::tuple& t) {
    return {at<T>(t[0].cast<Address>()), at<const T>(t[1].cast<Address>()),
            at<double>(t[2].cast<Address>()), t[3].cast<i64>(), t[4].cast<i64>(),
            t[5].cast<i64>(), t[6].cast<int>(), at<const i64>(t[7].cast<Address>()),
            at<const double>(t[8].cast<Address>())};
  }
};

#ifdef ENTROPIC_HAS_CUDA
template <typename T>
struct Gpu {
  static entropic::cuda::StepShape<T> shape(const py::tuple& t) {
    return {at<T>(t[0].cast<Address>()), at<const T>(t[1].cast<Address>()),
            at<double>(t[2].cast<Address>()), at<double>(t[6].cast<Address>()),
            t[3].cast<i64>(), t[4].cast<i64>(), t[5].cast<i64>(), t[7].cast<int>(),
            at<void>(t[8].cast<Address>())};
  }
};
#endif

template <typename T, template <typename> class Where>
void sgd_step(const py::tuple& where, Address grad, Address buffer, Address lr, double momentum,
              double dampening, double weight_decay, bool nesterov, bool first) {
  const auto shape = Where<T>::shape(where);
  const SgdOptions options{momentum, dampening, weight_decay, nesterov, first};
  py::gil_scoped_release release;
  sgd_step(shape, at<const T>(grad), at<T>(buffer), at<const double>(lr), options);
}

template <typename T, template <typename> class Where>
void adam_step(const py::tuple& where, Address grad, Address exp_avg, Address exp_avg_sq,
               Address step, Address lr, double beta1, double beta2, double eps,
               double weight_decay, bool decoupled) {
  const auto shape = Where<T>::shape(where);
  const AdamOptions options{beta1, beta2, eps, weight_decay, decoupled};
  py::gil_scoped_release release;
  adam_step(shape, at<const T>(grad), at<T>(exp_avg), at<T>(exp_avg_sq), at<const i64>(step),
            at<const double>(lr), options);
}

template <typename T, template <typename> class Where>
void project_step(const py::tuple& where, Address segment_squares, Address segment, Address t,
                  Address distance) {
  const auto shape = Where<T>::shape(where);
  py::gil_scoped_release release;
  project_step(shape, at<const double>(segment_squares), at<i64>(segment), at<double>(t),
               at<double>(distance));
}

template <typename T, template <typename> class Where>
void define_step(py::module_& m, const std::string& suffix) {
  m.def(("sgd_step" + suffix).c_str(), &sgd_step<T, Where>);
  m.def(("adam_step" + suffix).c_str(), &adam_step<T, Where>);
  m.def(("project_step" + suffix).c_str(), &project_step<T, Where>);
}

// Examples and groups; size, strides, example stride and channels of a, then of g; kernel, stride,
// padding and dilation; threads.
entropic::cpu::ConvShape conv_shape(const py::tuple& t) {
  entropic::cpu::ConvShape s;
  int at = 0;
  const auto next = [&] { return t[at++].cast<i64>(); };
  s.examples = next();
  s.groups = next();
  for (entropic::cpu::ConvTensor* tensor : {&s.a, &s.g}) {
    for (i64& value : tensor->size) value = next();
    for (i64& value : tensor->stride) value = next();
    tensor->example_stride = next();
    tensor->channels = next();
  }
  for (auto* values : {&s.kernel, &s.stride, &s.padding, &s.dilation})
    for (i64& value : *values) value = next();
  s.threads = int(next());
  return s;
}

template <typename T>
void conv_weight_grads(const py::tuple& shape, Address a, Address g, Address out, i64 row_stride) {
  const auto s = conv_shape(shape);
  py::gil_scoped_release release;
  entropic::cpu::conv_weight_grads(s, at<const T>(a), at<const T>(g), at<T>(out), row_stride);
}

template <typename T>
void conv_weight_norms(const py::tuple& shape, Address a, Address g, Address norms) {
  const auto s = conv_shape(shape);
  py::gil_scoped_release release;
  entropic::cpu::conv_weight_norms(s, at<const T>(a), at<const T>(g), at<double>(norms));
}

template <typename T>
void define_score_conv(py::module_& m, const std::string& suffix) {
  m.def(("conv_weight_grads" + suffix).c_str(), &conv_weight_grads<T>);
  m.def(("conv_weight_norms" + suffix).c_str(), &conv_weight_norms<T>);
}

template <typename Source, typename Product>
void gram_update(Address out, i64 out_stride, Address a, i64 a_count, i64 a_stride, Address b,
                 i64 b_count, i64 b_stride, i64 columns, bool lower, int threads) {
  py::gil_scoped_release release;
  entropic::cpu::gram_update<Source, Product>(
      at<double>(out), out_stride, {at<const Source>(a), a_count, a_stride},
      {at<const Source>(b), b_count, b_stride}, columns, lower, threads);
}

// Addresses of x, g, mean, rstd, weight, grad_x (0 for no grad_x), dscale and dshift; sizes
// n, S, C; strides of mean and rstd along them, 0 where they do not depend on that index.
template <typename T>
void norm_grads(const py::tuple& addresses, const py::tuple& sizes, const py::tuple& strides,
                int threads) {
  const auto address = [&](int i) { return addresses[i].cast<Address>(); };
  const auto number = [](const py::tuple& t, int i) { return t[i].cast<i64>(); };
  const entropic::cpu::NormGrads<T> call{
      at<const T>(address(0)), at<const T>(address(1)), at<const T>(address(2)),
      at<const T>(address(3)), at<const T>(address(4)), at<T>(address(5)), at<T>(address(6)),
      at<T>(address(7)), number(sizes, 0), number(sizes, 1), number(sizes, 2), number(strides, 0),
      number(strides, 1), number(strides, 2)};
  py::gil_scoped_release release;
  entropic::cpu::norm_grads(call, threads);
}

// Addresses and numbers of a call in the order of its struct's members, 0 for what is absent.
template <typename T>
struct Next {
  const py::tuple& values;
  std::size_t i = 0;
  T* address() { return at<T>(values[i++].cast<Address>()); }
  double* doubles() { return at<double>(values[i++].cast<Address>()); }
  i64 number() { return values[i++].cast<i64>(); }
  entropic::cpu::TangentSizes sizes() {
    const i64 tangents = number(), pixels = number();
    return {tangents, pixels, number()};
  }
};

// Sizes K, m, C; u, extra, normal, scale, tscale, tshift, residual, slope, cotangent, bend, out,
// sums, forms; strides of u, extra (k and pixel), residual and out along k.
template <typename T>
void jet_push(const py::tuple& values, int threads) {
  Next<T> next{values};
  entropic::cpu::NormActJvp<T> call{};
  call.sizes = next.sizes();
  call.u = next.address();
  for (const T** piece : {&call.extra, &call.normal, &call.scale, &call.tscale, &call.tshift,
                          &call.residual, &call.slope, &call.cotangent, &call.bend})
    *piece = next.address();
  call.out = next.address();
  call.sums = next.doubles();
  call.forms = next.doubles();
  for (i64* stride :
       {&call.u_k, &call.extra_k, &call.extra_pixel, &call.residual_k, &call.out_k})
    *stride = next.number();
  py::gil_scoped_release release;
  entropic::cpu::jvp(call, threads);
}

// Sizes K, m, C; u, extra, residual, slope, normal, scale, tscale, cotangent, ty, rstd, out,
// dscale, dshift; strides of u, extra (k and pixel), residual, ty and out along k.
template <typename T>
void jet_pull(const py::tuple& values, int threads) {
  Next<T> next{values};
  entropic::cpu::NormActVjpTangent<T> call{};
  call.sizes = next.sizes();
  call.u = next.address();
  for (const T** piece : {&call.extra, &call.residual, &call.slope, &call.normal, &call.scale,
                          &call.tscale, &call.cotangent, &call.ty, &call.rstd})
    *piece = next.address();
  for (T** result : {&call.out, &call.dscale, &call.dshift}) *result = next.address();
  for (i64* stride : {&call.u_k, &call.extra_k, &call.extra_pixel, &call.residual_k, &call.ty_k,
                      &call.out_k})
    *stride = next.number();
  py::gil_scoped_release release;
  entropic::cpu::vjp_tangent(call, threads);
}

// Sizes 1, m, C; y, mean, rstd, weight, bias, residual, z, normal, slope.
template <typename T>
void jet_normalise(const py::tuple& values, int threads) {
  Next<T> next{values};
  entropic::cpu::NormAct<T> call{};
  call.sizes = next.sizes();
  for (const T** piece :
       {&call.y, &call.mean, &call.rstd, &call.weight, &call.bias, &call.residual})
    *piece = next.address();
  for (T** result : {&call.z, &call.normal, &call.slope}) *result = next.address();
  py::gil_scoped_release release;
  entropic::cpu::norm_act(call, threads);
}

// Sizes K, m, C; a, b, result; strides of a along k, of b along k and pixels.
template <typename T>
void jet_inner(const py::tuple& values, int threads) {
  Next<T> next{values};
  entropic::cpu::InnerProducts<T> call{};
  call.sizes = next.sizes();
  call.a = next.address();
  call.b = next.address();
  call.result = next.doubles();
  for (i64* stride : {&call.a_k, &call.b_k, &call.b_pixel}) *stride = next.number();
  py::gil_scoped_release release;
  entropic::cpu::inner_products(call, threads);
}

template <typename T>
void define_jet(py::module_& m, const std::string& suffix) {
  m.def(("jet_push" + suffix).c_str(), &jet_push<T>);
  m.def(("jet_pull" + suffix).c_str(), &jet_pull<T>);
  m.def(("jet_normalise" + suffix).c_str(), &jet_normalise<T>);
  m.def(("jet_inner" + suffix).c_str(), &jet_inner<T>);
}

// Addresses of x and v (0 for overdamped schemes), sizes N and D; potential and its parameters;
// scheme; drift, decay and noise; steps, first step, first particle and seed.
template <typename T>
void langevin_advance(Address x, Address v, i64 particles, i64 dim, int potential,
                      const py::tuple& parameters, int scheme, const py::tuple& coefficients,
                      const py::tuple& counts, int threads) {
  entropic::cpu::Langevin<T> call{};
  call.x = at<T>(x);
  call.v = at<T>(v);
  call.particles = particles;
  call.dim = dim;
  call.potential = static_cast<entropic::cpu::LangevinPotential>(potential);
  for (std::size_t i = 0; i < parameters.size(); ++i)
    call.parameters[i] = parameters[i].cast<double>();
  call.scheme = static_cast<entropic::cpu::LangevinScheme>(scheme);
  std::size_t i = 0;
  for (double* value : {&call.drift, &call.decay, &call.noise})
    *value = coefficients[i++].cast<double>();
  i = 0;
  for (i64* value : {&call.steps, &call.first_step, &call.first_particle})
    *value = counts[i++].cast<i64>();
  call.seed = counts[i].cast<std::uint64_t>();
  py::gil_scoped_release release;
  entropic::cpu::langevin_steps(call, threads);
}

template <typename T>
void langevin_box_muller(Address words, Address normal, i64 pairs) {
  py::gil_scoped_release release;
  entropic::cpu::langevin_box_muller(at<const i64>(words), at<T>(normal), pairs);
}

template <typename T>
void define_langevin(py::module_& m, const std::string& suffix) {
  m.def(("langevin_advance" + suffix).c_str(), &langevin_advance<T>);
  m.def(("langevin_box_muller" + suffix).c_str(), &langevin_box_muller<T>);
}

// Address of the result, sizes [streams, seeds, count] and strides; address of the seeds, or 0 for
// the one given, that seed, the first stream and the first number; kind and type. Then where: the
// number of threads, or device and stream.
entropic::RandomFill random_fill_call(const py::tuple& values) {
  std::size_t i = 0;
  const auto address = [&] { return values[i++].cast<Address>(); };
  const auto number = [&] { return values[i++].cast<i64>(); };
  entropic::RandomFill call{};
  call.out = at<void>(address());
  for (i64* size : {&call.streams, &call.seeds, &call.count}) *size = number();
  for (i64& stride : call.strides) stride = number();
  call.keys = at<const i64>(address());
  call.key = entropic::u64(number());
  call.first_stream = entropic::u64(number());
  call.start = number();
  call.kind = static_cast<entropic::RandomKind>(number());
  call.type = static_cast<entropic::RandomType>(number());
  return call;
}

// Addresses of counters, seeds, streams and the result; sizes [rows, count]; strides of counters.
entropic::RandomPhilox random_philox_call(const py::tuple& values) {
  const auto address = [&](int i) { return values[i].cast<Address>(); };
  const auto number = [&](int i) { return values[i].cast<i64>(); };
  entropic::RandomPhilox call{};
  call.counters = at<const i64>(address(0));
  call.keys = at<const i64>(address(1));
  call.streams = at<const i64>(address(2));
  call.out = at<i64>(address(3));
  call.rows = number(4);
  call.count = number(5);
  call.strides[0] = number(6);
  call.strides[1] = number(7);
  return call;
}

void random_fill_cpu(const py::tuple& values, int threads) {
  const auto call = random_fill_call(values);
  py::gil_scoped_release release;
  entropic::cpu::random_fill(call, threads);
}

void random_philox_cpu(const py::tuple& values, int threads) {
  const auto call = random_philox_call(values);
  py::gil_scoped_release release;
  entropic::cpu::random_philox(call, threads);
}

#ifdef ENTROPIC_HAS_CUDA
void random_fill_cuda(const py::tuple& values, int device, Address stream) {
  const auto call = random_fill_call(values);
  py::gil_scoped_release release;
  entropic::cuda::random_fill(call, device, at<void>(stream));
}

void random_philox_cuda(const py::tuple& values, int device, Address stream) {
  const auto call = random_philox_call(values);
  py::gil_scoped_release release;
  entropic::cuda::random_philox(call, device, at<void>(stream));
}
#endif


void define(py::module_& m) {
  define_step<float, Cpu>(m, "_cpu_float32");
  define_step<double, Cpu>(m, "_cpu_float64");
  define_score_conv<float>(m, "_cpu_float32");
  define_score_conv<double>(m, "_cpu_float64");
  m.def("gram_update_float32", &gram_update<float, float>);
  m.def("gram_update_float32_in_double", &gram_update<float, double>);
  m.def("gram_update_float64", &gram_update<double, double>);
  m.def("norm_grads_float32", &norm_grads<float>);
  m.def("norm_grads_float64", &norm_grads<double>);
  define_jet<float>(m, "_cpu_float32");
  define_jet<double>(m, "_cpu_float64");
  define_langevin<float>(m, "_cpu_float32");
  define_langevin<double>(m, "_cpu_float64");
  m.def("random_fill_cpu", &random_fill_cpu);
  m.def("random_philox_cpu", &random_philox_cpu);
#ifdef ENTROPIC_HAS_CUDA
  m.def("random_fill_cuda", &random_fill_cuda);
  m.def("random_philox_cuda", &random_philox_cuda);
  define_step<float, Gpu>(m, "_cuda_float32");
  define_step<double, Gpu>(m, "_cuda_float64");
  m.def("step_workspace", &entropic::cuda::step_workspace, "Doubles of scratch a step needs.");
#endif
}

}  // namespace legacy

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of entropic_fast; called by entropic_fast.ops only.";
  m.def("build_config", &build_config, "What this module was built with.");
  m.def("default_threads", &default_threads, "Threads a parallel region gets by default.");
  m.def("current_isa", [] { return entropic::cpu::isa_name(entropic::cpu::current_isa()); });
  m.def("runnable_isas", [] { return py::str(entropic::cpu::runnable_isas()).attr("split")(); });
  m.def("use_isa", &entropic::cpu::use_isa, "Force an instruction set by name; '' undoes it.");
  py::dict kernels;
  for (const auto& kernel : entropic::kernels())
    kernels[kernel.name] = py::cpp_function(
        [run = kernel.run](const py::list& arguments) { call(run, arguments); });
  m.attr("kernels") = kernels;
  legacy::define(m);
}
