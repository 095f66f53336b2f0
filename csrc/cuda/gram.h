// P = G G^T and q = G g (paper, Eq. 11) in one read of G.
#pragma once

#include <cstdint>

#include "core/arrays.h"
#include "cuda/stream.h"

namespace gem_fast::cuda {

struct GramOutput {
  double* P;          // (t, t)
  double* q;          // (t,)
  double* g_squared;  // (1,): |g|^2
};

// The sums of gram's first phase, one for each slab of columns, and where their totals go.
struct Slabs {
  const double* partial = nullptr;  // (products, slabs): the lower triangle of g and G with themselves, row by row
  int64_t slabs = 0;
  int64_t t = 0;
  GramOutput out{};
  const int32_t* status = nullptr;  // as for gram
  unsigned* arrived = nullptr;      // zero: for a kernel that counts its blocks
};

// Doubles of workspace for gram and gram_slabs, on the current device.
int64_t gram_workspace(const RowMatrix& G, const TensorList& g, Products products);

// g must have p elements of G's dtype. `products`: what products are formed in; float64 elements allow no less. Where
// `status`, on the device, is not null, nothing is done unless it is kInaccurate.
void gram(const RowMatrix& G, const TensorList& g, Products products, const int32_t* status, const GramOutput& out,
          double* workspace, Stream stream);

// The first phase alone: whoever comes next on the stream adds the slabs.
Slabs gram_slabs(const RowMatrix& G, const TensorList& g, Products products, const int32_t* status,
                 const GramOutput& out, double* workspace, Stream stream);

}  // namespace gem_fast::cuda
