// The whole projection on the CPU: gram, solve, combine, each only where it is needed.
#pragma once

#include <cstdint>

#include "core/arrays.h"
#include "cpu/parallel.h"

namespace gem_fast::cpu {

enum class Projected {
  kDone,       // g holds g~, or was left as it was because no constraint is violated (v is zero then)
  kNonFinite,  // G or g has a NaN or an infinity, or their inner products overflow; g is as it was
};

// Products are formed in float32, and once more in float64 where the answer would suffer (core/projection_dual.h).
//
// Results: v (t,), q (t,) = G g of the gradient that came in, status and residual (its bound) of g~.
Projected project(const TensorList& g, const RowMatrix& G, double margin, double ridge, double* v, double* q,
                  int32_t* status, double* residual, const Executor& executor);

}  // namespace gem_fast::cpu
