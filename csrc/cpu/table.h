// Matrices whose rows are whole cache lines, so that every vector of them is readable.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#include "core/types.h"
#include "cpu/parallel.h"

namespace gem_fast::cpu {

// The length of a row of `width` elements; what is beyond them is zero.
constexpr int64_t padded(int64_t width) { return (width + 15) / 16 * 16; }

// A matrix with `stride` elements from row to row, or a list of matrices with as many from one to the next.
struct ConstMatrix {
  const void* data;
  int64_t stride;
};
struct Matrix {
  void* data;
  int64_t stride;

  operator ConstMatrix() const { return {data, stride}; }
};

// A list of tasks: rows [start[k], start[k + 1]) are task k's.
struct Tasks {
  const int64_t* start;
  int64_t t;
};

// y = x W' + b for the weights W (outputs, inputs).
struct Layer {
  const void* weight;
  const void* bias;  // may be null
  int64_t outputs;
  int64_t inputs;
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

// Memory that begins on a cache line, for a thread to use again and again: vectors across two lines take twice as long.
class Buffer {
 public:
  // Room for so many bytes; what was there is lost.
  void* of(int64_t bytes) {
    if (bytes > size_) {
      data_.reset(new (std::align_val_t{64}) char[bytes]);
      size_ = bytes;
    }
    return data_.get();
  }
  const void* data() const { return data_.get(); }

 private:
  struct Delete {
    void operator()(char* data) const { operator delete[](data, std::align_val_t{64}); }
  };
  std::unique_ptr<char[], Delete> data_;
  int64_t size_ = 0;
};

// One row of a table from `columns` elements.
inline void pad_row(const void* x, DType dtype, int64_t columns, void* row) {
  memcpy(row, x, columns * size_of(dtype));
  memset(at(row, columns, dtype), 0, (padded(columns) - columns) * size_of(dtype));
}

// table (columns, padded(rows)) = x' for x (rows, columns), contiguous.
void transpose(const void* x, DType dtype, int64_t rows, int64_t columns, void* table, const Executor& executor);

// Columns [first, last) of x alone, as rows of a table of their own.
void turn(const void* x, DType dtype, int64_t rows, int64_t columns, int64_t first, int64_t last, void* table);

// Back from a table (columns, padded(rows)) of some columns to those of x, whose rows are `stride` elements apart.
void turn_back(const void* table, DType dtype, int64_t columns, int64_t rows, void* x, int64_t stride);

// table (rows, padded(columns)) = x (rows, columns).
void pad_rows(const ConstMatrix& x, DType dtype, int64_t rows, int64_t columns, void* table, const Executor& executor);

}  // namespace gem_fast::cpu
