#include "cpu/linear.h"

#include <algorithm>
#include <vector>

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
ConstMatrix padded_rows(const ConstMatrix& x, DType dtype, int64_t n, int64_t columns, std::vector<char>& buffer) {
  const int64_t width = padded(columns);
  buffer.resize(n * width * size_of(dtype));
  for (int64_t i = 0; i < n; ++i) {
    pad_row(at(x.data, i * x.stride, dtype), dtype, columns, at(buffer.data(), i * width, dtype));
  }
  return {buffer.data(), width};
}

ConstMatrix rows_from(const ConstMatrix& x, int64_t row, DType dtype) {
  return {at(x.data, row * x.stride, dtype), x.stride};
}

}  // namespace

int64_t chain_scratch(const Layer* layers, int64_t count) {
  int64_t total = 0;
  for (int64_t l = 0; l < count; ++l) {
    const int64_t turned = (layers[l].inputs + 1) * padded(layers[l].outputs);
    total += std::max(turned, layers[l].outputs * padded(layers[l].inputs));
  }
  return total;
}

void chain_forward(const ConstMatrix& z, DType dtype, int64_t N, const Layer* layers, int64_t count,
                   const Matrix* inputs, const Matrix& outputs, void* scratch, const Executor& executor) {
  std::vector<const void*> weights(count), biases(count, nullptr);
  for (int64_t l = 0; l < count; ++l) {
    const Layer& layer = layers[l];
    weights[l] = scratch;
    transpose(layer.weight, dtype, layer.outputs, layer.inputs, scratch, executor);
    scratch = at(scratch, layer.inputs * padded(layer.outputs), dtype);
    if (layer.bias == nullptr) continue;
    biases[l] = scratch;
    pad_rows({layer.bias, 0}, dtype, 1, layer.outputs, scratch, executor);
    scratch = at(scratch, padded(layer.outputs), dtype);
  }
  executor.each((N + kRows - 1) / kRows, 1, [&](int64_t block) {
    const int64_t row = block * kRows;
    const int64_t n = std::min(kRows, N - row);
    GEM_FAST_DISPATCH_FULL(dtype, positive_rows<T>(rows_from(z, row, dtype), n, layers[0].inputs,
                                                   at(inputs[0].data, row * inputs[0].stride, dtype)));
    for (int64_t l = 0; l < count; ++l) {
      const bool last = l + 1 == count;
      const Matrix& y = last ? outputs : inputs[l + 1];
      const int64_t width = padded(layers[l].outputs);
      const int64_t columns = last ? layers[l].outputs : width;
      for (int64_t c = 0; c < columns; c += kColumns) {
        multiply(dtype, {.a = at(inputs[l].data, row * inputs[l].stride, dtype),
                         .a_row = inputs[l].stride,
                         .a_k = 1,
                         .b = at(weights[l], c, dtype),
                         .b_k = width,
                         .rows = n,
                         .columns = std::min(kColumns, columns - c),
                         .n = layers[l].inputs,
                         .start = biases[l] == nullptr ? nullptr : at(biases[l], c, dtype),
                         .relu = !last,
                         .mask = nullptr,
                         .mask_row = 0,
                         .out = at(y.data, row * y.stride + c, dtype),
                         .out_row = y.stride});
      }
    }
  });
}

void chain_backward(const ConstMatrix& grad, DType dtype, const Layer* layers, const Link* links, int64_t count,
                    const Tasks& tasks, const Matrix& delta, void* scratch, const Executor& executor) {
  std::vector<const void*> weights(count);
  for (int64_t l = 1; l < count; ++l) {
    const Layer& layer = layers[l];
    weights[l] = scratch;
    pad_rows({layer.weight, layer.inputs}, dtype, layer.outputs, layer.inputs, scratch, executor);
    scratch = at(scratch, layer.outputs * padded(layer.inputs), dtype);
  }
  executor.each(tasks.t, 1, [&](int64_t k) {
    const int64_t first = tasks.start[k];
    const int64_t n = tasks.start[k + 1] - first;
    thread_local std::vector<char> x_buffer, buffers[2];
    ConstMatrix mine = padded_rows(rows_from(grad, first, dtype), dtype, n, layers[count - 1].outputs, buffers[0]);
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
      ConstMatrix x = rows_from(link.x, first, dtype);
      if (!link.is_padded) x = padded_rows(x, dtype, n, inputs, x_buffer);
      if (link.weight_rows.data != nullptr) {
        void* out = at(link.weight_rows.data, k * link.weight_rows.stride, dtype);
        for (int64_t c = 0; c < inputs; c += kColumns) {
          weight_gradient(mine, x, dtype, n, outputs, inputs, c, std::min(inputs, c + kColumns), out);
        }
      }
      // The gradient at the layer's input, and with it at the output of the layer before where its ReLU let it pass.
      const int64_t width = padded(inputs);
      Matrix next{at(delta.data, first * delta.stride, dtype), delta.stride};
      if (l > 1) {
        std::vector<char>& buffer = buffers[(count - l) % 2];
        buffer.resize(n * width * size_of(dtype));
        next = {buffer.data(), width};
      }
      for (int64_t i = 0; i < n; i += kRows) {
        for (int64_t c = 0; c < width; c += kColumns) {
          multiply(dtype, {.a = at(mine.data, i * mine.stride, dtype),
                           .a_row = mine.stride,
                           .a_k = 1,
                           .b = at(weights[l], c, dtype),
                           .b_k = width,
                           .rows = std::min(kRows, n - i),
                           .columns = std::min(kColumns, width - c),
                           .n = outputs,
                           .start = nullptr,
                           .relu = false,
                           .mask = at(x.data, i * x.stride + c, dtype),
                           .mask_row = x.stride,
                           .out = at(next.data, i * next.stride + c, dtype),
                           .out_row = next.stride});
        }
      }
      mine = {next.data, next.stride};
    }
  });
}

void linear_gradient(const ConstMatrix& delta, const ConstMatrix& x, DType dtype, const Tasks& tasks, int64_t outputs,
                     int64_t inputs, const Matrix& out, const Executor& executor) {
  const int64_t groups = (inputs + kColumns - 1) / kColumns;
  executor.each(tasks.t * groups, 1, [&](int64_t item) {
    const int64_t k = item / groups;
    const int64_t first = item % groups * kColumns;
    const int64_t row = tasks.start[k];
    weight_gradient(rows_from(delta, row, dtype), rows_from(x, row, dtype), dtype, tasks.start[k + 1] - row, outputs,
                    inputs, first, std::min(inputs, first + kColumns), at(out.data, k * out.stride, dtype));
  });
}

}  // namespace gem_fast::cpu
