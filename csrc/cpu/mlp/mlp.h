// Multilayer perceptrons, linear layers with ReLU between them: a few rows go through all layers, forward and backward,
// before the next rows do, so that what belongs to them stays in the second-level cache from one layer to the next.
#pragma once

#include <cstdint>

#include "core/types.h"
#include "cpu/mlp/layer.h"
#include "cpu/mlp/matrix.h"
#include "cpu/mlp/sparse.h"
#include "cpu/parallel.h"

namespace gem_fast::cpu {

// A layer, its input, and where its gradients go: one matrix per task, or null.
struct MlpLayer {
  Layer layer;
  ConstMatrix x{};       // (N, inputs); of the first layer: not read
  Matrix weight_rows{};  // k: (outputs, inputs); of the first layer: not written
  Matrix bias_rows{};    // k: (outputs,)
  // Where what a pass computes is left behind for all N examples, or null: the input, and the gradient at the output.
  Matrix kept_x{};      // (N, padded(inputs)); of the first layer: not written
  Matrix kept_delta{};  // (N, padded(outputs)); of the first layer: see Mlp
};

// What a pass through an MLP of two or more layers writes: the rows of G of all weights but the first, and all biases;
// and delta (N, padded(outputs)), the gradient at the output of the first layer, before its ReLU.
struct Mlp {
  DType dtype;
  const MlpLayer* layers;
  int64_t count;
  Tasks tasks;
  Matrix delta;
};

// From grad (N, outputs), the gradient at the output of the last layer.
void mlp_backward(const Mlp& mlp, const ConstMatrix& grad, const Executor& executor);

// The current mini-batch, as the last task of a pass.
struct Current {
  LayerInput x;  // its own input: rows with positions, or dense
  double loss;   // its mean cross entropy, which the pass writes
};

// Forward, the gradient of the tasks' mean cross entropies (N targets), and backward. `input` is the first layer's; its
// pairs are of rows. `current` may be null. The layers' x is not read.
void mlp_pass(const Mlp& mlp, const LayerInput& input, Current* current, const int64_t* target,
              const Executor& executor);

}  // namespace gem_fast::cpu
