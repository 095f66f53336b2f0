#include "cpu/table.h"

#include <algorithm>

#include "cpu/transpose.h"

namespace gem_fast::cpu {
namespace {

// Rows of a table that one thread takes at a time.
constexpr int64_t kGrain = 64;

// Columns [first, last) of x (rows, columns) as rows of a table.
template <class Isa, class T>
GEM_FAST_KERNEL void transpose_columns(const T* x, int64_t first, int64_t last, int64_t rows, int64_t columns,
                                       T* table) {
  const int64_t width = padded(rows);
  transpose_into<T, kLanesOf<Isa, T>>(x + first, columns, rows, last - first, table, width);
  for (int64_t j = 0; j < last - first; ++j) std::fill(table + j * width + rows, table + (j + 1) * width, T(0));
}

template <class Isa>
GEM_FAST_KERNEL void transpose_columns_any_impl(DType dtype, const void* x, int64_t first, int64_t last, int64_t rows,
                                                int64_t columns, void* table) {
  GEM_FAST_DISPATCH_FULL(
      dtype, transpose_columns<Isa, T>(static_cast<const T*>(x), first, last, rows, columns, static_cast<T*>(table)));
}
GEM_FAST_MULTIVERSION(transpose_columns_any,
                      (DType dtype, const void* x, int64_t first, int64_t last, int64_t rows, int64_t columns,
                       void* table),
                      (dtype, x, first, last, rows, columns, table))

template <class Isa>
GEM_FAST_KERNEL void turn_back_any_impl(const void* table, DType dtype, int64_t columns, int64_t rows, void* x,
                                        int64_t stride) {
  GEM_FAST_DISPATCH_FULL(dtype, transpose_into<T, kLanesOf<Isa, T>>(static_cast<const T*>(table), padded(rows), columns,
                                                                    rows, static_cast<T*>(x), stride));
}
GEM_FAST_MULTIVERSION(turn_back_any,
                      (const void* table, DType dtype, int64_t columns, int64_t rows, void* x, int64_t stride),
                      (table, dtype, columns, rows, x, stride))

}  // namespace

void transpose(const void* x, DType dtype, int64_t rows, int64_t columns, void* table, const Executor& executor) {
  executor.each((columns + kGrain - 1) / kGrain, 2, [&](int64_t block) {
    const int64_t first = block * kGrain;
    turn(x, dtype, rows, columns, first, std::min(columns, first + kGrain), at(table, first * padded(rows), dtype));
  });
}

void turn(const void* x, DType dtype, int64_t rows, int64_t columns, int64_t first, int64_t last, void* table) {
  transpose_columns_any(dtype, x, first, last, rows, columns, table);
}

void turn_back(const void* table, DType dtype, int64_t columns, int64_t rows, void* x, int64_t stride) {
  turn_back_any(table, dtype, columns, rows, x, stride);
}

void pad_rows(const ConstMatrix& x, DType dtype, int64_t rows, int64_t columns, void* table, const Executor& executor) {
  const int64_t width = padded(columns);
  executor.each(rows, kGrain, [&](int64_t n) {
    pad_row(at(x.data, n * x.stride, dtype), dtype, columns, at(table, n * width, dtype));
  });
}

}  // namespace gem_fast::cpu
