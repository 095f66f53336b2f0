// The inner products of examples' gradients in one layer, and the sums of these gradients, without a row of G.
#pragma once

#include <cstdint>

#include "core/arrays.h"
#include "cpu/buffer.h"
#include "cpu/mlp/example_products.h"
#include "cpu/parallel.h"

namespace gem_fast::cpu {

// Rows of examples that are together.
struct Range {
  int64_t first, end;

  int64_t size() const { return end - first; }
};

// Of one layer the transposes of some examples' inputs, (inputs, padded(n)), and of their gradients at its output,
// (outputs, padded(n)).
struct Columns {
  Buffer x, delta;
};

// The products of one layer's examples.
class LayerProducts {
 public:
  LayerProducts(const Examples& of, const ExampleLayer& layer, bool is_first)
      : of_(of), layer_(layer), is_first_(is_first), n_(of.tasks.start[of.tasks.t]) {}

  // Makes columns of the examples `some`, all of past tasks or all of the current mini-batch.
  void transposed(const Range& some, Columns& columns) const;

  // The inner products of the gradients of the examples `rows`, of tasks [task, ...), with those of n others, given as
  // columns: to sums (tasks, padded(n)), where those of each task are added up. Where the others are the same examples,
  // `own` (n,) gets those of each with itself added.
  void add_products_of(const Range& rows, int64_t task, const Columns& columns, int64_t n, double* sums,
                       double* own) const;

  // What the products of q with a g that is given are formed with: its part of the weight as (outputs,
  // padded(inputs)), or for entries its transpose.
  void prepare_q(Buffer& g, const Executor& executor) const;

  // Adds to q_k, from what `prepare_q` has left.
  void add_q(int64_t k, const Buffer& g, double* q) const;

  // g = the sum of the gradients of the examples `some`, weighted; or += where g is given.
  void sum_gradients(const Range& some, const double* weights, const Executor& executor) const;

 private:
  // The layer's input from example `first` on, up to the last one of the memory or of the mini-batch.
  LayerInput input_from(int64_t first) const;

  // y (rows, y.stride) = the layer's input, of these rows, times the first columns of a matrix.
  void inputs_times(const Range& rows, const ConstMatrix& matrix, const Matrix& y) const;

  const Examples& of_;
  const ExampleLayer& layer_;
  const bool is_first_;
  const int64_t n_;
};

// |g|^2, in blocks over which a lane adds few products.
double squared_length(const TensorList& g, DType dtype);

}  // namespace gem_fast::cpu
