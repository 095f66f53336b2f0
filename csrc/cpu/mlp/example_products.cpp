#include "cpu/mlp/example_products.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/dispatch.h"
#include "core/status.h"
#include "cpu/mlp/buffer.h"
#include "cpu/mlp/gemm.h"
#include "cpu/mlp/layer_gradient.h"
#include "cpu/mlp/transpose.h"
#include "cpu/projection/solve.h"
#include "cpu/simd.h"

namespace gem_fast::cpu {
namespace {

// Columns of a product that are formed together.
constexpr int64_t kColumns = 64;
// Products that a float32 lane may add before its rounding exceeds what the tolerances count on.
constexpr double kLaneProducts = 256.0;
// Elements of g whose squares are added before float64 takes over.
constexpr int64_t kBlock = 1024;

// ---- kernels ------------------------------------------------------------------------------------------------

// The sum of a[i] b[i], in lanes of T over short blocks.
template <class Isa, class T>
GEM_FAST_KERNEL double dot(const T* a, const T* b, int64_t n) {
  constexpr int L = kLanesOf<Isa, T>;
  using V = typename Lanes<T, L>::type;
  V sum[2] = {};
  int64_t i = 0;
  for (; i + 2 * L <= n; i += 2 * L) {
    for (int h = 0; h < 2; ++h) {
      sum[h] += *reinterpret_cast<const V*>(a + i + h * L) * *reinterpret_cast<const V*>(b + i + h * L);
    }
  }
  double total = 0.0;
  for (int l = 0; l < L; ++l) total += static_cast<double>(sum[0][l] + sum[1][l]);
  for (; i < n; ++i) total += static_cast<double>(a[i] * b[i]);
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

// ---- one layer ----------------------------------------------------------------------------------------------

// Kept from call to call: fresh memory costs more than what is written to it.
struct Buffers {
  Buffer g, x, delta;
};

std::vector<Buffers>& this_threads_buffers(int64_t layers) {
  thread_local std::vector<Buffers> buffers;
  if (buffers.size() < static_cast<size_t>(layers)) buffers.resize(layers);
  return buffers;
}

// Of one layer: the transposes that P is formed from, and the part of g as the products of q take it.
class LayerProducts {
 public:
  LayerProducts(const Examples& of, const ExampleLayer& layer, Buffers& buffers)
      : of_(of), layer_(layer), n_(of.tasks.start[of.tasks.t]), g_(buffers.g), x_(buffers.x), delta_(buffers.delta) {}

  // What the products of q are formed with: where g's examples are known, the transposes of their inputs and of their
  // gradients at the outputs; else g's part of the weight as (outputs, padded(inputs)), or for entries its transpose.
  void prepare_q(bool is_first, const Executor& executor) {
    const DType dtype = of_.dtype;
    if (of_.current > 0) {
      const ConstMatrix x = is_first ? of_.current_x : rows_from(layer_.x.dense, n_, dtype);
      const int64_t width = padded(of_.current);
      transpose_padded(dtype, rows_from(layer_.delta, n_, dtype), of_.current, layer_.outputs,
                       delta_.of(layer_.outputs * width * size_of(dtype)), kThisThread);
      if (layer_.weight == nullptr) return;
      transpose_padded(dtype, x, of_.current, layer_.inputs, g_.of(layer_.inputs * width * size_of(dtype)),
                       kThisThread);
    } else if (layer_.weight != nullptr && layer_.x.rows != nullptr) {
      transpose_padded(dtype, {layer_.weight, layer_.inputs}, layer_.outputs, layer_.inputs,
                       g_.of(layer_.inputs * padded(layer_.outputs) * size_of(dtype)), executor);
    } else if (layer_.weight != nullptr) {
      pad_rows({layer_.weight, layer_.inputs}, dtype, layer_.outputs, layer_.inputs,
               g_.of(layer_.outputs * padded(layer_.inputs) * size_of(dtype)), executor);
    }
  }

  // Adds to q_k.
  void add_q(int64_t k, double* q) const {
    thread_local Buffer buffer;
    const DType dtype = of_.dtype;
    const int64_t first = of_.tasks.start[k];
    const int64_t rows = of_.tasks.start[k + 1] - first;
    const ConstMatrix delta = rows_from(layer_.delta, first, dtype);
    if (of_.current > 0) {
      thread_local std::vector<double> sums;
      sums.assign(of_.current, 0.0);
      add_example_products(first, rows, {g_.data(), padded(of_.current)}, {delta_.data(), padded(of_.current)},
                           of_.current, sums.data(), nullptr);
      for (const double sum : sums) *q += sum;
      return;
    }
    if (layer_.weight != nullptr && layer_.x.rows != nullptr) {
      const Matrix y = inputs_times(first, rows, {g_.data(), padded(layer_.outputs)}, padded(layer_.outputs), buffer);
      dot_rows(dtype, y, delta, rows, layer_.outputs, q);
    } else if (layer_.weight != nullptr) {
      const int64_t width = padded(layer_.inputs);
      const Matrix y{buffer.of(rows * width * size_of(dtype)), width};
      product(dtype, delta, {g_.data(), width}, rows, layer_.inputs, layer_.outputs, y);
      dot_rows(dtype, y, rows_from(layer_.x.dense, first, dtype), rows, layer_.inputs, q);
    }
    if (layer_.bias != nullptr) dot_rows(dtype, delta, {layer_.bias, 0}, rows, layer_.outputs, q);
  }

  // The transposes of the inputs and of the gradients at the outputs: (inputs, padded(N)) and (outputs, padded(N)).
  void prepare_P(const Executor& executor) {
    const DType dtype = of_.dtype;
    const int64_t width = padded(n_);
    transpose_padded(dtype, layer_.delta, n_, layer_.outputs, delta_.of(layer_.outputs * width * size_of(dtype)),
                     executor);
    if (layer_.weight == nullptr) return;
    void* x = x_.of(layer_.inputs * width * size_of(dtype));
    if (layer_.x.rows == nullptr) {
      transpose_padded(dtype, layer_.x.dense, n_, layer_.inputs, x, executor);
      return;
    }
    executor.each(column_blocks(layer_.inputs), 4, [&](int64_t block) {
      transpose_sparse_block(*layer_.x.rows, dtype, layer_.x.positions, n_, block,
                             at(x, block * kColumnBlock * width, dtype));
    });
  }

  // Adds the products of task k's examples with all of those before them, and with each other: to sums (N,), summed
  // over task k's; and to terms those of each with itself.
  void add_P(int64_t k, double* sums, double* terms) const {
    const int64_t first = of_.tasks.start[k];
    const int64_t end = of_.tasks.start[k + 1];
    add_example_products(first, end - first, {x_.data(), padded(n_)}, {delta_.data(), padded(n_)}, end, sums, terms);
  }

  // g += the sum over the examples, weighted.
  void add_gradient(const double* weights, const Executor& executor) const {
    const DType dtype = of_.dtype;
    const int64_t width = padded(layer_.outputs);
    Buffer buffer;
    const Matrix delta{buffer.of(n_ * width * size_of(dtype)), width};
    GEM_FAST_DISPATCH_FLOAT_OR_DOUBLE(dtype, {
      for (int64_t i = 0; i < n_; ++i) {
        const T* from = static_cast<const T*>(layer_.delta.data) + i * layer_.delta.stride;
        scale_row(from, static_cast<T>(weights[i]), width, static_cast<T*>(delta.data) + i * width);
      }
      if (layer_.bias != nullptr) {
        T* bias = static_cast<T*>(layer_.bias);
        for (int64_t i = 0; i < n_; ++i) {
          for (int64_t o = 0; o < layer_.outputs; ++o) bias[o] += static_cast<T*>(delta.data)[i * width + o];
        }
      }
    });
    if (layer_.weight == nullptr) return;
    const int64_t all[] = {0, n_};
    LayerInput x = layer_.x;
    if (x.rows != nullptr) x = {.transposed = {x_.data(), padded(n_)}};
    layer_gradients({dtype, {all, 1}, layer_.outputs, layer_.inputs, delta, x, true}, {layer_.weight, 0}, executor);
  }

 private:
  // (rows, width): the layer's input, of rows from `first` on, times the first `width` columns of a matrix.
  Matrix inputs_times(int64_t first, int64_t rows, const ConstMatrix& matrix, int64_t width, Buffer& buffer) const {
    const DType dtype = of_.dtype;
    const Matrix y{buffer.of(rows * width * size_of(dtype)), width};
    if (layer_.x.rows == nullptr) {
      product(dtype, rows_from(layer_.x.dense, first, dtype), matrix, rows, width, layer_.inputs, y);
      return y;
    }
    for (int64_t i = 0; i < rows; ++i) {
      sparse_row_product(*layer_.x.rows, dtype, layer_.x.positions[first + i], matrix, width,
                         rows_from(y, i, dtype).data);
    }
    return y;
  }

  // Adds the inner products of gradients, those of `rows` examples from `first` on with n others, given as transposes:
  // to sums (n,), summed over the rows; and to terms those of each with itself, where the others are all examples.
  void add_example_products(int64_t first, int64_t rows, const ConstMatrix& x, const ConstMatrix& delta, int64_t n,
                            double* sums, double* terms) const {
    thread_local Buffer buffers[2];
    const DType dtype = of_.dtype;
    const int64_t width = padded(n);
    const Matrix of_x{buffers[0].of(rows * width * size_of(dtype)), width};
    if (layer_.weight != nullptr) {
      inputs_times(first, rows, x, width, buffers[0]);
    } else {
      memset(of_x.data, 0, rows * width * size_of(dtype));
    }
    const Matrix of_delta{buffers[1].of(rows * width * size_of(dtype)), width};
    product(dtype, rows_from(layer_.delta, first, dtype), delta, rows, width, layer_.outputs, of_delta);
    const double one = layer_.bias == nullptr ? 0.0 : 1.0;
    add_products(dtype, of_x, one, of_delta, rows, n, sums);
    for (int64_t i = 0; terms != nullptr && i < rows; ++i) {
      *terms += (number(of_x, i, first + i, dtype) + one) * number(of_delta, i, first + i, dtype);
    }
  }

  const Examples& of_;
  const ExampleLayer& layer_;
  const int64_t n_;
  Buffer &g_, &x_, &delta_;
};

// |g|^2, in blocks over which a lane adds few products.
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

}  // namespace

bool project_examples(const Examples& of, const TensorList& g, double margin, double ridge, double* v, double* q,
                      double* residual, const Executor& executor) {
  const int64_t t = of.tasks.t;
  const int64_t n = of.tasks.start[t];
  std::vector<LayerProducts> layers;
  std::vector<Buffers>& buffers = this_threads_buffers(of.count);
  for (int64_t l = 0; l < of.count; ++l) {
    layers.emplace_back(of, of.layers[l], buffers[l]);
    layers.back().prepare_q(l == 0, executor);
  }
  std::fill_n(v, t, 0.0);
  *residual = 0.0;
  executor.each(t, 2, [&](int64_t k) {
    q[k] = 0.0;
    for (const LayerProducts& layer : layers) layer.add_q(k, q + k);
  });
  const double g_squared = squared_length(g, of.dtype);
  if (!std::isfinite(g_squared)) return false;
  bool violated = false;
  for (int64_t k = 0; k < t; ++k) {
    if (!std::isfinite(q[k])) return false;
    violated |= q[k] < 0.0;
  }
  if (!violated) return true;

  int64_t longest = 0;
  for (int64_t l = 0; l < of.count; ++l) {
    longest = std::max({longest, of.layers[l].inputs, of.layers[l].outputs});
    layers[l].prepare_P(executor);
  }
  std::vector<double> P(t * t), terms(t, 0.0);
  // The first task has the fewest products, the last one the most: a pair of both is as much work as any other.
  executor.each((t + 1) / 2, 1, [&](int64_t pair) {
    thread_local std::vector<double> sums;
    for (const int64_t k : {pair, t - 1 - pair}) {
      sums.assign(n, 0.0);
      for (const LayerProducts& layer : layers) layer.add_P(k, sums.data(), &terms[k]);
      for (int64_t j = 0; j <= k; ++j) {
        double sum = 0.0;
        for (int64_t i = of.tasks.start[j]; i < of.tasks.start[j + 1]; ++i) sum += sums[i];
        P[k * t + j] = P[j * t + k] = sum;
      }
      if (pair == t - 1 - pair) break;
    }
  });
  double cancellation = 0.0;
  for (int64_t k = 0; k < t; ++k) {
    if (!std::isfinite(P[k * t + k])) return false;
    cancellation = std::max(cancellation, terms[k] / std::max(P[k * t + k], 1e-300));
  }
  cancellation = (1.0 + cancellation) * std::sqrt(std::max(1.0, static_cast<double>(longest) / kLaneProducts));
  const NnqpProblem dual{P.data(), q, static_cast<int>(t), margin, ridge};
  const NnqpAnswer answer = project_dual({dual, &g_squared, products_of(of.dtype), &cancellation}, v);
  if (answer.status != kSolved) return false;
  *residual = answer.residual;
  std::vector<double> weights(n);
  for (int64_t k = 0; k < t; ++k) {
    std::fill(weights.begin() + of.tasks.start[k], weights.begin() + of.tasks.start[k + 1], v[k]);
  }
  for (const LayerProducts& layer : layers) layer.add_gradient(weights.data(), executor);
  return true;
}

}  // namespace gem_fast::cpu
