// Two phases. First every block forms the products of two panels of rows over a slab of columns; then the slabs' sums
// are added in a fixed order. Nothing depends on which block comes first, so the same input gives the same bits.
#include <algorithm>

#include "core/dispatch.h"
#include "core/status.h"
#include "cuda/block.h"
#include "cuda/gram.h"
#include "cuda/launch.h"
#include "cuda/tensor_list.h"
#include "cuda/vector.h"

namespace gem_fast::cuda {
namespace {

constexpr int kThreads = 256;
// G's rows, with g as one more, are taken in panels; a block forms the products of two of them.
constexpr int kPanel = 32;
// A thread forms kMicro x kMicro of a block's products, over its share of the columns in shared memory.
constexpr int kMicro = 4;
constexpr int kProducts = kMicro * kMicro;
// Products that a float32 sum adds before its value is added to the float64 sum, about.
constexpr int kFloatSum = 128;
// Blocks of the first phase, about: a few for each multiprocessor of a large device.
constexpr int64_t kBlocks = 1024;
// Shared memory for a stage of columns, which the threads' sums take over at the end.
constexpr int64_t kStageBytes = 40 * 1024;
constexpr int kMaxColumns = 1024;

constexpr int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// How a problem is cut up; of its sizes alone, so that the order of summation is too.
struct Tiling {
  int rows;  // t and one for g
  int panels;
  int columns;    // in a stage
  int64_t slab;   // columns of a slab: a multiple of a stage's
  int64_t pairs;  // of panels, the lower triangle
  int64_t slabs;  // of the whole gradient
  int64_t shared_bytes;

  Tiling(const RowMatrix& G, const TensorList& g, Products formed_in) {
    const int64_t element = formed_in == Products::kFloat64 ? sizeof(double) : sizeof(float);
    rows = static_cast<int>(G.t) + 1;
    panels = ceil_div(rows, kPanel);
    pairs = static_cast<int64_t>(panels) * (panels + 1) / 2;
    const int staged = panels == 1 ? ceil_div(rows, kMicro) * kMicro : 2 * kPanel;
    columns = static_cast<int>(std::min<int64_t>(kMaxColumns, (kStageBytes / staged - 16) / element) / kWarp * kWarp);
    const int64_t stages = std::max(1, ceil_div(G.p, columns));
    slab = ceil_div(stages, std::clamp<int64_t>(kBlocks / pairs, 1, stages)) * static_cast<int64_t>(columns);
    shared_bytes = std::max<int64_t>(staged * (columns * element + 16), kThreads * kProducts * sizeof(double));
    slabs = 0;
    for_each_kernel_list(g, slab,
                         [&](const KernelTensorList& list) { slabs += ceil_div(list.end() - list.begin(), slab); });
  }

  int64_t products() const { return static_cast<int64_t>(rows) * (rows + 1) / 2; }
};

// Where the products of two rows, r >= s, lie in the lower triangle.
__host__ __device__ inline int64_t triangle(int64_t r, int64_t s) { return r * (r + 1) / 2 + s; }

// Item x of a lower triangle, counted row by row.
struct Pair {
  int i;
  int j;

  __device__ explicit Pair(int64_t x) {
    i = 0;
    while (x > i) x -= ++i;
    j = static_cast<int>(x);
  }
};

template <class T>
struct GramInput {
  const T* G;
  int64_t stride;
  int t;
  int columns;  // in a stage
  int64_t slab;
  int64_t slabs;       // of the whole gradient
  int64_t first_slab;  // of this list
  double* partial;     // (products, slabs)
  const int32_t* status;
};

// Whether products are wanted, see gram.h: the same answer for all threads.
__device__ inline bool is_wanted(const int32_t* status) { return status == nullptr || *status == kInaccurate; }

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
    gram_kernel(const __grid_constant__ KernelTensorList list, const __grid_constant__ GramInput<T> in, int pairs) {
  if (!is_wanted(in.status)) return;
  constexpr int kV = kPerVector<C>;
  C* stage = reinterpret_cast<C*>(gem_fast_shared);
  const int64_t slab = blockIdx.x / pairs;
  const Pair panel(blockIdx.x % pairs);
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
  const int64_t begin = list.begin() + slab * in.slab;
  const int64_t end = begin + in.slab < list.end() ? begin + in.slab : list.end();
  for (int64_t c = begin; c < end; c += in.columns) {
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
    if (r > in.t || s > in.t) continue;
    const int64_t product = r >= s ? triangle(r, s) : triangle(s, r);
    in.partial[product * in.slabs + in.first_slab + slab] = total[i];
  }
}

// ---- second phase -------------------------------------------------------------------------------------------------

// One warp per product: the lanes add the slabs' sums, then each other's, in an order that never changes.
__global__ void __launch_bounds__(kThreads, 1)
    add_slabs_kernel(const double* partial, int64_t slabs, int64_t t, const int32_t* status, const GramOutput out) {
  const int64_t product = static_cast<int64_t>(blockIdx.x) * warps() + warp();
  const int64_t r = product / (t + 1);
  const int64_t s = product % (t + 1);
  if (r > t || s > r || !is_wanted(status)) return;
  const double* from = partial + triangle(r, s) * slabs;
  double sum = 0.0;
  for (int64_t slab = lane(); slab < slabs; slab += kWarp) sum += from[slab];
  for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  if (lane() != 0) return;
  if (s == t) {
    *out.g_squared = sum;
  } else if (r == t) {
    out.q[s] = sum;
  } else {
    out.P[r * t + s] = out.P[s * t + r] = sum;
  }
}

template <class T, class C>
void launch_products(const RowMatrix& G, const TensorList& g, const Tiling& tiling, const int32_t* status,
                     double* partial, Stream stream) {
  int64_t first_slab = 0;
  for_each_kernel_list(g, tiling.slab, [&](const KernelTensorList& list) {
    const int64_t slabs = ceil_div(list.end() - list.begin(), tiling.slab);
    const GramInput<T> in{static_cast<const T*>(G.data),
                          G.stride,
                          static_cast<int>(G.t),
                          tiling.columns,
                          tiling.slab,
                          tiling.slabs,
                          first_slab,
                          partial,
                          status};
    launch(gram_kernel<T, C>, slabs * tiling.pairs, kThreads, tiling.shared_bytes, stream, list, in,
           static_cast<int>(tiling.pairs));
    first_slab += slabs;
  });
}

}  // namespace

int64_t gram_workspace(const RowMatrix& G, const TensorList& g, Products products) {
  const Tiling tiling(G, g, products);
  return tiling.products() * tiling.slabs;
}

void gram(const RowMatrix& G, const TensorList& g, Products products, const int32_t* status, const GramOutput& out,
          double* workspace, Stream stream) {
  if (G.t == 0) return;
  const Tiling tiling(G, g, products);
  GEM_FAST_DISPATCH_DTYPE(G.dtype, {
    if (products == Products::kFloat64) {
      launch_products<T, double>(G, g, tiling, status, workspace, stream);
    } else {
      launch_products<T, Compute<T>>(G, g, tiling, status, workspace, stream);
    }
  });
  const int64_t products_in_rows = (G.t + 1) * (G.t + 1);
  launch(add_slabs_kernel, ceil_div(products_in_rows, kThreads / kWarp), kThreads, 0, stream,
         static_cast<const double*>(workspace), tiling.slabs, G.t, status, out);
}

}  // namespace gem_fast::cuda
