// The first linear layer over a memory of mostly zeros (the pixels of digits, say): y = x W' + b from the entries of x
// that are not zero, row by row, and every task's dL/dW from those same entries, column by column.
#pragma once

#include <cstdint>

#include "core/types.h"
#include "cpu/parallel.h"
#include "cpu/table.h"

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

// The same by tasks and by groups of one or two neighbouring columns: what group j of task k has are the rows
// [start[k (groups + 1) + j], ... [... + j + 1]), counted from the task's first one, each with as many values as the
// group has columns.
struct SparseColumns {
  const int32_t* start;
  const int32_t* rows;
  const void* values;
  int64_t d;
  int64_t together;
};

constexpr int64_t column_groups(int64_t d, int64_t together) { return (d + together - 1) / together; }

// How many entries of x (N, d), contiguous, are not zero: start (N blocks + 1) and, as the result, their number.
int64_t count_entries(const void* x, DType dtype, int64_t N, int64_t d, int32_t* start, const Executor& executor);

// Fills in columns and values by rows.
void fill_rows(const void* x, DType dtype, int64_t N, int64_t d, const int32_t* start, int32_t* columns, void* values,
               const Executor& executor);

// How many columns to take together: two where neighbours are mostly not zero in the same rows, as in pictures, because
// they share what is read.
int64_t columns_together(const SparseRows& x, int64_t N);

// How many rows all groups of columns have: first[k] is the number before task k, for k = 0 ... t.
void count_columns(const SparseRows& x, const Tasks& tasks, int64_t together, int64_t* first);

// Fills in start (t (groups + 1)), rows and values by columns.
void fill_columns(const SparseRows& x, DType dtype, const Tasks& tasks, int64_t together, const int64_t* first,
                  int32_t* start, int32_t* rows, void* values, const Executor& executor);

// y (n, outputs): row i = W x[positions[i]] + b; positions may be null for all rows in order.
void sparse_linear(const SparseRows& x, DType dtype, const int64_t* positions, int64_t n, const Layer& layer,
                   const Matrix& y, const Executor& executor);

// One row of that, from W' (d, padded(outputs)) and b or null: y (outputs,), or (padded(outputs),) and without what is
// negative.
void sparse_row(const SparseRows& x, DType dtype, int64_t row, const void* table, const void* bias, int64_t outputs,
                bool hidden, void* y);

// A block of one task's gradient, turned around: x[:, first ... last)' delta is added to out (last - first,
// padded(outputs)), for delta (n, padded(outputs)). The columns are those of one block; out has room for kColumnBlock.
void add_sparse_block(const SparseColumns& x, DType dtype, int64_t k, const ConstMatrix& delta, int64_t outputs,
                  int64_t first, int64_t last, void* out);

// The same for a sample: the n rows of x that positions names.
void add_sparse_block(const SparseRows& x, DType dtype, const int64_t* positions, int64_t n, const ConstMatrix& delta,
                  int64_t outputs, int64_t first, int64_t last, void* out);

}  // namespace gem_fast::cpu
