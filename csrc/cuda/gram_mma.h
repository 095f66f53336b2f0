// gram's first phase by tensor cores, for many rows.
#pragma once

#include <cstdint>

#include "core/arrays.h"
#include "cuda/gram_tiling.h"
#include "cuda/stream.h"

namespace gem_fast::cuda {

// Whether it is the one to take: more than 8 rows with g, float32 products, and a device that has such instructions.
bool gram_by_mma(const RowMatrix& G, Products products);

Tiling mma_tiling(const RowMatrix& G, const TensorList& g);

// One list of tensors. Does nothing for float64.
template <class T>
void launch_gram_mma(const KernelTensorList& list, const GramInput<T>& in, int64_t slabs, Stream stream);

}  // namespace gem_fast::cuda
