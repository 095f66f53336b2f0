// What the operators of the projection run on the CPU.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "core/status.h"
#include "cpu/projection/combine.h"
#include "cpu/projection/gram.h"
#include "cpu/projection/pack.h"
#include "cpu/projection/project.h"
#include "cpu/projection/solve.h"
#include "torch/checks.h"
#include "torch/torch_threads.h"
#include "torch/views.h"

namespace gem_fast {
namespace {

[[noreturn]] void fail_non_finite(const RowMatrix& G, const TensorList& g) {
  const int64_t row = cpu::first_non_finite(G, g);
  check<std::runtime_error>(row != G.t, "grads must be finite, got a NaN or an infinity");
  check<std::runtime_error>(row < 0, "G must be finite, got a NaN or an infinity in row ", row);
  throw std::runtime_error("the inner products of G's rows and grads must be finite, got an overflow");
}

std::tuple<Tensor, Tensor> gram_cpu(const Tensor& G, const Tensors& grads, bool in_float64) {
  const GramCall call(grads, G, in_float64);
  const RowMatrix& rows = call.matrix.rows;
  const double* P = doubles(call.P);
  const double* q = doubles(call.q);
  Tensor workspace = new_doubles(G, {cpu::gram_doubles(rows.t, rows.p)});
  cpu::gram(rows, call.grads.list(), call.products, doubles(call.P), doubles(call.q), doubles(call.g_squared),
            doubles(workspace), kTorchThreads);
  for (int64_t k = 0; k < rows.t; ++k) {
    if (!std::isfinite(P[k * rows.t + k]) || !std::isfinite(q[k])) fail_non_finite(rows, call.grads.list());
  }
  return call.result();
}

std::tuple<Tensor, Tensor, Tensor> project_dual_cpu(const Tensor& P, const Tensor& q, const Tensor& g_squared,
                                                    const std::optional<Tensor>& cancellation, double margin,
                                                    double ridge, bool in_float64) {
  const DualCall call(P, q, g_squared, cancellation, margin, ridge, in_float64);
  const NnqpAnswer answer = cpu::project_dual(call.problem, doubles(call.v));
  *ints(call.status) = answer.status;
  *doubles(call.residual) = answer.residual;
  return call.result();
}

std::tuple<Tensor, Tensor, Tensor> nnqp_cpu(const Tensor& P, const Tensor& q, double lower, double ridge) {
  const NnqpCall call(P, q, lower, ridge);
  const int64_t count = call.batch.count;
  cpu::nnqp(call.batch, doubles(call.v), ints(call.status), doubles(call.residual), nullptr, kTorchThreads);
  for (int64_t b = 0; b < count; ++b) {
    if (ints(call.status)[b] != kNonFinite) continue;
    check<std::runtime_error>(false, "P and q must be finite, got a NaN or an infinity",
                              count > 1 ? " in problem " + std::to_string(b) : "");
  }
  return {call.v, call.status, call.residual};
}

void combine_cpu(const Tensors& grads, const Tensor& G, const Tensor& v) {
  const CombineCall call(grads, G);
  const Tensor weights = check_weights(v, G);
  for (int64_t k = 0; k < G.size(0); ++k) {
    check<std::runtime_error>(std::isfinite(doubles(weights)[k]), "v must be finite, got a NaN or an infinity at ", k);
  }
  cpu::combine(call.grads.list(), call.matrix.rows, doubles(weights), kTorchThreads);
  call.grads.write_back(grads);
}

void pack_cpu(const Tensor& row, const std::vector<std::optional<Tensor>>& tensors, const std::vector<int64_t>& sizes) {
  const PackCall call(row, tensors, sizes);
  cpu::pack(call.list(), row.mutable_data_ptr(), row.size(0), call.dtype, kTorchThreads);
}

ProjectResult project_cpu(const Tensors& grads, const Tensor& G, double margin, double ridge) {
  const ProjectCall call(grads, G, margin, ridge);
  const auto outcome = cpu::project(call.grads.list(), call.matrix.rows, margin, ridge, doubles(call.v),
                                    doubles(call.q), ints(call.status), doubles(call.residual), kTorchThreads);
  if (outcome == cpu::Projected::kNonFinite) fail_non_finite(call.matrix.rows, call.grads.list());
  call.grads.write_back(grads);
  return call.result();
}

}  // namespace
}  // namespace gem_fast

STABLE_TORCH_LIBRARY_IMPL(gem_fast, CPU, m) {
  m.impl("gram", TORCH_BOX(&gem_fast::gram_cpu));
  m.impl("nnqp", TORCH_BOX(&gem_fast::nnqp_cpu));
  m.impl("combine_", TORCH_BOX(&gem_fast::combine_cpu));
  m.impl("pack_", TORCH_BOX(&gem_fast::pack_cpu));
  m.impl("_project_dual", TORCH_BOX(&gem_fast::project_dual_cpu));
  m.impl("project_", TORCH_BOX(&gem_fast::project_cpu));
}
