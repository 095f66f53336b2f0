// What the operators that project have in common on the CPU: their results, and what they say of numbers that are not
// finite.
#pragma once

#include <tuple>

#include "arguments.h"
#include "core/status.h"
#include "cpu/gram.h"
#include "cpu/project.h"
#include "torch_threads.h"

namespace gem_fast {

[[noreturn]] inline void fail_non_finite(const Rows& G, const Segments& g) {
  const int64_t row = cpu::first_non_finite(G, g);
  check<std::runtime_error>(row != G.t, "grads must be finite, got a NaN or an infinity");
  check<std::runtime_error>(row < 0, "G must be finite, got a NaN or an infinity in row ", row);
  throw std::runtime_error("the inner products of G's rows and grads must be finite, got an overflow");
}

using ProjectResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Projects grads, and where there is a layer its gradient, in place.
inline ProjectResult project_grads(const Tensors& grads, const Tensor& G, const cpu::LayerColumns* layer, double margin,
                                   double ridge) {
  const MatrixView matrix(G);
  check_writable(grads, "grads");
  const ListView list(grads, "grads", G);
  check_not_negative(margin, "margin");
  check_not_negative(ridge, "ridge");
  const int64_t t = matrix.rows.t;
  Tensor v = new_doubles(G, {t});
  Tensor q = new_doubles(G, {t});
  Tensor status = new_int(G);
  Tensor residual = new_doubles(G, {});
  const auto outcome = cpu::project(list.segments(), matrix.rows, layer, margin, ridge, doubles(v), doubles(q),
                                    static_cast<int32_t*>(status.mutable_data_ptr()), doubles(residual), kTorchThreads);
  if (outcome == cpu::Projected::kNonFinite) {
    if (layer != nullptr) {
      const Segment gradient{layer->g, layer->of.elements(), 0};
      const Rows none{nullptr, 0, 0, layer->of.elements(), layer->of.dtype};
      check<std::runtime_error>(cpu::first_non_finite(none, {&gradient, 1}) < 0,
                                "grads must be finite, got a NaN or an infinity");
    }
    fail_non_finite(matrix.rows, list.segments());
  }
  list.write_back(grads);
  return {v, q, status, residual};
}

}  // namespace gem_fast
