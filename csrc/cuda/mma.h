// Products of small matrices by a warp's tensor cores: d (16, 8) += a (16, k) b (8, k)'. What each lane holds of them,
// a "fragment", is the hardware's choice: lane 4 r + c holds rows r and r + 8 of a, row r of b, and of each the columns
// numbered c and c + k / 8 in units of 32 bits; of d the columns 2 c and 2 c + 1.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/types.h"

namespace gem_fast::cuda {

// One lane's part of eight rows.
struct Fragment {
  uint32_t low;   // unit c of the columns
  uint32_t high;  // unit c + k / 8
};

// For float32 (k = 8): of each number the sign, the exponent and the upper 10 bits are read (TF32).
// For bfloat16 and float16 (k = 16): two numbers in 32 bits. Products are exact, their sums float32.
template <class T>
__device__ inline void mma(float (&d)[4], const Fragment& top, const Fragment& bottom, const Fragment& b) {
#if !defined(__CUDACC__)
  constexpr auto kKind = std::is_same_v<T, float>      ? simt::MmaKind::kTf32
                         : std::is_same_v<T, BFloat16> ? simt::MmaKind::kBFloat16
                                                       : simt::MmaKind::kFloat16;
  simt::mma(kKind, d, {top.low, bottom.low, top.high, bottom.high}, {b.low, b.high});
#elif __CUDA_ARCH__ >= 800
#define GEM_FAST_MMA(instruction)                                                                                      \
  asm(instruction " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                   \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                                 \
      : "r"(top.low), "r"(bottom.low), "r"(top.high), "r"(bottom.high), "r"(b.low), "r"(b.high))
  if constexpr (std::is_same_v<T, float>) {
    GEM_FAST_MMA("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32");
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    GEM_FAST_MMA("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32");
  } else {
    GEM_FAST_MMA("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32");
  }
#undef GEM_FAST_MMA
#endif
}

// The capability from which devices have these instructions: on older ones `mma` does nothing, and is not called.
inline constexpr int kMmaCapability = 8;

}  // namespace gem_fast::cuda
