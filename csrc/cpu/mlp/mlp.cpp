#include "cpu/mlp/mlp.h"

#include <algorithm>
#include <vector>

#include "core/dispatch.h"
#include "cpu/buffer.h"
#include "cpu/mlp/cross_entropy.h"
#include "cpu/mlp/gemm.h"
#include "cpu/mlp/layer_gradient.h"
#include "cpu/mlp/transpose.h"

namespace gem_fast::cpu {
namespace {

// Columns of a layer's output, or of its weight's gradient, that are formed together.
constexpr int64_t kColumns = 64;
// Rows that are taken together, so that they stay in the first-level cache.
constexpr int64_t kRows = 32;

ConstMatrix padded_rows(const ConstMatrix& x, DType dtype, int64_t n, int64_t columns, Buffer& buffer) {
  void* data = buffer.of(n * padded(columns) * size_of(dtype));
  pad_rows(x, dtype, n, columns, data, kThisThread);
  return {data, padded(columns)};
}

// ---- forward -----------------------------------------------------------------------------------------------

// A layer with its weight transposed and padded, for the forward.
struct ForwardLayer {
  Layer layer;
  Buffer weight;  // W', (inputs, padded(outputs))
  Buffer bias;    // (padded(outputs),)

  ForwardLayer(const Layer& from, DType dtype, const Executor& executor) : layer(from) {
    transpose_padded(dtype, {layer.weight, layer.inputs}, layer.outputs, layer.inputs,
                     weight.of(layer.inputs * width() * size_of(dtype)), executor);
    if (layer.bias != nullptr) pad_row(layer.bias, dtype, layer.outputs, bias.of(width() * size_of(dtype)));
  }

  int64_t width() const { return padded(layer.outputs); }

  // y = x W' + b for n rows. A hidden layer's output goes through the ReLU, and its rows are padded.
  void forward(DType dtype, int64_t n, bool hidden, const ConstMatrix& x, const Matrix& y) const {
    const int64_t columns = hidden ? width() : layer.outputs;
    for (int64_t c = 0; c < columns; c += kColumns) {
      gemm(dtype, {.a = x.data,
                   .a_row_stride = x.stride,
                   .a_column_stride = 1,
                   .b = at(weight.data(), c, dtype),
                   .ldb = width(),
                   .c = at(y.data, c, dtype),
                   .ldc = y.stride,
                   .m = n,
                   .n = std::min(kColumns, columns - c),
                   .k = layer.inputs,
                   .bias = layer.bias == nullptr ? nullptr : at(bias.data(), c, dtype),
                   .relu = hidden});
    }
  }
};

// The first layer for rows [row, row + n) of a task whose examples begin at row `first` of x. Does nothing for pairs of
// rows, which mlp_pass takes through the layer all at once.
void first_forward(const ForwardLayer& layer, DType dtype, const LayerInput& x, int64_t first, int64_t row, int64_t n,
                   const Matrix& y) {
  if (x.rows != nullptr) {
    for (int64_t i = row; i < row + n; ++i) {
      sparse_row_forward(*x.rows, dtype, x.positions[first + i], layer.weight.data(), layer.bias.data(),
                         layer.layer.outputs, rows_from(y, i, dtype).data);
    }
  } else if (x.dense.data != nullptr) {
    layer.forward(dtype, n, true, rows_from(x.dense, first + row, dtype), rows_from(y, row, dtype));
  }
}

// ---- backward ----------------------------------------------------------------------------------------------

// All weights but the first, padded for the backward: (outputs, padded(inputs)).
std::vector<Buffer> padded_weights(const Mlp& mlp, const Executor& executor) {
  std::vector<Buffer> result(mlp.count);
  for (int64_t l = 1; l < mlp.count; ++l) {
    const Layer& layer = mlp.layers[l].layer;
    pad_rows({layer.weight, layer.inputs}, mlp.dtype, layer.outputs, layer.inputs,
             result[l].of(layer.outputs * padded(layer.inputs) * size_of(mlp.dtype)), executor);
  }
  return result;
}

// Task k's rows of G: those of the bias, and those of the weight unless the layer is the first.
void write_gradients(const MlpLayer& of, DType dtype, int64_t k, int64_t n, const ConstMatrix& delta,
                     const ConstMatrix& x) {
  const int64_t outputs = of.layer.outputs;
  const int64_t inputs = of.layer.inputs;
  if (of.bias_rows.data != nullptr) {
    sum_rows(delta, dtype, n, outputs, rows_from(of.bias_rows, k, dtype).data);
  }
  if (of.weight_rows.data == nullptr) return;
  void* out = rows_from(of.weight_rows, k, dtype).data;
  for (int64_t c = 0; c < inputs; c += kColumns) {  // columns of delta' x
    gemm(dtype, {.a = delta.data,
                 .a_row_stride = 1,
                 .a_column_stride = delta.stride,
                 .b = at(x.data, c, dtype),
                 .ldb = x.stride,
                 .c = at(out, c, dtype),
                 .ldc = inputs,
                 .m = outputs,
                 .n = std::min(kColumns, inputs - c),
                 .k = n});
  }
}

// The gradient at a layer's input, and with it at the output of the layer before, where its ReLU let it pass:
// next = delta W, zero where x is.
void input_gradient(const Buffer& weight, DType dtype, const Layer& layer, int64_t n, const ConstMatrix& delta,
                    const ConstMatrix& x, const Matrix& next) {
  const int64_t width = padded(layer.inputs);
  for (int64_t i = 0; i < n; i += kRows) {
    for (int64_t c = 0; c < width; c += kColumns) {
      gemm(dtype, {.a = rows_from(delta, i, dtype).data,
                   .a_row_stride = delta.stride,
                   .a_column_stride = 1,
                   .b = at(weight.data(), c, dtype),
                   .ldb = width,
                   .c = at(next.data, i * next.stride + c, dtype),
                   .ldc = next.stride,
                   .m = std::min(kRows, n - i),
                   .n = std::min(kColumns, width - c),
                   .k = layer.outputs,
                   .mask = at(x.data, i * x.stride + c, dtype),
                   .ldmask = x.stride});
    }
  }
}

// Which tasks begin a group that goes through the layers together, and the number of tasks: alone where their gradients
// are written, else as many as are no more rows than kRows.
std::vector<int64_t> groups_of(const Mlp& mlp, bool has_pairs, bool has_current) {
  bool alone = has_pairs;
  for (int64_t l = 0; l < mlp.count; ++l) {
    alone |= mlp.layers[l].weight_rows.data != nullptr || mlp.layers[l].bias_rows.data != nullptr;
  }
  std::vector<int64_t> groups{0};
  for (int64_t k = 1; k < mlp.tasks.t; ++k) {
    const bool is_current = has_current && k == mlp.tasks.t - 1;
    if (alone || is_current || mlp.tasks.start[k + 1] - mlp.tasks.start[groups.back()] > kRows) groups.push_back(k);
  }
  groups.push_back(mlp.tasks.t);
  return groups;
}

// Task k's backward, from its n rows of grad to those of mlp.delta; x[l] is its input of layer l, as padded rows.
void task_backward(const Mlp& mlp, const std::vector<Buffer>& weights, int64_t k, int64_t n, const ConstMatrix& grad,
                   const std::vector<ConstMatrix>& x) {
  const DType dtype = mlp.dtype;
  const int64_t first = mlp.tasks.start[k];
  thread_local Buffer buffers[2];
  const MlpLayer& last = mlp.layers[mlp.count - 1];
  const int64_t classes = last.layer.outputs;
  void* wide = last.kept_delta.data == nullptr ? buffers[0].of(n * padded(classes) * size_of(dtype))
                                               : rows_from(last.kept_delta, first, dtype).data;
  pad_rows(grad, dtype, n, classes, wide, kThisThread);
  ConstMatrix delta{wide, padded(classes)};
  for (int64_t l = mlp.count - 1;; --l) {
    write_gradients(mlp.layers[l], dtype, k, n, delta, x[l]);
    if (l == 0) break;
    const Layer& layer = mlp.layers[l].layer;
    const int64_t width = padded(layer.inputs);
    const Matrix& kept = l == 1 ? mlp.delta : mlp.layers[l - 1].kept_delta;
    const Matrix next = kept.data != nullptr
                            ? rows_from(kept, first, dtype)
                            : Matrix{buffers[(mlp.count - l) % 2].of(n * width * size_of(dtype)), width};
    input_gradient(weights[l], dtype, layer, n, delta, x[l], next);
    delta = next;
  }
}

}  // namespace

void mlp_backward(const Mlp& mlp, const ConstMatrix& grad, const Executor& executor) {
  const std::vector<Buffer> weights = padded_weights(mlp, executor);
  executor.each(mlp.tasks.t, 1, [&](int64_t k) {
    const int64_t first = mlp.tasks.start[k];
    const int64_t n = mlp.tasks.start[k + 1] - first;
    thread_local std::vector<Buffer> buffers;
    buffers.resize(std::max<size_t>(buffers.size(), mlp.count));
    std::vector<ConstMatrix> x(mlp.count);
    for (int64_t l = 1; l < mlp.count; ++l) {
      const int64_t inputs = mlp.layers[l].layer.inputs;
      x[l] = rows_from(mlp.layers[l].x, first, mlp.dtype);
      if (inputs < padded(inputs)) x[l] = padded_rows(x[l], mlp.dtype, n, inputs, buffers[l]);
    }
    task_backward(mlp, weights, k, n, rows_from(grad, first, mlp.dtype), x);
  });
}

void mlp_pass(const Mlp& mlp, const LayerInput& memory, Current* current, const int64_t* target,
              const Executor& executor) {
  const DType dtype = mlp.dtype;
  std::vector<ForwardLayer> forward;
  for (int64_t l = 0; l < mlp.count; ++l) forward.emplace_back(mlp.layers[l].layer, dtype, executor);
  const std::vector<Buffer> weights = padded_weights(mlp, executor);
  const int64_t classes = forward.back().layer.outputs;
  const std::vector<int64_t> groups = groups_of(mlp, memory.pairs != nullptr, current != nullptr);
  std::vector<int64_t> first_pair{0};
  for (int64_t k = 0; k < mlp.tasks.t; ++k) {
    first_pair.push_back(first_pair[k] + pairs_of(mlp.tasks.start[k + 1] - mlp.tasks.start[k]));
  }
  executor.each(static_cast<int64_t>(groups.size()) - 1, 1, [&](int64_t group) {
    const int64_t k = groups[group];
    const int64_t first = mlp.tasks.start[k];
    thread_local std::vector<int64_t> start;  // of the group's tasks within it
    start.clear();
    for (int64_t i = k; i <= groups[group + 1]; ++i) start.push_back(mlp.tasks.start[i] - first);
    const int64_t n = start.back();
    // The logits, the inputs of all layers but the first, and the gradient at the logits.
    thread_local std::vector<Buffer> buffers;
    buffers.resize(std::max<size_t>(buffers.size(), mlp.count + 1));
    std::vector<Matrix> x(mlp.count);
    for (int64_t l = 1; l < mlp.count; ++l) {
      const int64_t width = forward[l - 1].width();
      const Matrix& kept = mlp.layers[l].kept_x;
      x[l] = kept.data != nullptr ? rows_from(kept, first, dtype)
                                  : Matrix{buffers[l].of(n * width * size_of(dtype)), width};
    }
    const bool is_current = current != nullptr && k == mlp.tasks.t - 1;
    const LayerInput& input = is_current ? current->x : memory;
    const Matrix logits{buffers[0].of(n * classes * size_of(dtype)), classes};
    if (input.pairs != nullptr) {
      sparse_rows_forward(input.pairs->from(first_pair[k]), dtype, n, forward[0].weight.data(), forward[0].bias.data(),
                          forward[0].layer.outputs, x[1]);
    }
    for (int64_t row = 0; row < n; row += kRows) {
      const int64_t rows = std::min(kRows, n - row);
      first_forward(forward[0], dtype, input, is_current ? 0 : first, row, rows, x[1]);
      for (int64_t l = 1; l < mlp.count; ++l) {
        const bool hidden = l + 1 < mlp.count;
        forward[l].forward(dtype, rows, hidden, rows_from(x[l], row, dtype),
                           rows_from(hidden ? x[l + 1] : logits, row, dtype));
      }
    }
    if (is_current) current->loss = cross_entropy(logits, dtype, target + first, n, classes);
    const Matrix grad{buffers[mlp.count].of(n * classes * size_of(dtype)), classes};
    cross_entropy_gradient(logits, dtype, target + first, {start.data(), static_cast<int64_t>(start.size()) - 1},
                           classes, grad, kThisThread);
    task_backward(mlp, weights, k, n, grad, {x.begin(), x.end()});
  });
}

}  // namespace gem_fast::cpu
