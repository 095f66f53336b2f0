// The whole projection on the device: gram, solve, combine, one after the other on a stream.
#pragma once

#include <cstdint>

#include "core/arrays.h"
#include "cuda/stream.h"

namespace gem_fast::cuda {

// Doubles of workspace for project, on the current device.
int64_t project_workspace(const RowMatrix& G, const TensorList& g);

// Products are formed in float32, and once more in float64 where the answer would suffer (core/projection_dual.h). The
// kernels find that out themselves: those of the second time return at once where the first has sufficed.
//
// Results: v (t,), q (t,) = G g of the gradient that came in, status and residual (its bound) of g~. Where no
// constraint is violated, and where G or g is not finite, v is zero and g keeps every bit; the kernels find that out
// themselves, so the host never waits.
void project(const TensorList& g, const RowMatrix& G, double margin, double ridge, double* v, double* q,
             int32_t* status, double* residual, double* workspace, Stream stream);

}  // namespace gem_fast::cuda
