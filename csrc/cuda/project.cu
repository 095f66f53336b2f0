#include <algorithm>

#include "cuda/combine.h"
#include "cuda/gram.h"
#include "cuda/project.h"
#include "cuda/solve.h"

namespace gem_fast::cuda {

int64_t project_workspace(const RowMatrix& G, const TensorList& g) {
  const int64_t first = gram_workspace(G, g, products_of(G.dtype));
  const int64_t again = gram_workspace(G, g, Products::kFloat64);
  return G.t * G.t + 1 + std::max({first, again, nnqp_workspace(1, G.t)});
}

void project(const TensorList& g, const RowMatrix& G, double margin, double ridge, double* v, double* q,
             int32_t* status, double* residual, double* workspace, Stream stream) {
  double* P = workspace;
  double* g_squared = P + G.t * G.t;
  double* rest = g_squared + 1;
  const auto solve = [&](Products products, When when) {
    const int32_t* wanted = when == When::kAlways ? nullptr : status;
    const Slabs slabs = gram_slabs(G, g, products, wanted, {P, q, g_squared}, rest, stream);
    const NnqpProblem dual{P, q, static_cast<int>(G.t), margin, ridge};
    project_dual(slabs, {dual, g_squared, products}, when, v, status, residual, rest, stream);
  };
  const Products first = products_of(G.dtype);
  solve(first, When::kAlways);
  if (first != Products::kFloat64) solve(Products::kFloat64, When::kInaccurate);
  combine(g, G, v, stream);
}

}  // namespace gem_fast::cuda
