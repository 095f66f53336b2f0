// gem_fast._C: what the binary was built with, and the solver for NumPy users. No torch type crosses this file.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/headeronly/version.h>

#include <cmath>
#include <iterator>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/status.h"
#include "cpu/simd.h"
#include "cpu/solve.h"

namespace py = pybind11;

namespace {

using Doubles = py::array_t<double, py::array::c_style | py::array::forcecast>;

// One thread: NumPy users expect it, and torch's pool belongs to torch.
const gem_fast::cpu::Executor kThisThread{
    [](int64_t n, int64_t, void (*body)(int64_t, int64_t, void*), void* context) { body(0, n, context); }};

std::string shape_of(const Doubles& x) { return py::str(py::tuple(x.attr("shape"))); }

py::tuple nnqp(const Doubles& P, const Doubles& q, double lower, double ridge) {
  if (q.ndim() < 1) throw py::value_error("q must have shape (..., t), got ()");
  const py::ssize_t t = q.shape(q.ndim() - 1);
  bool fits = P.ndim() >= 2 && P.shape(P.ndim() - 1) == t && P.shape(P.ndim() - 2) == t;
  const bool shared = P.ndim() == 2;
  if (!shared) {
    fits = fits && P.ndim() == q.ndim() + 1;
    for (py::ssize_t d = 0; fits && d + 1 < q.ndim(); ++d) fits = P.shape(d) == q.shape(d);
  }
  if (!fits) {
    throw py::value_error("P must have shape (t, t) or q's leading dimensions and (t, t), got P " + shape_of(P) +
                          " and q " + shape_of(q));
  }
  if (!std::isfinite(lower)) throw py::value_error("lower must be finite, got " + std::to_string(lower));
  if (!(std::isfinite(ridge) && ridge >= 0.0)) {
    throw py::value_error("ridge must be finite and not negative, got " + std::to_string(ridge));
  }
  const std::vector<py::ssize_t> shape(q.shape(), q.shape() + q.ndim());
  const std::vector<py::ssize_t> batch(q.shape(), q.shape() + q.ndim() - 1);
  py::array_t<double> v(shape);
  py::array_t<int32_t> status(batch);
  py::array_t<double> residual(batch);
  py::array_t<int32_t> iterations(batch);
  const int64_t count = t > 0 ? q.size() / t : 0;
  if (count == 0) {
    // A problem without constraints is solved by the empty v.
    std::fill_n(status.mutable_data(), status.size(), gem_fast::kSolved);
    std::fill_n(residual.mutable_data(), residual.size(), 0.0);
    std::fill_n(iterations.mutable_data(), iterations.size(), 0);
  } else {
    const gem_fast::NnqpBatch problems{P.data(), q.data(), count, t, shared, lower, ridge};
    double* v_data = v.mutable_data();
    int32_t* status_data = status.mutable_data();
    double* residual_data = residual.mutable_data();
    int32_t* iterations_data = iterations.mutable_data();
    py::gil_scoped_release release;
    gem_fast::cpu::nnqp(problems, v_data, status_data, residual_data, iterations_data, kThisThread);
  }
  return py::make_tuple(v, status, residual, iterations);
}

std::vector<std::string> words(const std::string& text) {
  std::istringstream stream(text);
  return {std::istream_iterator<std::string>(stream), {}};
}

py::dict build_info() {
  std::vector<std::string> levels;
  for (auto level = gem_fast::cpu::Simd::kBase; level <= gem_fast::cpu::simd_available();
       level = static_cast<gem_fast::cpu::Simd>(static_cast<int>(level) + 1)) {
    levels.emplace_back(gem_fast::cpu::simd_name(level));
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
  using gem_fast::cpu::Simd;
  for (const Simd level : {Simd::kBase, Simd::kV3, Simd::kV4}) {
    if (name == gem_fast::cpu::simd_name(level) && level <= gem_fast::cpu::simd_available()) {
      gem_fast::cpu::set_simd_level(level);
      return;
    }
  }
  throw py::value_error("name must be one of build_info()['simd_levels'], got '" + name + "'");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled part of gem_fast: build information and the solver for NumPy arrays.";
  m.def("build_info", &build_info, "What this binary was built with, as a dict.");
  m.def("set_simd_level", &set_simd_level, py::arg("name"),
        "Use this instruction set (one of build_info()['simd_levels']) from now on; for tests and measurements.");
  m.def("nnqp", &nnqp, py::arg("P"), py::arg("q"), py::arg("lower") = 0.0, py::arg("ridge") = 0.0,
        "min_v 1/2 v' (P + ridge I) v + q' v subject to v >= lower, for NumPy arrays (paper, Eq. 11).\n\n"
        "P (t, t) or (..., t, t) and q (..., t), float64. Returns v (..., t), status (...,) int32 (0 solved,\n"
        "1 inaccurate, 2 not finite), residual (...,) and iterations (...,) int32.");
}
