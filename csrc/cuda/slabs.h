// The second phase of gram: the sums of the slabs of columns become P and q.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "core/status.h"
#include "cuda/block.h"
#include "cuda/gram.h"

namespace gem_fast::cuda {

// Where the products of two rows, r >= s, lie in the lower triangle.
__host__ __device__ inline int64_t triangle(int64_t r, int64_t s) { return r * (r + 1) / 2 + s; }

// Whether products are wanted, see gram.h: the same answer for all threads.
__device__ inline bool is_wanted(const int32_t* status) { return status == nullptr || *status == kInaccurate; }

__host__ __device__ inline int64_t products_of_rows(int64_t rows) { return rows * (rows + 1) / 2; }

// Sums of slabs that a lane has under way at a time.
inline constexpr int kSlabsAtOnce = 12;

// One warp per product, the warps of all blocks taking them in turn: the lanes add the slabs' sums, then each other's,
// in an order that never changes.
__device__ inline void add_slabs(const Slabs& in) {
  const int64_t products = products_of_rows(in.t + 1);
  const int64_t step = static_cast<int64_t>(gridDim.x) * warps();
  int64_t r = 0;
  int64_t below = 0;  // products of the rows before r
  for (int64_t x = static_cast<int64_t>(blockIdx.x) * warps() + warp(); x < products; x += step) {
    while (below + r + 1 <= x) below += ++r;
    const int64_t s = x - below;
    const double* from = in.partial + triangle(r, s) * in.slabs;
    double sum = 0.0;
    for (int64_t first = lane(); first < in.slabs; first += kSlabsAtOnce * kWarp) {
      double sums[kSlabsAtOnce];
#pragma unroll
      for (int k = 0; k < kSlabsAtOnce; ++k) sums[k] = first + k * kWarp < in.slabs ? from[first + k * kWarp] : 0.0;
#pragma unroll
      for (int k = 0; k < kSlabsAtOnce; ++k) sum += sums[k];
    }
    sum = warp_sum(sum);
    if (lane() != 0) continue;
    if (r == 0) {
      *in.out.g_squared = sum;
    } else if (s == 0) {
      in.out.q[r - 1] = sum;
    } else {
      in.out.P[(r - 1) * in.t + s - 1] = in.out.P[(s - 1) * in.t + r - 1] = sum;
    }
  }
}

// Blocks that share this work among them.
inline int64_t blocks_for_slabs(int64_t t, int64_t threads) {
  const int64_t warps_of_block = threads / kWarp;
  return std::clamp<int64_t>((products_of_rows(t + 1) + warps_of_block - 1) / warps_of_block, 1, 1024);
}

}  // namespace gem_fast::cuda
