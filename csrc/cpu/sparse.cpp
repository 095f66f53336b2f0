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
// Columns of x whose gradients are formed together and written as whole cache lines of each output's row.
constexpr int64_t kColumnGroup = 16;

// ---- sums of scaled vectors --------------------------------------------------------------------------------

// sum[0 ... kVectors) += sum over the entries e of value[e] * table[index[e]]
template <class T, int L, int kVectors>
GEM_FAST_KERNEL void add_entries(const T* table, int64_t stride, const int32_t* index, const T* value, int64_t count,
                                 T* sum) {
  using V = typename Lanes<T, L>::type;
  V total[kVectors];
  for (int v = 0; v < kVectors; ++v) total[v] = *reinterpret_cast<const V*>(sum + v * L);
  for (int64_t e = 0; e < count; ++e) {
    const T* row = table + index[e] * stride;
    const T scale = value[e];
    for (int v = 0; v < kVectors; ++v) total[v] += scale * *reinterpret_cast<const V*>(row + v * L);
  }
  for (int v = 0; v < kVectors; ++v) *reinterpret_cast<V*>(sum + v * L) = total[v];
}

// The same for all of a row, in groups of vectors that fit the registers.
template <class T, int L>
GEM_FAST_KERNEL void add_all_entries(const T* table, int64_t width, const int32_t* index, const T* value, int64_t count,
                                     T* sum) {
  const int64_t vectors = width / L;
  const int64_t groups = (vectors + kMostVectors - 1) / kMostVectors;
  const int64_t size = (vectors + groups - 1) / groups;
  for (int64_t v = 0; v < vectors; v += size) {
    const T* from = table + v * L;
    T* to = sum + v * L;
    switch (std::min(size, vectors - v)) {
      case 1: add_entries<T, L, 1>(from, width, index, value, count, to); break;
      case 2: add_entries<T, L, 2>(from, width, index, value, count, to); break;
      case 3: add_entries<T, L, 3>(from, width, index, value, count, to); break;
      case 4: add_entries<T, L, 4>(from, width, index, value, count, to); break;
      case 5: add_entries<T, L, 5>(from, width, index, value, count, to); break;
      case 6: add_entries<T, L, 6>(from, width, index, value, count, to); break;
      case 7: add_entries<T, L, 7>(from, width, index, value, count, to); break;
      default: add_entries<T, L, 8>(from, width, index, value, count, to); break;
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
  add_all_entries<T, kLanesOf<Isa, T>>(table, width, x.columns + first, static_cast<const T*>(x.values) + first,
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

// Columns [first, first + kColumnGroup) of one task's dL/dW, from its rows of dL/dy.
template <class Isa, class T>
GEM_FAST_KERNEL void gradient_columns(const SparseColumns& x, const T* grad, int64_t outputs, int64_t first, T* out) {
  constexpr int L = kLanesOf<Isa, T>;
  const int64_t width = padded(outputs);
  const int64_t n = std::min(kColumnGroup, x.d - first);
  thread_local std::vector<T> sums;
  sums.assign(kColumnGroup * width, T(0));
  for (int64_t j = 0; j < n; ++j) {
    const int32_t begin = x.column_start[first + j];
    add_all_entries<T, L>(grad, width, x.rows + begin, static_cast<const T*>(x.values) + begin,
                          x.column_start[first + j + 1] - begin, sums.data() + j * width);
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

// The entries of n rows by columns, from row `first` on.
template <class T>
void by_columns(const SparseRows& x, int64_t first, int64_t n, int32_t* start, int32_t* rows, T* values) {
  const int32_t begin = x.row_start[first];
  const int32_t end = x.row_start[first + n];
  std::vector<int32_t> next(x.d + 1, 0);
  for (int32_t e = begin; e < end; ++e) ++next[x.columns[e] + 1];
  next[0] = begin;
  for (int64_t j = 0; j < x.d; ++j) next[j + 1] += next[j];
  memcpy(start, next.data(), (x.d + 1) * sizeof(int32_t));
  for (int64_t i = 0; i < n; ++i) {
    for (int32_t e = x.row_start[first + i]; e < x.row_start[first + i + 1]; ++e) {
      const int32_t to = next[x.columns[e]]++;
      rows[to] = static_cast<int32_t>(i);
      values[to] = static_cast<const T*>(x.values)[e];
    }
  }
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

void fill_columns(const SparseRows& x, DType dtype, const Tasks& tasks, int32_t* column_start, int32_t* rows,
                  void* values, const Executor& executor) {
  executor.each(tasks.t, 1, [&](int64_t k) {
    const int64_t first = tasks.start[k];
    GEM_FAST_DISPATCH_FULL(dtype, by_columns(x, first, tasks.start[k + 1] - first, column_start + k * (x.d + 1), rows,
                                             static_cast<T*>(values)));
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
  const int64_t groups = (x.d + kColumnGroup - 1) / kColumnGroup;
  executor.each(tasks.t * groups, 4, [&](int64_t item) {
    const int64_t k = item / groups;
    SparseColumns mine = x;
    mine.column_start += k * (x.d + 1);
    gradient_columns_any(mine, dtype, at(delta.data, tasks.start[k] * delta.stride, dtype), outputs,
                         item % groups * kColumnGroup, at(out.data, k * out.stride, dtype));
  });
}

}  // namespace gem_fast::cpu
