// g~ = g + G^T v (paper, Eq. 8), written where the optimizer reads it.
#pragma once

#include "core/arrays.h"
#include "cuda/stream.h"

namespace gem_fast::cuda {

// One pass over g and over those rows of G whose v (on the device) is not zero; with no such row g keeps every bit.
void combine(const TensorList& g, const RowMatrix& G, const double* v, Stream stream);

}  // namespace gem_fast::cuda
