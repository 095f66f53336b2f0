// A list of tensors into one row of G.
#pragma once

#include "core/arrays.h"
#include "cpu/parallel.h"

namespace gem_fast::cpu {

// row[offset + i] = segment[i]; a segment without data (a parameter that got no gradient) is zeros.
void pack(const Segments& segments, void* row, int64_t p, DType dtype, const Executor& executor);

}  // namespace gem_fast::cpu
