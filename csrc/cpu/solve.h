// The non-negative QP (paper, Eq. 11), batched.
#pragma once

#include <cstdint>

#include "core/nnqp.h"
#include "cpu/parallel.h"

namespace gem_fast::cpu {

struct NnqpBatch {
  const double* P;  // `count` problems, or one that all share when `shared`
  const double* q;  // (count, t)
  int64_t count;
  int64_t t;
  bool shared;
  double lower;
  double ridge;
};

// v (count, t), status (count,), residual (count,), iterations (count,) or null.
void nnqp(const NnqpBatch& batch, double* v, int32_t* status, double* residual, int32_t* iterations,
          const Executor& executor);

}  // namespace gem_fast::cpu
