#include "cpu/product.h"

#include <algorithm>
#include <cstring>

#include "cpu/simd.h"
#include "cpu/table.h"
#include "cpu/transpose.h"

namespace gem_fast::cpu {
namespace {

// The part of a product that stays in registers.
template <class T, int L, int kTileRows, int kVectors>
GEM_FAST_KERNEL void tile(const Product& p, int64_t row, int64_t column) {
  using V = typename Lanes<T, L>::type;
  const T* a = static_cast<const T*>(p.a) + row * p.a_row;
  const T* b = static_cast<const T*>(p.b) + column;
  V sum[kTileRows][kVectors] = {};
  for (int64_t k = 0; k < p.n; ++k) {
    V x[kVectors];
    for (int v = 0; v < kVectors; ++v) x[v] = *reinterpret_cast<const V*>(b + k * p.b_k + v * L);
    for (int r = 0; r < kTileRows; ++r) {
      const T scale = a[r * p.a_row + k * p.a_k];
      for (int v = 0; v < kVectors; ++v) sum[r][v] += scale * x[v];
    }
  }
  const int64_t columns = std::min<int64_t>(kVectors * L, p.columns - column);
  for (int r = 0; r < kTileRows; ++r) {
    T values[kVectors * L];
    for (int v = 0; v < kVectors; ++v) *reinterpret_cast<V*>(values + v * L) = sum[r][v];
    T* out = static_cast<T*>(p.out) + (row + r) * p.out_row + column;
    if (p.start != nullptr) {
      const T* start = static_cast<const T*>(p.start) + column;
      for (int64_t c = 0; c < columns; ++c) values[c] += start[c];
    }
    if (p.relu) {
      // Like torch's, it lets a NaN pass.
      for (int64_t c = 0; c < columns; ++c) values[c] = values[c] <= T(0) ? T(0) : values[c];
    }
    if (p.mask != nullptr) {
      const T* mask = static_cast<const T*>(p.mask) + (row + r) * p.mask_row + column;
      for (int64_t c = 0; c < columns; ++c) values[c] = mask[c] <= T(0) ? T(0) : values[c];
    }
    if (p.add) {
      for (int64_t c = 0; c < columns; ++c) values[c] += out[c];
    }
    memcpy(out, values, columns * sizeof(T));
  }
}

template <class T, int L, int kTileRows>
GEM_FAST_KERNEL void tile_of(const Product& p, int64_t row, int64_t column, int64_t vectors) {
  switch (vectors) {
    case 1: return tile<T, L, kTileRows, 1>(p, row, column);
    case 2: return tile<T, L, kTileRows, 2>(p, row, column);
    case 3: return tile<T, L, kTileRows, 3>(p, row, column);
    default: return tile<T, L, kTileRows, 4>(p, row, column);
  }
}

template <class Isa, class T>
GEM_FAST_KERNEL void multiply_as(const Product& p) {
  constexpr int L = kLanesOf<Isa, T>;
  constexpr int kTileRows = 4;
  // 32 registers hold four rows of four sums and their factors; of 16, a compiler needs some for itself.
  constexpr int64_t kMostVectors = Isa::kFloats == 16 ? 4 : 2;
  const int64_t vectors = (p.columns + L - 1) / L;
  const int64_t groups = (vectors + kMostVectors - 1) / kMostVectors;
  const int64_t size = (vectors + groups - 1) / groups;
  for (int64_t v = 0; v < vectors; v += size) {
    const int64_t mine = std::min(size, vectors - v);
    int64_t row = 0;
    for (; row + kTileRows <= p.rows; row += kTileRows) tile_of<T, L, kTileRows>(p, row, v * L, mine);
    for (; row < p.rows; ++row) tile_of<T, L, 1>(p, row, v * L, mine);
  }
}

template <class Isa>
GEM_FAST_KERNEL void multiply_any_impl(DType dtype, const Product& p) {
  GEM_FAST_DISPATCH_FULL(dtype, multiply_as<Isa, T>(p));
}
GEM_FAST_MULTIVERSION(multiply_any, (DType dtype, const Product& p), (dtype, p))

}  // namespace

void multiply(DType dtype, const Product& p) { multiply_any(dtype, p); }

}  // namespace gem_fast::cpu
