// The first phase by multiplications of single numbers, and the choice between it and gram_mma.cu; see gram_tiling.h.
#include <algorithm>

#include "core/dispatch.h"
#include "cuda/block.h"
#include "cuda/gram.h"
#include "cuda/gram_mma.h"
#include "cuda/gram_tiling.h"
#include "cuda/launch.h"
#include "cuda/slabs.h"
#include "cuda/tensor_list.h"
#include "cuda/vector.h"

namespace gem_fast::cuda {
namespace {

constexpr int kThreads = 256;
// A thread forms kMicro x kMicro of a block's products, over its share of the columns in shared memory.
constexpr int kMicro = 4;
constexpr int kProducts = kMicro * kMicro;
// Shared memory for a stage of columns, which the threads' sums take over at the end.
constexpr int64_t kStageBytes = 40 * 1024;
constexpr int kMaxColumns = 1024;

// Rows of a stage: those of one panel, or of two.
int staged_rows(int64_t rows) { return rows <= kPanel ? ceil_div(rows, kMicro) * kMicro : 2 * kPanel; }

int64_t bytes_of(Products products) { return products == Products::kFloat64 ? sizeof(double) : sizeof(float); }

Tiling tiling_of(const RowMatrix& G, const TensorList& g, Products products) {
  if (gram_by_mma(G, products)) return mma_tiling(G, g);
  const int64_t fits = (kStageBytes / staged_rows(G.t + 1) - 16) / bytes_of(products);
  return Tiling(G, g, static_cast<int>(std::min<int64_t>(kMaxColumns, fits) / kWarp * kWarp), 1);
}

int64_t shared_bytes(const Tiling& tiling, Products products) {
  const int64_t stage = staged_rows(tiling.rows) * (tiling.columns * bytes_of(products) + 16);
  return std::max<int64_t>(stage, kThreads * kProducts * sizeof(double));
}

// ---- first phase: a stage of columns in shared memory ------------------------------------------------------------

// Columns [begin, begin + count) of one row of G, by one warp; zeros up to the next whole vector.
template <class T, class C>
__device__ void stage_row(const T* row, int64_t begin, int count, C* to) {
  constexpr int kV = kPerVector<T>;
  for (int c = lane() * kV; c < count; c += kWarp * kV) {
    alignas(16) C x[kV];
    const T* from = row + begin + c;
    if (count - c >= kV && is_aligned(from)) {
      load_vector(from, x);
    } else {
      load_elements(from, count - c, x);
    }
#pragma unroll
    for (int i = 0; i < kV; i += kPerVector<C>) {
      *reinterpret_cast<Vector<C>*>(to + c + i) = *reinterpret_cast<const Vector<C>*>(x + i);
    }
  }
}

// The same for the flattened gradient, whose columns lie in several tensors.
template <class T, class C>
__device__ void stage_gradient(const KernelTensorList& list, int64_t begin, int count, C* to) {
  constexpr int kV = kPerVector<C>;
  int s = -1;
  for (int c = lane(); c < (count + kV - 1) / kV * kV; c += kWarp) {
    const int64_t column = begin + c;
    C x = 0;
    if (c < count) {
      if (s < 0 || column >= list.offset[s + 1]) s = list.of_column(column);
      x = static_cast<C>(static_cast<Compute<T>>(static_cast<const T*>(list.data[s])[column - list.offset[s]]));
    }
    to[c] = x;
  }
}

// One panel, the warps taking its rows in turn.
template <class T, class C>
__device__ void stage_panel(const KernelTensorList& list, const GramInput<T>& in, int panel, int rows, int64_t begin,
                            int count, int pitch, C* to) {
  for (int r = warp(); r < rows; r += warps()) {
    const int row = panel * kPanel + r;
    if (row < in.t) {
      stage_row(in.G + row * in.stride, begin, count, to + r * pitch);
    } else if (row == in.t) {
      stage_gradient<T>(list, begin, count, to + r * pitch);
    } else {
      for (int c = lane(); c < in.columns; c += kWarp) to[r * pitch + c] = 0;
    }
  }
}

// ---- first phase: the products ------------------------------------------------------------------------------------

// A thread's kMicro rows of each panel lie `apart` rows from each other, so that neighbouring threads read
// neighbouring rows, which the pitch puts into different banks.
template <class C>
struct Share {
  const C* a;
  const C* b;
  int a_apart;
  int b_apart;
  int first;  // vector of columns
  int step;
};

template <class C>
__device__ inline void add_products(const Share<C>& mine, int pitch, int vectors, C (&sum)[kProducts]) {
  constexpr int kV = kPerVector<C>;
  for (int c = mine.first; c < vectors; c += mine.step) {
    Vector<C> a[kMicro], b[kMicro];
#pragma unroll
    for (int i = 0; i < kMicro; ++i) {
      a[i] = *reinterpret_cast<const Vector<C>*>(mine.a + i * mine.a_apart * pitch + c * kV);
      b[i] = *reinterpret_cast<const Vector<C>*>(mine.b + i * mine.b_apart * pitch + c * kV);
    }
#pragma unroll
    for (int i = 0; i < kProducts; ++i) {
#pragma unroll
      for (int x = 0; x < kV; ++x) sum[i] += a[i / kMicro].x[x] * b[i % kMicro].x[x];
    }
  }
}

// Adds the groups' sums; those of group 0 then hold the total. `groups` threads, `tiles` apart, have the same rows.
__device__ inline void add_groups(double (&sum)[kProducts], int tiles, int groups, double* shared) {
  const int thread = static_cast<int>(threadIdx.x);
  const int group = thread / tiles;
  for (int left = groups; left > 1;) {
    const int half = (left + 1) / 2;
    if (group >= half && group < left) {
#pragma unroll
      for (int i = 0; i < kProducts; ++i) shared[i * kThreads + thread] = sum[i];
    }
    __syncthreads();
    if (group + half < left) {
#pragma unroll
      for (int i = 0; i < kProducts; ++i) sum[i] += shared[i * kThreads + thread + half * tiles];
    }
    __syncthreads();
    left = half;
  }
}

template <class T, class C>
__global__ void __launch_bounds__(kThreads, 1)
    gram_kernel(const __grid_constant__ KernelTensorList list, const __grid_constant__ GramInput<T> in) {
  if (!is_wanted(in.status)) return;
  in.reset_count();
  constexpr int kV = kPerVector<C>;
  C* stage = reinterpret_cast<C*>(gem_fast_shared);
  const int64_t slab = in.slab_of(blockIdx.x);
  const Pair panel(blockIdx.x % in.pairs);
  const bool same = panel.i == panel.j;
  const int pitch = in.columns + kV;  // an odd number of vectors

  // Rows of the two panels, in whole micro-tiles. The upper triangle of a panel with itself is left out.
  const int rows_left = in.t + 1 - panel.i * kPanel;
  const int a_tiles = ((rows_left < kPanel ? rows_left : kPanel) + kMicro - 1) / kMicro;
  const int b_tiles = same ? a_tiles : kPanel / kMicro;
  const int tiles = same ? a_tiles * (a_tiles + 1) / 2 : a_tiles * b_tiles;
  const int groups = kThreads / tiles;
  const int tile = static_cast<int>(threadIdx.x) % tiles;
  const int group = static_cast<int>(threadIdx.x) / tiles;
  const Pair in_triangle(tile);
  const int a_tile = same ? in_triangle.i : tile / b_tiles;
  const int b_tile = same ? in_triangle.j : tile % b_tiles;
  C* const b_stage = same ? stage : stage + a_tiles * kMicro * pitch;
  const Share<C> mine{stage + a_tile * pitch, b_stage + b_tile * pitch, a_tiles, b_tiles, group, groups};

  double total[kProducts] = {};
  C sum[kProducts] = {};
  int products = 0;
  const auto flush = [&] {
#pragma unroll
    for (int i = 0; i < kProducts; ++i) {
      total[i] += static_cast<double>(sum[i]);
      sum[i] = 0;
    }
    products = 0;
  };
  const int64_t end = in.end(list, slab);
  for (int64_t c = in.begin(list, slab); c < end; c += in.columns) {
    const int count = static_cast<int>(end - c < in.columns ? end - c : in.columns);
    stage_panel(list, in, panel.i, a_tiles * kMicro, c, count, pitch, stage);
    if (!same) stage_panel(list, in, panel.j, b_tiles * kMicro, c, count, pitch, b_stage);
    __syncthreads();
    const int vectors = (count + kV - 1) / kV;
    if (group < groups) add_products(mine, pitch, vectors, sum);
    products += (vectors / groups + 1) * kV;
    if (products >= kFloatSum) flush();
    __syncthreads();
  }
  flush();

  add_groups(total, tiles, groups, reinterpret_cast<double*>(gem_fast_shared));
  if (group != 0) return;
#pragma unroll
  for (int i = 0; i < kProducts; ++i) {
    const int r = panel.i * kPanel + a_tile + i / kMicro * a_tiles;
    const int s = panel.j * kPanel + b_tile + i % kMicro * b_tiles;
    in.write(r, s, slab, total[i]);
  }
}

__global__ void __launch_bounds__(kThreads, 1) add_slabs_kernel(const Slabs slabs) {
  if (is_wanted(slabs.status)) add_slabs(slabs);
}

// The first phase of one list of tensors.
template <class T, class C>
void launch_products(const KernelTensorList& list, const GramInput<T>& in, int64_t slabs, int64_t bytes,
                     Stream stream) {
  launch(gram_kernel<T, C>, slabs * in.pairs, kThreads, bytes, stream, list, in);
}

}  // namespace

int64_t gram_workspace(const RowMatrix& G, const TensorList& g, Products products) {
  const Tiling tiling = tiling_of(G, g, products);
  return 1 + tiling.products() * tiling.slabs;
}

Slabs gram_slabs(const RowMatrix& G, const TensorList& g, Products products, const int32_t* status,
                 const GramOutput& out, double* workspace, Stream stream) {
  const Tiling tiling = tiling_of(G, g, products);
  auto* arrived = reinterpret_cast<unsigned*>(workspace);
  double* partial = workspace + 1;
  // Where there is nothing to multiply, no kernel sets the count to zero.
  if (tiling.slabs == 0) check(cudaMemsetAsync(arrived, 0, sizeof *arrived, stream));
  int64_t first_slab = 0;
  GEM_FAST_DISPATCH_DTYPE(G.dtype, {
    for_each_kernel_list(g, tiling.slab, [&](const KernelTensorList& list) {
      const int64_t slabs = ceil_div(list.end() - list.begin(), tiling.slab);
      const GramInput<T> in{static_cast<const T*>(G.data),
                            G.stride,
                            static_cast<int>(G.t),
                            static_cast<int>(tiling.pairs),
                            tiling.columns,
                            tiling.slab,
                            tiling.slabs,
                            first_slab,
                            partial,
                            status,
                            arrived};
      if (gram_by_mma(G, products)) {
        launch_gram_mma(list, in, slabs, stream);
      } else if (products == Products::kFloat64) {
        launch_products<T, double>(list, in, slabs, shared_bytes(tiling, products), stream);
      } else {
        launch_products<T, Compute<T>>(list, in, slabs, shared_bytes(tiling, products), stream);
      }
      first_slab += slabs;
    });
  });
  return {partial, tiling.slabs, G.t, out, status, arrived};
}

void gram(const RowMatrix& G, const TensorList& g, Products products, const int32_t* status, const GramOutput& out,
          double* workspace, Stream stream) {
  if (G.t == 0) return;
  const Slabs slabs = gram_slabs(G, g, products, status, out, workspace, stream);
  launch(add_slabs_kernel, blocks_for_slabs(G.t, kThreads), kThreads, 0, stream, slabs);
}

}  // namespace gem_fast::cuda
