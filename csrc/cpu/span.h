// A gradient of a linear layer is D' X, so that its rows lie in the span of the mini-batch's few inputs.
#pragma once

#include <cstdint>

#include "core/types.h"
#include "cpu/parallel.h"
#include "cpu/table.h"

namespace gem_fast::cpu {

// Elements of scratch space for `span_factors`.
int64_t span_scratch(int64_t rows, int64_t columns, int64_t most);

// g (rows, columns) = A Q: Q (most, columns) with orthonormal rows that span those of x (most, columns), followed by
// rows of zeros where these are dependent, and A (rows, most). Both contiguous. Returns |g - A Q| / |g|; not more than
// rounding when g's rows lie in that span.
double span_factors(const ConstMatrix& g, const ConstMatrix& x, DType dtype, int64_t rows, int64_t columns,
                    int64_t most, void* A, void* Q, void* scratch, const Executor& executor);

}  // namespace gem_fast::cpu
