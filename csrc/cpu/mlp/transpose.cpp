#include "cpu/mlp/transpose.h"

#include <algorithm>
#include <cstring>

#include "core/dispatch.h"
#include "cpu/simd.h"

namespace gem_fast::cpu {
namespace {

// Columns that one thread takes at a time.
constexpr int64_t kGrain = 64;

template <class T>
struct IndexOf {
  using type = int32_t;
};
template <>
struct IndexOf<double> {
  using type = int64_t;
};

// Transposes L vectors of L lanes in registers, in log2 L rounds of interleaving.
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

// Rows and columns are whole tiles of L by L.
template <class T, int L, bool kAdd>
GEM_FAST_KERNEL void transpose_tiles(const T* from, int64_t from_stride, int64_t rows, int64_t columns, T* to,
                                     int64_t to_stride) {
  using V = typename Lanes<T, L>::type;
  for (int64_t r = 0; r < rows; r += L) {
    for (int64_t c = 0; c < columns; c += L) {
      V tile[L];
      const T* source = from + r * from_stride + c;
      for (int i = 0; i < L; ++i, source += from_stride) tile[i] = *reinterpret_cast<const V*>(source);
      transpose_tile<T, L>(tile);
      T* target = to + c * to_stride + r;
      for (int i = 0; i < L; ++i, target += to_stride) {
        V& out = *reinterpret_cast<V*>(target);
        out = kAdd ? out + tile[i] : tile[i];
      }
    }
  }
}

// What is left of the rows and columns after whole tiles is taken in smaller ones.
template <class T, int L, bool kAdd>
GEM_FAST_KERNEL void transpose_as(const T* from, int64_t from_stride, int64_t rows, int64_t columns, T* to,
                                  int64_t to_stride) {
  const int64_t r = rows / L * L;
  const int64_t c = columns / L * L;
  transpose_tiles<T, L, kAdd>(from, from_stride, r, c, to, to_stride);
  if constexpr (L > 1) {
    constexpr int kLess = L > 4 ? 4 : 1;
    transpose_as<T, kLess, kAdd>(from + c, from_stride, rows, columns - c, to + c * to_stride, to_stride);
    transpose_as<T, kLess, kAdd>(from + r * from_stride, from_stride, rows - r, c, to + r, to_stride);
  }
}

template <class Isa>
GEM_FAST_KERNEL void transpose_any_impl(DType dtype, const ConstMatrix& from, int64_t rows, int64_t columns,
                                        const Matrix& to, bool add) {
  GEM_FAST_DISPATCH_FLOAT_OR_DOUBLE(dtype, {
    constexpr int L = kLanesOf<Isa, T>;
    const T* x = static_cast<const T*>(from.data);
    T* out = static_cast<T*>(to.data);
    if (add) {
      transpose_as<T, L, true>(x, from.stride, rows, columns, out, to.stride);
    } else {
      transpose_as<T, L, false>(x, from.stride, rows, columns, out, to.stride);
    }
  });
}
GEM_FAST_MULTIVERSION(transpose_any,
                      (DType dtype, const ConstMatrix& from, int64_t rows, int64_t columns, const Matrix& to, bool add),
                      (dtype, from, rows, columns, to, add))

}  // namespace

void transpose(DType dtype, const ConstMatrix& from, int64_t rows, int64_t columns, const Matrix& to, bool add) {
  transpose_any(dtype, from, rows, columns, to, add);
}

void transpose_padded(DType dtype, const ConstMatrix& from, int64_t rows, int64_t columns, void* to,
                      const Executor& executor) {
  const int64_t width = padded(rows);
  executor.each((columns + kGrain - 1) / kGrain, 2, [&](int64_t block) {
    const int64_t first = block * kGrain;
    const int64_t last = std::min(columns, first + kGrain);
    transpose_any(dtype, {at(from.data, first, dtype), from.stride}, rows, last - first,
                  {at(to, first * width, dtype), width}, false);
    for (int64_t c = first; c < last; ++c) {
      memset(at(to, c * width + rows, dtype), 0, (width - rows) * size_of(dtype));
    }
  });
}

}  // namespace gem_fast::cpu
