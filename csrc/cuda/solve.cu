#include <algorithm>

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

enum class Input { kSatisfied, kViolated, kNonFinite };

// Whether some q_k < 0. A NaN or an infinity anywhere in P or q outranks that: 0 * x is 0 for a finite x only.
__device__ Input classify(const BlockTeam& team, const NnqpProblem& problem) {
  const int t = problem.t;
  double found = static_cast<double>(Input::kSatisfied);
  for (int k = team.rank(); k < t; k += team.size()) {
    double zero = 0.0 * problem.q[k];
    for (int j = 0; j < t; ++j) zero += 0.0 * problem.P[static_cast<int64_t>(j) * t + k];
    if (!(zero == 0.0)) {
      found = static_cast<double>(Input::kNonFinite);
    } else if (problem.q[k] < 0.0) {
      found = fmax(found, static_cast<double>(Input::kViolated));
    }
  }
  return static_cast<Input>(static_cast<int>(team.max(found)));
}

__global__ void __launch_bounds__(kMaxThreads, 1)
    solve_kernel(const NnqpBatch batch, bool only_where_violated, double* v, int32_t* status, double* residual,
                 double* workspace) {
  auto* scratch = reinterpret_cast<BlockTeam::Scratch*>(gem_fast_shared);
  double* doubles = workspace == nullptr ? reinterpret_cast<double*>(scratch + 1)
                                         : workspace + static_cast<int64_t>(blockIdx.x) * workspace_doubles(batch.t);
  int* ints = reinterpret_cast<int*>(doubles + nnqp_doubles(batch.t));
  const BlockTeam team(scratch);
  for (int64_t b = blockIdx.x; b < batch.count; b += gridDim.x) {
    const NnqpProblem problem = batch[b];
    double* answer_v = v + b * batch.t;
    NnqpAnswer answer{kSolved, 0.0, 0};
    if (only_where_violated && classify(team, problem) == Input::kSatisfied) {
      for (int k = team.rank(); k < problem.t; k += team.size()) answer_v[k] = 0.0;
    } else {
      answer = Nnqp<BlockTeam>(team, problem, doubles, ints).solve(answer_v);
    }
    if (team.rank() == 0) {
      status[b] = answer.status;
      residual[b] = answer.residual;
    }
  }
}

void launch_solve(const NnqpBatch& batch, bool only_where_violated, double* v, int32_t* status, double* residual,
                  double* workspace, Stream stream) {
  const bool in_shared = fits_shared_memory(batch.t);
  const int64_t threads = std::clamp<int64_t>((batch.t + kWarp - 1) / kWarp * kWarp, kWarp, kMaxThreads);
  launch(solve_kernel, blocks_for(batch.count, in_shared), static_cast<int>(threads),
         in_shared ? shared_bytes(batch.t) : sizeof(BlockTeam::Scratch), stream, batch, only_where_violated, v, status,
         residual, in_shared ? nullptr : workspace);
}

}  // namespace

int64_t nnqp_workspace(int64_t count, int64_t t) {
  return fits_shared_memory(t) ? 0 : blocks_for(count, false) * workspace_doubles(t);
}

void nnqp(const NnqpBatch& batch, double* v, int32_t* status, double* residual, double* workspace, Stream stream) {
  launch_solve(batch, false, v, status, residual, workspace, stream);
}

void project_dual(const NnqpProblem& problem, double* v, int32_t* status, double* residual, double* workspace,
                  Stream stream) {
  launch_solve({problem.P, problem.q, 1, problem.t, false, problem.lower, problem.ridge}, true, v, status, residual,
               workspace, stream);
}

}  // namespace gem_fast::cuda
