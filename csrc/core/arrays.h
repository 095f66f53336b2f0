// What the kernels are handed: raw pointers and sizes, no tensor library. Sizes are 64-bit.
#pragma once

#include <cstdint>

#include "core/types.h"

namespace gem_fast {

// G: t rows of p elements, one gradient per past task; consecutive rows are `stride` elements apart.
struct RowMatrix {
  const void* data;
  int64_t stride;
  int64_t t;
  int64_t p;
  DType dtype;
};

// One tensor of a parameter list: a contiguous span of the flattened gradient. `data` may be null when numel is 0.
struct TensorRef {
  void* data;
  int64_t numel;
  int64_t offset;  // of its first element in the flattened gradient
};

// The flattened gradient g (p,) as it lies in memory: the parameters' `.grad` tensors, one after the other.
struct TensorList {
  const TensorRef* items;
  int64_t count;
};

}  // namespace gem_fast
