// What gram's kernels have in common: how a problem is cut up, and where their sums go.
//
// Two phases. First every block forms the products of two panels of rows over a slab of columns; then the slabs' sums
// are added in a fixed order. Nothing depends on which block comes first, so the same input gives the same bits.
//
// Row 0 is g, row k + 1 is row k of G.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "core/arrays.h"
#include "cuda/slabs.h"
#include "cuda/tensor_list.h"

namespace gem_fast::cuda {

// Products that a float32 sum adds before its value is added to the float64 sum, about.
inline constexpr int kFloatSum = 128;
// Blocks of the first phase, about: a few for each multiprocessor of a large device, and many where all of them are
// long, so that the last ones keep few multiprocessors waiting.
inline constexpr int64_t kBlocks = 1024;
inline constexpr int64_t kMostBlocks = 4096;
inline constexpr int64_t kLongSlab = 2048;
// As steps of a slab, where a slab may be of any length.
inline constexpr int64_t kAnyLength = int64_t{1} << 40;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How a problem is cut up; of its sizes alone, so that the order of summation is too.
struct Tiling {
  int rows;       // t and one for g
  int64_t slab;   // columns of a slab
  int64_t pairs;  // of panels, the lower triangle
  int64_t slabs;  // of the whole gradient

  // With `panel` rows in a panel, `columns` that a block reads in one step, and at least and at most so many steps in a
  // slab.
  Tiling(const RowMatrix& G, const TensorList& g, int panel, int columns, int64_t least, int64_t most)
      : rows(static_cast<int>(G.t) + 1), slabs(0) {
    const int64_t panels = ceil_div(rows, panel);
    pairs = panels * (panels + 1) / 2;
    const int64_t blocks = std::max<int64_t>(1, std::clamp(G.p / kLongSlab, kBlocks, kMostBlocks) / pairs);
    slab = std::clamp(ceil_div(ceil_div(G.p, columns), blocks), least, most) * columns;
    for_each_kernel_list(g, slab,
                         [&](const KernelTensorList& list) { slabs += ceil_div(list.end() - list.begin(), slab); });
  }

  int64_t products() const { return products_of_rows(rows); }
};

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
  int pairs;  // of panels
  int64_t slab;
  int64_t slabs;       // of the whole gradient
  int64_t first_slab;  // of this list
  double* partial;     // (products, slabs)
  const int32_t* status;
  unsigned* arrived;  // set to zero for the kernel that adds the slabs

  // Of block b: its slab, and where that begins and ends among the columns of the list.
  __device__ int64_t slab_of(unsigned b) const { return b / pairs; }
  __device__ int64_t begin(const KernelTensorList& list, int64_t s) const { return list.begin() + s * slab; }
  __device__ int64_t end(const KernelTensorList& list, int64_t s) const {
    const int64_t x = begin(list, s) + slab;
    return x < list.end() ? x : list.end();
  }
  __device__ void write(int64_t r, int64_t s, int64_t slab_of_list, double sum) const {
    if (r > t || s > t) return;
    const int64_t product = r >= s ? triangle(r, s) : triangle(s, r);
    partial[product * slabs + first_slab + slab_of_list] = sum;
  }
  __device__ void reset_count() const {
    if (blockIdx.x == 0 && threadIdx.x == 0) *arrived = 0;
  }
};

}  // namespace gem_fast::cuda
