// g~ = g + G^T v (paper, Eq. 8), written where the optimizer reads it.
#pragma once

#include "core/arrays.h"
#include "cpu/parallel.h"

namespace gem_fast::cpu {

// One pass over g and over those rows of G whose v is not zero. g must have p elements of G's dtype.
void combine(const TensorList& g, const RowMatrix& G, const double* v, const Executor& executor);

// The same for a v of equal elements, from column_sums = G^T 1 as gram_row_sums leaves it: no row is read.
void combine_equally(const TensorList& g, DType dtype, int64_t p, const void* column_sums, double v,
                     const Executor& executor);

}  // namespace gem_fast::cpu
