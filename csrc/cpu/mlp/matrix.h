// Matrices of float32 or float64; which of them is known at run time.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/types.h"
#include "cpu/parallel.h"

namespace gem_fast::cpu {

// `stride` is the number of elements from one row to the next, or from one matrix of a list to the next.
struct ConstMatrix {
  const void* data;
  int64_t stride;
};
struct Matrix {
  void* data;
  int64_t stride;

  operator ConstMatrix() const { return {data, stride}; }
};

inline int64_t size_of(DType dtype) { return dtype == DType::kFloat64 ? sizeof(double) : sizeof(float); }

inline const void* at(const void* data, int64_t elements, DType dtype) {
  return static_cast<const char*>(data) + elements * size_of(dtype);
}
inline void* at(void* data, int64_t elements, DType dtype) {
  return static_cast<char*>(data) + elements * size_of(dtype);
}

// The rows from `row` on.
inline ConstMatrix rows_from(const ConstMatrix& x, int64_t row, DType dtype) {
  return {at(x.data, row * x.stride, dtype), x.stride};
}
inline Matrix rows_from(const Matrix& x, int64_t row, DType dtype) {
  return {at(x.data, row * x.stride, dtype), x.stride};
}

// The length of a row that is filled up with zeros to whole cache lines, so that it can be read by whole vectors.
constexpr int64_t padded(int64_t columns) { return (columns + 15) / 16 * 16; }

inline void pad_row(const void* from, DType dtype, int64_t columns, void* to) {
  memcpy(to, from, columns * size_of(dtype));
  memset(at(to, columns, dtype), 0, (padded(columns) - columns) * size_of(dtype));
}

// to (rows, padded(columns)) = from (rows, columns).
inline void pad_rows(const ConstMatrix& from, DType dtype, int64_t rows, int64_t columns, void* to,
                     const Executor& executor) {
  executor.each(rows, 64, [&](int64_t n) {
    pad_row(rows_from(from, n, dtype).data, dtype, columns, at(to, n * padded(columns), dtype));
  });
}

}  // namespace gem_fast::cpu
