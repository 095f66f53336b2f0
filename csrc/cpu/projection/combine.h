// g~ = g + G^T v (paper, Eq. 8), written where the optimizer reads it.
#pragma once

#include "core/arrays.h"
#include "cpu/parallel.h"

namespace gem_fast::cpu {

// One pass over g and over those rows of G whose v is not zero. g must have p elements of G's dtype.
void combine(const TensorList& g, const RowMatrix& G, const double* v, const Executor& executor);

}  // namespace gem_fast::cpu
