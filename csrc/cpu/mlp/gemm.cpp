#include "cpu/mlp/gemm.h"

#include <algorithm>

#include "core/dispatch.h"
#include "cpu/simd.h"

namespace gem_fast::cpu {
namespace {

// What applies to a row of a product, in its order; like torch's, the ReLU lets a NaN pass. X is T or a vector of T.
template <class X, class T>
GEM_FAST_KERNEL X finished(const Gemm& p, X value, const T* bias, const T* mask, const T* out) {
  const X zero = {};
  if (bias != nullptr) value += *reinterpret_cast<const X*>(bias);
  if (p.relu) value = value <= zero ? zero : value;
  if (mask != nullptr) value = *reinterpret_cast<const X*>(mask) <= zero ? zero : value;
  return p.accumulate ? value + *reinterpret_cast<const X*>(out) : value;
}

template <class Isa>
GEM_FAST_KERNEL void finish_impl(DType dtype, const Gemm& p, const void* values, int64_t row, int64_t column,
                                 int64_t rows, int64_t width) {
  const int64_t columns = std::min(width, p.n - column);
  GEM_FAST_DISPATCH_FLOAT_OR_DOUBLE(dtype, {
    constexpr int L = kLanesOf<Isa, T>;
    using V = typename Lanes<T, L>::type;
    const T* bias = p.bias == nullptr ? nullptr : static_cast<const T*>(p.bias) + column;
    for (int64_t r = 0; r < rows; ++r) {
      const T* from = static_cast<const T*>(values) + r * width;
      T* out = static_cast<T*>(p.c) + (row + r) * p.ldc + column;
      const T* mask = p.mask == nullptr ? nullptr : static_cast<const T*>(p.mask) + (row + r) * p.ldmask + column;
      const auto after = [](const T* x, int64_t c) { return x == nullptr ? nullptr : x + c; };
      int64_t c = 0;
      for (; c + L <= columns; c += L) {
        *reinterpret_cast<V*>(out + c) =
            finished<V>(p, *reinterpret_cast<const V*>(from + c), after(bias, c), after(mask, c), out + c);
      }
      for (; c < columns; ++c) out[c] = finished<T>(p, from[c], after(bias, c), after(mask, c), out + c);
    }
  });
}
GEM_FAST_MULTIVERSION(finish,
                      (DType dtype, const Gemm& p, const void* values, int64_t row, int64_t column, int64_t rows,
                       int64_t width),
                      (dtype, p, values, row, column, rows, width))

// `rows` rows of `width` sums go to C, those columns that it has. Not a part of each tile, of which there are many.
__attribute__((noinline)) void finish_tile(DType dtype, const Gemm& p, const void* values, int64_t row, int64_t column,
                                           int64_t rows, int64_t width) {
  finish(dtype, p, values, row, column, rows, width);
}

// The part of C that stays in registers.
template <class T, int L, int kTileRows, int kVectors>
GEM_FAST_KERNEL void tile(const Gemm& p, int64_t row, int64_t column) {
  using V = typename Lanes<T, L>::type;
  const T* a = static_cast<const T*>(p.a) + row * p.a_row_stride;
  const T* b = static_cast<const T*>(p.b) + column;
  V sum[kTileRows][kVectors] = {};
  for (int64_t k = 0; k < p.k; ++k) {
    V x[kVectors];
    for (int v = 0; v < kVectors; ++v) x[v] = *reinterpret_cast<const V*>(b + k * p.ldb + v * L);
    for (int r = 0; r < kTileRows; ++r) {
      const T scale = a[r * p.a_row_stride + k * p.a_column_stride];
      for (int v = 0; v < kVectors; ++v) sum[r][v] += scale * x[v];
    }
  }
  alignas(64) T values[kTileRows * kVectors * L];
  for (int r = 0; r < kTileRows; ++r) {
    for (int v = 0; v < kVectors; ++v) *reinterpret_cast<V*>(values + (r * kVectors + v) * L) = sum[r][v];
  }
  constexpr DType kDType = sizeof(T) == sizeof(double) ? DType::kFloat64 : DType::kFloat32;
  finish_tile(kDType, p, values, row, column, kTileRows, kVectors * L);
}

template <class T, int L, int kTileRows>
GEM_FAST_KERNEL void tile_of(const Gemm& p, int64_t row, int64_t column, int64_t vectors) {
  switch (vectors) {
    case 1: return tile<T, L, kTileRows, 1>(p, row, column);
    case 2: return tile<T, L, kTileRows, 2>(p, row, column);
    case 3: return tile<T, L, kTileRows, 3>(p, row, column);
    default: return tile<T, L, kTileRows, 4>(p, row, column);
  }
}

template <class Isa, class T>
GEM_FAST_KERNEL void gemm_as(const Gemm& p) {
  constexpr int L = kLanesOf<Isa, T>;
  constexpr int kTileRows = 4;
  // 32 registers hold four rows of four sums and their factors; of 16, a compiler needs some for itself.
  constexpr int64_t kMaxVectors = Isa::kFloats == 16 ? 4 : 2;
  const int64_t vectors = (p.n + L - 1) / L;
  const int64_t groups = (vectors + kMaxVectors - 1) / kMaxVectors;
  const int64_t size = (vectors + groups - 1) / groups;
  for (int64_t v = 0; v < vectors; v += size) {
    const int64_t mine = std::min(size, vectors - v);
    int64_t row = 0;
    for (; row + kTileRows <= p.m; row += kTileRows) tile_of<T, L, kTileRows>(p, row, v * L, mine);
    switch (p.m - row) {
      case 1: tile_of<T, L, 1>(p, row, v * L, mine); break;
      case 2: tile_of<T, L, 2>(p, row, v * L, mine); break;
      case 3: tile_of<T, L, 3>(p, row, v * L, mine); break;
    }
  }
}

template <class Isa>
GEM_FAST_KERNEL void gemm_any_impl(DType dtype, const Gemm& p) {
  GEM_FAST_DISPATCH_FLOAT_OR_DOUBLE(dtype, gemm_as<Isa, T>(p));
}
GEM_FAST_MULTIVERSION(gemm_any, (DType dtype, const Gemm& p), (dtype, p))

}  // namespace

void gemm(DType dtype, const Gemm& p) { gemm_any(dtype, p); }

}  // namespace gem_fast::cpu
