#include <algorithm>

#include "core/nnqp.h"
#include "core/projection_dual.h"
#include "cuda/block.h"
#include "cuda/launch.h"
#include "cuda/solve.h"

namespace gem_fast::cuda {
namespace {

constexpr int64_t kMaxThreads = 256;
// Blocks at a time; each goes on to further problems. Fewer where every block has a workspace in global memory.
constexpr int64_t kMaxBlocks = 4096;
constexpr int64_t kMaxBlocksInGlobalMemory = 256;

GEM_FAST_HD constexpr int64_t workspace_doubles(int64_t t) { return nnqp_doubles(t) + (nnqp_ints(t) + 1) / 2; }

int64_t shared_bytes(int64_t t) { return sizeof(BlockTeam::Scratch) + workspace_doubles(t) * sizeof(double); }

bool fits_shared_memory(int64_t t) {
  const int64_t bytes = shared_bytes(t);
  return bytes <= kSharedBytes || bytes <= device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

int64_t blocks_for(int64_t count, bool in_shared) {
  return std::min(count, in_shared ? kMaxBlocks : kMaxBlocksInGlobalMemory);
}

// What a block works in: shared memory, or its part of the workspace in global memory.
struct BlockWorkspace {
  BlockTeam::Scratch* scratch;
  double* doubles;
  int* ints;

  __device__ BlockWorkspace(double* global, int64_t t)
      : scratch(reinterpret_cast<BlockTeam::Scratch*>(gem_fast_shared)),
        doubles(global == nullptr ? reinterpret_cast<double*>(scratch + 1)
                                  : global + blockIdx.x * workspace_doubles(t)),
        ints(reinterpret_cast<int*>(doubles + nnqp_doubles(t))) {}
};

__global__ void __launch_bounds__(kMaxThreads, 1)
    solve_kernel(const NnqpBatch batch, double* v, int32_t* status, double* residual, double* workspace) {
  const BlockWorkspace mine(workspace, batch.t);
  const BlockTeam team(mine.scratch);
  for (int64_t b = blockIdx.x; b < batch.count; b += gridDim.x) {
    const NnqpAnswer answer = Nnqp<BlockTeam>(team, batch[b], mine.doubles, mine.ints).solve(v + b * batch.t);
    if (team.rank() == 0) {
      status[b] = answer.status;
      residual[b] = answer.residual;
    }
  }
}

__global__ void __launch_bounds__(kMaxThreads, 1) project_kernel(const ProjectionProblem problem, When when, double* v,
                                                                 int32_t* status, double* residual, double* workspace) {
  // All threads have read the status before it is written: barriers of the solver lie between.
  if (when == When::kInaccurate && *status != kInaccurate) return;
  const BlockWorkspace mine(workspace, problem.dual.t);
  const BlockTeam team(mine.scratch);
  const NnqpAnswer answer = ProjectionDual<BlockTeam>(team, problem, mine.doubles, mine.ints).solve(v);
  if (team.rank() == 0) {
    *status = answer.status;
    *residual = answer.residual;
  }
}

// Launches a kernel that takes these arguments and then the workspace.
template <class Kernel, class... Arguments>
void launch_solver(Kernel kernel, int64_t count, int64_t t, Stream stream, double* workspace,
                   const Arguments&... arguments) {
  const bool in_shared = fits_shared_memory(t);
  const int64_t threads = std::clamp<int64_t>((t + kWarp - 1) / kWarp * kWarp, kWarp, kMaxThreads);
  launch(kernel, blocks_for(count, in_shared), static_cast<int>(threads),
         in_shared ? shared_bytes(t) : sizeof(BlockTeam::Scratch), stream, arguments...,
         in_shared ? static_cast<double*>(nullptr) : workspace);
}

}  // namespace

int64_t nnqp_workspace(int64_t count, int64_t t) {
  return fits_shared_memory(t) ? 0 : blocks_for(count, false) * workspace_doubles(t);
}

void nnqp(const NnqpBatch& batch, double* v, int32_t* status, double* residual, double* workspace, Stream stream) {
  launch_solver(solve_kernel, batch.count, batch.t, stream, workspace, batch, v, status, residual);
}

void project_dual(const ProjectionProblem& problem, When when, double* v, int32_t* status, double* residual,
                  double* workspace, Stream stream) {
  launch_solver(project_kernel, 1, problem.dual.t, stream, workspace, problem, when, v, status, residual);
}

}  // namespace gem_fast::cuda
