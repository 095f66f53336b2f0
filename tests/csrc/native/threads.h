// Executors of plain threads: the kernels' loops as torch's pool would run them, where sanitizers can see them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

#include "cpu/parallel.h"

namespace gem_fast::native {

using Body = void (*)(int64_t begin, int64_t end, void* context);

inline constexpr int64_t kThreads = 3;

inline void on_threads(int64_t n, int64_t grain, Body body, void* context) {
  const int64_t chunk = std::max(grain, (n + kThreads - 1) / kThreads);
  std::vector<std::thread> threads;
  for (int64_t begin = 0; begin < n; begin += chunk) {
    threads.emplace_back(body, begin, std::min(n, begin + chunk), context);
  }
  for (std::thread& thread : threads) thread.join();
}

// Wrong on purpose: every item goes to two threads at once.
inline void on_threads_twice(int64_t n, int64_t, Body body, void* context) {
  std::thread first(body, 0, n, context);
  std::thread second(body, 0, n, context);
  first.join();
  second.join();
}

inline const cpu::Executor kPlainThreads{&on_threads};
inline const cpu::Executor kRacingThreads{&on_threads_twice};

}  // namespace gem_fast::native
