// A list of tensors as a kernel parameter. It travels with the launch, so that nothing is copied to the device on the
// side: no allocation, no synchronisation, and a CUDA graph keeps it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/arrays.h"

namespace gem_fast::cuda {

// Consecutive tensors of the list, empty ones left out. Kernels that work tensor by tensor cut each into tiles of a
// fixed number of elements: one block per tile.
struct SegmentTable {
  // As many as the 4 KB of kernel parameters hold beside a kernel's other arguments.
  static constexpr int kCapacity = 200;

  void* data[kCapacity];
  int64_t offset[kCapacity + 1];  // in the flattened gradient; the last one is where the table's columns end
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
static_assert(sizeof(SegmentTable) <= 4024);

// Calls f(table) for tables that together are the list: one for most models, more for lists longer than a table.
template <class F>
void for_each_table(const Segments& g, int64_t tile, const F& f) {
  SegmentTable table;
  table.count = table.tiles = 0;
  const auto flush = [&] {
    if (table.count > 0) f(static_cast<const SegmentTable&>(table));
    table.count = table.tiles = 0;
  };
  for (int64_t i = 0; i < g.count; ++i) {
    const Segment& segment = g.items[i];
    if (segment.numel == 0) continue;
    if (table.count == SegmentTable::kCapacity) flush();
    table.data[table.count] = segment.data;
    table.offset[table.count] = segment.offset;
    table.offset[table.count + 1] = segment.offset + segment.numel;
    table.first_tile[table.count] = table.tiles;
    table.tiles += static_cast<int32_t>((segment.numel + tile - 1) / tile);
    ++table.count;
  }
  flush();
}

}  // namespace gem_fast::cuda
