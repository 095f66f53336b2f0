#include "cpu/sparse.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/simd.h"

namespace gem_fast::cpu {
namespace {

// Rows that one thread takes at a time.
constexpr int64_t kRowGrain = 16;
// Vectors of outputs whose sums stay in registers while entries stream by.
constexpr int kMostVectors = 8;
// Outputs are padded to whole cache lines, so that every vector of them is readable.
constexpr int64_t kPadding = 16;
// Columns of x whose gradients are formed together and written as whole cache lines of each output's row.
constexpr int64_t kColumnGroup = 16;

int64_t padded(int64_t outputs) { return (outputs + kPadding - 1) / kPadding * kPadding; }

// Only these two have kernels; half precision has no sums of its own.
#define GEM_FAST_DISPATCH_SPARSE(dtype, ...)                                                                           \
  if ((dtype) == DType::kFloat64) {                                                                                    \
    using T = double;                                                                                                  \
    __VA_ARGS__;                                                                                                       \
  } else {                                                                                                             \
    using T = float;                                                                                                   \
    __VA_ARGS__;                                                                                                       \
  }

template <class T>
struct IndexOf {
  using type = int32_t;
};
template <>
struct IndexOf<double> {
  using type = int64_t;
};

template <class Isa, class T>
constexpr int kLanesOf = Isa::kFloats * static_cast<int>(sizeof(float)) / static_cast<int>(sizeof(T));

// ---- transposing -------------------------------------------------------------------------------------------

// Turns L vectors of L lanes into the columns they make up, in log2 L rounds of interleaving.
template <class T, int L>
GEM_FAST_KERNEL void transpose(typename Lanes<T, L>::type* x) {
  using V = typename Lanes<T, L>::type;
  typedef typename IndexOf<T>::type Mask __attribute__((vector_size(L * sizeof(T))));
  Mask low, high;
  for (int i = 0; i < L; ++i) {
    low[i] = i / 2 + (i % 2) * L;
    high[i] = L / 2 + i / 2 + (i % 2) * L;
  }
  for (int round = 1; round < L; round *= 2) {
    V next[L];
    for (int i = 0; i < L / 2; ++i) {
      next[2 * i] = __builtin_shuffle(x[i], x[i + L / 2], low);
      next[2 * i + 1] = __builtin_shuffle(x[i], x[i + L / 2], high);
    }
    for (int i = 0; i < L; ++i) x[i] = next[i];
  }
}

// to[c][r] = from[r][c], touching nothing beyond rows x columns of either.
template <class T, int L>
GEM_FAST_KERNEL void transpose_into(const T* from, int64_t from_stride, int64_t rows, int64_t columns, T* to,
                                    int64_t to_stride) {
  using V = typename Lanes<T, L>::type;
  for (int64_t r = 0; r < rows; r += L) {
    for (int64_t c = 0; c < columns; c += L) {
      if (r + L <= rows && c + L <= columns) {
        V tile[L];
        for (int i = 0; i < L; ++i) memcpy(&tile[i], from + (r + i) * from_stride + c, sizeof(V));
        transpose<T, L>(tile);
        for (int i = 0; i < L; ++i) memcpy(to + (c + i) * to_stride + r, &tile[i], sizeof(V));
        continue;
      }
      for (int64_t i = r; i < std::min(r + L, rows); ++i) {
        for (int64_t j = c; j < std::min(c + L, columns); ++j) to[j * to_stride + i] = from[i * from_stride + j];
      }
    }
  }
}

// ---- sums of scaled vectors --------------------------------------------------------------------------------

// sum[0 ... kVectors) += sum over the entries e of value[e] * table[index[e]]
template <class T, int L, int kVectors>
GEM_FAST_KERNEL void add_entries(const T* table, int64_t stride, const int32_t* index, const T* value, int64_t count,
                                 T* sum) {
  using V = typename Lanes<T, L>::type;
  V total[kVectors];
  for (int v = 0; v < kVectors; ++v) memcpy(&total[v], sum + v * L, sizeof(V));
  for (int64_t e = 0; e < count; ++e) {
    const T* row = table + index[e] * stride;
    const T scale = value[e];
    for (int v = 0; v < kVectors; ++v) {
      V x;
      memcpy(&x, row + v * L, sizeof(V));
      total[v] += scale * x;
    }
  }
  for (int v = 0; v < kVectors; ++v) memcpy(sum + v * L, &total[v], sizeof(V));
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

// Columns [first, last) of W (outputs, d) as rows of a table with padded rows.
template <class Isa, class T>
GEM_FAST_KERNEL void transpose_weight(const T* weight, int64_t first, int64_t last, int64_t d, int64_t outputs,
                                      T* table) {
  const int64_t width = padded(outputs);
  transpose_into<T, kLanesOf<Isa, T>>(weight + first, d, outputs, last - first, table + first * width, width);
  for (int64_t j = first; j < last; ++j) std::fill(table + j * width + outputs, table + (j + 1) * width, T(0));
}

template <class Isa>
GEM_FAST_KERNEL void transpose_weight_any_impl(DType dtype, const void* weight, int64_t first, int64_t last, int64_t d,
                                               int64_t outputs, void* table) {
  GEM_FAST_DISPATCH_SPARSE(
      dtype, transpose_weight<Isa, T>(static_cast<const T*>(weight), first, last, d, outputs, static_cast<T*>(table)));
}
GEM_FAST_MULTIVERSION(transpose_weight_any,
                      (DType dtype, const void* weight, int64_t first, int64_t last, int64_t d, int64_t outputs,
                       void* table),
                      (dtype, weight, first, last, d, outputs, table))

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
                                         const void* bias, int64_t outputs, void* y) {
  GEM_FAST_DISPATCH_SPARSE(dtype, linear_row<Isa, T>(x, row, static_cast<const T*>(table), static_cast<const T*>(bias),
                                                     outputs, static_cast<T*>(y)));
}
GEM_FAST_MULTIVERSION(linear_row_any,
                      (const SparseRows& x, DType dtype, int64_t row, const void* table, const void* bias,
                       int64_t outputs, void* y),
                      (x, dtype, row, table, bias, outputs, y))

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
  GEM_FAST_DISPATCH_SPARSE(
      dtype, gradient_columns<Isa, T>(x, static_cast<const T*>(grad), outputs, first, static_cast<T*>(out)));
}
GEM_FAST_MULTIVERSION(gradient_columns_any,
                      (const SparseColumns& x, DType dtype, const void* grad, int64_t outputs, int64_t first,
                       void* out),
                      (x, dtype, grad, outputs, first, out))

int64_t size_of(DType dtype) { return dtype == DType::kFloat64 ? sizeof(double) : sizeof(float); }

const void* at(const void* data, int64_t elements, DType dtype) {
  return static_cast<const char*>(data) + elements * size_of(dtype);
}
void* at(void* data, int64_t elements, DType dtype) { return static_cast<char*>(data) + elements * size_of(dtype); }

// grad (N, outputs) with its rows padded.
void pad_rows(const void* grad, DType dtype, int64_t N, int64_t outputs, void* padded_grad, const Executor& executor) {
  const int64_t width = padded(outputs);
  executor.each(N, 4 * kRowGrain, [&](int64_t n) {
    memcpy(at(padded_grad, n * width, dtype), at(grad, n * outputs, dtype), outputs * size_of(dtype));
    memset(at(padded_grad, n * width + outputs, dtype), 0, (width - outputs) * size_of(dtype));
  });
}

// The entries of some rows by columns: `row_at(i)` is the i-th row's number in x.
template <class T, class RowAt>
void by_columns(const SparseRows& x, int64_t n, const RowAt& row_at, int32_t base, int32_t* start, int32_t* rows,
                T* values) {
  std::vector<int32_t> next(x.d + 1, 0);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t row = row_at(i);
    for (int32_t e = x.row_start[row]; e < x.row_start[row + 1]; ++e) ++next[x.columns[e] + 1];
  }
  next[0] = base;
  for (int64_t j = 0; j < x.d; ++j) next[j + 1] += next[j];
  memcpy(start, next.data(), (x.d + 1) * sizeof(int32_t));
  for (int64_t i = 0; i < n; ++i) {
    const int64_t row = row_at(i);
    for (int32_t e = x.row_start[row]; e < x.row_start[row + 1]; ++e) {
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
    GEM_FAST_DISPATCH_SPARSE(dtype, {
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
    GEM_FAST_DISPATCH_SPARSE(dtype, {
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
    GEM_FAST_DISPATCH_SPARSE(
        dtype, by_columns<T>(
                   x, tasks.start[k + 1] - first, [&](int64_t i) { return first + i; }, x.row_start[first],
                   column_start + k * (x.d + 1), rows, static_cast<T*>(values)));
  });
}

// ---- forward and backward ----------------------------------------------------------------------------------

int64_t sparse_scratch(int64_t rows, int64_t outputs) { return rows * padded(outputs); }

void sparse_linear(const SparseRows& x, DType dtype, const int64_t* positions, int64_t n, const void* weight,
                   const void* bias, int64_t outputs, void* y, void* scratch, const Executor& executor) {
  constexpr int64_t kColumns = 64;
  executor.each((x.d + kColumns - 1) / kColumns, 2, [&](int64_t block) {
    const int64_t first = block * kColumns;
    transpose_weight_any(dtype, weight, first, std::min(x.d, first + kColumns), x.d, outputs, scratch);
  });
  executor.each(n, kRowGrain, [&](int64_t i) {
    linear_row_any(x, dtype, positions == nullptr ? i : positions[i], scratch, bias, outputs,
                   at(y, i * outputs, dtype));
  });
}

void sparse_gradient(const SparseColumns& x, DType dtype, const Tasks& tasks, const void* grad, int64_t outputs,
                     const Matrix& out, void* scratch, const Executor& executor) {
  pad_rows(grad, dtype, tasks.start[tasks.t], outputs, scratch, executor);
  const int64_t groups = (x.d + kColumnGroup - 1) / kColumnGroup;
  executor.each(tasks.t * groups, 4, [&](int64_t item) {
    const int64_t k = item / groups;
    SparseColumns mine = x;
    mine.column_start += k * (x.d + 1);
    gradient_columns_any(mine, dtype, at(scratch, tasks.start[k] * padded(outputs), dtype), outputs,
                         item % groups * kColumnGroup, at(out.data, k * out.stride, dtype));
  });
}

void sparse_gradient_of_sample(const SparseRows& x, DType dtype, const int64_t* positions, const Tasks& tasks,
                               const void* grad, int64_t outputs, const Matrix& out, void* scratch,
                               const Executor& executor) {
  pad_rows(grad, dtype, tasks.start[tasks.t], outputs, scratch, executor);
  executor.each(tasks.t, 1, [&](int64_t k) {
    const int64_t first = tasks.start[k];
    const int64_t n = tasks.start[k + 1] - first;
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t row = positions[first + i];
      count += x.row_start[row + 1] - x.row_start[row];
    }
    thread_local std::vector<int32_t> start, rows;
    thread_local std::vector<char> values;
    start.resize(x.d + 1);
    rows.resize(count);
    values.resize(count * size_of(dtype));
    GEM_FAST_DISPATCH_SPARSE(dtype, by_columns<T>(
                                        x, n, [&](int64_t i) { return positions[first + i]; }, 0, start.data(),
                                        rows.data(), reinterpret_cast<T*>(values.data())));
    const SparseColumns mine{start.data(), rows.data(), values.data(), x.d};
    for (int64_t j = 0; j < x.d; j += kColumnGroup) {
      gradient_columns_any(mine, dtype, at(scratch, first * padded(outputs), dtype), outputs, j,
                           at(out.data, k * out.stride, dtype));
    }
  });
}

}  // namespace gem_fast::cpu
