// A list of tensors as a kernel parameter. It travels with the launch, so that nothing is copied to the device on the
// side: no allocation, no synchronisation, and a CUDA graph keeps it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/arrays.h"

namespace gem_fast::cuda {

// Up to kCapacity consecutive tensors of a list, empty ones left out. Kernels that work tensor by tensor cut each into
// tiles of a fixed number of elements: one block per tile.
struct KernelTensorList {
  // As many as the 4 KB of kernel parameters hold beside a kernel's other arguments.
  static constexpr int kCapacity = 200;

  void* data[kCapacity];
  int64_t offset[kCapacity + 1];  // in the flattened gradient; the last one is where the list's columns end
  int32_t first_tile[kCapacity];
  int32_t count;
  int32_t tiles;

  __host__ __device__ int64_t begin() const { return offset[0]; }
  __host__ __device__ int64_t end() const { return offset[count]; }
  __device__ int64_t numel(int s) const { return offset[s + 1] - offset[s]; }

  __device__ int of_tile(int32_t tile) const { return last_not_above(first_tile, tile); }
  __device__ int of_column(int64_t column) const { return last_not_above(offset, column); }

 private:
  template <class I>
  __device__ int last_not_above(const I* starts, I x) const {
    int low = 0;
    int high = count;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (starts[middle] <= x) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return low;
  }
};

// Kernel parameters are limited to 4 KB; this leaves room for the others.
static_assert(sizeof(KernelTensorList) <= 4024);

// Calls f(list) for one list after the other, which together hold the tensors of g: one for most models, more where
// there are more than kCapacity tensors.
template <class F>
void for_each_kernel_list(const TensorList& g, int64_t tile, const F& f) {
  KernelTensorList list;
  list.count = list.tiles = 0;
  const auto flush = [&] {
    if (list.count > 0) f(static_cast<const KernelTensorList&>(list));
    list.count = list.tiles = 0;
  };
  for (int64_t i = 0; i < g.count; ++i) {
    const TensorRef& tensor = g.items[i];
    if (tensor.numel == 0) continue;
    if (list.count == KernelTensorList::kCapacity) flush();
    list.data[list.count] = tensor.data;
    list.offset[list.count] = tensor.offset;
    list.offset[list.count + 1] = tensor.offset + tensor.numel;
    list.first_tile[list.count] = list.tiles;
    list.tiles += static_cast<int32_t>((tensor.numel + tile - 1) / tile);
    ++list.count;
  }
  flush();
}

}  // namespace gem_fast::cuda
