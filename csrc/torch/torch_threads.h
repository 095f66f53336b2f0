// torch's own thread pool, as the executor that CPU kernels run their loops on.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "cpu/parallel.h"

namespace gem_fast {

inline const cpu::Executor kTorchThreads{
    [](int64_t n, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
      torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { body(begin, end, context); });
    }};

}  // namespace gem_fast
