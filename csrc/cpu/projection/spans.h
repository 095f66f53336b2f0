// Walking a list of tensors in parallel: spans of elements that lie in one tensor, whatever the tensors' sizes.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/arrays.h"
#include "cpu/parallel.h"

namespace gem_fast::cpu {

struct Span {
  const TensorRef* tensor;
  int64_t begin;   // first element within the tensor
  int64_t offset;  // of that element in the flattened gradient
  int64_t numel;
};

// The tensor that holds a column. Empty tensors begin where the next one does, and are passed over.
inline const TensorRef* tensor_at(const TensorList& g, int64_t column) {
  return std::upper_bound(g.items, g.items + g.count, column,
                          [](int64_t c, const TensorRef& x) { return c < x.offset; }) -
         1;
}

// Calls f(span) for spans that together are the tensors' p elements, each within one chunk of `grain` elements.
template <class F>
void for_each_span(const TensorList& g, int64_t p, int64_t grain, const Executor& executor, const F& f) {
  executor.each((p + grain - 1) / grain, 1, [&](int64_t chunk) {
    const int64_t end = std::min(p, (chunk + 1) * grain);
    int64_t at = chunk * grain;
    for (const TensorRef* s = tensor_at(g, at); at < end; ++s) {
      const int64_t begin = at - s->offset;
      const int64_t numel = std::min(s->numel - begin, end - at);
      if (numel > 0) f(Span{s, begin, at, numel});
      at += std::max<int64_t>(numel, 0);
    }
  });
}

}  // namespace gem_fast::cpu
