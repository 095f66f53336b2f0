// Products of matrices that fit the caches: a BLAS would spend its time on packing them.
#pragma once

#include <cstdint>

#include "core/types.h"

namespace gem_fast::cpu {

// C (m, n) = A B for A (m, k) and B (k, n). Then bias, relu, mask and accumulate apply where given, in this order.
struct Gemm {
  const void* a;
  int64_t a_row_stride, a_column_stride;  // elements from one row, and from one column, to the next
  const void* b;
  int64_t ldb;  // rows of B are readable up to whole cache lines
  void* c;
  int64_t ldc;
  int64_t m, n, k;
  const void* bias = nullptr;  // (n,): added to each row
  bool relu = false;
  const void* mask = nullptr;  // (m, n): where it is not positive the result is zero
  int64_t ldmask = 0;
  bool accumulate = false;  // C += the result
};

void gemm(DType dtype, const Gemm& p);

}  // namespace gem_fast::cpu
