// The only pybind11 file. Entry points take addresses, sizes and strides, and on a GPU a stream
// handle: no torch header anywhere, so one build serves every torch version. Whoever calls them
// (entropic_fast/ops, nobody else) has already checked dtype, device, shape and contiguity.
#include <pybind11/pybind11.h>

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
  config["isas"] = ENTROPIC_ISAS;
#ifdef ENTROPIC_HAS_CUDA
  config["cuda"] = true;
#else
  config["cuda"] = false;
#endif
  config["cuda_compiler"] = ENTROPIC_CUDA_STORY;
  config["cuda_archs"] = ENTROPIC_CUDA_ARCHS;
  return config;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of entropic_fast; called by entropic_fast.ops only.";
  m.def("build_config", &build_config, "What this module was built with.");
}
