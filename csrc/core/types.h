// The element types that the kernels read and write, and what they compute in.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/team.h"

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

namespace gem_fast {

enum class DType : int32_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

// The upper half of a float32; arithmetic happens in float32.
struct BFloat16 {
  uint16_t bits;

  BFloat16() = default;
  GEM_FAST_INLINE GEM_FAST_HD explicit BFloat16(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    // Round to nearest, ties to even; a NaN keeps its top bit set, so that rounding cannot make it an infinity.
    bits = x != x ? static_cast<uint16_t>((u >> 16) | 0x40u)
                  : static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
  }
  GEM_FAST_INLINE GEM_FAST_HD explicit operator float() const {
    const uint32_t u = static_cast<uint32_t>(bits) << 16;
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
  }
};

// Each compiler's own type, which converts in one instruction.
#if defined(__CUDACC__)
using Float16 = __half;
#else
using Float16 = _Float16;
#endif

// What inner products are formed in, over short blocks; block sums are float64.
enum class Products : int32_t { kFloat32, kFloat64 };

// What they are formed in first.
GEM_FAST_INLINE GEM_FAST_HD constexpr Products products_of(DType dtype) {
  return dtype == DType::kFloat64 ? Products::kFloat64 : Products::kFloat32;
}

// The same as a type, and what elements are converted to.
template <class T>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <class T>
using Compute = typename ComputeType<T>::type;

}  // namespace gem_fast
