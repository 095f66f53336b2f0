#include "cpu/simd.h"

#include <algorithm>
#include <atomic>
#include <cstring>

namespace gem_fast::cpu {

Simd simd_available() {
#if defined(GEM_FAST_HAS_X86_LEVELS)
  static const Simd available = [] {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("x86-64-v4")) return Simd::kV4;
    if (__builtin_cpu_supports("x86-64-v3")) return Simd::kV3;
    return Simd::kBase;
  }();
  return available;
#else
  return Simd::kBase;
#endif
}

static std::atomic<Simd>& level_in_use() {
  static std::atomic<Simd> level{simd_available()};
  return level;
}

Simd simd_level() { return level_in_use().load(std::memory_order_relaxed); }

void set_simd_level(Simd level) { level_in_use().store(std::min(level, simd_available()), std::memory_order_relaxed); }

bool set_simd_level(const char* name) {
  for (int level = 0; level <= static_cast<int>(simd_available()); ++level) {
    if (std::strcmp(name, simd_name(static_cast<Simd>(level))) == 0) {
      set_simd_level(static_cast<Simd>(level));
      return true;
    }
  }
  return false;
}

const char* simd_name(Simd level) {
  switch (level) {
    case Simd::kV4: return "x86-64-v4";
    case Simd::kV3: return "x86-64-v3";
    default: return "baseline";
  }
}

}  // namespace gem_fast::cpu
