#include "cpu/chain.h"

#include <algorithm>
#include <vector>

#include "cpu/cross_entropy.h"
#include "cpu/product.h"

namespace gem_fast::cpu {
namespace {

// Columns of x whose gradients are formed together.
constexpr int64_t kColumns = 64;
// Rows that are taken together, so that they stay in the first-level cache.
constexpr int64_t kRows = 32;

// out (outputs, inputs) = columns [first, last) of delta' x for n rows.
void weight_gradient(const ConstMatrix& delta, const ConstMatrix& x, DType dtype, int64_t n, int64_t outputs,
                     int64_t inputs, int64_t first, int64_t last, void* out) {
  multiply(dtype, {.a = delta.data,
                   .a_row = 1,
                   .a_k = delta.stride,
                   .b = at(x.data, first, dtype),
                   .b_k = x.stride,
                   .rows = outputs,
                   .columns = last - first,
                   .n = n,
                   .start = nullptr,
                   .relu = false,
                   .mask = nullptr,
                   .mask_row = 0,
                   .out = at(out, first, dtype),
                   .out_row = inputs});
}

template <class T>
void sum_rows(const T* delta, int64_t stride, int64_t n, int64_t outputs, T* out) {
  std::fill_n(out, outputs, T(0));
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t o = 0; o < outputs; ++o) out[o] += delta[i * stride + o];
  }
}

// The positive parts of n rows of z, as padded rows.
template <class T>
void positive_rows(const ConstMatrix& z, int64_t n, int64_t columns, void* out) {
  const int64_t width = padded(columns);
  for (int64_t i = 0; i < n; ++i) {
    const T* from = static_cast<const T*>(z.data) + i * z.stride;
    T* to = static_cast<T*>(out) + i * width;
    for (int64_t c = 0; c < columns; ++c) to[c] = from[c] <= T(0) ? T(0) : from[c];
    std::fill(to + columns, to + width, T(0));
  }
}

// Copies n rows of x into padded ones.
ConstMatrix padded_rows(const ConstMatrix& x, DType dtype, int64_t n, int64_t columns, Buffer& buffer) {
  const int64_t width = padded(columns);
  void* data = buffer.of(n * width * size_of(dtype));
  for (int64_t i = 0; i < n; ++i) {
    pad_row(at(x.data, i * x.stride, dtype), dtype, columns, at(data, i * width, dtype));
  }
  return {data, width};
}

ConstMatrix rows_from(const ConstMatrix& x, int64_t row, DType dtype) {
  return {at(x.data, row * x.stride, dtype), x.stride};
}
Matrix rows_from(const Matrix& x, int64_t row, DType dtype) { return {at(x.data, row * x.stride, dtype), x.stride}; }

// ---- forward -----------------------------------------------------------------------------------------------

// A layer as the forward reads it.
struct ForwardLayer {
  Layer layer;
  Buffer weight;  // (inputs, padded(outputs))
  Buffer bias;    // (padded(outputs),)

  ForwardLayer(const Layer& from, DType dtype, const Executor& executor) : layer(from) {
    transpose(layer.weight, dtype, layer.outputs, layer.inputs, weight.of(layer.inputs * width() * size_of(dtype)),
              executor);
    if (layer.bias != nullptr) pad_row(layer.bias, dtype, layer.outputs, bias.of(width() * size_of(dtype)));
  }

  int64_t width() const { return padded(layer.outputs); }
  const void* bias_or_null() const { return layer.bias == nullptr ? nullptr : bias.data(); }
};

std::vector<ForwardLayer> forward_layers(const Layer* layers, int64_t count, DType dtype, const Executor& executor) {
  std::vector<ForwardLayer> result;
  for (int64_t l = 0; l < count; ++l) result.emplace_back(layers[l], dtype, executor);
  return result;
}

// n rows through one layer; hidden ones go on to the next as padded rows without what is negative.
void layer_forward(const ForwardLayer& of, DType dtype, int64_t n, bool hidden, const ConstMatrix& x, const Matrix& y) {
  const int64_t columns = hidden ? of.width() : of.layer.outputs;
  for (int64_t c = 0; c < columns; c += kColumns) {
    multiply(dtype, {.a = x.data,
                     .a_row = x.stride,
                     .a_k = 1,
                     .b = at(of.weight.data(), c, dtype),
                     .b_k = of.width(),
                     .rows = n,
                     .columns = std::min(kColumns, columns - c),
                     .n = of.layer.inputs,
                     .start = of.layer.bias == nullptr ? nullptr : at(of.bias.data(), c, dtype),
                     .relu = hidden,
                     .mask = nullptr,
                     .mask_row = 0,
                     .out = at(y.data, c, dtype),
                     .out_row = y.stride});
  }
}

// Rows [row, row + n) through the layers from `first` on, whose inputs are inputs[first ...).
void rows_forward(const std::vector<ForwardLayer>& layers, DType dtype, int64_t first, int64_t row, int64_t n,
                  const Matrix* inputs, const Matrix& outputs) {
  const auto count = static_cast<int64_t>(layers.size());
  for (int64_t l = first; l < count; ++l) {
    const bool hidden = l + 1 < count;
    layer_forward(layers[l], dtype, n, hidden, rows_from(inputs[l], row, dtype),
                  rows_from(hidden ? inputs[l + 1] : outputs, row, dtype));
  }
}

// ---- backward ----------------------------------------------------------------------------------------------

// All weights but the first as the backward reads them: (outputs, padded(inputs)).
std::vector<Buffer> backward_weights(const Layer* layers, int64_t count, DType dtype, const Executor& executor) {
  std::vector<Buffer> result(count);
  for (int64_t l = 1; l < count; ++l) {
    const Layer& layer = layers[l];
    pad_rows({layer.weight, layer.inputs}, dtype, layer.outputs, layer.inputs,
             result[l].of(layer.outputs * padded(layer.inputs) * size_of(dtype)), executor);
  }
  return result;
}

// Task k's backward, from its n rows of grad to those of delta; x[l] is its input of layer l, as padded rows.
void task_backward(const std::vector<Buffer>& weights, DType dtype, const Layer* layers, const Link* links,
                   int64_t count, int64_t k, int64_t n, const ConstMatrix& grad, const ConstMatrix* x,
                   const Matrix& delta) {
  thread_local Buffer buffers[2];
  ConstMatrix mine = padded_rows(grad, dtype, n, layers[count - 1].outputs, buffers[0]);
  for (int64_t l = count - 1;; --l) {
    const Link& link = links[l];
    const int64_t outputs = layers[l].outputs;
    const int64_t inputs = layers[l].inputs;
    if (link.bias_rows.data != nullptr) {
      GEM_FAST_DISPATCH_FULL(dtype,
                             sum_rows(static_cast<const T*>(mine.data), mine.stride, n, outputs,
                                      static_cast<T*>(at(link.bias_rows.data, k * link.bias_rows.stride, dtype))));
    }
    if (l == 0) break;
    if (link.weight_rows.data != nullptr) {
      void* out = at(link.weight_rows.data, k * link.weight_rows.stride, dtype);
      for (int64_t c = 0; c < inputs; c += kColumns) {
        weight_gradient(mine, x[l], dtype, n, outputs, inputs, c, std::min(inputs, c + kColumns), out);
      }
    }
    // The gradient at the layer's input, and with it at the output of the layer before where its ReLU let it pass.
    const int64_t width = padded(inputs);
    Matrix next = delta;
    if (l > 1) next = {buffers[(count - l) % 2].of(n * width * size_of(dtype)), width};
    for (int64_t i = 0; i < n; i += kRows) {
      for (int64_t c = 0; c < width; c += kColumns) {
        multiply(dtype, {.a = at(mine.data, i * mine.stride, dtype),
                         .a_row = mine.stride,
                         .a_k = 1,
                         .b = at(weights[l].data(), c, dtype),
                         .b_k = width,
                         .rows = std::min(kRows, n - i),
                         .columns = std::min(kColumns, width - c),
                         .n = outputs,
                         .start = nullptr,
                         .relu = false,
                         .mask = at(x[l].data, i * x[l].stride + c, dtype),
                         .mask_row = x[l].stride,
                         .out = at(next.data, i * next.stride + c, dtype),
                         .out_row = next.stride});
      }
    }
    mine = {next.data, next.stride};
  }
}

}  // namespace

void chain_forward(const ConstMatrix& z, DType dtype, int64_t N, const Layer* layers, int64_t count,
                   const Matrix* inputs, const Matrix& outputs, const Executor& executor) {
  const std::vector<ForwardLayer> forward = forward_layers(layers, count, dtype, executor);
  executor.each((N + kRows - 1) / kRows, 1, [&](int64_t block) {
    const int64_t row = block * kRows;
    const int64_t n = std::min(kRows, N - row);
    const Matrix x = rows_from(inputs[0], row, dtype);
    GEM_FAST_DISPATCH_FULL(dtype, positive_rows<T>(rows_from(z, row, dtype), n, layers[0].inputs, x.data));
    rows_forward(forward, dtype, 0, row, n, inputs, outputs);
  });
}

void chain_backward(const ConstMatrix& grad, DType dtype, const Layer* layers, const Link* links, int64_t count,
                    const Tasks& tasks, const Matrix& delta, const Executor& executor) {
  const std::vector<Buffer> weights = backward_weights(layers, count, dtype, executor);
  executor.each(tasks.t, 1, [&](int64_t k) {
    const int64_t first = tasks.start[k];
    const int64_t n = tasks.start[k + 1] - first;
    thread_local std::vector<Buffer> buffers;
    buffers.resize(std::max<size_t>(buffers.size(), count));
    std::vector<ConstMatrix> x(count);
    for (int64_t l = 1; l < count; ++l) {
      x[l] = rows_from(links[l].x, first, dtype);
      if (!links[l].is_padded) x[l] = padded_rows(x[l], dtype, n, layers[l].inputs, buffers[l]);
    }
    task_backward(weights, dtype, layers, links, count, k, n, rows_from(grad, first, dtype), x.data(),
                  rows_from(delta, first, dtype));
  });
}

void chain_pass(const LayerInput& input, const int64_t* target, DType dtype, const Layer* layers, const Link* links,
                int64_t count, const Tasks& tasks, const Matrix& delta, const Executor& executor) {
  const std::vector<ForwardLayer> forward = forward_layers(layers, count, dtype, executor);
  const std::vector<Buffer> weights = backward_weights(layers, count, dtype, executor);
  const int64_t classes = layers[count - 1].outputs;
  std::vector<int64_t> first_pair{0};
  for (int64_t k = 0; k < tasks.t; ++k) {
    first_pair.push_back(first_pair[k] + pairs_of(tasks.start[k + 1] - tasks.start[k]));
  }
  executor.each(tasks.t, 1, [&](int64_t k) {
    const int64_t first = tasks.start[k];
    const int64_t n = tasks.start[k + 1] - first;
    thread_local std::vector<Buffer> buffers;
    buffers.resize(std::max<size_t>(buffers.size(), count + 1));
    std::vector<Matrix> x(count);
    for (int64_t l = 1; l < count; ++l) {
      const int64_t width = padded(layers[l].inputs);
      x[l] = {buffers[l].of(n * width * size_of(dtype)), width};
    }
    const Matrix logits{buffers[0].of(n * classes * size_of(dtype)), classes};
    if (input.pairs != nullptr) {
      sparse_rows_forward(input.pairs->from(first_pair[k]), dtype, n, forward[0].weight.data(),
                          forward[0].bias_or_null(), layers[0].outputs, x[1]);
    }
    for (int64_t row = 0; row < n; row += kRows) {
      const int64_t rows = std::min(kRows, n - row);
      const Matrix y = rows_from(x[1], row, dtype);
      for (int64_t i = 0; input.rows != nullptr && i < rows; ++i) {
        sparse_row_forward(*input.rows, dtype, input.positions[first + row + i], forward[0].weight.data(),
                           forward[0].bias_or_null(), layers[0].outputs, at(y.data, i * y.stride, dtype));
      }
      if (input.dense.data != nullptr) {
        layer_forward(forward[0], dtype, rows, true, rows_from(input.dense, first + row, dtype), y);
      }
      rows_forward(forward, dtype, 1, row, rows, x.data(), logits);
    }
    const int64_t whole[] = {0, n};
    const Matrix grad{buffers[count].of(n * classes * size_of(dtype)), classes};
    cross_entropy_gradient(logits, dtype, target + first, {whole, 1}, classes, grad, kThisThread);
    const std::vector<ConstMatrix> inputs(x.begin(), x.end());
    task_backward(weights, dtype, layers, links, count, k, n, grad, inputs.data(), rows_from(delta, first, dtype));
  });
}

}  // namespace gem_fast::cpu
