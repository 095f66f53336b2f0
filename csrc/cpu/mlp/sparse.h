// The first linear layer over a memory of mostly zeros (the pixels of digits, say): y = x W' + b from the entries of x
// that are not zero, and every task's dL/dW from the same entries.
#pragma once

#include <cstdint>

#include "core/types.h"
#include "cpu/mlp/layer.h"
#include "cpu/mlp/matrix.h"
#include "cpu/parallel.h"

namespace gem_fast::cpu {

// Columns of x whose gradients are formed together: those of all outputs stay in the first-level cache.
constexpr int64_t kColumnBlock = 32;

constexpr int64_t column_blocks(int64_t d) { return d > kColumnBlock ? (d + kColumnBlock - 1) / kColumnBlock : 1; }

// The non-zero entries of x (N, d), by rows and blocks of columns: those of row n in block b are [start[n blocks + b],
// start[n blocks + b + 1]), and those of the whole row [begin(n), begin(n + 1)).
struct SparseRows {
  const int32_t* start;
  const int32_t* columns;
  const void* values;
  int64_t d;

  int32_t begin(int64_t n) const { return start[n * column_blocks(d)]; }
  // N, for `start` of so many elements.
  int64_t count(int64_t starts) const { return (starts - 1) / column_blocks(d); }
};

// Lines are the rows of x, or its columns. Two lines that are not zero in many of the same places make a pair: what an
// entry is multiplied with is then read once for both. Pair i is lines[2 i] and lines[2 i + 1] (-1: there is none),
// with entries [start[i], start[i + 1]) of two values each, one per line, of which one may be zero.
struct SparsePairs {
  const int32_t* lines;
  const int32_t* start;
  const int32_t* index;
  const void* values;

  SparsePairs from(int64_t pair) const { return {lines + 2 * pair, start + pair, index, values}; }
};

// A layer's input x (N, inputs), in one of three forms: pairs of each task's lines (rows for the forward, columns for
// the gradient); the entries of a memory, of which rows `positions` (N,) are meant; or x itself.
struct LayerInput {
  const SparsePairs* pairs = nullptr;
  const SparseRows* rows = nullptr;
  const int64_t* positions = nullptr;
  ConstMatrix dense{};
};

// The number of pairs of n lines.
constexpr int64_t pairs_of(int64_t n) { return (n + 1) / 2; }

// Fills in start (n blocks + 1,) for x (n, d), contiguous, and returns the number of entries.
int64_t count_entries(const void* x, DType dtype, int64_t n, int64_t d, int32_t* start, const Executor& executor);

// Fills in columns and values by rows.
void fill_rows(const void* x, DType dtype, int64_t n, int64_t d, const int32_t* start, int32_t* columns, void* values,
               const Executor& executor);

// y (n, outputs): row i = W x[positions[i]] + b; positions may be null for all rows in order.
void sparse_linear(const SparseRows& x, DType dtype, const int64_t* positions, int64_t n, const Layer& layer,
                   const Matrix& y, const Executor& executor);

// relu(W x + b) for one row of x, and for n of them from their pairs: from W' (d, padded(outputs)) and b (or null) to
// padded rows of y. On this thread.
void sparse_row_forward(const SparseRows& x, DType dtype, int64_t row, const void* transposed, const void* bias,
                        int64_t outputs, void* y);
void sparse_rows_forward(const SparsePairs& x, DType dtype, int64_t n, const void* transposed, const void* bias,
                         int64_t outputs, const Matrix& y);

// y (width) = x[row] M for the first `width` columns, whole cache lines, of M (d, ...). On this thread.
void sparse_row_product(const SparseRows& x, DType dtype, int64_t row, const ConstMatrix& matrix, int64_t width,
                        void* y);

// out (d, padded(n)) = x[positions]'. On this thread.
void transpose_sparse(const SparseRows& x, DType dtype, const int64_t* positions, int64_t n, void* out);

// A block of one task's gradient, transposed: x[:, block]' delta is added to out (columns of the block,
// padded(outputs)), for delta (n, padded(outputs)). From pairs of the task's columns:
void add_sparse_block(const SparsePairs& x, DType dtype, int64_t d, int64_t block, const ConstMatrix& delta,
                      int64_t outputs, void* out);
// and for a sample, the n rows of x that positions names:
void add_sparse_block(const SparseRows& x, DType dtype, const int64_t* positions, int64_t n, int64_t block,
                      const ConstMatrix& delta, int64_t outputs, void* out);

}  // namespace gem_fast::cpu
