// The dual of one projection, as projection_dual.h solves it.
#pragma once

#include "core/nnqp_problem.h"
#include "core/types.h"

namespace gem_fast {

struct ProjectionProblem {
  NnqpProblem dual;
  const double* g_squared;  // |g|^2
  Products products;        // what P, q and |g|^2 were formed in
  // How much larger the rounding of P and q is than that of inner products of rows, because they are sums whose terms
  // cancel; null: not at all.
  const double* cancellation = nullptr;
};

}  // namespace gem_fast
