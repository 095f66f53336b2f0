// P = G G^T and q = G g (paper, Eq. 11) in one read of G.
#pragma once

#include <cstdint>

#include "core/arrays.h"
#include "cuda/stream.h"

namespace gem_fast::cuda {

// Doubles of workspace for gram.
int64_t gram_workspace(const RowMatrix& G, const TensorList& g);

// P (t, t) and q (t,), float64. g must have p elements of G's dtype.
void gram(const RowMatrix& G, const TensorList& g, double* P, double* q, double* workspace, Stream stream);

}  // namespace gem_fast::cuda
