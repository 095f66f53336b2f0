// One binary, fast and safe everywhere: a kernel is compiled for several instruction sets and the widest one that
// the processor has is taken at run time.
//
//     template <class Isa> GEM_FAST_KERNEL void scale_impl(float* x, int64_t n) { ... }
//     GEM_FAST_MULTIVERSION(scale, (float* x, int64_t n), (x, n))        // defines scale(x, n)
#pragma once

#include <cstdint>

namespace gem_fast::cpu {

enum class Simd : int { kBase = 0, kV3 = 1, kV4 = 2 };

// The instruction set in use: the widest available one unless a test asked for less.
Simd simd_level();
// What this processor and this binary have in common.
Simd simd_available();
void set_simd_level(Simd level);
// The same by its name. Returns false, and changes nothing, where there is no such level here.
bool set_simd_level(const char* name);
const char* simd_name(Simd level);

// Lanes of float32, and the tile of rows x rows whose products stay in registers.
struct IsaBase {
  static constexpr int kFloats = 4, kTileI = 4, kTileJ = 2;
};
struct IsaV3 {
  static constexpr int kFloats = 8, kTileI = 4, kTileJ = 2;
};
struct IsaV4 {
  static constexpr int kFloats = 16, kTileI = 4, kTileJ = 4;
};

#define GEM_FAST_KERNEL static inline __attribute__((always_inline))

#if defined(__x86_64__)
#define GEM_FAST_HAS_X86_LEVELS 1
#define GEM_FAST_MULTIVERSION(name, parameters, arguments)                                                             \
  __attribute__((target("arch=x86-64-v4"), flatten)) static void name##_v4 parameters {                                \
    name##_impl<::gem_fast::cpu::IsaV4> arguments;                                                                     \
  }                                                                                                                    \
  __attribute__((target("arch=x86-64-v3"), flatten)) static void name##_v3 parameters {                                \
    name##_impl<::gem_fast::cpu::IsaV3> arguments;                                                                     \
  }                                                                                                                    \
  __attribute__((flatten)) static void name##_base parameters { name##_impl<::gem_fast::cpu::IsaBase> arguments; }     \
  static void name parameters {                                                                                        \
    switch (::gem_fast::cpu::simd_level()) {                                                                           \
      case ::gem_fast::cpu::Simd::kV4: return name##_v4 arguments;                                                     \
      case ::gem_fast::cpu::Simd::kV3: return name##_v3 arguments;                                                     \
      default: return name##_base arguments;                                                                           \
    }                                                                                                                  \
  }
#else
#define GEM_FAST_MULTIVERSION(name, parameters, arguments)                                                             \
  static void name parameters { name##_impl<::gem_fast::cpu::IsaBase> arguments; }
#endif

template <class Isa, class C>
constexpr int kLanesOf = Isa::kFloats * static_cast<int>(sizeof(float)) / static_cast<int>(sizeof(C));

// n lanes of C that the compiler keeps in as many registers as the instruction set needs.
template <class C, int N>
struct Lanes {
  typedef C type __attribute__((vector_size(N * sizeof(C)), aligned(sizeof(C)), may_alias));
};

}  // namespace gem_fast::cpu
