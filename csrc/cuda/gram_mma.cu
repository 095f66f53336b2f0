// Fragments come straight from global memory: lane 4 r + c loads 16 bytes of row r of eight rows, and counts them as
// the columns that mma gives it. Every lane of every row does, so the products are those of equal columns, in another
// order. A row of G is thus read once for each pair of panels, goes through no shared memory, and no warp waits for
// another.
//
// float32 numbers are split in two of 11 bits each, x = high + low up to 2^-23 |x|. high high', high low' and low high'
// are formed exactly and low low' is left out, 2^-24 of the product: the error is float32's. What the sums within mma
// lose, they lose towards zero, so chains are short: each begins anew after one load, with the small products.
#include "cuda/block.h"
#include "cuda/gram_mma.h"
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
constexpr int kBlocksOfRows = kPanel / kRows;
// Tiles of two panels; of a panel with itself only those that reach the lower triangle.
template <bool kSame>
constexpr int kTiles = kSame ? 6 : 8;
constexpr int kMinRows = 16;
// Fewer columns in a slab would not be worth its sums' way through memory.
constexpr int kStages = 4;

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

// What a lane reads of one panel: row `lane / 4` of each of its blocks of eight. Columns count from the slab's first
// one.
template <class T>
struct Reader {
  static constexpr int kV = kPerVector<T>;

  const T* from[kBlocksOfRows];  // null for rows that do not exist, and for g
  unsigned aligned = 0;          // a bit for each block of rows
  int gradient = -1;             // the block of rows whose row of this lane is g
  int s = -1;                    // the tensor of g that was read last
  int64_t begin;
  int count;

  __device__ Reader(const GramInput<T>& in, int panel, int64_t begin, int count) : begin(begin), count(count) {
#pragma unroll
    for (int j = 0; j < kBlocksOfRows; ++j) {
      const int row = panel * kPanel + j * kRows + lane() / 4;
      from[j] = row < in.t ? in.G + row * in.stride + begin : nullptr;
      aligned |= static_cast<unsigned>(is_aligned(from[j])) << j;
      if (row == in.t) gradient = j;
    }
  }

  // Columns [c, c + kV) of row block j, zeros from `count` on; c is a multiple of kV.
  __device__ uint4 load(const KernelTensorList& list, int j, int c) {
    Vector<T> x{};
    if (j == gradient) {
      load_gradient(list, c, x);
    } else if (from[j] != nullptr) {
      if ((aligned >> j & 1) != 0 && c + kV <= count) {
        x = *reinterpret_cast<const Vector<T>*>(from[j] + c);
      } else {
#pragma unroll
        for (int i = 0; i < kV; ++i) {
          if (c + i < count) x.x[i] = from[j][c + i];
        }
      }
    }
    uint4 words;
    memcpy(&words, &x, sizeof words);
    return words;
  }

 private:
  // The same of g, whose columns lie in several tensors.
  __device__ void load_gradient(const KernelTensorList& list, int c, Vector<T>& x) {
    if (c >= count) return;
    const int64_t column = begin + c;
    if (s < 0 || column >= list.offset[s + 1]) s = list.of_column(column);
    const T* at = static_cast<const T*>(list.data[s]) + (column - list.offset[s]);
    if (c + kV <= count && column + kV <= list.offset[s + 1] && is_aligned(at)) {
      x = *reinterpret_cast<const Vector<T>*>(at);
      return;
    }
#pragma unroll
    for (int i = 0; i < kV; ++i) {
      if (c + i >= count) break;
      if (column + i >= list.offset[s + 1]) s = list.of_column(column + i);
      x.x[i] = static_cast<const T*>(list.data[s])[column + i - list.offset[s]];
    }
  }
};

// Tile x: rows 16 i ... of the first panel, 8 j ... of the second.
template <bool kSame>
__device__ constexpr int tile_i(int x) {
  return kSame ? (x < 2 ? 0 : 1) : x / kBlocksOfRows;
}
template <bool kSame>
__device__ constexpr int tile_j(int x) {
  return kSame ? (x < 2 ? x : x - 2) : x % kBlocksOfRows;
}

// Whether number i of a lane's part of tile x counts: in the upper half of these tiles all are above the diagonal.
template <bool kSame>
__device__ constexpr bool counts(int x, int i) {
  return !kSame || i >= 2 || (x != 1 && x != kTiles<true> - 1);
}

template <bool kSame, class T>
__device__ void multiply_panels(const KernelTensorList& list, const GramInput<T>& in, const Pair& panel, int64_t slab) {
  constexpr int kCount = kTiles<kSame>;
  const int64_t begin = in.begin(list, slab);
  const auto count = static_cast<int>(in.end(list, slab) - begin);
  Reader<T> a(in, panel.i, begin, count);
  Reader<T> b(in, panel.j, begin, count);
  double total[kCount][4] = {};
  float sum[kCount][4] = {};
  const auto flush = [&] {
#pragma unroll
    for (int x = 0; x < kCount; ++x) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (counts<kSame>(x, i)) total[x][i] += static_cast<double>(sum[x][i]);
        sum[x][i] = 0.0f;
      }
    }
  };
  const int mine = lane() % 4 * kPerVector<T>;
  // The next columns are on their way while these are multiplied.
  uint4 next[kBlocksOfRows];
  const auto fetch = [&](int c) {
#pragma unroll
    for (int j = 0; j < kBlocksOfRows; ++j) next[j] = b.load(list, j, c + mine);
  };
  int c = warp() * kColumnsOfWarp<T>;
  fetch(c);
  for (; c < count; c += kColumns<T>) {
    uint4 words_a[kBlocksOfRows];
    if constexpr (!kSame) {
#pragma unroll
      for (int j = 0; j < kBlocksOfRows; ++j) words_a[j] = a.load(list, j, c + mine);
    }
    const Operand<T> of_b[kBlocksOfRows] = {Operand<T>(next[0]), Operand<T>(next[1]), Operand<T>(next[2]),
                                            Operand<T>(next[3])};
    fetch(c + kColumns<T>);
#pragma unroll
    for (int x = 0; x < kCount; ++x) {
      const int i = tile_i<kSame>(x);
      const int j = tile_j<kSame>(x);
      if constexpr (kSame) {
        add_tile<T>(of_b[2 * i], of_b[2 * i + 1], of_b[j], sum[x]);
      } else {
        add_tile<T>(Operand<T>(words_a[2 * i]), Operand<T>(words_a[2 * i + 1]), of_b[j], sum[x]);
      }
    }
    constexpr int kTimes = kFloatSum / kColumnsOfWarp<T>;
    if (c / kColumns<T> % kTimes == kTimes - 1) flush();
  }
  flush();

  // The warps' sums, added in order.
  auto* shared = reinterpret_cast<double*>(gem_fast_shared);
  for (int w = 1; w < kWarps; ++w) {
    if (warp() == w) {
#pragma unroll
      for (int x = 0; x < 4 * kCount; ++x) shared[x * kWarp + lane()] = total[x / 4][x % 4];
    }
    __syncthreads();
    if (warp() == 0) {
#pragma unroll
      for (int x = 0; x < 4 * kCount; ++x) total[x / 4][x % 4] += shared[x * kWarp + lane()];
    }
    __syncthreads();
  }
  if (warp() != 0) return;
#pragma unroll
  for (int x = 0; x < 4 * kCount; ++x) {
    const int r = tile_i<kSame>(x / 4) * kTileRows + lane() / 4 + (x % 4) / 2 * kRows;
    const int s = tile_j<kSame>(x / 4) * kRows + lane() % 4 * 2 + x % 2;
    if (!kSame || r >= s) in.write(panel.i * kPanel + r, panel.j * kPanel + s, slab, total[x / 4][x % 4]);
  }
}

// Three blocks of a multiprocessor fill it with loads; two panels take more registers than that leaves.
template <class T, bool kOnePanel>
__global__ void __launch_bounds__(kThreads, kOnePanel ? 3 : 2)
    gram_mma_kernel(const __grid_constant__ KernelTensorList list, const __grid_constant__ GramInput<T> in) {
  if (!is_wanted(in.status)) return;
  in.reset_count();
  const int64_t slab = in.slab_of(blockIdx.x);
  const Pair panel(blockIdx.x % in.pairs);
  if constexpr (kOnePanel) {
    multiply_panels<true>(list, in, panel, slab);
  } else if (panel.i == panel.j) {
    multiply_panels<true>(list, in, panel, slab);
  } else {
    multiply_panels<false>(list, in, panel, slab);
  }
}

}  // namespace

bool gram_by_mma(const RowMatrix& G, Products products) {
  return G.t + 1 >= kMinRows && products == Products::kFloat32 &&
         device_attribute(cudaDevAttrComputeCapabilityMajor) >= kMmaCapability;
}

Tiling mma_tiling(const RowMatrix& G, const TensorList& g) {
  return Tiling(G, g, G.dtype == DType::kFloat32 ? kColumns<float> : kColumns<BFloat16>, kStages);
}

template <class T>
void launch_gram_mma(const KernelTensorList& list, const GramInput<T>& in, int64_t slabs, Stream stream) {
  if constexpr (!std::is_same_v<T, double>) {
    constexpr int64_t kSharedBytes = kTiles<false> * 4 * kWarp * sizeof(double);
    launch(in.pairs == 1 ? gram_mma_kernel<T, true> : gram_mma_kernel<T, false>, slabs * in.pairs, kThreads,
           kSharedBytes, stream, list, in);
  }
}

template void launch_gram_mma(const KernelTensorList&, const GramInput<float>&, int64_t, Stream);
template void launch_gram_mma(const KernelTensorList&, const GramInput<double>&, int64_t, Stream);
template void launch_gram_mma(const KernelTensorList&, const GramInput<BFloat16>&, int64_t, Stream);
template void launch_gram_mma(const KernelTensorList&, const GramInput<Float16>&, int64_t, Stream);

}  // namespace gem_fast::cuda
