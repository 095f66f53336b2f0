#include <algorithm>

#include "core/nnqp.h"
#include "core/projection_dual.h"
#include "cuda/block.h"
#include "cuda/launch.h"
#include "cuda/slabs.h"
#include "cuda/solve.h"

namespace gem_fast::cuda {
namespace {

constexpr int64_t kMaxThreads = 256;
// Blocks at a time; each goes on to further problems. Fewer where every block has a workspace in global memory.
constexpr int64_t kMaxBlocks = 4096;
constexpr int64_t kMaxBlocksInGlobalMemory = 256;
// Up to so many constraints one warp has a problem, with a copy of P in shared memory; above it a block.
constexpr int64_t kMaxWarpConstraints = kWarp;
constexpr int64_t kWarpsPerBlock = 4;
// Numbers of P that a lane has under way at a time, when it is copied.
constexpr int kAtOnce = 16;

GEM_FAST_HD constexpr int64_t workspace_doubles(int64_t t) { return nnqp_doubles(t) + (nnqp_ints(t) + 1) / 2; }

bool by_warps(int64_t t) { return t <= kMaxWarpConstraints; }

// A warp's share of shared memory: P and the workspace.
GEM_FAST_HD constexpr int64_t warp_doubles(int64_t t) { return t * t + workspace_doubles(t); }

int64_t block_bytes(int64_t t) { return sizeof(BlockTeam::Scratch) + workspace_doubles(t) * sizeof(double); }

bool fits_shared_memory(int64_t t) {
  if (by_warps(t)) return true;
  const int64_t bytes = block_bytes(t);
  return bytes <= kSharedBytes || bytes <= device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

int64_t blocks_for(int64_t count, bool in_shared) {
  return std::min(count, in_shared ? kMaxBlocks : kMaxBlocksInGlobalMemory);
}

// What a warp works in.
struct WarpWorkspace {
  double* P;
  double* doubles;
  int* ints;

  __device__ explicit WarpWorkspace(int64_t t)
      : P(reinterpret_cast<double*>(gem_fast_shared) + warp() * warp_doubles(t)),
        doubles(P + t * t),
        ints(reinterpret_cast<int*>(doubles + nnqp_doubles(t))) {}

  // The problem with its P in shared memory.
  __device__ NnqpProblem staged(const WarpTeam& team, NnqpProblem problem) const {
    team.barrier();  // the last problem's P has been read
    const int count = problem.t * problem.t;
    for (int first = team.rank(); first < count; first += kAtOnce * team.size()) {
      double x[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) x[k] = first + k * kWarp < count ? problem.P[first + k * kWarp] : 0.0;
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        if (first + k * kWarp < count) P[first + k * kWarp] = x[k];
      }
    }
    team.barrier();
    problem.P = P;
    return problem;
  }
};

// What a block works in: shared memory, or its part of the workspace in global memory.
struct BlockWorkspace {
  BlockTeam::Scratch* scratch;
  double* doubles;
  int* ints;

  __device__ BlockWorkspace(double* global, int64_t block, int64_t t)
      : scratch(reinterpret_cast<BlockTeam::Scratch*>(gem_fast_shared)),
        doubles(global == nullptr ? reinterpret_cast<double*>(scratch + 1) : global + block * workspace_doubles(t)),
        ints(reinterpret_cast<int*>(doubles + nnqp_doubles(t))) {}
};

template <class Team>
__device__ void write(const Team& team, const NnqpAnswer& answer, int32_t* status, double* residual) {
  if (team.rank() != 0) return;
  *status = answer.status;
  *residual = answer.residual;
}

__global__ void __launch_bounds__(kMaxThreads, 1)
    solve_by_warp_kernel(const NnqpBatch batch, double* v, int32_t* status, double* residual) {
  const WarpTeam team;
  const WarpWorkspace mine(batch.t);
  const int64_t step = static_cast<int64_t>(gridDim.x) * warps();
  for (int64_t b = static_cast<int64_t>(blockIdx.x) * warps() + warp(); b < batch.count; b += step) {
    const NnqpProblem problem = mine.staged(team, batch[b]);
    const NnqpAnswer answer = Nnqp<WarpTeam>(team, problem, mine.doubles, mine.ints).solve(v + b * batch.t);
    write(team, answer, status + b, residual + b);
  }
}

__global__ void __launch_bounds__(kMaxThreads, 1)
    solve_by_block_kernel(const NnqpBatch batch, double* v, int32_t* status, double* residual, double* workspace) {
  const BlockWorkspace mine(workspace, blockIdx.x, batch.t);
  const BlockTeam team(mine.scratch);
  for (int64_t b = blockIdx.x; b < batch.count; b += gridDim.x) {
    const NnqpAnswer answer = Nnqp<BlockTeam>(team, batch[b], mine.doubles, mine.ints).solve(v + b * batch.t);
    write(team, answer, status + b, residual + b);
  }
}

// Whether this block solves the problem. Where there are slabs all blocks add them up, and the last one to be done
// solves: so a projection needs no launch between the sums and their use.
__device__ bool is_to_solve(const Slabs& slabs, When when, const int32_t* status) {
  // All threads have read the status before it is written: they are counted, or barriers of the solver lie between.
  if (when == When::kInaccurate && *status != kInaccurate) return false;
  if (slabs.partial == nullptr) return true;
  add_slabs(slabs);
  return is_last_block(slabs.arrived);
}

__global__ void __launch_bounds__(kMaxThreads, 1)
    project_by_warp_kernel(const Slabs slabs, ProjectionProblem problem, When when, double* v, int32_t* status,
                           double* residual) {
  if (!is_to_solve(slabs, when, status) || warp() != 0) return;
  const WarpTeam team;
  const WarpWorkspace mine(problem.dual.t);
  problem.dual = mine.staged(team, problem.dual);
  write(team, ProjectionDual<WarpTeam>(team, problem, mine.doubles, mine.ints).solve(v), status, residual);
}

__global__ void __launch_bounds__(kMaxThreads, 1)
    project_by_block_kernel(const Slabs slabs, const ProjectionProblem problem, When when, double* v, int32_t* status,
                            double* residual, double* workspace) {
  if (!is_to_solve(slabs, when, status)) return;
  const BlockWorkspace mine(workspace, 0, problem.dual.t);
  const BlockTeam team(mine.scratch);
  write(team, ProjectionDual<BlockTeam>(team, problem, mine.doubles, mine.ints).solve(v), status, residual);
}

int threads_for(int64_t t) {
  return static_cast<int>(std::clamp<int64_t>((t + kWarp - 1) / kWarp * kWarp, kWarp, kMaxThreads));
}

}  // namespace

int64_t nnqp_workspace(int64_t count, int64_t t) {
  return fits_shared_memory(t) ? 0 : blocks_for(count, false) * workspace_doubles(t);
}

void nnqp(const NnqpBatch& batch, double* v, int32_t* status, double* residual, double* workspace, Stream stream) {
  if (by_warps(batch.t)) {
    const int64_t bytes = std::max<int64_t>(1, warp_doubles(batch.t)) * sizeof(double);
    const int64_t solvers = std::min(kSharedBytes / bytes, kWarpsPerBlock);
    launch(solve_by_warp_kernel, std::min((batch.count + solvers - 1) / solvers, kMaxBlocks),
           static_cast<int>(solvers * kWarp), solvers * bytes, stream, batch, v, status, residual);
    return;
  }
  const bool in_shared = fits_shared_memory(batch.t);
  launch(solve_by_block_kernel, blocks_for(batch.count, in_shared), threads_for(batch.t),
         in_shared ? block_bytes(batch.t) : sizeof(BlockTeam::Scratch), stream, batch, v, status, residual,
         in_shared ? nullptr : workspace);
}

void project_dual(const Slabs& slabs, const ProjectionProblem& problem, When when, double* v, int32_t* status,
                  double* residual, double* workspace, Stream stream) {
  const int64_t t = problem.dual.t;
  const bool adds = slabs.partial != nullptr;
  const int64_t blocks = adds ? blocks_for_slabs(t, kMaxThreads) : 1;
  const int threads = adds ? kMaxThreads : threads_for(t);
  if (by_warps(t)) {
    const int64_t bytes = std::max<int64_t>(1, warp_doubles(t)) * sizeof(double);
    launch(project_by_warp_kernel, blocks, threads, bytes, stream, slabs, problem, when, v, status, residual);
    return;
  }
  const bool in_shared = fits_shared_memory(t);
  launch(project_by_block_kernel, blocks, threads, in_shared ? block_bytes(t) : sizeof(BlockTeam::Scratch), stream,
         slabs, problem, when, v, status, residual, in_shared ? nullptr : workspace);
}

}  // namespace gem_fast::cuda
