// The float32 examples of a pass, and the gradient, once more in float64: for projections that need more digits than
// float32 products have.
#pragma once

#include <vector>

#include "cpu/buffer.h"
#include "cpu/mlp/example_products.h"
#include "cpu/mlp/sparse.h"
#include "cpu/parallel.h"

namespace gem_fast::cpu {

class ExamplesInFloat64 {
 public:
  // Copies them into memory of this thread, which the next ones use again: one at a time.
  ExamplesInFloat64(const Examples& of, const TensorList& g, const Executor& executor);
  ExamplesInFloat64(const ExamplesInFloat64&) = delete;
  ExamplesInFloat64& operator=(const ExamplesInFloat64&) = delete;

  const Examples& examples() const { return examples_; }
  // All of the gradient; its values only where it is given.
  TensorList g() const { return {g_.data(), static_cast<int64_t>(g_.size())}; }

  // Rounds the gradient's parts that are a layer's to the float32 ones. Returns false, and writes nothing, where
  // float32 does not hold a value.
  bool round_gradient() const;

 private:
  // The entries of the rows that count, and of no others.
  struct Entries {
    std::vector<int32_t> start, columns;
    std::vector<int64_t> positions;
    SparseRows rows;
  };

  void* copy(const void* from, int64_t numel);
  ConstMatrix copy(const ConstMatrix& from, int64_t rows, int64_t columns);
  LayerInput copy(const LayerInput& from, int64_t n, int64_t inputs, Entries& entries);
  void* part_of_g(const void* original) const;

  const TensorList original_;
  const Executor& executor_;
  size_t used_ = 0;
  Entries of_memory_, of_current_;
  std::vector<ExampleLayer> layers_;
  std::vector<TensorRef> g_;
  Examples examples_;
};

}  // namespace gem_fast::cpu
