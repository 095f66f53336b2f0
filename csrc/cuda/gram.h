// P = G G^T and q = G g (paper, Eq. 11) in one read of G.
#pragma once

#include <cstdint>

#include "core/arrays.h"
#include "cuda/stream.h"

namespace gem_fast::cuda {

// Doubles of workspace for gram.
int64_t gram_workspace(const RowMatrix& G, const TensorList& g, Products products);

struct GramOutput {
  double* P;          // (t, t)
  double* q;          // (t,)
  double* g_squared;  // (1,): |g|^2
};

// g must have p elements of G's dtype. `products`: what products are formed in; float64 elements allow no less. Where
// `status`, on the device, is not null, nothing is done unless it is kInaccurate.
void gram(const RowMatrix& G, const TensorList& g, Products products, const int32_t* status, const GramOutput& out,
          double* workspace, Stream stream);

}  // namespace gem_fast::cuda
