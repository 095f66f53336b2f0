#include "cpu/projection/solve.h"

#include <algorithm>
#include <vector>

#include "cpu/simd.h"

namespace gem_fast::cpu {
namespace {

template <class Isa>
GEM_FAST_KERNEL void solve_one_impl(const NnqpProblem& problem, double* v, NnqpAnswer& answer, double* doubles,
                                    int* ints) {
  answer = Nnqp<Solo>(Solo{}, problem, doubles, ints).solve(v);
}
GEM_FAST_MULTIVERSION(solve_one,
                      (const NnqpProblem& problem, double* v, NnqpAnswer& answer, double* doubles, int* ints),
                      (problem, v, answer, doubles, ints))

template <class Isa>
GEM_FAST_KERNEL void project_one_impl(const ProjectionProblem& problem, double* v, NnqpAnswer& answer, double* doubles,
                                      int* ints) {
  answer = ProjectionDual<Solo>(Solo{}, problem, doubles, ints).solve(v);
}
GEM_FAST_MULTIVERSION(project_one,
                      (const ProjectionProblem& problem, double* v, NnqpAnswer& answer, double* doubles, int* ints),
                      (problem, v, answer, doubles, ints))

struct Workspace {
  std::vector<double> doubles;
  std::vector<int> ints;
};

// Kept by each thread from call to call, so that a solve allocates nothing once it has seen the size. It is declared in
// a function of its own because a thread frees its variable only if it has come past the declaration.
Workspace& this_threads_workspace(int64_t t) {
  thread_local Workspace workspace;
  workspace.doubles.resize(std::max<size_t>(workspace.doubles.size(), nnqp_doubles(t)));
  workspace.ints.resize(std::max<size_t>(workspace.ints.size(), nnqp_ints(t)));
  return workspace;
}

}  // namespace

void nnqp(const NnqpBatch& batch, double* v, int32_t* status, double* residual, int32_t* iterations,
          const Executor& executor) {
  const int64_t work = batch.t * batch.t * batch.t;
  const int64_t grain = std::max<int64_t>(1, 20000 / (work + 50));
  executor.each(batch.count, grain, [&](int64_t b) {
    Workspace& workspace = this_threads_workspace(batch.t);
    NnqpAnswer answer;
    solve_one(batch[b], v + b * batch.t, answer, workspace.doubles.data(), workspace.ints.data());
    status[b] = answer.status;
    residual[b] = answer.residual;
    if (iterations != nullptr) iterations[b] = answer.iterations;
  });
}

NnqpAnswer project_dual(const ProjectionProblem& problem, double* v) {
  Workspace& workspace = this_threads_workspace(problem.dual.t);
  NnqpAnswer answer;
  project_one(problem, v, answer, workspace.doubles.data(), workspace.ints.data());
  return answer;
}

}  // namespace gem_fast::cpu
