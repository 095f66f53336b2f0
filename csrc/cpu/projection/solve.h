// The non-negative QP (paper, Eq. 11), batched.
#pragma once

#include <cstdint>

#include "core/projection_dual.h"
#include "cpu/parallel.h"

namespace gem_fast::cpu {

// v (count, t), status (count,), residual (count,), iterations (count,) or null.
void nnqp(const NnqpBatch& batch, double* v, int32_t* status, double* residual, int32_t* iterations,
          const Executor& executor);

// The dual of one projection: v (t,).
NnqpAnswer project_dual(const ProjectionProblem& problem, double* v);

}  // namespace gem_fast::cpu
