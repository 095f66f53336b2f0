// torch's own thread pool, as the executor that CPU kernels run their loops on.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>

#include "cpu/parallel.h"

namespace gem_fast {

// Each thread takes the next few items as it comes to need them: halves that are given out beforehand end at different
// times, since tasks are uneven and a core may be busy with something else.
inline const cpu::Executor kTorchThreads{
    [](int64_t n, int64_t grain, void (*body)(int64_t begin, int64_t end, void* context), void* context) {
      constexpr int64_t kTurns = 8;  // of each thread, where there are enough items
      const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), (n + grain - 1) / grain);
      if (threads <= 1) return body(0, n, context);
      const int64_t step = std::max(grain, n / (threads * kTurns));
      std::atomic<int64_t> next{0};
      torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
        for (int64_t i; (i = next.fetch_add(step, std::memory_order_relaxed)) < n;)
          body(i, std::min(n, i + step), context);
      });
    }};

}  // namespace gem_fast
