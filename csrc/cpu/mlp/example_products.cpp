#include "cpu/mlp/example_products.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/dispatch.h"
#include "core/status.h"
#include "cpu/mlp/buffer.h"
#include "cpu/mlp/example_rows.h"
#include "cpu/mlp/examples_in_float64.h"
#include "cpu/mlp/gemm.h"
#include "cpu/mlp/layer_gradient.h"
#include "cpu/mlp/transpose.h"
#include "cpu/projection/solve.h"
#include "cpu/simd.h"

namespace gem_fast::cpu {
namespace {

// Columns of a product that are formed together.
constexpr int64_t kColumns = 64;
// Examples whose products with others are formed together: their transposes stay in the caches.
constexpr int64_t kGroup = 32;
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

// Rows of examples that are together.
struct Range {
  int64_t first, end;

  int64_t size() const { return end - first; }
};

// Of one layer the transposes of some examples' inputs, (inputs, padded(n)), and of their gradients at its output,
// (outputs, padded(n)).
struct Columns {
  Buffer x, delta;
};

// The products of one layer's examples.
class LayerProducts {
 public:
  LayerProducts(const Examples& of, const ExampleLayer& layer, bool is_first)
      : of_(of), layer_(layer), is_first_(is_first), n_(of.tasks.start[of.tasks.t]) {}

  // Makes columns of the examples `some`, all of past tasks or all of the current mini-batch.
  void transposed(const Range& some, Columns& columns) const {
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

  // The inner products of the gradients of the examples `rows`, of tasks [task, ...), with those of n others, given as
  // columns: to sums (tasks, padded(n)), where those of each task are added up. Where the others are the same examples,
  // `own` (n,) gets those of each with itself added.
  void add_products_of(const Range& rows, int64_t task, const Columns& columns, int64_t n, double* sums,
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

  // What the products of q with a g that is given are formed with: its part of the weight as (outputs,
  // padded(inputs)), or for entries its transpose.
  void prepare_q(Buffer& g, const Executor& executor) const {
    const DType dtype = of_.dtype;
    if (layer_.weight != nullptr && layer_.x.rows != nullptr) {
      transpose_padded(dtype, {layer_.weight, layer_.inputs}, layer_.outputs, layer_.inputs,
                       g.of(layer_.inputs * padded(layer_.outputs) * size_of(dtype)), executor);
    } else if (layer_.weight != nullptr) {
      pad_rows({layer_.weight, layer_.inputs}, dtype, layer_.outputs, layer_.inputs,
               g.of(layer_.outputs * padded(layer_.inputs) * size_of(dtype)), executor);
    }
  }

  // Adds to q_k, from what `prepare_q` has left.
  void add_q(int64_t k, const Buffer& g, double* q) const {
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

  // g = the sum of the gradients of the examples `some`, weighted; or += where g is given.
  void sum_gradients(const Range& some, const double* weights, const Executor& executor) const {
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

 private:
  // The layer's input from example `first` on, up to the last one of the memory or of the mini-batch.
  LayerInput input_from(int64_t first) const {
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

  // y (rows, y.stride) = the layer's input, of these rows, times the first columns of a matrix.
  void inputs_times(const Range& rows, const ConstMatrix& matrix, const Matrix& y) const {
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

  const Examples& of_;
  const ExampleLayer& layer_;
  const bool is_first_;
  const int64_t n_;
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

// ---- all layers ---------------------------------------------------------------------------------------------

// Consecutive tasks whose products are formed together, and their examples.
struct Group {
  int64_t task, end_task;
  Range rows;
};

std::vector<Group> groups_of(const Tasks& tasks) {
  std::vector<Group> groups;
  for (int64_t k = 0; k < tasks.t; ++k) {
    const Range rows{tasks.start[k], tasks.start[k + 1]};
    if (!groups.empty() && rows.end - groups.back().rows.first <= kGroup) {
      groups.back().end_task = k + 1;
      groups.back().rows.end = rows.end;
    } else {
      groups.push_back({k, k + 1, rows});
    }
  }
  return groups;
}

// Kept from call to call: fresh memory costs more than what is written to it.
std::vector<Columns>& this_threads_columns(size_t count) {
  thread_local std::vector<Columns> columns;
  if (columns.size() < count) columns.resize(count);
  return columns;
}

double sum_of(const double* x, int64_t n) {
  double sum = 0.0;
  for (int64_t i = 0; i < n; ++i) sum += x[i];
  return sum;
}

// An inner product of a gradient with itself, and the sum of those of its examples' parts: what its rounding grows
// with.
struct SelfProducts {
  double whole, parts;
};

// q, and |g|^2 of the gradient that the current mini-batch's examples add up to.
SelfProducts products_with_current(const Examples& of, const std::vector<LayerProducts>& layers, double* q,
                                   const Executor& executor) {
  const int64_t t = of.tasks.t;
  const Range current{of.tasks.start[t], of.tasks.start[t] + of.current};
  std::vector<Columns>& columns = this_threads_columns(layers.size());
  for (size_t l = 0; l < layers.size(); ++l) layers[l].transposed(current, columns[l]);
  std::vector<double> own(of.current, 0.0);
  double g_squared = 0.0;
  executor.each(t + 1, 4, [&](int64_t k) {
    thread_local std::vector<double> sums;
    sums.assign(padded(of.current), 0.0);
    const Range rows{of.tasks.start[k], of.tasks.start[k + 1]};
    for (size_t l = 0; l < layers.size(); ++l) {
      layers[l].add_products_of(rows, k, columns[l], of.current, sums.data(), k == t ? own.data() : nullptr);
    }
    (k == t ? g_squared : q[k]) = sum_of(sums.data(), of.current);
  });
  return {g_squared, sum_of(own.data(), of.current)};
}

// P (t, t), and of its diagonal the sums of the examples' own.
void form_P(const Examples& of, const std::vector<LayerProducts>& layers, double* P, std::vector<double>& parts,
            const Executor& executor) {
  const int64_t t = of.tasks.t;
  const auto count = static_cast<int64_t>(layers.size());
  const std::vector<Group> groups = groups_of(of.tasks);
  const auto n_groups = static_cast<int64_t>(groups.size());
  std::vector<Columns>& columns = this_threads_columns(groups.size() * layers.size());
  executor.each(n_groups * count, 1,
                [&](int64_t i) { layers[i % count].transposed(groups[i / count].rows, columns[i]); });
  // A pair is a group of rows and one of columns, not after it.
  executor.each(n_groups * (n_groups + 1) / 2, 1, [&](int64_t pair) {
    int64_t b = 0;
    for (; pair >= n_groups - b; ++b) pair -= n_groups - b;
    const Group &mine = groups[b + pair], &others = groups[b];
    const int64_t n = others.rows.size();
    thread_local std::vector<double> sums, own;
    sums.assign((mine.end_task - mine.task) * padded(n), 0.0);
    own.assign(n, 0.0);
    for (int64_t l = 0; l < count; ++l) {
      layers[l].add_products_of(mine.rows, mine.task, columns[b * count + l], n, sums.data(),
                                pair == 0 ? own.data() : nullptr);
    }
    for (int64_t k = mine.task; k < mine.end_task; ++k) {
      const double* of_k = sums.data() + (k - mine.task) * padded(n) - others.rows.first;
      for (int64_t j = others.task; j < std::min(k + 1, others.end_task); ++j) {
        P[k * t + j] = P[j * t + k] = sum_of(of_k + of.tasks.start[j], of.tasks.start[j + 1] - of.tasks.start[j]);
      }
      if (pair == 0) {
        parts[k] =
            sum_of(own.data() + of.tasks.start[k] - others.rows.first, of.tasks.start[k + 1] - of.tasks.start[k]);
      }
    }
  });
}

// q where g is given: what its products are formed with is made of the layers' parts of it.
void products_with_given(const Examples& of, const std::vector<LayerProducts>& layers, double* q,
                         const Executor& executor) {
  thread_local std::vector<Buffer> parts;
  parts.resize(std::max(parts.size(), layers.size()));
  for (size_t l = 0; l < layers.size(); ++l) layers[l].prepare_q(parts[l], executor);
  const std::vector<Buffer>& prepared = parts;
  executor.each(of.tasks.t, 2, [&](int64_t k) {
    q[k] = 0.0;
    for (size_t l = 0; l < layers.size(); ++l) layers[l].add_q(k, prepared[l], q + k);
  });
}

// v and the residual by way of P; false, with v = 0, where the products are not enough.
bool solve(const Examples& of, const std::vector<LayerProducts>& layers, const SelfProducts& of_g, double margin,
           double ridge, double* v, const double* q, double* residual, const Executor& executor) {
  const int64_t t = of.tasks.t;
  std::vector<double> P(t * t), parts(t);
  form_P(of, layers, P.data(), parts, executor);
  int64_t longest = 0;
  for (int64_t l = 0; l < of.count; ++l) longest = std::max({longest, of.layers[l].inputs, of.layers[l].outputs});
  double cancellation = of_g.parts / std::max(of_g.whole, 1e-300);
  for (int64_t k = 0; k < t; ++k) {
    if (!std::isfinite(P[k * t + k])) return false;
    cancellation = std::max(cancellation, parts[k] / std::max(P[k * t + k], 1e-300));
  }
  cancellation = (1.0 + cancellation) * std::sqrt(std::max(1.0, static_cast<double>(longest) / kLaneProducts));
  const NnqpProblem dual{P.data(), q, static_cast<int>(t), margin, ridge};
  const NnqpAnswer answer = project_dual({dual, &of_g.whole, products_of(of.dtype), &cancellation}, v);
  if (answer.status == kSolved) {
    *residual = answer.residual;
  } else {
    std::fill_n(v, t, 0.0);
  }
  return answer.status == kSolved;
}

std::vector<LayerProducts> products_of_layers(const Examples& of) {
  std::vector<LayerProducts> layers;
  for (int64_t l = 0; l < of.count; ++l) layers.emplace_back(of, of.layers[l], l == 0);
  return layers;
}

// q, and |g|^2; not finite where a value of g or q is not.
SelfProducts products_with_g(const Examples& of, const std::vector<LayerProducts>& layers, const TensorList& g,
                             double* q, const Executor& executor) {
  SelfProducts of_g{0.0, 0.0};
  if (of.current > 0) {
    of_g = products_with_current(of, layers, q, executor);
  } else {
    products_with_given(of, layers, q, executor);
    of_g.whole = squared_length(g, of.dtype);
  }
  for (int64_t k = 0; k < of.tasks.t; ++k) of_g.whole += 0.0 * q[k];
  return of_g;
}

// g + G^T v to the layers' parts: of a g that is given, in place.
void write_sum(const Examples& of, const std::vector<LayerProducts>& layers, const double* v,
               const Executor& executor) {
  const int64_t t = of.tasks.t;
  const int64_t n = of.tasks.start[t];
  const bool is_moved = std::any_of(v, v + t, [](double x) { return x != 0.0; });
  const Range some{is_moved ? 0 : n, n + of.current};
  if (some.size() == 0) return;
  std::vector<double> weights(some.end, 1.0);
  for (int64_t k = 0; k < t; ++k) {
    std::fill(weights.begin() + of.tasks.start[k], weights.begin() + of.tasks.start[k + 1], v[k]);
  }
  for (const LayerProducts& layer : layers) layer.sum_gradients(some, weights.data(), executor);
}

// All of a projection of float32 examples in float64, rounded once; false, with v = 0 and g as it was, where that is
// not enough, either.
bool project_in_float64(const Examples& of, const TensorList& g, double margin, double ridge, double* v, double* q,
                        double* residual, const Executor& executor) {
  if (of.dtype != DType::kFloat32) return false;
  const ExamplesInFloat64 exact(of, g, executor);
  const std::vector<LayerProducts> layers = products_of_layers(exact.examples());
  const SelfProducts of_g = products_with_g(exact.examples(), layers, exact.g(), q, executor);
  if (!std::isfinite(of_g.whole)) return false;
  if (solve(exact.examples(), layers, of_g, margin, ridge, v, q, residual, executor)) {
    write_sum(exact.examples(), layers, v, executor);
    if (exact.round_gradient()) return true;
  }
  std::fill_n(v, of.tasks.t, 0.0);
  *residual = 0.0;
  return false;
}

}  // namespace

int32_t project_examples(const Examples& of, const TensorList& g, double margin, double ridge, double* v, double* q,
                         double* residual, void* rows, const Executor& executor) {
  const int64_t t = of.tasks.t;
  const std::vector<LayerProducts> layers = products_of_layers(of);
  std::fill_n(v, t, 0.0);
  *residual = 0.0;
  const SelfProducts of_g = products_with_g(of, layers, g, q, executor);
  bool finite = std::isfinite(of_g.whole);
  const bool by_products = rows == nullptr;
  if (finite && std::any_of(q, q + t, [](double x) { return x < 0.0; }) &&
      !(by_products && solve(of, layers, of_g, margin, ridge, v, q, residual, executor))) {
    if (by_products && project_in_float64(of, g, margin, ridge, v, q, residual, executor)) return kSolved;
    Buffer own;
    if (by_products) rows = own.of(example_rows_bytes(of));
    const int32_t status = project_by_rows(of, margin, ridge, v, q, residual, rows, executor);
    if (status != kNonFinite) return status;
    finite = false;
  }
  write_sum(of, layers, v, executor);
  return finite ? kSolved : kNonFinite;
}

}  // namespace gem_fast::cpu
