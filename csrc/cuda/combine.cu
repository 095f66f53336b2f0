#include "core/dispatch.h"
#include "cuda/block.h"
#include "cuda/combine.h"
#include "cuda/launch.h"
#include "cuda/tensor_list.h"
#include "cuda/vector.h"

namespace gem_fast::cuda {
namespace {

constexpr int kThreads = 256;
// Rows of G whose weights are in shared memory at a time.
constexpr int kTerms = 256;
// Rows that a thread has under way at a time: where p is small, time goes by how often it waits for memory.
// Half as many of the 16-bit types, of which a load has twice as many numbers to convert.
template <class T>
constexpr int kAtOnce = sizeof(T) == 2 ? 4 : 8;

template <class T>
constexpr int kTile = kThreads * kPerVector<T>;

// The rows with a weight, in order.
struct Terms {
  double v[kTerms];
  int64_t row[kTerms];
  int count;
};

// Collects those of rows [first, last) whose weight is not zero. The first warp goes through them 32 at a time.
__device__ void collect_terms(const double* v, int64_t first, int64_t last, Terms& terms) {
  if (warp() == 0) {
    int count = 0;
    for (int64_t base = first; base < last; base += kWarp) {
      const int64_t row = base + lane();
      const double weight = row < last ? v[row] : 0.0;
      const unsigned nonzero = __ballot_sync(kAllLanes, weight != 0.0);
      if (weight != 0.0) {
        const int place = count + __popc(nonzero & ((1u << lane()) - 1u));
        terms.v[place] = weight;
        terms.row[place] = row;
      }
      count += __popc(nonzero);
    }
    if (lane() == 0) terms.count = count;
  }
  __syncthreads();
}

// sum[i] += sum_k v_k G[k][i] over the rows with a weight.
template <bool kWhole, class T>
__device__ inline void add_terms(const T* columns, int64_t stride, int64_t count, const Terms& terms,
                                 double (&sum)[kPerVector<T>]) {
  for (int first = 0; first < terms.count; first += kAtOnce<T>) {
    uint4 words[kAtOnce<T>] = {};
#pragma unroll
    for (int k = 0; k < kAtOnce<T>; ++k) {
      if (first + k >= terms.count) break;
      const T* from = columns + terms.row[first + k] * stride;
      words[k] = kWhole ? read_words(from) : words_of(read_elements(from, count));
    }
#pragma unroll
    for (int k = 0; k < kAtOnce<T>; ++k) {
      if (first + k >= terms.count) break;
      double row[kPerVector<T>];
      convert(elements_of<T>(words[k]), row);
#pragma unroll
      for (int i = 0; i < kPerVector<T>; ++i) sum[i] += terms.v[first + k] * row[i];
    }
  }
}

// One tile of one tensor: g += G^T v, summed in float64 and rounded once.
template <class T>
__global__ void __launch_bounds__(kThreads, 1) combine_kernel(const __grid_constant__ KernelTensorList list, const T* G,
                                                              int64_t stride, int64_t t, const double* v) {
  Terms& terms = *reinterpret_cast<Terms*>(gem_fast_shared);
  const auto tile = static_cast<int32_t>(blockIdx.x);
  const int s = list.of_tile(tile);
  const int64_t at = static_cast<int64_t>(tile - list.first_tile[s]) * kTile<T> + threadIdx.x * kPerVector<T>;
  const int64_t count = list.numel(s) - at;  // of this thread's elements, where positive
  T* g = static_cast<T*>(list.data[s]) + at;
  const T* columns = G + list.offset[s] + at;
  const bool whole = count >= kPerVector<T> && is_aligned(g) && is_aligned(columns) && stride % kPerVector<T> == 0;
  double sum[kPerVector<T>];
  bool changed = false;
  for (int64_t first = 0; first < t; first += kTerms) {
    collect_terms(v, first, first + kTerms < t ? first + kTerms : t, terms);
    if (count > 0 && terms.count > 0) {
      if (!changed) convert(whole ? read_vector(g) : read_elements(g, count), sum);
      changed = true;
      if (whole) {
        add_terms<true>(columns, stride, count, terms, sum);
      } else {
        add_terms<false>(columns, stride, count, terms, sum);
      }
    }
    __syncthreads();
  }
  if (!changed) return;
  const Vector<T> result = converted<T>(sum);
  if (whole) {
    *reinterpret_cast<Vector<T>*>(g) = result;
  } else {
    write_elements(result, count, g);
  }
}

}  // namespace

void combine(const TensorList& g, const RowMatrix& G, const double* v, Stream stream) {
  if (G.t == 0) return;
  GEM_FAST_DISPATCH_DTYPE(G.dtype, {
    for_each_kernel_list(g, kTile<T>, [&](const KernelTensorList& list) {
      launch(combine_kernel<T>, list.tiles, kThreads, sizeof(Terms), stream, list, static_cast<const T*>(G.data),
             G.stride, G.t, v);
    });
  });
}

}  // namespace gem_fast::cuda
