// The gradients of a linear layer's weight, one per task: task k's is the sum over its examples of delta' x, for the
// layer's input x and the gradient delta at its output.
#pragma once

#include <cstdint>

#include "core/types.h"
#include "cpu/mlp/layer.h"
#include "cpu/mlp/matrix.h"
#include "cpu/mlp/sparse.h"
#include "cpu/parallel.h"

namespace gem_fast::cpu {

struct LayerGradients {
  DType dtype;
  Tasks tasks;
  int64_t outputs, inputs;
  ConstMatrix delta;  // (N, padded(outputs)), zeros beyond the outputs
  LayerInput x;       // pairs are of columns
};

// out k (outputs, inputs) = task k's gradient.
void layer_gradients(const LayerGradients& of, const Matrix& out, const Executor& executor);

}  // namespace gem_fast::cpu
