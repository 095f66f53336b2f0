// Fragments come straight from global memory: lane 4 r + c loads 16 bytes of row r of eight rows, and counts them as
// the columns that mma gives it. Every lane of every row does, so the products are those of equal columns, in another
// order. A row is thus read once for each pair of panels, goes through no shared memory, and no warp waits for another.
// Of float32, a multiprocessor has 16 warps with 64 bytes of each row under way twice with up to 16 rows, 12 with 24, 8
// with 32: 18 to 32 KB. Two panels of 64 rows: 8 warps, once, 32 KB.
//
// float32 numbers are split in two of 11 bits each, x = high + low up to 2^-23 |x|. high high', high low' and low high'
// are formed exactly and low low' is left out, 2^-24 of the product: the error is float32's. What the sums within mma
// lose, they lose towards zero, so chains are short: each begins anew after one load, with the small products.
#include "cuda/block.h"
#include "cuda/gram_mma.h"
#include "cuda/gram_rows.h"
#include "cuda/launch.h"
#include "cuda/mma.h"
#include "cuda/vector.h"

namespace gem_fast::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
// Rows of a fragment; rows of a tile of products, and its columns.
constexpr int kRows = 8;
constexpr int kTileRows = 16;
// Rows of a panel, at most, and blocks of eight in it.
constexpr int kPanel = 32;
constexpr int kBlocksOfPanel = kPanel / kRows;
// Tiles of two panels; of a panel with itself only those that reach the lower triangle.
template <int kBlocks, bool kSame>
constexpr int kTiles = !kSame         ? 8
                       : kBlocks == 2 ? 2
                       : kBlocks == 3 ? 5
                                      : 6;
constexpr int kMinRows = 9;
// Fewer columns in a slab would not be worth its sums' way through memory.
constexpr int kSteps = 4;

template <class T>
constexpr int kColumnsOfWarp = 4 * kPerVector<T>;
// Columns of all warps at a time.
template <class T>
constexpr int kColumns = kWarps * kColumnsOfWarp<T>;

// A lane's 16 bytes as fragments: two steps of mma, and for float32 two parts of each.
template <class T>
struct Operand {
  static constexpr int kParts = std::is_same_v<T, float> ? 2 : 1;
  Fragment part[2][kParts];  // the upper digits first

  Operand() = default;
  __device__ explicit Operand(const uint4& x) {
    const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      const uint32_t low = words[2 * step];
      const uint32_t high = words[2 * step + 1];
      if constexpr (kParts == 1) {
        part[step][0] = {low, high};
      } else {
        part[step][0] = {upper(low), upper(high)};
        part[step][1] = {rest(low, part[step][0].low), rest(high, part[step][0].high)};
      }
    }
  }

  // Rounded to 11 bits. A NaN may get lost here, but not in the rest.
  __device__ static uint32_t upper(uint32_t x) { return (x + 0x1000u) & 0xffffe000u; }
  __device__ static uint32_t rest(uint32_t x, uint32_t upper) {
    return __float_as_uint(__uint_as_float(x) - __uint_as_float(upper));
  }
};

// sum += the products of 16 rows with 8 rows, over the columns of one load.
template <class T>
__device__ inline void add_tile(const Operand<T>& top, const Operand<T>& bottom, const Operand<T>& b, float (&sum)[4]) {
  float chain[4] = {};
  if constexpr (Operand<T>::kParts == 2) {
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      mma<T>(chain, top.part[step][1], bottom.part[step][1], b.part[step][0]);
      mma<T>(chain, top.part[step][0], bottom.part[step][0], b.part[step][1]);
    }
  }
#pragma unroll
  for (int step = 0; step < 2; ++step) mma<T>(chain, top.part[step][0], bottom.part[step][0], b.part[step][0]);
#pragma unroll
  for (int i = 0; i < 4; ++i) sum[i] += chain[i];
}

// Tile x: rows 16 i ... of the first panel, 8 j ... of the second.
template <bool kSame>
__device__ constexpr int tile_i(int x) {
  return kSame ? (x < 2 ? 0 : 1) : x / kBlocksOfPanel;
}
template <bool kSame>
__device__ constexpr int tile_j(int x) {
  return kSame ? (x < 2 ? x : x - 2) : x % kBlocksOfPanel;
}

// Whether number i of a lane's part of tile x counts: not above the diagonal, nor below a panel of 24 rows.
template <int kBlocks, bool kSame>
__device__ constexpr bool counts(int x, int i) {
  const bool upper = i < 2;
  return !kSame || (upper ? tile_j<true>(x) != 2 * tile_i<true>(x) + 1 : 2 * tile_i<true>(x) + 1 < kBlocks);
}

// A thread's float64 sums, in shared memory; nobody else's until all are there.
struct Totals {
  double* mine = reinterpret_cast<double*>(gem_fast_shared) + threadIdx.x;

  __device__ double& operator[](int i) const { return mine[i * kThreads]; }
};

template <int kBlocks, bool kSame, class T>
__device__ void multiply_panels(const KernelTensorList& list, const GramInput<T>& in, const Pair& panel, int64_t slab) {
  constexpr int kCount = kTiles<kBlocks, kSame>;
  // Loads under way beside those that are multiplied: two panels make enough of them at once.
  constexpr int kAhead = kSame ? 2 : 1;
  const int64_t begin = in.begin(list, slab);
  const auto count = static_cast<int>(in.end(list, slab) - begin);
  RowsReader<T, kBlocks, kSame> rows_a(in, panel.i * kPanel + lane() / 4, kRows, begin, count);
  RowsReader<T, kBlocks> rows_b(in, panel.j * kPanel + lane() / 4, kRows, begin, count);
  const Totals totals;
  float sum[kCount][4] = {};
#pragma unroll
  for (int x = 0; x < 4 * kCount; ++x) totals[x] = 0.0;
  const auto flush = [&] {
#pragma unroll
    for (int x = 0; x < kCount; ++x) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (counts<kBlocks, kSame>(x, i)) totals[4 * x + i] += static_cast<double>(sum[x][i]);
        sum[x][i] = 0.0f;
      }
    }
  };
  uint4 a[kAhead][kBlocks] = {}, b[kAhead][kBlocks] = {};
  const auto fetch = [&](int at, int c) {
    if constexpr (!kSame) rows_a.read(list, c, a[at]);
    rows_b.read(list, c, b[at]);
  };
  const auto multiply = [&](const uint4(&of_a)[kBlocks], const uint4(&of_b)[kBlocks]) {
    Operand<T> right[kBlocks];
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) right[j] = Operand<T>(of_b[j]);
#pragma unroll
    for (int x = 0; x < kCount; ++x) {
      const int i = 2 * tile_i<kSame>(x);
      const int j = tile_j<kSame>(x);
      if constexpr (!kSame) {
        add_tile<T>(Operand<T>(of_a[i]), Operand<T>(of_a[i + 1]), right[j], sum[x]);
      } else if (i + 1 < kBlocks) {
        add_tile<T>(right[i], right[i + 1 < kBlocks ? i + 1 : i], right[j], sum[x]);
      } else {
        add_tile<T>(right[i], Operand<T>(uint4{}), right[j], sum[x]);
      }
    }
  };
  constexpr int kTimes = kFloatSum / kColumnsOfWarp<T>;
  const int mine = lane() % 4 * kPerVector<T>;
  int times = 0;
  for (int c = warp() * kColumnsOfWarp<T> - kAhead * kColumns<T>; c < count; c += kAhead * kColumns<T>) {
#pragma unroll
    for (int at = 0; at < kAhead; ++at) {
      if (c >= 0) multiply(a[at], b[at]);
      fetch(at, c + mine + (kAhead + at) * kColumns<T>);
    }
    if (++times % (kTimes / kAhead) == 0) flush();
  }
  flush();

  // The warps' sums are added in order.
  __syncthreads();
  const auto* shared = reinterpret_cast<double*>(gem_fast_shared);
  for (int x = warp(); x < 4 * kCount; x += kWarps) {
    double total = 0.0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += shared[x * kThreads + w * kWarp + lane()];
    const int r = tile_i<kSame>(x / 4) * kTileRows + lane() / 4 + (x % 4) / 2 * kRows;
    const int s = tile_j<kSame>(x / 4) * kRows + lane() % 4 * 2 + x % 2;
    if (!kSame || r >= s) in.write(panel.i * kPanel + r, panel.j * kPanel + s, slab, total);
  }
}

// Blocks of a multiprocessor: with fewer rows it takes more of them to fill it with loads.
template <class T, int kBlocks, bool kOnePanel>
__global__ void __launch_bounds__(kThreads, !kOnePanel || kBlocks == 4 ? 2
                                            : kBlocks == 3             ? 3
                                                                       : 4)
    gram_mma_kernel(const __grid_constant__ KernelTensorList list, const __grid_constant__ GramInput<T> in) {
  if (!is_wanted(in.status)) return;
  in.reset_count();
  const int64_t slab = in.slab_of(blockIdx.x);
  const Pair panel(blockIdx.x % in.pairs);
  if (kOnePanel || panel.i == panel.j) {
    multiply_panels<kBlocks, true>(list, in, panel, slab);
  } else if constexpr (!kOnePanel) {
    multiply_panels<kBlocks, false>(list, in, panel, slab);
  }
}

}  // namespace

bool gram_by_mma(const RowMatrix& G, Products products) {
  return G.t + 1 >= kMinRows && products == Products::kFloat32 &&
         device_attribute(cudaDevAttrComputeCapabilityMajor) >= kMmaCapability;
}

Tiling mma_tiling(const RowMatrix& G, const TensorList& g) {
  const int columns = G.dtype == DType::kFloat32 ? kColumns<float> : kColumns<BFloat16>;
  return Tiling(G, g, kPanel, columns, kSteps, kAnyLength);
}

template <class T>
void launch_gram_mma(const KernelTensorList& list, const GramInput<T>& in, int64_t slabs, Stream stream) {
  if constexpr (!std::is_same_v<T, double>) {
    constexpr int64_t kBytesOfTile = 4 * kThreads * sizeof(double);
    const auto run = [&](auto kernel, int tiles) {
      launch(kernel, slabs * in.pairs, kThreads, tiles * kBytesOfTile, stream, list, in);
    };
    switch (in.t / kRows) {
      case 0:
      case 1: return run(gram_mma_kernel<T, 2, true>, kTiles<2, true>);
      case 2: return run(gram_mma_kernel<T, 3, true>, kTiles<3, true>);
      case 3: return run(gram_mma_kernel<T, 4, true>, kTiles<4, true>);
      default: return run(gram_mma_kernel<T, 4, false>, kTiles<4, false>);
    }
  }
}

template void launch_gram_mma(const KernelTensorList&, const GramInput<float>&, int64_t, Stream);
template void launch_gram_mma(const KernelTensorList&, const GramInput<double>&, int64_t, Stream);
template void launch_gram_mma(const KernelTensorList&, const GramInput<BFloat16>&, int64_t, Stream);
template void launch_gram_mma(const KernelTensorList&, const GramInput<Float16>&, int64_t, Stream);

}  // namespace gem_fast::cuda
