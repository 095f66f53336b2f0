// P = G G^T and q = G g (paper, Eq. 11) in one read of G.
#pragma once

#include <cstdint>

#include "core/arrays.h"
#include "cpu/parallel.h"

namespace gem_fast::cpu {

// Doubles of workspace for gram and probe.
int64_t gram_doubles(int64_t t, int64_t p);
int64_t probe_doubles(int64_t t, int64_t p);

// P (t, t) and q (t,), float64. g must have p elements of G's dtype.
void gram(const Rows& G, const Segments& g, double* P, double* q, double* workspace, const Executor& executor);

// q = G g and sums = G (G^T 1) = P 1, without P itself: enough to tell whether a constraint is violated, and
// whether v = margin * 1 already is the answer.
void probe(const Rows& G, const Segments& g, double* q, double* sums, double* workspace, const Executor& executor);

// sum (p,) = G^T 1, of the type that G's is computed in, on this thread.
void row_sum(const Rows& G, void* sum);

// The first row of G with a NaN or an infinity; t when it is g that has one, -1 when there is none.
int64_t first_non_finite(const Rows& G, const Segments& g);

}  // namespace gem_fast::cpu
