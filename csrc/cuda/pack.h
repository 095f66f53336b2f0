// A list of tensors into one row of G.
#pragma once

#include "core/arrays.h"
#include "cuda/stream.h"

namespace gem_fast::cuda {

// row[offset + i] = segment[i]; a segment without data (a parameter that got no gradient) is zeros.
void pack(const Segments& segments, void* row, DType dtype, Stream stream);

}  // namespace gem_fast::cuda
