#include "cpu/projection/project.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/status.h"
#include "cpu/buffer.h"
#include "cpu/projection/combine.h"
#include "cpu/projection/gram.h"
#include "cpu/projection/solve.h"

namespace gem_fast::cpu {

Projected project(const TensorList& g, const RowMatrix& G, double margin, double ridge, double* v, double* q,
                  int32_t* status, double* residual, const Executor& executor) {
  const int64_t t = G.t;
  std::fill_n(v, t, 0.0);
  *status = kSolved;
  *residual = 0.0;

  std::vector<double> sums(t), workspace(gram_row_sums_doubles(t, G.p));
  Buffer buffer;
  void* column_sums = buffer.of(column_sums_bytes(G.dtype, G.p));
  gram_row_sums(G, g, q, sums.data(), column_sums, workspace.data(), executor);
  bool violated = false;
  bool margin_suffices = true;
  for (int64_t k = 0; k < t; ++k) {
    if (!std::isfinite(q[k]) || !std::isfinite(sums[k])) return Projected::kNonFinite;
    violated |= q[k] < 0.0;
    margin_suffices &= q[k] + margin * (sums[k] + ridge) >= 0.0;
  }
  if (!violated) return Projected::kDone;

  if (margin_suffices) {
    // At v = margin * 1 no slope is negative: it is the minimiser, and P need not be formed.
    std::fill_n(v, t, margin);
    combine_equally(g, G.dtype, G.p, column_sums, margin, executor);
    return Projected::kDone;
  }
  std::vector<double> P(t * t);
  double g_squared = 0.0;
  workspace.resize(gram_doubles(t, G.p));
  const auto solve = [&](Products products) {
    gram(G, g, products, P.data(), q, &g_squared, workspace.data(), executor);
    const NnqpProblem dual{P.data(), q, static_cast<int>(t), margin, ridge};
    const NnqpAnswer answer = project_dual({dual, &g_squared, products}, v);
    *status = answer.status;
    *residual = answer.residual;
  };
  const Products first = products_of(G.dtype);
  solve(first);
  if (*status == kInaccurate && first != Products::kFloat64) solve(Products::kFloat64);
  if (*status == kNonFinite) return Projected::kNonFinite;
  combine(g, G, v, executor);
  return Projected::kDone;
}

}  // namespace gem_fast::cpu
