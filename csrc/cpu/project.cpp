#include "cpu/project.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "core/status.h"
#include "cpu/combine.h"
#include "cpu/gram.h"
#include "cpu/solve.h"

namespace gem_fast::cpu {
namespace {

// For up to so many tasks, P takes little beside a layer's columns, which else are formed once more where it is needed.
constexpr int64_t kFewTasks = 32;

}  // namespace

Projected project(const Segments& g, const Rows& G, const LayerColumns* layer, double margin, double ridge, double* v,
                  double* q, int32_t* status, double* residual, const Executor& executor) {
  const int64_t t = G.t;
  std::fill_n(v, t, 0.0);
  *status = kSolved;
  *residual = 0.0;

  Buffer row_sum_buffer;
  void* row_sum = layer == nullptr ? nullptr : row_sum_buffer.of(layer->row_sum_bytes());
  std::vector<double> P, sums(t);
  const auto form_P = [&] {
    P.resize(t * t);
    std::vector<double> workspace(gram_doubles(t, G.p));
    gram(G, g, P.data(), q, workspace.data(), executor);
    if (layer != nullptr) gram(*layer, P.data(), q, row_sum, executor);
  };
  if (layer != nullptr && t <= kFewTasks) {
    form_P();
    for (int64_t k = 0; k < t; ++k) sums[k] = std::accumulate(&P[k * t], &P[k * t] + t, 0.0);
  } else {
    std::vector<double> workspace(probe_doubles(t, G.p));
    probe(G, g, q, sums.data(), workspace.data(), executor);
    if (layer != nullptr) probe(*layer, q, sums.data(), row_sum, executor);
  }
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
    if (P.empty()) form_P();
    nnqp({P.data(), q, 1, t, false, margin, ridge}, v, status, residual, nullptr, executor);
    if (*status == kNonFinite) return Projected::kNonFinite;
  }
  combine(g, G, v, executor);
  if (layer != nullptr) combine(*layer, v, row_sum, executor);
  return Projected::kDone;
}

}  // namespace gem_fast::cpu
