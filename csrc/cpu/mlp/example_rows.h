// The projection of example_products.h by way of rows of G. A row has the transpose of each layer's gradient,
// (inputs, padded(outputs)), and its bias's, padded: as the examples' sums come, so that g alone changes its layout.
#pragma once

#include <cstdint>

#include "cpu/mlp/example_products.h"
#include "cpu/parallel.h"

namespace gem_fast::cpu {

// Bytes of workspace for project_by_rows: the rows, and one more for g.
int64_t example_rows_bytes(const Examples& examples);

// As project_examples, with whatever digits it takes. Returns the status; where that is kNonFinite, G or g is not
// finite and nothing is written but v = 0.
int32_t project_by_rows(const Examples& examples, double margin, double ridge, double* v, double* q, double* residual,
                        void* workspace, const Executor& executor);

}  // namespace gem_fast::cpu
