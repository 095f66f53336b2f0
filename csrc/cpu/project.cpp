#include "cpu/project.h"

#include <algorithm>
#include <cmath>
#include <memory>

#include "core/status.h"
#include "cpu/combine.h"
#include "cpu/gram.h"
#include "cpu/solve.h"

namespace gem_fast::cpu {

Projected project(const Segments& g, const Rows& G, double margin, double ridge, double* v, double* q, int32_t* status,
                  double* residual, const Executor& executor) {
  const int64_t t = G.t;
  std::fill_n(v, t, 0.0);
  *status = kSolved;
  *residual = 0.0;

  auto doubles = std::make_unique_for_overwrite<double[]>(t + probe_doubles(t, G.p));
  double* sums = doubles.get();
  probe(G, g, q, sums, sums + t, executor);
  bool violated = false;
  bool margin_suffices = true;
  for (int64_t k = 0; k < t; ++k) {
    if (!std::isfinite(q[k]) || !std::isfinite(sums[k])) return Projected::kNonFinite;
    violated |= q[k] < 0.0;
    margin_suffices &= q[k] + margin * (sums[k] + ridge) >= 0.0;
  }
  if (!violated) return Projected::kDone;

  if (margin_suffices) {
    // At v = margin * 1 no slope is negative: it is the minimiser, and P need not be formed.
    std::fill_n(v, t, margin);
  } else {
    doubles = std::make_unique_for_overwrite<double[]>(t * t + gram_doubles(t, G.p));
    double* P = doubles.get();
    gram(G, g, P, q, P + t * t, executor);
    nnqp({P, q, 1, t, false, margin, ridge}, v, status, residual, nullptr, executor);
    if (*status == kNonFinite) return Projected::kNonFinite;
  }
  combine(g, G, v, executor);
  return Projected::kDone;
}

}  // namespace gem_fast::cpu
