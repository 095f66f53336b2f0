#include <algorithm>

#include "cuda/combine.h"
#include "cuda/gram.h"
#include "cuda/project.h"
#include "cuda/solve.h"

namespace gem_fast::cuda {

int64_t project_workspace(const RowMatrix& G, const TensorList& g) {
  return G.t * G.t + std::max(gram_workspace(G, g), nnqp_workspace(1, G.t));
}

void project(const TensorList& g, const RowMatrix& G, double margin, double ridge, double* v, double* q,
             int32_t* status, double* residual, double* workspace, Stream stream) {
  double* P = workspace;
  double* rest = workspace + G.t * G.t;
  gram(G, g, P, q, rest, stream);
  project_dual({P, q, static_cast<int>(G.t), margin, ridge}, v, status, residual, rest, stream);
  combine(g, G, v, stream);
}

}  // namespace gem_fast::cuda
