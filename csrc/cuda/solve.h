// The non-negative QP (paper, Eq. 11): one warp per problem up to 32 constraints, one block above that.
#pragma once

#include <cstdint>

#include "core/nnqp_problem.h"
#include "core/projection_problem.h"
#include "cuda/gram.h"
#include "cuda/stream.h"

namespace gem_fast::cuda {

// Doubles of workspace that nnqp and project_dual need on the current device: none where the block's shared memory
// holds a problem with t constraints.
int64_t nnqp_workspace(int64_t count, int64_t t);

// v (count, t), status (count,) and residual (count,).
void nnqp(const NnqpBatch& batch, double* v, int32_t* status, double* residual, double* workspace, Stream stream);

// Whether project_dual solves always, or only where the status on the device is kInaccurate.
enum class When : int32_t { kAlways, kInaccurate };

// The dual of one projection: v (t,). Where `slabs` has any, their sums become the problem's P, q and |g|^2 in the same
// launch, and the workspace may be theirs.
void project_dual(const Slabs& slabs, const ProjectionProblem& problem, When when, double* v, int32_t* status,
                  double* residual, double* workspace, Stream stream);

}  // namespace gem_fast::cuda
