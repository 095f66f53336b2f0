#include "cpu/mlp/layer_gradient.h"

#include <algorithm>
#include <cstring>

#include "core/dispatch.h"
#include "cpu/buffer.h"
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

// Writes one block of columns of the sum of the parts' gradients of task k as its transpose, (columns,
// padded(outputs)), and returns the number of columns.
int64_t write_transposed(std::span<const LayerGradients> parts, int64_t k, int64_t block, void* out) {
  const LayerGradients& layer = parts[0];
  const int64_t first = block * kColumnBlock;
  const int64_t last = std::min(layer.inputs, first + kColumnBlock);
  memset(out, 0, (last - first) * padded(layer.outputs) * size_of(layer.dtype));
  for (const LayerGradients& part : parts) add_block(part, k, block, first, last, out);
  return last - first;
}

// Writes one block of columns of the sum of the parts' gradients of task k to out (outputs, inputs), or adds it.
void write_block(std::span<const LayerGradients> parts, int64_t k, int64_t block, bool add, void* out) {
  const LayerGradients& layer = parts[0];
  const int64_t width = padded(layer.outputs);
  thread_local Buffer buffer;
  void* transposed = buffer.of(kColumnBlock * width * size_of(layer.dtype));
  const int64_t columns = write_transposed(parts, k, block, transposed);
  transpose(layer.dtype, {transposed, width}, columns, layer.outputs,
            {at(out, block * kColumnBlock, layer.dtype), layer.inputs}, add);
}

template <class T>
void add_rows(const T* delta, int64_t stride, int64_t n, int64_t outputs, T* out) {
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t o = 0; o < outputs; ++o) out[o] += delta[i * stride + o];
  }
}

}  // namespace

void sum_rows(const ConstMatrix& delta, DType dtype, int64_t n, int64_t outputs, void* out) {
  memset(out, 0, outputs * size_of(dtype));
  GEM_FAST_DISPATCH_FLOAT_OR_DOUBLE(
      dtype, add_rows(static_cast<const T*>(delta.data), delta.stride, n, outputs, static_cast<T*>(out)));
}

void layer_gradients(const LayerGradients& of, const Matrix& out, const Executor& executor) {
  const int64_t blocks = column_blocks(of.inputs);
  // Task by task, so that a task's delta stays in the second-level cache.
  executor.each(of.tasks.t * blocks, 2, [&](int64_t item) {
    const int64_t k = item / blocks;
    write_block({&of, 1}, k, item % blocks, false, at(out.data, k * out.stride, of.dtype));
  });
}

void layer_gradients_transposed(const LayerGradients& of, const Matrix& out, const Executor& executor) {
  const int64_t blocks = column_blocks(of.inputs);
  const int64_t block_size = kColumnBlock * padded(of.outputs);
  executor.each(of.tasks.t * blocks, 2, [&](int64_t item) {
    const int64_t k = item / blocks;
    const int64_t block = item % blocks;
    write_transposed({&of, 1}, k, block, at(out.data, k * out.stride + block * block_size, of.dtype));
  });
}

void layer_gradient_sum(std::span<const LayerGradients> parts, bool add, void* out, const Executor& executor) {
  executor.each(column_blocks(parts[0].inputs), 2, [&](int64_t block) { write_block(parts, 0, block, add, out); });
}

}  // namespace gem_fast::cpu
