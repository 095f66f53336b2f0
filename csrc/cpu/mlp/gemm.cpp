#include "cpu/mlp/gemm.h"

#include <algorithm>
#include <cstring>

#include "core/dispatch.h"
#include "cpu/simd.h"

namespace gem_fast::cpu {
namespace {

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
  const int64_t columns = std::min<int64_t>(kVectors * L, p.n - column);
  for (int r = 0; r < kTileRows; ++r) {
    T values[kVectors * L];
    for (int v = 0; v < kVectors; ++v) *reinterpret_cast<V*>(values + v * L) = sum[r][v];
    T* out = static_cast<T*>(p.c) + (row + r) * p.ldc + column;
    if (p.bias != nullptr) {
      const T* bias = static_cast<const T*>(p.bias) + column;
      for (int64_t c = 0; c < columns; ++c) values[c] += bias[c];
    }
    if (p.relu) {
      // Like torch's, it lets a NaN pass.
      for (int64_t c = 0; c < columns; ++c) values[c] = values[c] <= T(0) ? T(0) : values[c];
    }
    if (p.mask != nullptr) {
      const T* mask = static_cast<const T*>(p.mask) + (row + r) * p.ldmask + column;
      for (int64_t c = 0; c < columns; ++c) values[c] = mask[c] <= T(0) ? T(0) : values[c];
    }
    if (p.accumulate) {
      for (int64_t c = 0; c < columns; ++c) values[c] += out[c];
    }
    memcpy(out, values, columns * sizeof(T));
  }
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
    for (; row < p.m; ++row) tile_of<T, L, 1>(p, row, v * L, mine);
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
