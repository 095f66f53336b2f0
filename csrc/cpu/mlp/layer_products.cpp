#include "cpu/mlp/layer_products.h"

#include <algorithm>
#include <cstring>

#include "core/dispatch.h"
#include "cpu/mlp/gemm.h"
#include "cpu/mlp/layer_gradient.h"
#include "cpu/mlp/transpose.h"
#include "cpu/simd.h"

namespace gem_fast::cpu {
namespace {

// Columns of a product that are formed together.
constexpr int64_t kColumns = 64;
// Elements of g whose squares are added before float64 takes over.
constexpr int64_t kBlock = 1024;

// The sum of a[i] b[i], in lanes of T over short blocks.
template <class Isa, class T>
GEM_FAST_KERNEL double dot(const T* a, const T* b, int64_t n) {
  constexpr int L = kLanesOf<Isa, T>;
  using V = typename Lanes<T, L>::type;
  V sum[2] = {};
  const int64_t whole = n - n % (2 * L);
  for (int64_t i = 0; i < whole; i += 2 * L) {
    for (int h = 0; h < 2; ++h) {
      sum[h] += *reinterpret_cast<const V*>(a + i + h * L) * *reinterpret_cast<const V*>(b + i + h * L);
    }
  }
  double total = 0.0;
  for (int l = 0; l < L; ++l) total += static_cast<double>(sum[0][l] + sum[1][l]);
  for (int64_t i = whole; i < n; ++i) total += static_cast<double>(a[i] * b[i]);
  return total;
}

template <class Isa>
GEM_FAST_KERNEL void dot_rows_impl(DType dtype, const ConstMatrix& a, const ConstMatrix& b, int64_t rows,
                                   int64_t columns, double* sum) {
  for (int64_t i = 0; i < rows; ++i) {
    GEM_FAST_DISPATCH_FLOAT_OR_DOUBLE(dtype,
                                      *sum += dot<Isa, T>(static_cast<const T*>(a.data) + i * a.stride,
                                                          static_cast<const T*>(b.data) + i * b.stride, columns));
  }
}
// sum += all of a * b, for matrices (rows, columns).
GEM_FAST_MULTIVERSION(dot_rows,
                      (DType dtype, const ConstMatrix& a, const ConstMatrix& b, int64_t rows, int64_t columns,
                       double* sum),
                      (dtype, a, b, rows, columns, sum))

template <class Isa>
GEM_FAST_KERNEL void add_products_impl(DType dtype, const ConstMatrix& a, double one, const ConstMatrix& b,
                                       int64_t rows, int64_t columns, double* sum) {
  GEM_FAST_DISPATCH_FLOAT_OR_DOUBLE(dtype, {
    for (int64_t i = 0; i < rows; ++i) {
      const T* x = static_cast<const T*>(a.data) + i * a.stride;
      const T* y = static_cast<const T*>(b.data) + i * b.stride;
      for (int64_t c = 0; c < columns; ++c) sum[c] += static_cast<double>((x[c] + T(one)) * y[c]);
    }
  });
}
// sum (columns) += the rows of (a + one) * b.
GEM_FAST_MULTIVERSION(add_products,
                      (DType dtype, const ConstMatrix& a, double one, const ConstMatrix& b, int64_t rows,
                       int64_t columns, double* sum),
                      (dtype, a, one, b, rows, columns, sum))

template <class T>
void scale_row(const T* from, T scale, int64_t n, T* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = scale * from[i];
}

double number(const ConstMatrix& x, int64_t row, int64_t column, DType dtype) {
  double value = 0.0;
  GEM_FAST_DISPATCH_FLOAT_OR_DOUBLE(
      dtype, value = static_cast<double>(static_cast<const T*>(x.data)[row * x.stride + column]));
  return value;
}

// c (m, n) = a b, in blocks of columns; b is (k, n), readable up to whole cache lines.
void product(DType dtype, const ConstMatrix& a, const ConstMatrix& b, int64_t m, int64_t n, int64_t k,
             const Matrix& c) {
  for (int64_t j = 0; j < n; j += kColumns) {
    gemm(dtype, {.a = a.data,
                 .a_row_stride = a.stride,
                 .a_column_stride = 1,
                 .b = at(b.data, j, dtype),
                 .ldb = b.stride,
                 .c = at(c.data, j, dtype),
                 .ldc = c.stride,
                 .m = m,
                 .n = std::min(kColumns, n - j),
                 .k = k});
  }
}

}  // namespace

void LayerProducts::transposed(const Range& some, Columns& columns) const {
  const DType dtype = of_.dtype;
  const int64_t n = some.size();
  const int64_t width = padded(n);
  transpose_padded(dtype, rows_from(layer_.delta, some.first, dtype), n, layer_.outputs,
                   columns.delta.of(layer_.outputs * width * size_of(dtype)), kThisThread);
  if (layer_.weight == nullptr) return;
  void* to = columns.x.of(layer_.inputs * width * size_of(dtype));
  const LayerInput x = input_from(some.first);
  if (x.rows != nullptr) {
    transpose_sparse(*x.rows, dtype, x.positions, n, to);
  } else {
    transpose_padded(dtype, x.dense, n, layer_.inputs, to, kThisThread);
  }
}

void LayerProducts::add_products_of(const Range& rows, int64_t task, const Columns& columns, int64_t n, double* sums,
                                    double* own) const {
  thread_local Buffer buffers[2];
  const DType dtype = of_.dtype;
  const int64_t width = padded(n);
  const int64_t bytes = rows.size() * width * size_of(dtype);
  const Matrix of_x{buffers[0].of(bytes), width};
  if (layer_.weight != nullptr) {
    inputs_times(rows, {columns.x.data(), width}, of_x);
  } else {
    memset(of_x.data, 0, bytes);
  }
  const Matrix of_delta{buffers[1].of(bytes), width};
  product(dtype, rows_from(layer_.delta, rows.first, dtype), {columns.delta.data(), width}, rows.size(), width,
          layer_.outputs, of_delta);
  const double one = layer_.bias == nullptr ? 0.0 : 1.0;
  for (int64_t k = task, row = rows.first; row < rows.end; row = of_.tasks.start[++k]) {
    const int64_t at = row - rows.first;
    add_products(dtype, rows_from(of_x, at, dtype), one, rows_from(of_delta, at, dtype), of_.tasks.start[k + 1] - row,
                 n, sums + (k - task) * width);
  }
  for (int64_t i = 0; own != nullptr && i < n; ++i) {
    own[i] += (number(of_x, i, i, dtype) + one) * number(of_delta, i, i, dtype);
  }
}

void LayerProducts::prepare_q(Buffer& g, const Executor& executor) const {
  const DType dtype = of_.dtype;
  if (layer_.weight != nullptr && layer_.x.rows != nullptr) {
    transpose_padded(dtype, {layer_.weight, layer_.inputs}, layer_.outputs, layer_.inputs,
                     g.of(layer_.inputs * padded(layer_.outputs) * size_of(dtype)), executor);
  } else if (layer_.weight != nullptr) {
    pad_rows({layer_.weight, layer_.inputs}, dtype, layer_.outputs, layer_.inputs,
             g.of(layer_.outputs * padded(layer_.inputs) * size_of(dtype)), executor);
  }
}

void LayerProducts::add_q(int64_t k, const Buffer& g, double* q) const {
  thread_local Buffer buffer;
  const DType dtype = of_.dtype;
  const Range rows{of_.tasks.start[k], of_.tasks.start[k + 1]};
  const ConstMatrix delta = rows_from(layer_.delta, rows.first, dtype);
  if (layer_.weight != nullptr && layer_.x.rows != nullptr) {
    const int64_t width = padded(layer_.outputs);
    const Matrix y{buffer.of(rows.size() * width * size_of(dtype)), width};
    inputs_times(rows, {g.data(), width}, y);
    dot_rows(dtype, y, delta, rows.size(), layer_.outputs, q);
  } else if (layer_.weight != nullptr) {
    const int64_t width = padded(layer_.inputs);
    const Matrix y{buffer.of(rows.size() * width * size_of(dtype)), width};
    product(dtype, delta, {g.data(), width}, rows.size(), layer_.inputs, layer_.outputs, y);
    dot_rows(dtype, y, input_from(rows.first).dense, rows.size(), layer_.inputs, q);
  }
  if (layer_.bias != nullptr) dot_rows(dtype, delta, {layer_.bias, 0}, rows.size(), layer_.outputs, q);
}

void LayerProducts::sum_gradients(const Range& some, const double* weights, const Executor& executor) const {
  const DType dtype = of_.dtype;
  const int64_t width = padded(layer_.outputs);
  const int64_t n = some.size();
  thread_local Buffer buffer;
  const Matrix delta{buffer.of(n * width * size_of(dtype)), width};
  const bool is_given = of_.current == 0;
  GEM_FAST_DISPATCH_FLOAT_OR_DOUBLE(dtype, {
    for (int64_t i = 0; i < n; ++i) {
      const T* from = static_cast<const T*>(layer_.delta.data) + (some.first + i) * layer_.delta.stride;
      scale_row(from, static_cast<T>(weights[some.first + i]), width, static_cast<T*>(delta.data) + i * width);
    }
    if (layer_.bias != nullptr) {
      T* bias = static_cast<T*>(layer_.bias);
      if (!is_given) std::fill_n(bias, layer_.outputs, T(0));
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t o = 0; o < layer_.outputs; ++o) bias[o] += static_cast<T*>(delta.data)[i * width + o];
      }
    }
  });
  if (layer_.weight == nullptr) return;
  // In one piece, or of the first layer those of the memory and those of the mini-batch.
  const int64_t middle = is_first_ && some.first < n_ ? n_ - some.first : n;
  const int64_t bounds[][2] = {{0, middle}, {0, n - middle}};
  LayerGradients parts[2];
  for (int i = 0; i < 2; ++i) {
    const int64_t first = i == 0 ? 0 : middle;
    parts[i] = {dtype,
                {bounds[i], 1},
                layer_.outputs,
                layer_.inputs,
                rows_from(ConstMatrix(delta), first, dtype),
                input_from(some.first + first)};
  }
  layer_gradient_sum({parts, middle < n ? size_t{2} : size_t{1}}, is_given, layer_.weight, executor);
}

LayerInput LayerProducts::input_from(int64_t first) const {
  const bool is_current = is_first_ && first >= n_;
  LayerInput x = is_current ? of_.current_x : layer_.x;
  if (is_current) first -= n_;
  if (x.rows != nullptr) {
    x.positions += first;
  } else {
    x.dense = rows_from(x.dense, first, of_.dtype);
  }
  return x;
}

void LayerProducts::inputs_times(const Range& rows, const ConstMatrix& matrix, const Matrix& y) const {
  const DType dtype = of_.dtype;
  const LayerInput x = input_from(rows.first);
  if (x.rows == nullptr) {
    product(dtype, x.dense, matrix, rows.size(), y.stride, layer_.inputs, y);
    return;
  }
  for (int64_t i = 0; i < rows.size(); ++i) {
    sparse_row_product(*x.rows, dtype, x.positions[i], matrix, y.stride, rows_from(y, i, dtype).data);
  }
}

double squared_length(const TensorList& g, DType dtype) {
  double sum = 0.0;
  for (int64_t s = 0; s < g.count; ++s) {
    const int64_t rows = g.items[s].numel / kBlock;
    const int64_t rest = g.items[s].numel % kBlock;
    const ConstMatrix blocks{g.items[s].data, kBlock};
    const ConstMatrix last = rows_from(blocks, rows, dtype);
    dot_rows(dtype, blocks, blocks, rows, kBlock, &sum);
    if (rest > 0) dot_rows(dtype, last, last, 1, rest, &sum);
  }
  return sum;
}

}  // namespace gem_fast::cpu
