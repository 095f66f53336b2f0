// The kernels run their loops on an executor, so that the caller chooses the thread pool (torch's own).
#pragma once

#include <cstdint>

namespace gem_fast::cpu {

struct Executor {
  // Calls body(begin, end, context) over disjoint ranges that together are [0, n), `grain` items or more at a
  // time, possibly from several threads, and returns when all are done.
  void (*run)(int64_t n, int64_t grain, void (*body)(int64_t begin, int64_t end, void* context), void* context);

  template <class F>
  void each(int64_t n, int64_t grain, const F& f) const {
    run(
        n, grain,
        [](int64_t begin, int64_t end, void* context) {
          const F& item = *static_cast<const F*>(context);
          for (int64_t i = begin; i < end; ++i) item(i);
        },
        const_cast<void*>(static_cast<const void*>(&f)));
  }
};

// Runs everything on the calling thread, which may be one of another executor's.
inline constexpr Executor kThisThread{
    [](int64_t n, int64_t, void (*body)(int64_t, int64_t, void*), void* context) { body(0, n, context); }};

}  // namespace gem_fast::cpu
