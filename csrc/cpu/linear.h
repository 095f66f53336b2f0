// Linear layers with ReLU between them: every task's gradients of all of them, task by task, so that what belongs to a
// task stays in the second-level cache from one layer to the next.
#pragma once

#include <cstdint>

#include "core/types.h"
#include "cpu/parallel.h"
#include "cpu/table.h"

namespace gem_fast::cpu {

// y = x W' + b for the weights W (outputs, inputs).
struct Layer {
  const void* weight;
  const void* bias;  // may be null
  int64_t outputs;
  int64_t inputs;
};

// A layer of a chain: its input x (N, inputs), and where its gradients go, one per task, or null.
struct Link {
  Layer layer;
  ConstMatrix x;        // of the first layer: not read
  Matrix weight_rows;   // k: (outputs, inputs); of the first layer: not written
  Matrix bias_rows;     // k: (outputs,)
};

// Elements of scratch space for `chain_backward`.
int64_t chain_scratch(const Link* links, int64_t count);

// From grad (N, outputs), the gradient at the output of the last layer, to delta (N, padded(outputs)), the one at the
// output of the first layer, before its ReLU; on the way the rows of G of all weights but the first, and all biases.
void chain_backward(const ConstMatrix& grad, DType dtype, const Link* links, int64_t count, const Tasks& tasks,
                    const Matrix& delta, void* scratch, const Executor& executor);

// out k (outputs, inputs) = sum over task k's rows of delta' x, for delta (N, outputs) and x (N, padded(inputs)).
void linear_gradient(const ConstMatrix& delta, const ConstMatrix& x, DType dtype, const Tasks& tasks, int64_t outputs,
                     int64_t inputs, const Matrix& out, const Executor& executor);

}  // namespace gem_fast::cpu
