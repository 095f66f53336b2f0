// The first phase by multiplications of single numbers, and the choice between it and gram_mma.cu; see gram_tiling.h.
//
// A thread reads sixteen bytes of each row at a time and adds all their products to sums of its own, in registers. So
// nothing but the end of a slab makes a thread wait for another, and a multiprocessor has as many loads under way as
// its threads have registers for: with one row of G and g 32 KB, with three 64 KB, with seven 64 KB. About 20 KB
// saturate the memory of an H100 (3 TB/s, 800 ns, 132 multiprocessors).
#include <algorithm>

#include "core/dispatch.h"
#include "cuda/block.h"
#include "cuda/gram.h"
#include "cuda/gram_mma.h"
#include "cuda/gram_rows.h"
#include "cuda/gram_tiling.h"
#include "cuda/launch.h"
#include "cuda/slabs.h"
#include "cuda/tensor_list.h"
#include "cuda/vector.h"

namespace gem_fast::cuda {
namespace {

constexpr int kThreads = 128;
// Rows of a panel; of one alone, where there are no more.
constexpr int kPanel = 8;
constexpr int kFewRows = 4;
// Sums of each thread that are in shared memory at a time, to be added up.
constexpr int kAtOnce = 32;

Tiling tiling_of(const RowMatrix& G, const TensorList& g, Products products) {
  if (gram_by_mma(G, products)) return mma_tiling(G, g);
  int64_t per_vector = 1;
  GEM_FAST_DISPATCH_DTYPE(G.dtype, per_vector = kPerVector<T>);
  // In float32 so long that a thread's sums add kFloatSum products.
  const int64_t most = products == Products::kFloat64 ? kAnyLength : kFloatSum / per_vector;
  return Tiling(G, g, kPanel, static_cast<int>(kThreads * per_vector), 1, most);
}

// ---- first phase ---------------------------------------------------------------------------------------------------

// The products of two panels of rows, or of one with itself: then those of the lower triangle.
template <class C, int kRows, bool kSame>
struct Sums {
  static constexpr int kCount = kSame ? kRows * (kRows + 1) / 2 : kRows * kRows;
  C sum[kCount] = {};

  template <class T>
  __device__ void add(const uint4 (&a)[kRows], const uint4 (&b)[kRows]) {
#pragma unroll
    for (int column = 0; column < kPerVector<T>; ++column) {
      C of_b[kRows];
#pragma unroll
      for (int j = 0; j < kRows; ++j) of_b[j] = value<T>(b[j], column);
      int at = 0;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const C of_a = kSame ? of_b[i] : value<T>(a[i], column);
#pragma unroll
        for (int j = 0; j < (kSame ? i + 1 : kRows); ++j) sum[at++] += of_a * of_b[j];
      }
    }
  }

  // Adds up the threads' sums and hands them to write(i, j, sum), one after the other.
  template <class F>
  __device__ void add_threads(const F& write) const {
    auto* shared = reinterpret_cast<C*>(gem_fast_shared);
#pragma unroll
    for (int first = 0; first < kCount; first += kAtOnce) {
      constexpr int kLast = kCount - 1;
      __syncthreads();
#pragma unroll
      for (int x = 0; x < kAtOnce; ++x) {
        if (first + x < kCount) shared[x * kThreads + threadIdx.x] = sum[first + x < kLast ? first + x : kLast];
      }
      __syncthreads();
      for (int x = warp(); x < kAtOnce && first + x < kCount; x += warps()) {
        double total = 0.0;
#pragma unroll
        for (int thread = 0; thread < kThreads; thread += kWarp) {
          total += static_cast<double>(shared[x * kThreads + thread + lane()]);
        }
        total = warp_sum(total);
        const Pair of_triangle(first + x);
        if (lane() == 0) {
          write(kSame ? of_triangle.i : (first + x) / kRows, kSame ? of_triangle.j : (first + x) % kRows, total);
        }
      }
    }
  }

 private:
  template <class T>
  __device__ static C value(const uint4& words, int column) {
    return static_cast<C>(static_cast<Compute<T>>(elements_of<T>(words).x[column]));
  }
};

template <class C, int kRows, bool kSame, class T>
__device__ void multiply_panels(const KernelTensorList& list, const GramInput<T>& in, const Pair& panel, int64_t slab) {
  constexpr int kStep = kThreads * kPerVector<T>;
  // Loads under way beside those that are multiplied: two panels make enough of them at once.
  constexpr int kAhead = kSame ? 2 : 1;
  const int64_t begin = in.begin(list, slab);
  const auto count = static_cast<int>(in.end(list, slab) - begin);
  RowsReader<T, kRows, kSame> rows_a(in, panel.i * kRows, 1, begin, count);
  RowsReader<T, kRows> rows_b(in, panel.j * kRows, 1, begin, count);
  uint4 a[kAhead][kRows] = {}, b[kAhead][kRows] = {};
  const auto fetch = [&](int at, int c) {
    rows_a.read(list, c, a[at]);
    if constexpr (!kSame) rows_b.read(list, c, b[at]);
  };
  Sums<C, kRows, kSame> sums;
  const int mine = static_cast<int>(threadIdx.x) * kPerVector<T>;
  for (int c = mine - kAhead * kStep; c < count; c += kAhead * kStep) {
#pragma unroll
    for (int at = 0; at < kAhead; ++at) {
      if (c >= 0) sums.template add<T>(a[at], kSame ? a[at] : b[at]);
      fetch(at, c + (kAhead + at) * kStep);
    }
  }
  sums.add_threads([&](int i, int j, double sum) { in.write(panel.i * kRows + i, panel.j * kRows + j, slab, sum); });
}

// Four blocks on a multiprocessor, with more than few rows two: as many as their registers allow.
template <class T, class C, int kRows>
__global__ void __launch_bounds__(kThreads, kRows == kFewRows ? 4 : 2)
    gram_kernel(const __grid_constant__ KernelTensorList list, const __grid_constant__ GramInput<T> in) {
  if (!is_wanted(in.status)) return;
  in.reset_count();
  const int64_t slab = in.slab_of(blockIdx.x);
  const Pair panel(blockIdx.x % in.pairs);
  if (kRows == kFewRows || panel.i == panel.j) {
    multiply_panels<C, kRows, true>(list, in, panel, slab);
  } else if constexpr (kRows != kFewRows) {
    multiply_panels<C, kRows, false>(list, in, panel, slab);
  }
}

__global__ void __launch_bounds__(kThreads, 1) add_slabs_kernel(const Slabs slabs) {
  if (is_wanted(slabs.status)) add_slabs(slabs);
}

// The first phase of one list of tensors.
template <class T, class C>
void launch_products(const KernelTensorList& list, const GramInput<T>& in, int64_t slabs, Stream stream) {
  launch(in.t < kFewRows ? gram_kernel<T, C, kFewRows> : gram_kernel<T, C, kPanel>, slabs * in.pairs, kThreads,
         kAtOnce * kThreads * sizeof(C), stream, list, in);
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
                            tiling.slab,
                            tiling.slabs,
                            first_slab,
                            partial,
                            status,
                            arrived};
      if (gram_by_mma(G, products)) {
        launch_gram_mma(list, in, slabs, stream);
      } else if (products == Products::kFloat64) {
        launch_products<T, double>(list, in, slabs, stream);
      } else {
        launch_products<T, Compute<T>>(list, in, slabs, stream);
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
