// Sixteen bytes at a time where the address allows it, one element at a time where not.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

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

// A vector as the registers hold it: until its elements are looked at, nobody waits for a load.
template <class T>
__device__ inline uint4 words_of(const Vector<T>& x) {
  uint4 words;
  memcpy(&words, &x, sizeof words);
  return words;
}

template <class T>
__device__ inline Vector<T> elements_of(const uint4& words) {
  Vector<T> x;
  memcpy(&x, &words, sizeof x);
  return x;
}

// Sixteen bytes at an aligned address.
__device__ inline uint4 read_words(const void* from) { return *static_cast<const uint4*>(from); }
template <class T>
__device__ inline Vector<T> read_vector(const T* from) {
  return elements_of<T>(read_words(from));
}

// The first `count` elements at any address, as many as a vector has at most; zeros for the others.
template <class T>
__device__ inline Vector<T> read_elements(const T* from, int64_t count) {
  Vector<T> vector{};
#pragma unroll
  for (int i = 0; i < kPerVector<T>; ++i) {
    if (i < count) vector.x[i] = from[i];
  }
  return vector;
}

template <class T>
__device__ inline void write_elements(const Vector<T>& vector, int64_t count, T* to) {
#pragma unroll
  for (int i = 0; i < kPerVector<T>; ++i) {
    if (i < count) to[i] = vector.x[i];
  }
}

// The same, converted.
template <class T, class C>
__device__ inline void convert(const Vector<T>& vector, C (&to)[kPerVector<T>]) {
#pragma unroll
  for (int i = 0; i < kPerVector<T>; ++i) to[i] = static_cast<C>(static_cast<Compute<T>>(vector.x[i]));
}

template <class T, class C>
__device__ inline Vector<T> converted(const C (&from)[kPerVector<T>]) {
  Vector<T> vector;
#pragma unroll
  for (int i = 0; i < kPerVector<T>; ++i) vector.x[i] = static_cast<T>(static_cast<Compute<T>>(from[i]));
  return vector;
}

}  // namespace gem_fast::cuda
