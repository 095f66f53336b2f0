#include "cpu/pack.h"

#include <cstring>

#include "core/dispatch.h"
#include "cpu/runs.h"

namespace gem_fast::cpu {

void pack(const Segments& segments, void* row, int64_t p, DType dtype, const Executor& executor) {
  constexpr int64_t kGrain = 32768;
  GEM_FAST_DISPATCH_DTYPE(dtype, {
    for_each_run(segments, p, kGrain, executor, [&](const Run& run) {
      T* to = static_cast<T*>(row) + run.offset;
      if (run.segment->data == nullptr) {
        std::memset(to, 0, run.numel * sizeof(T));
      } else {
        std::memcpy(to, static_cast<const T*>(run.segment->data) + run.begin, run.numel * sizeof(T));
      }
    });
  });
}

}  // namespace gem_fast::cpu
