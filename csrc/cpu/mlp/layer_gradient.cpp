#include "cpu/mlp/layer_gradient.h"

#include <algorithm>
#include <cstring>

#include "cpu/mlp/buffer.h"
#include "cpu/mlp/gemm.h"
#include "cpu/mlp/transpose.h"

namespace gem_fast::cpu {
namespace {

// Adds one block of task k's gradient, columns [first, last), to its transpose out (last - first, padded(outputs)).
void add_block(const LayerGradients& of, int64_t k, int64_t block, int64_t first, int64_t last, void* out) {
  const int64_t row = of.tasks.start[k];
  const int64_t n = of.tasks.start[k + 1] - row;
  const ConstMatrix delta = rows_from(of.delta, row, of.dtype);
  if (of.x.pairs != nullptr) {
    add_sparse_block(of.x.pairs->from(k * pairs_of(of.inputs)), of.dtype, of.inputs, block, delta, of.outputs, out);
  } else if (of.x.rows != nullptr) {
    add_sparse_block(*of.x.rows, of.dtype, of.x.positions + row, n, block, delta, of.outputs, out);
  } else {
    gemm(of.dtype, {.a = at(of.x.dense.data, row * of.x.dense.stride + first, of.dtype),
                    .a_row_stride = 1,
                    .a_column_stride = of.x.dense.stride,
                    .b = delta.data,
                    .ldb = delta.stride,
                    .c = out,
                    .ldc = padded(of.outputs),
                    .m = last - first,
                    .n = padded(of.outputs),
                    .k = n,
                    .accumulate = true});
  }
}

}  // namespace

void layer_gradients(const LayerGradients& of, const Matrix& out, const Executor& executor) {
  const int64_t blocks = column_blocks(of.inputs);
  const int64_t width = padded(of.outputs);
  const int64_t bytes = kColumnBlock * width * size_of(of.dtype);
  // Task by task, so that a task's delta stays in the second-level cache.
  executor.each(of.tasks.t * blocks, 2, [&](int64_t item) {
    thread_local Buffer buffer;
    const int64_t k = item / blocks;
    const int64_t block = item % blocks;
    const int64_t first = block * kColumnBlock;
    const int64_t last = std::min(of.inputs, first + kColumnBlock);
    void* transposed = memset(buffer.of(bytes), 0, bytes);
    add_block(of, k, block, first, last, transposed);
    transpose(of.dtype, {transposed, width}, last - first, of.outputs,
              {at(out.data, k * out.stride + first, of.dtype), of.inputs});
  });
}

}  // namespace gem_fast::cpu
