// A list of tensors into one row of G.
#pragma once

#include "core/arrays.h"
#include "cuda/stream.h"

namespace gem_fast::cuda {

// row[x.offset + i] = x[i] for every tensor x; one without data (a parameter that got no gradient) counts as zeros.
void pack(const TensorList& tensors, void* row, DType dtype, Stream stream);

}  // namespace gem_fast::cuda
