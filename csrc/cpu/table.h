// Matrices whose rows are whole cache lines, so that every vector of them is readable.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/types.h"
#include "cpu/parallel.h"

namespace gem_fast::cpu {

// The length of a row of `width` elements; what is beyond them is zero.
constexpr int64_t padded(int64_t width) { return (width + 15) / 16 * 16; }

// A matrix with `stride` elements from row to row, or a list of matrices with as many from one to the next.
struct Matrix {
  void* data;
  int64_t stride;
};
struct ConstMatrix {
  const void* data;
  int64_t stride;
};

// A list of tasks: rows [start[k], start[k + 1]) are task k's.
struct Tasks {
  const int64_t* start;
  int64_t t;
};

// The element types of layers: half precision has no sums of its own.
#define GEM_FAST_DISPATCH_FULL(dtype, ...)                                                                             \
  if ((dtype) == ::gem_fast::DType::kFloat64) {                                                                        \
    using T = double;                                                                                                  \
    __VA_ARGS__;                                                                                                       \
  } else {                                                                                                             \
    using T = float;                                                                                                   \
    __VA_ARGS__;                                                                                                       \
  }

inline int64_t size_of(DType dtype) { return dtype == DType::kFloat64 ? sizeof(double) : sizeof(float); }

inline const void* at(const void* data, int64_t elements, DType dtype) {
  return static_cast<const char*>(data) + elements * size_of(dtype);
}
inline void* at(void* data, int64_t elements, DType dtype) {
  return static_cast<char*>(data) + elements * size_of(dtype);
}

// One row of a table from `columns` elements.
inline void pad_row(const void* x, DType dtype, int64_t columns, void* row) {
  memcpy(row, x, columns * size_of(dtype));
  memset(at(row, columns, dtype), 0, (padded(columns) - columns) * size_of(dtype));
}

// table (columns, padded(rows)) = x' for x (rows, columns), contiguous.
void transpose(const void* x, DType dtype, int64_t rows, int64_t columns, void* table, const Executor& executor);

// table (rows, padded(columns)) = x (rows, columns).
void pad_rows(const ConstMatrix& x, DType dtype, int64_t rows, int64_t columns, void* table, const Executor& executor);

}  // namespace gem_fast::cpu
