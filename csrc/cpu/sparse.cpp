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
                                bool hidden, T* y) {
  const int64_t width = padded(outputs);
  thread_local Buffer buffer;
  T* sum = static_cast<T*>(buffer.of(width * sizeof(T)));
  std::fill_n(sum, width, T(0));
  if (bias != nullptr) std::copy_n(bias, outputs, sum);
  const int32_t first = x.begin(row);
  add_all_entries<T, kLanesOf<Isa, T>, 1>(table, width, x.columns + first, static_cast<const T*>(x.values) + first,
                                          x.begin(row + 1) - first, sum);
  if (hidden) {
    // Like torch's, it lets a NaN pass.
    for (int64_t o = 0; o < width; ++o) y[o] = sum[o] <= T(0) ? T(0) : sum[o];
  } else {
    std::copy_n(sum, outputs, y);
  }
}

template <class Isa>
GEM_FAST_KERNEL void linear_row_any_impl(const SparseRows& x, DType dtype, int64_t row, const void* table,
                                         const void* bias, int64_t outputs, bool hidden, void* y) {
  GEM_FAST_DISPATCH_FULL(dtype, linear_row<Isa, T>(x, row, static_cast<const T*>(table), static_cast<const T*>(bias),
                                                   outputs, hidden, static_cast<T*>(y)));
}
GEM_FAST_MULTIVERSION(linear_row_any,
                      (const SparseRows& x, DType dtype, int64_t row, const void* table, const void* bias,
                       int64_t outputs, bool hidden, void* y),
                      (x, dtype, row, table, bias, outputs, hidden, y))

// ---- its gradient ------------------------------------------------------------------------------------------

// Columns [first, last) of one task: the sums of dL/dy's rows, scaled by a column's entries.
template <class Isa, class T>
GEM_FAST_KERNEL void columns_block(const SparseColumns& x, int64_t k, const T* delta, int64_t width, int64_t first,
                                   int64_t last, T* out) {
  constexpr int L = kLanesOf<Isa, T>;
  const int32_t* starts = x.start + k * (column_groups(x.d, x.together) + 1);
  for (int64_t j = first; j < last; j += x.together) {
    const int32_t* start = starts + j / x.together;
    const int32_t* rows = x.rows + start[0];
    const T* values = static_cast<const T*>(x.values) + start[0] * x.together;
    if (x.together == 2) {
      add_all_entries<T, L, 2>(delta, width, rows, values, start[1] - start[0], out + (j - first) * width);
    } else {
      add_all_entries<T, L, 1>(delta, width, rows, values, start[1] - start[0], out + (j - first) * width);
    }
  }
}

// The same from a sample's rows: each is added, scaled, to all columns that it has entries in.
template <class T, int L, int kVectors>
GEM_FAST_KERNEL void add_row(const int32_t* columns, const T* values, int64_t count, const T* delta, int64_t width,
                             T* out) {
  using V = typename Lanes<T, L>::type;
  V scaled[kVectors];
  for (int v = 0; v < kVectors; ++v) scaled[v] = *reinterpret_cast<const V*>(delta + v * L);
  for (int64_t e = 0; e < count; ++e) {
    T* to = out + columns[e] * width;
    const T value = values[e];
    for (int v = 0; v < kVectors; ++v) *reinterpret_cast<V*>(to + v * L) += value * scaled[v];
  }
}

template <class Isa, class T>
GEM_FAST_KERNEL void rows_block(const SparseRows& x, const int64_t* positions, int64_t n, const T* delta, int64_t stride,
                                int64_t width, int64_t first, int64_t last, T* out) {
  constexpr int L = kLanesOf<Isa, T>;
  T* origin = out - first * width;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t* start = x.start + positions[i] * column_blocks(x.d) + first / kColumnBlock;
    const int32_t* columns = x.columns + start[0];
    const T* values = static_cast<const T*>(x.values) + start[0];
    const int64_t count = start[1] - start[0];
    for (int64_t v = 0; v < width / L; v += kMostVectors) {
      const T* from = delta + i * stride + v * L;
      T* to = origin + v * L;
      switch (std::min<int64_t>(kMostVectors, width / L - v)) {
        case 1: add_row<T, L, 1>(columns, values, count, from, width, to); break;
        case 2: add_row<T, L, 2>(columns, values, count, from, width, to); break;
        case 3: add_row<T, L, 3>(columns, values, count, from, width, to); break;
        case 4: add_row<T, L, 4>(columns, values, count, from, width, to); break;
        case 5: add_row<T, L, 5>(columns, values, count, from, width, to); break;
        case 6: add_row<T, L, 6>(columns, values, count, from, width, to); break;
        case 7: add_row<T, L, 7>(columns, values, count, from, width, to); break;
        default: add_row<T, L, 8>(columns, values, count, from, width, to); break;
      }
    }
  }
}

template <class Isa>
GEM_FAST_KERNEL void columns_block_any_impl(const SparseColumns& x, DType dtype, int64_t k, const void* delta,
                                            int64_t width, int64_t first, int64_t last, void* out) {
  GEM_FAST_DISPATCH_FULL(dtype, columns_block<Isa, T>(x, k, static_cast<const T*>(delta), width, first, last,
                                                      static_cast<T*>(out)));
}
GEM_FAST_MULTIVERSION(columns_block_any,
                      (const SparseColumns& x, DType dtype, int64_t k, const void* delta, int64_t width, int64_t first,
                       int64_t last, void* out),
                      (x, dtype, k, delta, width, first, last, out))

template <class Isa>
GEM_FAST_KERNEL void rows_block_any_impl(const SparseRows& x, DType dtype, const int64_t* positions, int64_t n,
                                         const ConstMatrix& delta, int64_t width, int64_t first, int64_t last,
                                         void* out) {
  GEM_FAST_DISPATCH_FULL(dtype, rows_block<Isa, T>(x, positions, n, static_cast<const T*>(delta.data), delta.stride,
                                                   width, first, last, static_cast<T*>(out)));
}
GEM_FAST_MULTIVERSION(rows_block_any,
                      (const SparseRows& x, DType dtype, const int64_t* positions, int64_t n, const ConstMatrix& delta,
                       int64_t width, int64_t first, int64_t last, void* out),
                      (x, dtype, positions, n, delta, width, first, last, out))

// Calls f(row, entry, column, is_new) for the entries of rows [first, last); is_new: the row's first one in its group.
template <class F>
void each_entry(const SparseRows& x, int64_t first, int64_t last, int64_t together, const F& f) {
  for (int64_t row = first; row < last; ++row) {
    int64_t before = -1;
    for (int32_t e = x.begin(row); e < x.begin(row + 1); ++e) {
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

int64_t count_entries(const void* x, DType dtype, int64_t N, int64_t d, int32_t* start, const Executor& executor) {
  const int64_t blocks = column_blocks(d);
  start[0] = 0;
  executor.each(N, kRowGrain, [&](int64_t n) {
    GEM_FAST_DISPATCH_FULL(dtype, {
      const T* row = static_cast<const T*>(x) + n * d;
      for (int64_t b = 0; b < blocks; ++b) {
        const T* end = row + std::min(d, (b + 1) * kColumnBlock);
        start[n * blocks + b + 1] = static_cast<int32_t>(
            std::count_if(row + b * kColumnBlock, end, [](T value) { return value != T(0); }));
      }
    });
  });
  for (int64_t i = 0; i < N * blocks; ++i) start[i + 1] += start[i];
  return start[N * blocks];
}

void fill_rows(const void* x, DType dtype, int64_t N, int64_t d, const int32_t* start, int32_t* columns, void* values,
               const Executor& executor) {
  executor.each(N, kRowGrain, [&](int64_t n) {
    GEM_FAST_DISPATCH_FULL(dtype, {
      const T* row = static_cast<const T*>(x) + n * d;
      int32_t e = start[n * column_blocks(d)];
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
  return static_cast<double>(x.begin(N)) >= kLeastFull * 2 * static_cast<double>(pairs) && x.d > 1 ? 2 : 1;
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
                   const Matrix& y, const Executor& executor) {
  Buffer table;
  transpose(layer.weight, dtype, layer.outputs, layer.inputs,
            table.of(layer.inputs * padded(layer.outputs) * size_of(dtype)), executor);
  executor.each(n, kRowGrain, [&](int64_t i) {
    sparse_row(x, dtype, positions == nullptr ? i : positions[i], table.data(), layer.bias, layer.outputs, false,
               at(y.data, i * y.stride, dtype));
  });
}

void sparse_row(const SparseRows& x, DType dtype, int64_t row, const void* table, const void* bias, int64_t outputs,
                bool hidden, void* y) {
  linear_row_any(x, dtype, row, table, bias, outputs, hidden, y);
}

void add_sparse_block(const SparseColumns& x, DType dtype, int64_t k, const ConstMatrix& delta, int64_t outputs,
                  int64_t first, int64_t last, void* out) {
  columns_block_any(x, dtype, k, delta.data, padded(outputs), first, last, out);
}

void add_sparse_block(const SparseRows& x, DType dtype, const int64_t* positions, int64_t n, const ConstMatrix& delta,
                  int64_t outputs, int64_t first, int64_t last, void* out) {
  rows_block_any(x, dtype, positions, n, delta, padded(outputs), first, last, out);
}

}  // namespace gem_fast::cpu
