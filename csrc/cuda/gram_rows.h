// How a thread of gram's first phase reads its rows: sixteen bytes of each at a time, straight into registers. What it
// has asked for is on its way while it multiplies what came before.
//
// Columns count from the slab's first one.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "cuda/gram_tiling.h"
#include "cuda/tensor_list.h"
#include "cuda/vector.h"

namespace gem_fast::cuda {

// One row over a slab: g, whose columns lie in several tensors, or a row of G, which counts as one tensor.
template <class T>
class RowReader {
 public:
  // Row `row` of those of gram_tiling.h; one that does not exist reads as zeros.
  __device__ RowReader(const GramInput<T>& in, int row, int64_t begin, int count)
      : begin_(begin), count_(row <= in.t ? count : 0), end_(row == 0 ? 0 : count_) {
    if (row > 0) from_ = in.G + (row - 1) * in.stride + begin;
  }

  // Columns [c, c + kPerVector), zeros from the slab's end on.
  __device__ uint4 read(const KernelTensorList& list, int c) {
    constexpr int kV = kPerVector<T>;
    if (c >= end_ && c < count_) go_to(list, list.of_column(begin_ + c));
    if (c + kV <= end_) return is_aligned(from_ + c) ? read_words(from_ + c) : words_of(read_elements(from_ + c, kV));
    Vector<T> x{};
#pragma unroll
    for (int i = 0; i < kV; ++i) {
      if (c + i >= count_) break;
      if (c + i == end_) go_to(list, tensor_ + 1);
      x.x[i] = from_[c + i];
    }
    return words_of(x);
  }

 private:
  __device__ void go_to(const KernelTensorList& list, int tensor) {
    tensor_ = tensor;
    from_ = static_cast<const T*>(list.data[tensor]) + (begin_ - list.offset[tensor]);
    const int64_t end = list.offset[tensor + 1] - begin_;
    end_ = end < count_ ? static_cast<int>(end) : count_;
  }

  const T* from_ = nullptr;  // where column 0 lies, or would if the tensor reached back to it
  int64_t begin_;
  int count_;
  int end_;  // of the tensor or of the slab, whichever comes first
  int tensor_ = 0;
};

// Rows first, first + apart, first + 2 apart, ... as many as `kRows`. Those beyond G's last read as zeros. Without
// `kMayHaveG`, which takes registers, first is not 0.
template <class T, int kRows, bool kMayHaveG = true>
class RowsReader {
 public:
  __device__ RowsReader(const GramInput<T>& in, int first, int apart, int64_t begin, int count)
      : first_(in, first, begin, count),
        from_(in.G + (first - 1) * in.stride + begin),
        stride_(apart * in.stride),
        exist_(first <= in.t ? (in.t - first) / apart + 1 : 0),
        count_(is_aligned(from_) && in.stride % kPerVector<T> == 0 ? count : 0),
        end_(count) {}

  __device__ void read(const KernelTensorList& list, int c, uint4 (&x)[kRows]) {
    constexpr int kPlain = kMayHaveG ? 1 : 0;
    if (c + kPerVector<T> <= count_) {
#pragma unroll
      for (int r = kPlain; r < kRows; ++r) x[r] = r < exist_ ? read_words(from_ + r * stride_ + c) : uint4{};
    } else {
#pragma unroll
      for (int r = kPlain; r < kRows; ++r) {
        x[r] = words_of(read_elements(from_ + r * stride_ + c, r < exist_ ? end_ - c : 0));
      }
    }
    if constexpr (kMayHaveG) x[0] = first_.read(list, c);
  }

 private:
  struct Nothing {
    __device__ Nothing(const GramInput<T>&, int, int64_t, int) {}
  };
  std::conditional_t<kMayHaveG, RowReader<T>, Nothing> first_;
  const T* from_;
  int64_t stride_;
  int exist_;
  int count_;  // columns that lie at aligned addresses
  int end_;
};

}  // namespace gem_fast::cuda
