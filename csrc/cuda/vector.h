// Sixteen bytes at a time where the address allows it, one element at a time where not.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/types.h"

namespace gem_fast::cuda {

// Elements of T in one load of sixteen bytes.
template <class T>
inline constexpr int kPerVector = 16 / static_cast<int>(sizeof(T));

template <class T>
struct alignas(16) Vector {
  T x[kPerVector<T>];
};

__device__ inline bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Sixteen bytes at an aligned address, converted to C.
template <class T, class C>
__device__ inline void load_vector(const T* from, C (&to)[kPerVector<T>]) {
  const Vector<T> vector = *reinterpret_cast<const Vector<T>*>(from);
#pragma unroll
  for (int i = 0; i < kPerVector<T>; ++i) to[i] = static_cast<C>(static_cast<Compute<T>>(vector.x[i]));
}

// The first `count` elements at any address, as many as a vector has at most; zeros for the others.
template <class T, class C>
__device__ inline void load_elements(const T* from, int64_t count, C (&to)[kPerVector<T>]) {
#pragma unroll
  for (int i = 0; i < kPerVector<T>; ++i) to[i] = i < count ? static_cast<C>(static_cast<Compute<T>>(from[i])) : C(0);
}

template <class T, class C>
__device__ inline void store_vector(const C (&from)[kPerVector<T>], T* to) {
  Vector<T> vector;
#pragma unroll
  for (int i = 0; i < kPerVector<T>; ++i) vector.x[i] = static_cast<T>(static_cast<Compute<T>>(from[i]));
  *reinterpret_cast<Vector<T>*>(to) = vector;
}

template <class T, class C>
__device__ inline void store_elements(const C (&from)[kPerVector<T>], int64_t count, T* to) {
#pragma unroll
  for (int i = 0; i < kPerVector<T>; ++i) {
    if (i < count) to[i] = static_cast<T>(static_cast<Compute<T>>(from[i]));
  }
}

}  // namespace gem_fast::cuda
