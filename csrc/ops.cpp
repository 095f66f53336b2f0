// torch.ops.gem_fast.*: what the operators are called and take, and what they run on the CPU. This file, arguments.h
// and ops_cuda.cpp are the only ones that know torch. Every op: check, allocate, launch.
//
// Written against LibTorch's stable ABI, so that one binary serves every torch from the target version on.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "core/status.h"
#include "cpu/combine.h"
#include "cpu/gram.h"
#include "cpu/pack.h"
#include "cpu/solve.h"
#include "projection.h"
#include "torch_threads.h"

namespace gem_fast {
namespace {

// ---- the ops -----------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> gram_cpu(const Tensor& G, const Tensors& grads) {
  const MatrixView matrix(G);
  const ListView list(grads, "grads", G);
  const int64_t t = matrix.rows.t;
  Tensor P = new_doubles(G, {t, t});
  Tensor q = new_doubles(G, {t});
  Tensor workspace = new_doubles(G, {cpu::gram_doubles(t, matrix.rows.p)});
  cpu::gram(matrix.rows, list.segments(), doubles(P), doubles(q), doubles(workspace), kTorchThreads);
  for (int64_t k = 0; k < t; ++k) {
    if (!std::isfinite(doubles(P)[k * t + k]) || !std::isfinite(doubles(q)[k])) {
      fail_non_finite(matrix.rows, list.segments());
    }
  }
  return {P, q};
}

std::tuple<Tensor, Tensor, Tensor> nnqp_cpu(const Tensor& P, const Tensor& q, double lower, double ridge) {
  const NnqpCall call(P, q, lower, ridge);
  const int64_t count = call.batch.count;
  cpu::nnqp(call.batch, doubles(call.v), call.statuses(), doubles(call.residual), nullptr, kTorchThreads);
  for (int64_t b = 0; b < count; ++b) {
    check<std::runtime_error>(call.statuses()[b] != kNonFinite, "P and q must be finite, got a NaN or an infinity",
                              count > 1 ? " in problem " + std::to_string(b) : std::string());
  }
  return {call.v, call.status, call.residual};
}

void combine_cpu(const Tensors& grads, const Tensor& G, const Tensor& v) {
  const MatrixView matrix(G);
  check_writable(grads, "grads");
  const ListView list(grads, "grads", G);
  const Tensor weights = check_weights(v, G);
  for (int64_t k = 0; k < G.size(0); ++k) {
    check<std::runtime_error>(std::isfinite(doubles(weights)[k]), "v must be finite, got a NaN or an infinity at ", k);
  }
  cpu::combine(list.segments(), matrix.rows, doubles(weights), kTorchThreads);
  list.write_back(grads);
}

void pack_cpu(const Tensor& row, const std::vector<std::optional<Tensor>>& tensors, const std::vector<int64_t>& sizes) {
  const PackCall call(row, tensors, sizes);
  cpu::pack(call.segments(), row.mutable_data_ptr(), row.size(0), call.dtype, kTorchThreads);
}

ProjectResult project_cpu(const Tensors& grads, const Tensor& G, double margin, double ridge) {
  return project_grads(grads, G, nullptr, margin, ridge);
}

}  // namespace
}  // namespace gem_fast

STABLE_TORCH_LIBRARY(gem_fast, m) {
  m.def("gram(Tensor G, Tensor[] grads) -> (Tensor P, Tensor q)");
  m.def("nnqp(Tensor P, Tensor q, float lower=0.0, float ridge=0.0) -> (Tensor v, Tensor status, Tensor residual)");
  m.def("combine_(Tensor(a!)[] grads, Tensor G, Tensor v) -> ()");
  m.def("pack_(Tensor(a!) row, Tensor?[] tensors, int[] sizes) -> ()");
  m.def(
      "project_(Tensor(a!)[] grads, Tensor G, float margin=0.5, float ridge=0.0) -> "
      "(Tensor v, Tensor q, Tensor status, Tensor residual)");
}

STABLE_TORCH_LIBRARY_IMPL(gem_fast, CPU, m) {
  m.impl("gram", TORCH_BOX(&gem_fast::gram_cpu));
  m.impl("nnqp", TORCH_BOX(&gem_fast::nnqp_cpu));
  m.impl("combine_", TORCH_BOX(&gem_fast::combine_cpu));
  m.impl("pack_", TORCH_BOX(&gem_fast::pack_cpu));
  m.impl("project_", TORCH_BOX(&gem_fast::project_cpu));
}
