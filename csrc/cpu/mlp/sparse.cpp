#include "cpu/mlp/sparse.h"

#include <algorithm>
#include <cstring>

#include "core/dispatch.h"
#include "cpu/buffer.h"
#include "cpu/mlp/transpose.h"
#include "cpu/simd.h"

namespace gem_fast::cpu {
namespace {

// Rows that one thread takes at a time.
constexpr int64_t kRowGrain = 16;
// Vectors of outputs whose sums stay in registers while entries stream by.
constexpr int kMaxVectors = 8;

// ---- sums of scaled vectors --------------------------------------------------------------------------------

// For c < kTogether: sum[c] (kVectors) += sum over the entries e of value[e kTogether + c] * matrix[index[e]]
template <class T, int L, int kTogether, int kVectors>
GEM_FAST_KERNEL void add_entries(const T* matrix, int64_t stride, const int32_t* index, const T* value, int64_t count,
                                 T* const* sum, int64_t at) {
  using V = typename Lanes<T, L>::type;
  V total[kTogether][kVectors];
  for (int c = 0; c < kTogether; ++c) {
    for (int v = 0; v < kVectors; ++v) total[c][v] = *reinterpret_cast<const V*>(sum[c] + at + v * L);
  }
  for (int64_t e = 0; e < count; ++e) {
    const T* row = matrix + index[e] * stride + at;
    for (int v = 0; v < kVectors; ++v) {
      const V x = *reinterpret_cast<const V*>(row + v * L);
      for (int c = 0; c < kTogether; ++c) total[c][v] += value[e * kTogether + c] * x;
    }
  }
  for (int c = 0; c < kTogether; ++c) {
    for (int v = 0; v < kVectors; ++v) *reinterpret_cast<V*>(sum[c] + at + v * L) = total[c][v];
  }
}

// The same for the first `width` columns of a row, in groups of vectors that fit the registers.
template <class T, int L, int kTogether>
GEM_FAST_KERNEL void add_all_entries(const T* matrix, int64_t stride, int64_t width, const int32_t* index,
                                     const T* value, int64_t count, T* const* sum) {
  constexpr int64_t kMax = kTogether == 1 || L * sizeof(T) == 64 ? kMaxVectors : kMaxVectors / 2;
  const int64_t vectors = width / L;
  const int64_t groups = (vectors + kMax - 1) / kMax;
  const int64_t size = (vectors + groups - 1) / groups;
  for (int64_t v = 0; v < vectors; v += size) {
    switch (std::min(size, vectors - v)) {
      case 1: add_entries<T, L, kTogether, 1>(matrix, stride, index, value, count, sum, v * L); break;
      case 2: add_entries<T, L, kTogether, 2>(matrix, stride, index, value, count, sum, v * L); break;
      case 3: add_entries<T, L, kTogether, 3>(matrix, stride, index, value, count, sum, v * L); break;
      case 4: add_entries<T, L, kTogether, 4>(matrix, stride, index, value, count, sum, v * L); break;
      case 5: add_entries<T, L, kTogether, 5>(matrix, stride, index, value, count, sum, v * L); break;
      case 6: add_entries<T, L, kTogether, 6>(matrix, stride, index, value, count, sum, v * L); break;
      case 7: add_entries<T, L, kTogether, 7>(matrix, stride, index, value, count, sum, v * L); break;
      default: add_entries<T, L, kTogether, 8>(matrix, stride, index, value, count, sum, v * L); break;
    }
  }
}

// The entries of pair i, added to the sums of its two lines.
template <class T, int L>
GEM_FAST_KERNEL void add_pair(const SparsePairs& x, int64_t i, const T* matrix, int64_t width, T* first, T* second) {
  T* const sums[] = {first, second};
  const int64_t begin = x.start[i];
  add_all_entries<T, L, 2>(matrix, width, width, x.index + begin, static_cast<const T*>(x.values) + 2 * begin,
                           x.start[i + 1] - begin, sums);
}

// ---- the layer ---------------------------------------------------------------------------------------------

// sum (width) = the bias, or zeros.
template <class T>
GEM_FAST_KERNEL void start_sum(const T* bias, int64_t outputs, int64_t width, T* sum) {
  const int64_t given = bias == nullptr ? 0 : outputs;
  std::copy_n(bias, given, sum);
  std::fill(sum + given, sum + width, T(0));
}

// Like torch's ReLU, it lets a NaN pass.
template <class T>
GEM_FAST_KERNEL void keep_positive(T* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = y[i] <= T(0) ? T(0) : y[i];
}

// y (width) = the bias and the sum over a row's entries of W's columns; `transposed` is W'.
template <class Isa, class T>
GEM_FAST_KERNEL void linear_row(const SparseRows& x, int64_t row, const T* transposed, const T* bias, int64_t outputs,
                                bool hidden, T* y) {
  const int64_t width = padded(outputs);
  T* const sums[] = {y};
  start_sum(bias, outputs, width, y);
  const int32_t first = x.begin(row);
  add_all_entries<T, kLanesOf<Isa, T>, 1>(transposed, width, width, x.columns + first,
                                          static_cast<const T*>(x.values) + first, x.begin(row + 1) - first, sums);
  if (hidden) keep_positive(y, width);
}

// y (width) = the sum over a row's entries of the matrix's rows, of which the first `width` columns count.
template <class Isa, class T>
GEM_FAST_KERNEL void product_row(const SparseRows& x, int64_t row, const T* matrix, int64_t stride, int64_t width,
                                 T* y) {
  T* const sums[] = {y};
  std::fill_n(y, width, T(0));
  const int32_t first = x.begin(row);
  add_all_entries<T, kLanesOf<Isa, T>, 1>(matrix, stride, width, x.columns + first,
                                          static_cast<const T*>(x.values) + first, x.begin(row + 1) - first, sums);
}

template <class Isa, class T>
GEM_FAST_KERNEL void linear_pairs(const SparsePairs& x, int64_t n, const T* transposed, const T* bias, int64_t outputs,
                                  T* y, int64_t stride) {
  const int64_t width = padded(outputs);
  thread_local Buffer buffer;
  T* none = static_cast<T*>(buffer.of(width * sizeof(T)));
  for (int64_t i = 0; i < pairs_of(n); ++i) {
    T* rows[2];
    for (int c = 0; c < 2; ++c) {
      const int32_t row = x.lines[2 * i + c];
      rows[c] = row < 0 ? none : y + row * stride;
      start_sum(bias, outputs, width, rows[c]);
    }
    add_pair<T, kLanesOf<Isa, T>>(x, i, transposed, width, rows[0], rows[1]);
    for (T* row : rows) keep_positive(row, width);
  }
}

template <class Isa>
GEM_FAST_KERNEL void linear_row_any_impl(const SparseRows& x, DType dtype, int64_t row, const void* transposed,
                                         const void* bias, int64_t outputs, bool hidden, void* y) {
  GEM_FAST_DISPATCH_FLOAT_OR_DOUBLE(
      dtype, linear_row<Isa, T>(x, row, static_cast<const T*>(transposed), static_cast<const T*>(bias), outputs, hidden,
                                static_cast<T*>(y)));
}
GEM_FAST_MULTIVERSION(linear_row_any,
                      (const SparseRows& x, DType dtype, int64_t row, const void* transposed, const void* bias,
                       int64_t outputs, bool hidden, void* y),
                      (x, dtype, row, transposed, bias, outputs, hidden, y))

template <class Isa>
GEM_FAST_KERNEL void product_row_any_impl(const SparseRows& x, DType dtype, int64_t row, const ConstMatrix& matrix,
                                          int64_t width, void* y) {
  GEM_FAST_DISPATCH_FLOAT_OR_DOUBLE(
      dtype, product_row<Isa, T>(x, row, static_cast<const T*>(matrix.data), matrix.stride, width, static_cast<T*>(y)));
}
GEM_FAST_MULTIVERSION(product_row_any,
                      (const SparseRows& x, DType dtype, int64_t row, const ConstMatrix& matrix, int64_t width,
                       void* y),
                      (x, dtype, row, matrix, width, y))

template <class Isa>
GEM_FAST_KERNEL void linear_pairs_any_impl(const SparsePairs& x, DType dtype, int64_t n, const void* transposed,
                                           const void* bias, int64_t outputs, const Matrix& y) {
  GEM_FAST_DISPATCH_FLOAT_OR_DOUBLE(
      dtype, linear_pairs<Isa, T>(x, n, static_cast<const T*>(transposed), static_cast<const T*>(bias), outputs,
                                  static_cast<T*>(y.data), y.stride));
}
GEM_FAST_MULTIVERSION(linear_pairs_any,
                      (const SparsePairs& x, DType dtype, int64_t n, const void* transposed, const void* bias,
                       int64_t outputs, const Matrix& y),
                      (x, dtype, n, transposed, bias, outputs, y))

// ---- its gradient ------------------------------------------------------------------------------------------

// The columns of one block, from their pairs: each is the sum of delta's rows, scaled by the column's entries.
template <class Isa, class T>
GEM_FAST_KERNEL void pairs_block(const SparsePairs& x, int64_t d, int64_t block, const T* delta, int64_t width,
                                 T* out) {
  thread_local Buffer buffer;
  T* none = static_cast<T*>(buffer.of(width * sizeof(T)));
  const int64_t first = block * kColumnBlock;
  const int64_t last = std::min(d, first + kColumnBlock);
  for (int64_t i = first / 2; i < pairs_of(last); ++i) {
    T* columns[2];
    for (int c = 0; c < 2; ++c) {
      const int32_t column = x.lines[2 * i + c];
      columns[c] = column < 0 ? none : out + (column - first) * width;
    }
    if (columns[1] == none) std::fill_n(none, width, T(0));
    add_pair<T, kLanesOf<Isa, T>>(x, i, delta, width, columns[0], columns[1]);
  }
}

// The same from a sample's rows: a row of delta is added, scaled by each entry of its row of x, to that entry's column.
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
GEM_FAST_KERNEL void rows_block(const SparseRows& x, const int64_t* positions, int64_t n, int64_t block, const T* delta,
                                int64_t stride, int64_t width, T* out) {
  constexpr int L = kLanesOf<Isa, T>;
  T* origin = out - block * kColumnBlock * width;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t* start = x.start + positions[i] * column_blocks(x.d) + block;
    const int32_t* columns = x.columns + start[0];
    const T* values = static_cast<const T*>(x.values) + start[0];
    const int64_t count = start[1] - start[0];
    for (int64_t v = 0; v < width / L; v += kMaxVectors) {
      const T* from = delta + i * stride + v * L;
      T* to = origin + v * L;
      switch (std::min<int64_t>(kMaxVectors, width / L - v)) {
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
GEM_FAST_KERNEL void pairs_block_any_impl(const SparsePairs& x, DType dtype, int64_t d, int64_t block,
                                          const void* delta, int64_t width, void* out) {
  GEM_FAST_DISPATCH_FLOAT_OR_DOUBLE(
      dtype, pairs_block<Isa, T>(x, d, block, static_cast<const T*>(delta), width, static_cast<T*>(out)));
}
GEM_FAST_MULTIVERSION(pairs_block_any,
                      (const SparsePairs& x, DType dtype, int64_t d, int64_t block, const void* delta, int64_t width,
                       void* out),
                      (x, dtype, d, block, delta, width, out))

template <class Isa>
GEM_FAST_KERNEL void rows_block_any_impl(const SparseRows& x, DType dtype, const int64_t* positions, int64_t n,
                                         int64_t block, const ConstMatrix& delta, int64_t width, void* out) {
  GEM_FAST_DISPATCH_FLOAT_OR_DOUBLE(dtype, rows_block<Isa, T>(x, positions, n, block, static_cast<const T*>(delta.data),
                                                              delta.stride, width, static_cast<T*>(out)));
}
GEM_FAST_MULTIVERSION(rows_block_any,
                      (const SparseRows& x, DType dtype, const int64_t* positions, int64_t n, int64_t block,
                       const ConstMatrix& delta, int64_t width, void* out),
                      (x, dtype, positions, n, block, delta, width, out))

}  // namespace

// ---- the entries -------------------------------------------------------------------------------------------

int64_t count_entries(const void* x, DType dtype, int64_t N, int64_t d, int32_t* start, const Executor& executor) {
  const int64_t blocks = column_blocks(d);
  start[0] = 0;
  executor.each(N, kRowGrain, [&](int64_t n) {
    GEM_FAST_DISPATCH_FLOAT_OR_DOUBLE(dtype, {
      const T* row = static_cast<const T*>(x) + n * d;
      for (int64_t b = 0; b < blocks; ++b) {
        const T* end = row + std::min(d, (b + 1) * kColumnBlock);
        start[n * blocks + b + 1] =
            static_cast<int32_t>(std::count_if(row + b * kColumnBlock, end, [](T value) { return value != T(0); }));
      }
    });
  });
  for (int64_t i = 0; i < N * blocks; ++i) start[i + 1] += start[i];
  return start[N * blocks];
}

void fill_rows(const void* x, DType dtype, int64_t N, int64_t d, const int32_t* start, int32_t* columns, void* values,
               const Executor& executor) {
  executor.each(N, kRowGrain, [&](int64_t n) {
    GEM_FAST_DISPATCH_FLOAT_OR_DOUBLE(dtype, {
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

// ---- forward and backward ----------------------------------------------------------------------------------

void sparse_linear(const SparseRows& x, DType dtype, const int64_t* positions, int64_t n, const Layer& layer,
                   const Matrix& y, const Executor& executor) {
  Buffer transposed;
  const int64_t width = padded(layer.outputs);
  transpose_padded(dtype, {layer.weight, layer.inputs}, layer.outputs, layer.inputs,
                   transposed.of(layer.inputs * width * size_of(dtype)), executor);
  executor.each(n, kRowGrain, [&](int64_t i) {
    thread_local Buffer buffer;
    void* row = buffer.of(width * size_of(dtype));
    linear_row_any(x, dtype, positions == nullptr ? i : positions[i], transposed.data(), layer.bias, layer.outputs,
                   false, row);
    memcpy(at(y.data, i * y.stride, dtype), row, layer.outputs * size_of(dtype));
  });
}

void sparse_row_forward(const SparseRows& x, DType dtype, int64_t row, const void* transposed, const void* bias,
                        int64_t outputs, void* y) {
  linear_row_any(x, dtype, row, transposed, bias, outputs, true, y);
}

void sparse_rows_forward(const SparsePairs& x, DType dtype, int64_t n, const void* transposed, const void* bias,
                         int64_t outputs, const Matrix& y) {
  linear_pairs_any(x, dtype, n, transposed, bias, outputs, y);
}

void sparse_row_product(const SparseRows& x, DType dtype, int64_t row, const ConstMatrix& matrix, int64_t width,
                        void* y) {
  product_row_any(x, dtype, row, matrix, width, y);
}

void transpose_sparse(const SparseRows& x, DType dtype, const int64_t* positions, int64_t n, void* out) {
  const int64_t width = padded(n);
  memset(out, 0, x.d * width * size_of(dtype));
  GEM_FAST_DISPATCH_FLOAT_OR_DOUBLE(dtype, {
    for (int64_t i = 0; i < n; ++i) {
      for (int32_t e = x.begin(positions[i]); e < x.begin(positions[i] + 1); ++e) {
        static_cast<T*>(out)[x.columns[e] * width + i] = static_cast<const T*>(x.values)[e];
      }
    }
  });
}

void add_sparse_block(const SparsePairs& x, DType dtype, int64_t d, int64_t block, const ConstMatrix& delta,
                      int64_t outputs, void* out) {
  pairs_block_any(x, dtype, d, block, delta.data, padded(outputs), out);
}

void add_sparse_block(const SparseRows& x, DType dtype, const int64_t* positions, int64_t n, int64_t block,
                      const ConstMatrix& delta, int64_t outputs, void* out) {
  rows_block_any(x, dtype, positions, n, block, delta, padded(outputs), out);
}

}  // namespace gem_fast::cpu
