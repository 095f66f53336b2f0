// gem_fast._C: what the binary was built with. Loading it registers the operators (library.cpp).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/headeronly/version.h>

#include <iterator>
#include <sstream>
#include <string>
#include <vector>

#include "cpu/simd.h"

namespace py = pybind11;

namespace {

std::vector<std::string> words(const std::string& text) {
  std::istringstream stream(text);
  return {std::istream_iterator<std::string>(stream), {}};
}

py::dict build_info() {
  std::vector<std::string> levels;
  for (int level = 0; level <= static_cast<int>(gem_fast::cpu::simd_available()); ++level) {
    levels.emplace_back(gem_fast::cpu::simd_name(static_cast<gem_fast::cpu::Simd>(level)));
  }
  py::dict info;
  info["version"] = GEM_FAST_VERSION;
  info["compiler"] = GEM_FAST_COMPILER;
  info["torch_built_with"] = TORCH_VERSION;
  info["torch_at_least"] = GEM_FAST_TORCH_AT_LEAST;
  info["pybind11"] = std::to_string(PYBIND11_VERSION_MAJOR) + "." + std::to_string(PYBIND11_VERSION_MINOR);
  info["simd_levels"] = levels;
  info["simd_in_use"] = gem_fast::cpu::simd_name(gem_fast::cpu::simd_level());
  info["nvcc"] = GEM_FAST_NVCC;
  info["cuda_architectures"] = words(GEM_FAST_CUDA_ARCHITECTURES);
  return info;
}

void set_simd_level(const std::string& name) {
  if (gem_fast::cpu::set_simd_level(name.c_str())) return;
  throw py::value_error("name must be one of build_info()['simd_levels'], got '" + name + "'");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled part of gem_fast.";
  m.def("build_info", &build_info, "What this binary was built with, as a dict.");
  m.def("set_simd_level", &set_simd_level, py::arg("name"),
        "Use this instruction set (one of build_info()['simd_levels']) from now on; for tests and measurements.");
}
