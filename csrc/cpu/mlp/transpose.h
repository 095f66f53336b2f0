// Transposing matrices of float32 and float64.
#pragma once

#include <cstdint>

#include "core/types.h"
#include "cpu/mlp/matrix.h"
#include "cpu/parallel.h"

namespace gem_fast::cpu {

// to (columns, rows) = from' for from (rows, columns), or += it; nothing beyond is touched. On this thread.
void transpose(DType dtype, const ConstMatrix& from, int64_t rows, int64_t columns, const Matrix& to, bool add = false);

// to (columns, padded(rows)) = from' for from (rows, columns), with zeros beyond the rows.
void transpose_padded(DType dtype, const ConstMatrix& from, int64_t rows, int64_t columns, void* to,
                      const Executor& executor);

}  // namespace gem_fast::cpu
