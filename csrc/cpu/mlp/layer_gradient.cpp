#include "cpu/mlp/layer_gradient.h"

#include <algorithm>
#include <cstring>

#include "core/dispatch.h"
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
    const Matrix columns{at(out.data, k * out.stride + first, of.dtype), of.inputs};
    add_block(of, k, block, first, last, transposed);
    transpose(of.dtype, {transposed, width}, last - first, of.outputs, columns);
  });
}

void layer_gradient_sum(std::span<const LayerGradients> parts, bool add, void* out, const Executor& executor) {
  const LayerGradients& layer = parts[0];
  const int64_t width = padded(layer.outputs);
  const int64_t bytes = kColumnBlock * width * size_of(layer.dtype);
  executor.each(column_blocks(layer.inputs), 2, [&](int64_t block) {
    thread_local Buffer buffer;
    const int64_t first = block * kColumnBlock;
    const int64_t last = std::min(layer.inputs, first + kColumnBlock);
    void* transposed = memset(buffer.of(bytes), 0, bytes);
    for (const LayerGradients& part : parts) add_block(part, 0, block, first, last, transposed);
    transpose(layer.dtype, {transposed, width}, last - first, layer.outputs,
              {at(out, first, layer.dtype), layer.inputs}, add);
  });
}

}  // namespace gem_fast::cpu
