#include "cpu/projection/combine.h"

#include <algorithm>
#include <vector>

#include "core/dispatch.h"
#include "cpu/projection/spans.h"
#include "cpu/simd.h"

namespace gem_fast::cpu {
namespace {

// Columns whose float64 sums are kept in the first-level cache while the rows stream by.
constexpr int64_t kColumns = 512;
// Columns that one thread takes at a time.
constexpr int64_t kGrain = 8 * kColumns;

struct Term {
  int64_t row;
  double v;
};

// sum[i] += v_k row_k[i] for a few rows at once, so that the sums are loaded and stored once for all of them.
template <int kRows, class T>
GEM_FAST_KERNEL void add_rows(double* sum, const T* G, int64_t stride, const Term* terms, int64_t n) {
  const T* rows[kRows];
  double v[kRows];
  for (int r = 0; r < kRows; ++r) {
    rows[r] = G + terms[r].row * stride;
    v[r] = terms[r].v;
  }
  for (int64_t i = 0; i < n; ++i) {
    double total = sum[i];
    for (int r = 0; r < kRows; ++r) total += v[r] * static_cast<double>(static_cast<Compute<T>>(rows[r][i]));
    sum[i] = total;
  }
}

// g[i] += sum_k v_k row_k[i], summed in float64 and rounded once; rows are of g's type, or of the one it is added up
// in.
template <class T, class Row>
GEM_FAST_KERNEL void combine_span(T* g, const Row* G, int64_t stride, const Term* terms, int64_t count, int64_t n) {
  alignas(64) double sum[kColumns];
  for (int64_t c = 0; c < n; c += kColumns) {
    const int64_t m = std::min(kColumns, n - c);
    for (int64_t i = 0; i < m; ++i) sum[i] = static_cast<double>(static_cast<Compute<T>>(g[c + i]));
    int64_t k = 0;
    for (; k + 8 <= count; k += 8) add_rows<8>(sum, G + c, stride, terms + k, m);
    if (k + 4 <= count) {
      add_rows<4>(sum, G + c, stride, terms + k, m);
      k += 4;
    }
    for (; k < count; ++k) add_rows<1>(sum, G + c, stride, terms + k, m);
    for (int64_t i = 0; i < m; ++i) g[c + i] = static_cast<T>(static_cast<Compute<T>>(sum[i]));
  }
}

template <class Isa>
GEM_FAST_KERNEL void combine_any_impl(const RowMatrix& G, const Span& span, const Term* terms, int64_t count) {
  GEM_FAST_DISPATCH_DTYPE(
      G.dtype, combine_span(static_cast<T*>(span.tensor->data) + span.begin,
                            static_cast<const T*>(G.data) + span.offset, G.stride, terms, count, span.numel));
}
GEM_FAST_MULTIVERSION(combine_any, (const RowMatrix& G, const Span& span, const Term* terms, int64_t count),
                      (G, span, terms, count))

template <class Isa>
GEM_FAST_KERNEL void add_sums_any_impl(const Span& span, DType dtype, const void* sums, double v) {
  const Term term{0, v};
  GEM_FAST_DISPATCH_DTYPE(dtype,
                          combine_span(static_cast<T*>(span.tensor->data) + span.begin,
                                       static_cast<const Compute<T>*>(sums) + span.offset, 0, &term, 1, span.numel));
}
GEM_FAST_MULTIVERSION(add_sums_any, (const Span& span, DType dtype, const void* sums, double v), (span, dtype, sums, v))

}  // namespace

void combine(const TensorList& g, const RowMatrix& G, const double* v, const Executor& executor) {
  std::vector<Term> terms;
  for (int64_t k = 0; k < G.t; ++k) {
    if (v[k] != 0.0) terms.push_back({k, v[k]});
  }
  if (terms.empty()) return;
  const auto count = static_cast<int64_t>(terms.size());
  for_each_span(g, G.p, kGrain, executor, [&](const Span& span) { combine_any(G, span, terms.data(), count); });
}

void combine_equally(const TensorList& g, DType dtype, int64_t p, const void* column_sums, double v,
                     const Executor& executor) {
  for_each_span(g, p, kGrain, executor, [&](const Span& span) { add_sums_any(span, dtype, column_sums, v); });
}

}  // namespace gem_fast::cpu
