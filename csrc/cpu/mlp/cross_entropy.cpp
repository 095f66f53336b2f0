#include "cpu/mlp/cross_entropy.h"

#include <algorithm>
#include <cmath>

#include "core/dispatch.h"

namespace gem_fast::cpu {
namespace {

template <class T>
void gradient_row(const T* logits, int64_t target, int64_t classes, T scale, T* grad) {
  const T largest = *std::max_element(logits, logits + classes);
  T sum = 0;
  for (int64_t c = 0; c < classes; ++c) sum += grad[c] = std::exp(logits[c] - largest);
  for (int64_t c = 0; c < classes; ++c) grad[c] *= scale / sum;
  grad[target] -= scale;
}

template <class T>
double loss_of_row(const T* logits, int64_t target, int64_t classes) {
  const T largest = *std::max_element(logits, logits + classes);
  T sum = 0;
  for (int64_t c = 0; c < classes; ++c) sum += std::exp(logits[c] - largest);
  return static_cast<double>(std::log(sum) - (logits[target] - largest));
}

}  // namespace

double cross_entropy(const ConstMatrix& logits, DType dtype, const int64_t* target, int64_t n, int64_t classes) {
  double sum = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    GEM_FAST_DISPATCH_FLOAT_OR_DOUBLE(
        dtype, sum += loss_of_row(static_cast<const T*>(logits.data) + i * logits.stride, target[i], classes));
  }
  return sum / static_cast<double>(n);
}

void cross_entropy_gradient(const ConstMatrix& logits, DType dtype, const int64_t* target, const Tasks& tasks,
                            int64_t classes, const Matrix& grad, const Executor& executor) {
  executor.each(tasks.t, 1, [&](int64_t k) {
    const int64_t size = tasks.start[k + 1] - tasks.start[k];
    for (int64_t n = tasks.start[k]; n < tasks.start[k + 1]; ++n) {
      GEM_FAST_DISPATCH_FLOAT_OR_DOUBLE(
          dtype, gradient_row(static_cast<const T*>(logits.data) + n * logits.stride, target[n], classes,
                              T(1) / static_cast<T>(size), static_cast<T*>(grad.data) + n * grad.stride));
    }
  });
}

}  // namespace gem_fast::cpu
