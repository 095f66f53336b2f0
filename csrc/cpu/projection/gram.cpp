#include "cpu/projection/gram.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/dispatch.h"
#include "cpu/projection/column_blocks.h"
#include "cpu/simd.h"

namespace gem_fast::cpu {
namespace {

// Rows are taken in panels, so that the rows of two panels over a block of columns stay in the second-level cache.
constexpr int64_t kPanel = 64;

// G's rows with g as one more, filled up with zero rows to whole tiles.
int64_t padded_rows(int64_t t) { return (t + 1 + 3) / 4 * 4; }

Slabs gram_slabs(int64_t t, int64_t p) {
  const int64_t n = padded_rows(t);
  return Slabs(p, std::clamp<int64_t>(kPartials / (n * n), 1, kMaxSlabs));
}

// Adds the products of two groups of rows over n columns (whole lanes) to `out` (rows of length ld).
template <class C, int kLanes, int kI, int kJ>
GEM_FAST_KERNEL void tile(const C* const* rows_i, const C* const* rows_j, int64_t n, double* out, int64_t ld) {
  using V = typename Lanes<C, kLanes>::type;
  V sum[kI][kJ] = {};
  for (int64_t c = 0; c < n; c += kLanes) {
    V b[kJ];
    for (int j = 0; j < kJ; ++j) b[j] = *reinterpret_cast<const V*>(rows_j[j] + c);
    for (int i = 0; i < kI; ++i) {
      const V a = *reinterpret_cast<const V*>(rows_i[i] + c);
      for (int j = 0; j < kJ; ++j) sum[i][j] += a * b[j];
    }
  }
  for (int i = 0; i < kI; ++i) {
    for (int j = 0; j < kJ; ++j) out[i * ld + j] += lane_sum<C, kLanes>(sum[i][j]);
  }
}

template <class C>
struct PanelBuffer {
  const C* rows[kPanel];
  std::vector<C> storage = std::vector<C>(kPanel * kBlockColumns);
};

// Points `panel.rows` at columns [begin, begin + n) of padded rows [first, last).
template <class T, class C>
GEM_FAST_KERNEL void load_panel(const RowMatrix& G, const TensorList& g, int64_t first, int64_t last, int64_t begin,
                                int64_t n, int64_t padded, PanelBuffer<C>& panel) {
  alignas(64) static const C zeros[kBlockColumns] = {};
  for (int64_t row = first; row < last; ++row) {
    C* buffer = panel.storage.data() + (row - first) * kBlockColumns;
    if (row < G.t) {
      panel.rows[row - first] =
          row_block<T, C>(static_cast<const T*>(G.data) + row * G.stride, begin, n, padded, buffer);
    } else {
      panel.rows[row - first] = row == G.t ? gradient_block<T, C>(g, begin, n, padded, buffer) : zeros;
    }
  }
}

// One slab of columns of one pair of panels: adds to the slab's partial sums.
template <class Isa, class T, class C>
GEM_FAST_KERNEL void panel_pair(const RowMatrix& G, const TensorList& g, int64_t panel_i, int64_t panel_j,
                                int64_t begin, int64_t end, double* partial) {
  constexpr int kLanes = kLanesOf<Isa, C>;
  constexpr int kI = Isa::kTileI;
  constexpr int kJ = Isa::kTileJ;
  thread_local PanelBuffer<C> buffer_i, buffer_j;
  const int64_t ld = padded_rows(G.t);
  const int64_t i0 = panel_i * kPanel;
  const int64_t j0 = panel_j * kPanel;
  const int64_t i1 = std::min(i0 + kPanel, ld);
  const int64_t j1 = std::min(j0 + kPanel, ld);
  for (int64_t c = begin; c < end; c += kBlockColumns) {
    const int64_t n = std::min(kBlockColumns, end - c);
    const int64_t padded = (n + kLanes - 1) / kLanes * kLanes;
    load_panel<T, C>(G, g, i0, i1, c, n, padded, buffer_i);
    const bool same = i0 == j0;
    if (!same) load_panel<T, C>(G, g, j0, j1, c, n, padded, buffer_j);
    const C* const* rows_j = same ? buffer_i.rows : buffer_j.rows;
    for (int64_t i = i0; i < i1; i += kI) {
      const int64_t last = std::min(j1, i + kI);  // the lower triangle is enough
      for (int64_t j = j0; j < last; j += kJ) {
        tile<C, kLanes, kI, kJ>(buffer_i.rows + (i - i0), rows_j + (j - j0), padded, partial + i * ld + j, ld);
      }
    }
  }
}

template <class Isa>
GEM_FAST_KERNEL void panel_pair_any_impl(const RowMatrix& G, const TensorList& g, Products products, int64_t panel_i,
                                         int64_t panel_j, int64_t begin, int64_t end, double* partial) {
  if (products == Products::kFloat64) {
    GEM_FAST_DISPATCH_DTYPE(G.dtype, panel_pair<Isa, T, double>(G, g, panel_i, panel_j, begin, end, partial));
  } else {
    GEM_FAST_DISPATCH_DTYPE(G.dtype, panel_pair<Isa, T, Compute<T>>(G, g, panel_i, panel_j, begin, end, partial));
  }
}
GEM_FAST_MULTIVERSION(panel_pair_any,
                      (const RowMatrix& G, const TensorList& g, Products products, int64_t panel_i, int64_t panel_j,
                       int64_t begin, int64_t end, double* partial),
                      (G, g, products, panel_i, panel_j, begin, end, partial))

// sum[i] += row_k[i] for a few rows at once, so that the sums are loaded and stored once for all of them.
template <int kRows, class T, class C>
GEM_FAST_KERNEL void sum_rows(C* sum, const T* first, int64_t stride, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    C total = sum[i];
    for (int r = 0; r < kRows; ++r) total += static_cast<C>(first[r * stride + i]);
    sum[i] = total;
  }
}

// sum (padded,) = columns [c, c + n) of G^T 1, and zeros.
template <class T>
GEM_FAST_KERNEL void sum_all_rows(const RowMatrix& G, int64_t c, int64_t n, int64_t padded, Compute<T>* sum) {
  const T* rows = static_cast<const T*>(G.data) + c;
  std::fill_n(sum, padded, Compute<T>(0));
  int64_t k = 0;
  for (; k + 8 <= G.t; k += 8) sum_rows<8>(sum, rows + k * G.stride, G.stride, n);
  for (; k < G.t; ++k) sum_rows<1>(sum, rows + k * G.stride, G.stride, n);
}

// One slab of columns: adds q_k to partial[k] and (P 1)_k to partial[t + k].
template <class Isa, class T>
GEM_FAST_KERNEL void row_sums_slab(const RowMatrix& G, const TensorList& g, int64_t begin, int64_t end,
                                   Compute<T>* column_sums, double* partial) {
  using C = Compute<T>;
  constexpr int kLanes = kLanesOf<Isa, C>;
  constexpr int64_t kColumns =
      kBlockColumns / 2;  // g, the sum of rows and the rows themselves share the first-level cache
  using V = typename Lanes<C, kLanes>::type;
  alignas(64) C g_buffer[kColumns];
  alignas(64) C row_buffer[kColumns];
  for (int64_t c = begin; c < end; c += kColumns) {
    const int64_t n = std::min(kColumns, end - c);
    const int64_t padded = (n + kLanes - 1) / kLanes * kLanes;
    C* sum = column_sums + c;
    sum_all_rows<T>(G, c, n, padded, sum);
    const C* current = gradient_block<T, C>(g, c, n, padded, g_buffer);
    for (int64_t k = 0; k < G.t; ++k) {
      const C* row = row_block<T, C>(static_cast<const T*>(G.data) + k * G.stride, c, n, padded, row_buffer);
      V with_g[2] = {}, with_sum[2] = {};
      int64_t i = 0;
      for (; i + 2 * kLanes <= padded; i += 2 * kLanes) {
        for (int half = 0; half < 2; ++half) {
          const V r = *reinterpret_cast<const V*>(row + i + half * kLanes);
          with_g[half] += r * *reinterpret_cast<const V*>(current + i + half * kLanes);
          with_sum[half] += r * *reinterpret_cast<const V*>(sum + i + half * kLanes);
        }
      }
      if (i < padded) {
        const V r = *reinterpret_cast<const V*>(row + i);
        with_g[0] += r * *reinterpret_cast<const V*>(current + i);
        with_sum[0] += r * *reinterpret_cast<const V*>(sum + i);
      }
      partial[k] += lane_sum<C, kLanes>(with_g[0] + with_g[1]);
      partial[G.t + k] += lane_sum<C, kLanes>(with_sum[0] + with_sum[1]);
    }
  }
}

template <class Isa>
GEM_FAST_KERNEL void row_sums_any_impl(const RowMatrix& G, const TensorList& g, int64_t begin, int64_t end,
                                       void* column_sums, double* partial) {
  GEM_FAST_DISPATCH_DTYPE(G.dtype,
                          row_sums_slab<Isa, T>(G, g, begin, end, static_cast<Compute<T>*>(column_sums), partial));
}
GEM_FAST_MULTIVERSION(row_sums_any,
                      (const RowMatrix& G, const TensorList& g, int64_t begin, int64_t end, void* column_sums,
                       double* partial),
                      (G, g, begin, end, column_sums, partial))

template <class T>
bool all_finite(const T* x, int64_t n) {
  // 0 * x is 0 for a finite x and NaN otherwise.
  Compute<T> sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += Compute<T>(0) * static_cast<Compute<T>>(x[i]);
  return sum == Compute<T>(0);
}

}  // namespace

int64_t gram_doubles(int64_t t, int64_t p) {
  const int64_t n = padded_rows(t);
  return gram_slabs(t, p).count * n * n;
}

int64_t gram_row_sums_doubles(int64_t t, int64_t p) { return Slabs(p, kMaxSlabs).count * 2 * t; }

void gram(const RowMatrix& G, const TensorList& g, Products products, double* P, double* q, double* g_squared,
          double* workspace, const Executor& executor) {
  const int64_t n = padded_rows(G.t);
  const Slabs slabs = gram_slabs(G.t, G.p);
  std::fill_n(workspace, slabs.count * n * n, 0.0);
  const int64_t panels = (n + kPanel - 1) / kPanel;
  const int64_t pairs = panels * (panels + 1) / 2;
  executor.each(slabs.count * pairs, 1, [&](int64_t task) {
    const int64_t slab = task / pairs;
    int64_t pair = task % pairs;
    int64_t i = 0;
    while (pair > i) pair -= ++i;
    panel_pair_any(G, g, products, i, pair, slab * slabs.width, std::min(G.p, (slab + 1) * slabs.width),
                   workspace + slab * n * n);
  });
  for (int64_t i = 0; i <= G.t; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      double sum = 0.0;
      for (int64_t slab = 0; slab < slabs.count; ++slab) sum += workspace[(slab * n + i) * n + j];
      if (j == G.t) {
        *g_squared = sum;
      } else if (i == G.t) {
        q[j] = sum;
      } else {
        P[i * G.t + j] = P[j * G.t + i] = sum;
      }
    }
  }
}

int64_t column_sums_bytes(DType dtype, int64_t p) {
  // Whole vectors are written.
  GEM_FAST_DISPATCH_DTYPE(dtype, return static_cast<int64_t>(sizeof(Compute<T>)) * (p + IsaV4::kFloats));
  return 0;
}

void gram_row_sums(const RowMatrix& G, const TensorList& g, double* q, double* sums, void* column_sums,
                   double* workspace, const Executor& executor) {
  const Slabs slabs(G.p, kMaxSlabs);
  std::fill_n(workspace, slabs.count * 2 * G.t, 0.0);
  executor.each(slabs.count, 1, [&](int64_t slab) {
    row_sums_any(G, g, slab * slabs.width, std::min(G.p, (slab + 1) * slabs.width), column_sums,
                 workspace + slab * 2 * G.t);
  });
  for (int64_t k = 0; k < G.t; ++k) {
    q[k] = sums[k] = 0.0;
    for (int64_t slab = 0; slab < slabs.count; ++slab) {
      q[k] += workspace[slab * 2 * G.t + k];
      sums[k] += workspace[slab * 2 * G.t + G.t + k];
    }
  }
}

int64_t first_non_finite(const RowMatrix& G, const TensorList& g) {
  int64_t found = -1;
  GEM_FAST_DISPATCH_DTYPE(G.dtype, {
    for (int64_t k = 0; k < G.t && found < 0; ++k) {
      if (!all_finite(static_cast<const T*>(G.data) + k * G.stride, G.p)) found = k;
    }
    for (int64_t s = 0; s < g.count && found < 0; ++s) {
      if (!all_finite(static_cast<const T*>(g.items[s].data), g.items[s].numel)) found = G.t;
    }
  });
  return found;
}

}  // namespace gem_fast::cpu
