// The first linear layer over a memory of mostly zeros (the pixels of digits, say): y = x W' + b from the entries of x
// that are not zero, row by row, and every task's dL/dW from those same entries, column by column.
#pragma once

#include <cstdint>

#include "core/types.h"
#include "cpu/linear.h"
#include "cpu/parallel.h"
#include "cpu/table.h"

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

// How many entries of x (N, d), contiguous, are not zero: row_start (N + 1) and, as the result, their number.
int64_t count_entries(const void* x, DType dtype, int64_t N, int64_t d, int32_t* row_start, const Executor& executor);

// Fills in columns and values by rows, then column_start (t (d + 1)), rows and values by columns.
void fill_rows(const void* x, DType dtype, int64_t N, int64_t d, const int32_t* row_start, int32_t* columns,
               void* values, const Executor& executor);
void fill_columns(const SparseRows& x, DType dtype, const Tasks& tasks, int32_t* column_start, int32_t* rows,
                  void* values, const Executor& executor);

// y (n, outputs): row i = W x[positions[i]] + b; positions may be null for all rows in order. Scratch space:
// d padded(outputs) elements.
void sparse_linear(const SparseRows& x, DType dtype, const int64_t* positions, int64_t n, const Layer& layer,
                   const Matrix& y, void* scratch, const Executor& executor);

// out k, as (outputs, d), = sum over task k's rows of delta' x, for delta = dL/dy (n, padded(outputs)).
void sparse_gradient(const SparseColumns& x, DType dtype, const Tasks& tasks, const ConstMatrix& delta, int64_t outputs,
                     const Matrix& out, const Executor& executor);

}  // namespace gem_fast::cpu
