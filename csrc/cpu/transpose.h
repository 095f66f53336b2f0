// Turning matrices around in registers.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/simd.h"

namespace gem_fast::cpu {

template <class T>
struct IndexOf {
  using type = int32_t;
};
template <>
struct IndexOf<double> {
  using type = int64_t;
};

template <class Isa, class T>
constexpr int kLanesOf = Isa::kFloats * static_cast<int>(sizeof(float)) / static_cast<int>(sizeof(T));

// Turns L vectors of L lanes into the columns they make up, in log2 L rounds of interleaving.
template <class T, int L>
GEM_FAST_KERNEL void transpose_tile(typename Lanes<T, L>::type* x) {
  using V = typename Lanes<T, L>::type;
  typedef typename IndexOf<T>::type Mask __attribute__((vector_size(L * sizeof(T))));
  Mask low, high;
  for (int i = 0; i < L; ++i) {
    low[i] = i / 2 + (i % 2) * L;
    high[i] = L / 2 + i / 2 + (i % 2) * L;
  }
  for (int round = 1; round < L; round *= 2) {
    V next[L];
    for (int i = 0; i < L / 2; ++i) {
      next[2 * i] = __builtin_shuffle(x[i], x[i + L / 2], low);
      next[2 * i + 1] = __builtin_shuffle(x[i], x[i + L / 2], high);
    }
    for (int i = 0; i < L; ++i) x[i] = next[i];
  }
}

// to[c][r] = from[r][c], touching nothing beyond rows x columns of either.
template <class T, int L>
GEM_FAST_KERNEL void transpose_into(const T* from, int64_t from_stride, int64_t rows, int64_t columns, T* to,
                                    int64_t to_stride) {
  using V = typename Lanes<T, L>::type;
  for (int64_t r = 0; r < rows; r += L) {
    for (int64_t c = 0; c < columns; c += L) {
      if (r + L <= rows && c + L <= columns) {
        V tile[L];
        for (int i = 0; i < L; ++i) tile[i] = *reinterpret_cast<const V*>(from + (r + i) * from_stride + c);
        transpose_tile<T, L>(tile);
        for (int i = 0; i < L; ++i) *reinterpret_cast<V*>(to + (c + i) * to_stride + r) = tile[i];
        continue;
      }
      for (int64_t i = r; i < std::min(r + L, rows); ++i) {
        for (int64_t j = c; j < std::min(c + L, columns); ++j) to[j * to_stride + i] = from[i * from_stride + j];
      }
    }
  }
}

}  // namespace gem_fast::cpu
