// The columns of G that are the weight of a linear layer: formed block by block, for all tasks, in a buffer that stays
// in the second-level cache, and never as a whole. To write them to memory and to read them again, twice, takes longer
// than to form them.
#pragma once

#include <cstdint>

#include "cpu/layer.h"

namespace gem_fast::cpu {

struct LayerColumns {
  LayerGradients of;
  void* g;  // (outputs, inputs): the current gradient

  // The sum of all rows, turned around.
  int64_t row_sum_bytes() const { return of.blocks() * of.block_elements() * size_of(of.dtype); }
};

// P (t, t), q (t,) and sums (t,) as in gram.h, to which these columns' part is added; row_sum = G^T 1 is for `combine`.
void gram(const LayerColumns& G, double* P, double* q, void* row_sum, const Executor& executor);
void probe(const LayerColumns& G, double* q, double* sums, void* row_sum, const Executor& executor);

// g += G^T v; where all of v is the same, the sum of the rows is all that it takes.
void combine(const LayerColumns& G, const double* v, const void* row_sum, const Executor& executor);

}  // namespace gem_fast::cpu
