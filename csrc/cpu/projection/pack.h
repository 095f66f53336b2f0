// A list of tensors into one row of G.
#pragma once

#include "core/arrays.h"
#include "cpu/parallel.h"

namespace gem_fast::cpu {

// row[x.offset + i] = x[i] for every tensor x; one without data (a parameter that got no gradient) counts as zeros.
void pack(const TensorList& tensors, void* row, int64_t p, DType dtype, const Executor& executor);

}  // namespace gem_fast::cpu
