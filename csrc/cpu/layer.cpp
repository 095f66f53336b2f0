#include "cpu/layer.h"

#include <cstring>

#include "cpu/product.h"

namespace gem_fast::cpu {

void LayerGradients::add_block(int64_t k, int64_t block, void* out) const {
  const BlockInputs of(*this, block);
  const int64_t row = tasks.start[k];
  const int64_t n = tasks.start[k + 1] - row;
  const ConstMatrix mine{at(delta.data, row * delta.stride, dtype), delta.stride};
  if (x.pairs != nullptr) {
    add_sparse_block(x.pairs->from(k * pairs_of(inputs)), dtype, inputs, block, mine, outputs, out);
  } else if (x.rows != nullptr) {
    add_sparse_block(*x.rows, dtype, x.positions + row, n, block, mine, outputs, out);
  } else {
    multiply(dtype, {.a = at(x.dense.data, row * x.dense.stride + of.first, dtype),
                     .a_row = 1,
                     .a_k = x.dense.stride,
                     .b = mine.data,
                     .b_k = mine.stride,
                     .rows = of.count(),
                     .columns = padded(outputs),
                     .n = n,
                     .start = nullptr,
                     .relu = false,
                     .mask = nullptr,
                     .mask_row = 0,
                     .out = out,
                     .out_row = padded(outputs),
                     .add = true});
  }
}

void write_rows(const LayerGradients& gradients, const Matrix& out, const Executor& executor) {
  const DType dtype = gradients.dtype;
  // Task by task, so that a task's delta stays in the second-level cache.
  executor.each(gradients.tasks.t * gradients.blocks(), 2, [&](int64_t item) {
    thread_local Buffer buffer;
    void* turned = buffer.of(gradients.block_elements() * size_of(dtype));
    const int64_t k = item / gradients.blocks();
    const int64_t block = item % gradients.blocks();
    const BlockInputs of(gradients, block);
    memset(turned, 0, gradients.block_elements() * size_of(dtype));
    gradients.add_block(k, block, turned);
    turn_back(turned, dtype, of.count(), gradients.outputs, at(out.data, k * out.stride + of.first, dtype),
              gradients.inputs);
  });
}

}  // namespace gem_fast::cpu
