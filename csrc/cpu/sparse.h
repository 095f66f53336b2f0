// The first linear layer over a memory of mostly zeros (the pixels of digits, say): y = x W' + b from the entries of x
// that are not zero, row by row, and every task's dL/dW from those same entries, column by column.
#pragma once

#include <cstdint>

#include "core/types.h"
#include "cpu/parallel.h"

namespace gem_fast::cpu {

// The non-zero entries of x (N, d), by rows: those of row n are [row_start[n], row_start[n + 1]).
struct SparseRows {
  const int32_t* row_start;
  const int32_t* columns;
  const void* values;
  int64_t d;
};

// The same by tasks and columns: those of column j of task k are [column_start[k (d + 1) + j], ... [... + j + 1]), and
// their rows count from the task's first one.
struct SparseColumns {
  const int32_t* column_start;
  const int32_t* rows;
  const void* values;
  int64_t d;
};

// A list of tasks: rows [task_start[k], task_start[k + 1]) are task k's.
struct Tasks {
  const int64_t* start;
  int64_t t;
};

// A matrix with `stride` elements from row to row.
struct Matrix {
  void* data;
  int64_t stride;
};

// How many entries of x (N, d), contiguous, are not zero: row_start (N + 1) and, as the result, their number.
int64_t count_entries(const void* x, DType dtype, int64_t N, int64_t d, int32_t* row_start, const Executor& executor);

// Fills in columns and values by rows, then column_start (t (d + 1)), rows and values by columns.
void fill_rows(const void* x, DType dtype, int64_t N, int64_t d, const int32_t* row_start, int32_t* columns,
               void* values, const Executor& executor);
void fill_columns(const SparseRows& x, DType dtype, const Tasks& tasks, int32_t* column_start, int32_t* rows,
                  void* values, const Executor& executor);

// Elements of scratch space that `sparse_linear` takes for d rows, and a gradient for N.
int64_t sparse_scratch(int64_t rows, int64_t outputs);

// y[i] = W x[positions[i]] + b for i < n; positions may be null for all rows in order, bias for zeros.
void sparse_linear(const SparseRows& x, DType dtype, const int64_t* positions, int64_t n, const void* weight,
                   const void* bias, int64_t outputs, void* y, void* scratch, const Executor& executor);

// out row k, as (outputs, d), = sum over task k's rows of dL/dy' x.
void sparse_gradient(const SparseColumns& x, DType dtype, const Tasks& tasks, const void* grad, int64_t outputs,
                     const Matrix& out, void* scratch, const Executor& executor);

// The same where row i of `grad` belongs to x[positions[i]].
void sparse_gradient_of_sample(const SparseRows& x, DType dtype, const int64_t* positions, const Tasks& tasks,
                               const void* grad, int64_t outputs, const Matrix& out, void* scratch,
                               const Executor& executor);

}  // namespace gem_fast::cpu
