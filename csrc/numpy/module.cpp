// gem_fast._solver: the solver for NumPy arrays, on the calling thread. It links to no torch: see gem_fast/solver.py.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "core/status.h"
#include "cpu/parallel.h"
#include "cpu/projection/solve.h"
#include "cpu/simd.h"

namespace py = pybind11;

namespace {

using Doubles = py::array_t<double, py::array::c_style | py::array::forcecast>;

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
    gem_fast::cpu::nnqp(problems, v_data, status_data, residual_data, iterations_data, gem_fast::cpu::kThisThread);
  }
  return py::make_tuple(v, status, residual, iterations);
}

}  // namespace

PYBIND11_MODULE(_solver, m) {
  m.def("nnqp", &nnqp, py::arg("P"), py::arg("q"), py::arg("lower"), py::arg("ridge"));
  // For tests: see gem_fast._C.
  m.def("set_simd_level", [](const std::string& name) { return gem_fast::cpu::set_simd_level(name.c_str()); });
}
