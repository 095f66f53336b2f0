// The dual of GEM (paper, Eq. 11), as nnqp.h solves it, one problem or a batch:
//
//     min over v   1/2 v' P v + q' v     subject to   v >= lower,      P (t, t) positive semidefinite
#pragma once

#include <cstdint>

#include "core/team.h"

namespace gem_fast {

struct NnqpProblem {
  const double* P;  // (t, t), symmetric, rows of length t
  const double* q;  // (t,)
  int t;
  double lower;
  double ridge;           // added to P's diagonal
  double softness = 0.0;  // 1/2 softness sum_j P_jj (v_j - lower)^2 is added to the objective

  // To the diagonal.
  GEM_FAST_INLINE GEM_FAST_HD double added(int i) const {
    return ridge + softness * P[static_cast<int64_t>(i) * t + i];
  }
  GEM_FAST_INLINE GEM_FAST_HD double entry(int i, int j) const {
    return P[static_cast<int64_t>(i) * t + j] + (i == j ? added(i) : 0.0);
  }
};

struct NnqpBatch {
  const double* P;  // `count` problems, or one that all share when `shared`
  const double* q;  // (count, t)
  int64_t count;
  int64_t t;
  bool shared;
  double lower;
  double ridge;

  GEM_FAST_HD NnqpProblem operator[](int64_t b) const {
    return {P + (shared ? 0 : b * t * t), q + b * t, static_cast<int>(t), lower, ridge};
  }
};

struct NnqpAnswer {
  int32_t status;
  // Largest |min(u_j |g_j|, w_j / |g_j|)| relative to the largest |q_j| / |g_j| and |v_j| |g_j|: zero exactly at
  // a KKT point, and free of units.
  double residual;
  int iterations;
};

}  // namespace gem_fast
