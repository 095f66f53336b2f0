// The gradients of a linear layer's weight, one per task: task k's is the sum over its examples of delta' x, for the
// layer's input x and the gradient delta at its output.
#pragma once

#include <cstdint>
#include <span>

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

// out k (inputs, padded(outputs)) = the transpose of task k's gradient, with zeros beyond the outputs.
void layer_gradients_transposed(const LayerGradients& of, const Matrix& out, const Executor& executor);

// out (outputs, inputs) = the sum of the gradients of a few parts, one task each of the same layer; or += it.
void layer_gradient_sum(std::span<const LayerGradients> parts, bool add, void* out, const Executor& executor);

// The bias's: out (outputs,) = the sum of n rows of delta.
void sum_rows(const ConstMatrix& delta, DType dtype, int64_t n, int64_t outputs, void* out);

}  // namespace gem_fast::cpu
