// Linear layers, and which rows of a matrix belong to which task.
#pragma once

#include <cstdint>

namespace gem_fast::cpu {

// y = x W' + b for the weights W (outputs, inputs), contiguous.
struct Layer {
  const void* weight;
  const void* bias;  // may be null
  int64_t outputs;
  int64_t inputs;
};

// Rows [start[k], start[k + 1]) are task k's, for k < t.
struct Tasks {
  const int64_t* start;
  int64_t t;
};

}  // namespace gem_fast::cpu
