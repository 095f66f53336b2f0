// Mean cross entropies, and their gradients without them.
#pragma once

#include <cstdint>

#include "core/types.h"
#include "cpu/mlp/layer.h"
#include "cpu/mlp/matrix.h"
#include "cpu/parallel.h"

namespace gem_fast::cpu {

// grad (N, classes) = (softmax(logits) - onehot(target)) / (the number of the task's rows), for targets from 0 to
// classes - 1.
void cross_entropy_gradient(const ConstMatrix& logits, DType dtype, const int64_t* target, const Tasks& tasks,
                            int64_t classes, const Matrix& grad, const Executor& executor);

// The mean over n rows, in float64.
double cross_entropy(const ConstMatrix& logits, DType dtype, const int64_t* target, int64_t n, int64_t classes);

}  // namespace gem_fast::cpu
