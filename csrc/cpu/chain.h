// Chains of linear layers with ReLU between them: some rows go through all of them, forward and backward, before the
// next rows do, so that what belongs to them stays in the second-level cache from one layer to the next.
#pragma once

#include <cstdint>

#include "core/types.h"
#include "cpu/parallel.h"
#include "cpu/sparse.h"
#include "cpu/table.h"

namespace gem_fast::cpu {

// From z (N, units), what the layer before the first one of these puts out before its ReLU, to the inputs of the
// layers, inputs[l] (N, padded(layers[l].inputs)), and the outputs (N, outputs) of the last one.
void chain_forward(const ConstMatrix& z, DType dtype, int64_t N, const Layer* layers, int64_t count,
                   const Matrix* inputs, const Matrix& outputs, const Executor& executor);

// A layer's part in the backward: its input, and where its gradients go, one per task, or null.
struct Link {
  ConstMatrix x;       // (N, inputs); of the first layer: not read
  bool is_padded;      // x is (N, padded(inputs))
  Matrix weight_rows;  // k: (outputs, inputs); of the first layer: not written
  Matrix bias_rows;    // k: (outputs,)
};

// From grad (N, outputs), the gradient at the output of the last layer, to delta (N, padded(outputs)), the one at the
// output of the first layer, before its ReLU; on the way the rows of G of all weights but the first, and all biases.
void chain_backward(const ConstMatrix& grad, DType dtype, const Layer* layers, const Link* links, int64_t count,
                    const Tasks& tasks, const Matrix& delta, const Executor& executor);

// Both ways at once, with the tasks' mean cross entropies (N targets) between them; links[l].x are not read.
// `input` is the first layer's, its pairs are of rows.
void chain_pass(const LayerInput& input, const int64_t* target, DType dtype, const Layer* layers, const Link* links,
                int64_t count, const Tasks& tasks, const Matrix& delta, const Executor& executor);

}  // namespace gem_fast::cpu
