#include "cpu/mlp/example_products.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/status.h"
#include "cpu/mlp/example_rows.h"
#include "cpu/mlp/examples_in_float64.h"
#include "cpu/mlp/layer_products.h"
#include "cpu/projection/solve.h"

namespace gem_fast::cpu {
namespace {

// Examples whose products with others are formed together: their transposes stay in the caches.
constexpr int64_t kGroup = 32;
// Products that a float32 lane may add before its rounding exceeds what the tolerances count on.
constexpr double kLaneProducts = 256.0;

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
