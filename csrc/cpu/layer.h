// The gradients of a linear layer's weight, one per task: task k's is the sum over its examples of delta' x, for the
// layer's input x and the gradient delta at its output. They are formed in blocks: for some inputs, and turned around.
#pragma once

#include <cstdint>

#include "cpu/parallel.h"
#include "cpu/sparse.h"
#include "cpu/table.h"

namespace gem_fast::cpu {

struct LayerGradients {
  DType dtype;
  Tasks tasks;
  int64_t outputs, inputs;
  ConstMatrix delta;  // (N, padded(outputs)), zeros beyond the outputs
  LayerInput x;       // pairs are of columns

  int64_t blocks() const { return column_blocks(inputs); }
  int64_t elements() const { return outputs * inputs; }
  // Elements that a block takes.
  int64_t block_elements() const { return kColumnBlock * padded(outputs); }

  // Adds task k's block to out (inputs of the block, padded(outputs)), which has room for block_elements().
  void add_block(int64_t k, int64_t block, void* out) const;
};

// The inputs that a block is about.
struct BlockInputs {
  int64_t first, last;

  BlockInputs(const LayerGradients& of, int64_t block)
      : first(block * kColumnBlock), last(block + 1 < of.blocks() ? first + kColumnBlock : of.inputs) {}
  int64_t count() const { return last - first; }
};

// out k (outputs, inputs) = task k's gradient.
void write_rows(const LayerGradients& gradients, const Matrix& out, const Executor& executor);

}  // namespace gem_fast::cpu
