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
    kernels[kernel.name] =
        py::cpp_function([run = kernel.run](const py::list& arguments) { call(run, arguments); });
  m.attr("kernels") = kernels;
}
