// The non-negative QP (paper, Eq. 11), one block per problem.
#pragma once

#include <cstdint>

#include "core/nnqp.h"
#include "cuda/stream.h"

namespace gem_fast::cuda {

// Doubles of workspace that nnqp and project_dual need on the current device: none where the block's shared memory
// holds a problem with t constraints.
int64_t nnqp_workspace(int64_t count, int64_t t);

// v (count, t), status (count,) and residual (count,).
void nnqp(const NnqpBatch& batch, double* v, int32_t* status, double* residual, double* workspace, Stream stream);

// The dual of one projection: as nnqp where some q_k < 0. Otherwise no constraint is violated and v is zero.
void project_dual(const NnqpProblem& problem, double* v, int32_t* status, double* residual, double* workspace,
                  Stream stream);

}  // namespace gem_fast::cuda
