// P = G G^T and q = G g (paper, Eq. 11) in one read of G.
#pragma once

#include <cstdint>

#include "core/arrays.h"
#include "cpu/parallel.h"

namespace gem_fast::cpu {

// Doubles of workspace for gram and gram_row_sums.
int64_t gram_doubles(int64_t t, int64_t p);
int64_t gram_row_sums_doubles(int64_t t, int64_t p);

// P (t, t), q (t,) and |g|^2 (1,), float64. g must have p elements of G's dtype. `products`: what products are formed
// in; float64 elements allow no less.
void gram(const RowMatrix& G, const TensorList& g, Products products, double* P, double* q, double* g_squared,
          double* workspace, const Executor& executor);

// q (t,) = G g and sums (t,) = P 1 = G (G^T 1), the row sums of P, without P itself: enough to tell whether a
// constraint is violated, and whether v = margin * 1 already is the answer. G^T 1 is left in column_sums, see
// combine.h.
void gram_row_sums(const RowMatrix& G, const TensorList& g, double* q, double* sums, void* column_sums,
                   double* workspace, const Executor& executor);
// Bytes of column_sums.
int64_t column_sums_bytes(DType dtype, int64_t p);

// The first row of G with a NaN or an infinity; t when it is g that has one, -1 when there is none.
int64_t first_non_finite(const RowMatrix& G, const TensorList& g);

}  // namespace gem_fast::cpu
