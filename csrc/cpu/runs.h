// Walking a list of tensors in parallel: runs of elements that lie in one tensor, whatever the tensors' sizes.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/arrays.h"
#include "cpu/parallel.h"

namespace gem_fast::cpu {

struct Run {
  const Segment* segment;
  int64_t begin;   // first element within the segment
  int64_t offset;  // of that element in the flattened gradient
  int64_t numel;
};

// Calls f(run) for runs that together are the segments' p elements, each within one chunk of `grain` elements.
template <class F>
void for_each_run(const Segments& g, int64_t p, int64_t grain, const Executor& executor, const F& f) {
  executor.each((p + grain - 1) / grain, 1, [&](int64_t chunk) {
    const int64_t end = std::min(p, (chunk + 1) * grain);
    int64_t at = chunk * grain;
    const Segment* s = std::upper_bound(g.items, g.items + g.count, at,
                                        [](int64_t column, const Segment& x) { return column < x.offset; }) -
                       1;
    for (; at < end; ++s) {
      const int64_t begin = at - s->offset;
      const int64_t numel = std::min(s->numel - begin, end - at);
      if (numel > 0) f(Run{s, begin, at, numel});
      at += std::max<int64_t>(numel, 0);
    }
  });
}

}  // namespace gem_fast::cpu
