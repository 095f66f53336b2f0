// Products of matrices that fit the caches, where a library's would spend its time on packing.
#pragma once

#include <cstdint>

#include "core/types.h"

namespace gem_fast::cpu {

// out (rows, columns) = start + sum over k < n of a(r, k) b(k, :), or the positive part of that, or added to what is
// there.
struct Product {
  const void* a;
  int64_t a_row, a_k;  // elements from one row, and from one k, to the next
  const void* b;
  int64_t b_k;  // likewise; what follows the columns, up to whole cache lines, is readable
  int64_t rows, columns, n;
  const void* start;  // (columns,), or null for zeros
  bool relu;
  const void* mask;  // (rows, columns): where this is not positive the result is zero; or null
  int64_t mask_row;
  void* out;
  int64_t out_row;
  bool add = false;
};

void multiply(DType dtype, const Product& p);

}  // namespace gem_fast::cpu
