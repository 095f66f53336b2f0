#include "cpu/sparse.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/simd.h"
#include "cpu/transpose.h"

namespace gem_fast::cpu {
namespace {

// Rows that one thread takes at a time.
constexpr int64_t kRowGrain = 16;
// Vectors of outputs whose sums stay in registers while entries stream by.
constexpr int kMostVectors = 8;
// Columns of x whose gradients are formed one after the other and written as whole cache lines of each output's row.
constexpr int64_t kColumnBlock = 16;
// The part of the products with two neighbouring columns that must not be with zeros, for these to be taken together:
// what is spared is half of what is read, and a zero costs as much as another number.
constexpr double kLeastFull = 0.7;

// ---- sums of scaled vectors --------------------------------------------------------------------------------

// For c < kTogether: sum[c width ... + kVectors) += sum over the entries e of value[e kTogether + c] * table[index[e]]
template <class T, int L, int kTogether, int kVectors>
GEM_FAST_KERNEL void add_entries(const T* table, int64_t width, const int32_t* index, const T* value, int64_t count,
                                 T* sum) {
  using V = typename Lanes<T, L>::type;
  V total[kTogether][kVectors];
  for (int c = 0; c < kTogether; ++c) {
    for (int v = 0; v < kVectors; ++v) total[c][v] = *reinterpret_cast<const V*>(sum + c * width + v * L);
  }
  for (int64_t e = 0; e < count; ++e) {
    const T* row = table + index[e] * width;
    for (int v = 0; v < kVectors; ++v) {
      const V x = *reinterpret_cast<const V*>(row + v * L);
      for (int c = 0; c < kTogether; ++c) total[c][v] += value[e * kTogether + c] * x;
    }
  }
  for (int c = 0; c < kTogether; ++c) {
    for (int v = 0; v < kVectors; ++v) *reinterpret_cast<V*>(sum + c * width + v * L) = total[c][v];
  }
}

// The same for all of a row, in groups of vectors that fit the registers.
template <class T, int L, int kTogether>
GEM_FAST_KERNEL void add_all_entries(const T* table, int64_t width, const int32_t* index, const T* value, int64_t count,
                                     T* sum) {
  constexpr int64_t kMost = kTogether == 1 || L * sizeof(T) == 64 ? kMostVectors : kMostVectors / 2;
  const int64_t vectors = width / L;
  const int64_t groups = (vectors + kMost - 1) / kMost;
  const int64_t size = (vectors + groups - 1) / groups;
  for (int64_t v = 0; v < vectors; v += size) {
    const T* from = table + v * L;
    T* to = sum + v * L;
    switch (std::min(size, vectors - v)) {
      case 1: add_entries<T, L, kTogether, 1>(from, width, index, value, count, to); break;
      case 2: add_entries<T, L, kTogether, 2>(from, width, index, value, count, to); break;
      case 3: add_entries<T, L, kTogether, 3>(from, width, index, value, count, to); break;
      case 4: add_entries<T, L, kTogether, 4>(from, width, index, value, count, to); break;
      case 5: add_entries<T, L, kTogether, 5>(from, width, index, value, count, to); break;
      case 6: add_entries<T, L, kTogether, 6>(from, width, index, value, count, to); break;
      case 7: add_entries<T, L, kTogether, 7>(from, width, index, value, count, to); break;
      default: add_entries<T, L, kTogether, 8>(from, width, index, value, count, to); break;
    }
  }
}

// ---- the layer ---------------------------------------------------------------------------------------------

// y = the bias and the sum over a row's entries.
template <class Isa, class T>
GEM_FAST_KERNEL void linear_row(const SparseRows& x, int64_t row, const T* table, const T* bias, int64_t outputs,
                                T* y) {
  const int64_t width = padded(outputs);
  thread_local std::vector<T> sum;
  sum.assign(width, T(0));
  if (bias != nullptr) std::copy(bias, bias + outputs, sum.begin());
  const int32_t first = x.row_start[row];
  add_all_entries<T, kLanesOf<Isa, T>, 1>(table, width, x.columns + first, static_cast<const T*>(x.values) + first,
                                          x.row_start[row + 1] - first, sum.data());
  std::copy(sum.begin(), sum.begin() + outputs, y);
}

template <class Isa>
GEM_FAST_KERNEL void linear_row_any_impl(const SparseRows& x, DType dtype, int64_t row, const void* table,
                                         const Layer& layer, void* y) {
  GEM_FAST_DISPATCH_FULL(
      dtype, linear_row<Isa, T>(x, row, static_cast<const T*>(table), static_cast<const T*>(layer.bias), layer.outputs,
                                static_cast<T*>(y)));
}
GEM_FAST_MULTIVERSION(linear_row_any,
                      (const SparseRows& x, DType dtype, int64_t row, const void* table, const Layer& layer, void* y),
                      (x, dtype, row, table, layer, y))

// ---- its gradient ------------------------------------------------------------------------------------------

// Columns [first, first + kColumnBlock) of one task's dL/dW, from its rows of dL/dy.
template <class Isa, class T>
GEM_FAST_KERNEL void gradient_columns(const SparseColumns& x, const T* grad, int64_t outputs, int64_t first, T* out) {
  constexpr int L = kLanesOf<Isa, T>;
  const int64_t width = padded(outputs);
  const int64_t n = std::min(kColumnBlock, x.d - first);
  thread_local std::vector<T> sums;
  sums.assign(kColumnBlock * width, T(0));
  for (int64_t j = 0; j < n; j += x.together) {
    const int32_t* start = x.start + (first + j) / x.together;
    const int32_t* rows = x.rows + start[0];
    const T* values = static_cast<const T*>(x.values) + start[0] * x.together;
    if (x.together == 2) {
      add_all_entries<T, L, 2>(grad, width, rows, values, start[1] - start[0], sums.data() + j * width);
    } else {
      add_all_entries<T, L, 1>(grad, width, rows, values, start[1] - start[0], sums.data() + j * width);
    }
  }
  transpose_into<T, L>(sums.data(), width, n, outputs, out + first, x.d);
}

template <class Isa>
GEM_FAST_KERNEL void gradient_columns_any_impl(const SparseColumns& x, DType dtype, const void* grad, int64_t outputs,
                                               int64_t first, void* out) {
  GEM_FAST_DISPATCH_FULL(
      dtype, gradient_columns<Isa, T>(x, static_cast<const T*>(grad), outputs, first, static_cast<T*>(out)));
}
GEM_FAST_MULTIVERSION(gradient_columns_any,
                      (const SparseColumns& x, DType dtype, const void* grad, int64_t outputs, int64_t first,
                       void* out),
                      (x, dtype, grad, outputs, first, out))

// Calls f(row, entry, column, is_new) for the entries of rows [first, last); is_new: the row's first one in its group.
template <class F>
void each_entry(const SparseRows& x, int64_t first, int64_t last, int64_t together, const F& f) {
  for (int64_t row = first; row < last; ++row) {
    int64_t before = -1;
    for (int32_t e = x.row_start[row]; e < x.row_start[row + 1]; ++e) {
      const int64_t group = x.columns[e] / together;
      f(row, e, group, group != before);
      before = group;
    }
  }
}

// The entries of rows [first, last) by groups of columns, `begin` being the place of the first.
template <class T>
void by_columns(const SparseRows& x, int64_t first, int64_t last, int64_t together, int64_t begin, int32_t* start,
                int32_t* rows, T* values) {
  const int64_t groups = column_groups(x.d, together);
  std::vector<int32_t> next(groups + 1, 0);
  each_entry(x, first, last, together,
             [&](int64_t, int32_t, int64_t group, bool is_new) { next[group + 1] += is_new; });
  next[0] = static_cast<int32_t>(begin);
  for (int64_t j = 0; j < groups; ++j) next[j + 1] += next[j];
  memcpy(start, next.data(), (groups + 1) * sizeof(int32_t));
  each_entry(x, first, last, together, [&](int64_t row, int32_t e, int64_t group, bool is_new) {
    if (is_new) {
      const int32_t to = next[group]++;
      rows[to] = static_cast<int32_t>(row - first);
      std::fill_n(values + to * together, together, T(0));
    }
    values[(next[group] - 1) * together + x.columns[e] % together] = static_cast<const T*>(x.values)[e];
  });
}

}  // namespace

// ---- the entries -------------------------------------------------------------------------------------------

int64_t count_entries(const void* x, DType dtype, int64_t N, int64_t d, int32_t* row_start, const Executor& executor) {
  row_start[0] = 0;
  executor.each(N, kRowGrain, [&](int64_t n) {
    GEM_FAST_DISPATCH_FULL(dtype, {
      const T* row = static_cast<const T*>(x) + n * d;
      row_start[n + 1] = static_cast<int32_t>(std::count_if(row, row + d, [](T value) { return value != T(0); }));
    });
  });
  int64_t total = 0;
  for (int64_t n = 0; n < N; ++n) {
    total += row_start[n + 1];
    row_start[n + 1] = static_cast<int32_t>(total);
  }
  return total;
}

void fill_rows(const void* x, DType dtype, int64_t N, int64_t d, const int32_t* row_start, int32_t* columns,
               void* values, const Executor& executor) {
  executor.each(N, kRowGrain, [&](int64_t n) {
    GEM_FAST_DISPATCH_FULL(dtype, {
      const T* row = static_cast<const T*>(x) + n * d;
      int32_t e = row_start[n];
      for (int64_t j = 0; j < d; ++j) {
        if (row[j] == T(0)) continue;
        columns[e] = static_cast<int32_t>(j);
        static_cast<T*>(values)[e++] = row[j];
      }
    });
  });
}

int64_t columns_together(const SparseRows& x, int64_t N) {
  int64_t pairs = 0;
  each_entry(x, 0, N, 2, [&](int64_t, int32_t, int64_t, bool is_new) { pairs += is_new; });
  return static_cast<double>(x.row_start[N]) >= kLeastFull * 2 * static_cast<double>(pairs) && x.d > 1 ? 2 : 1;
}

void count_columns(const SparseRows& x, const Tasks& tasks, int64_t together, int64_t* first) {
  first[0] = 0;
  for (int64_t k = 0; k < tasks.t; ++k) {
    first[k + 1] = first[k];
    each_entry(x, tasks.start[k], tasks.start[k + 1], together,
               [&](int64_t, int32_t, int64_t, bool is_new) { first[k + 1] += is_new; });
  }
}

void fill_columns(const SparseRows& x, DType dtype, const Tasks& tasks, int64_t together, const int64_t* first,
                  int32_t* start, int32_t* rows, void* values, const Executor& executor) {
  executor.each(tasks.t, 1, [&](int64_t k) {
    GEM_FAST_DISPATCH_FULL(dtype,
                           by_columns(x, tasks.start[k], tasks.start[k + 1], together, first[k],
                                      start + k * (column_groups(x.d, together) + 1), rows, static_cast<T*>(values)));
  });
}

// ---- forward and backward ----------------------------------------------------------------------------------

void sparse_linear(const SparseRows& x, DType dtype, const int64_t* positions, int64_t n, const Layer& layer,
                   const Matrix& y, void* scratch, const Executor& executor) {
  transpose(layer.weight, dtype, layer.outputs, layer.inputs, scratch, executor);
  executor.each(n, kRowGrain, [&](int64_t i) {
    linear_row_any(x, dtype, positions == nullptr ? i : positions[i], scratch, layer, at(y.data, i * y.stride, dtype));
  });
}

void sparse_gradient(const SparseColumns& x, DType dtype, const Tasks& tasks, const ConstMatrix& delta, int64_t outputs,
                     const Matrix& out, const Executor& executor) {
  const int64_t blocks = (x.d + kColumnBlock - 1) / kColumnBlock;
  executor.each(tasks.t * blocks, 4, [&](int64_t item) {
    const int64_t k = item / blocks;
    SparseColumns mine = x;
    mine.start += k * (column_groups(x.d, x.together) + 1);
    gradient_columns_any(mine, dtype, at(delta.data, tasks.start[k] * delta.stride, dtype), outputs,
                         item % blocks * kColumnBlock, at(out.data, k * out.stride, dtype));
  });
}

}  // namespace gem_fast::cpu
