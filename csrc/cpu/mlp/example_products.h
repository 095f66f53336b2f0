// The projection from inner products of examples, without G's rows, for tasks of few examples: with the inputs A_k and
// the output gradients B_k of a layer, one row per example, task k's part of G is B_k' A_k, and
//
//     P_kj = the sum of all of (A_k A_j') * (B_k B_j')     q_k = the sum of all of (B_k g) * A_k     g~ = g + B'
//     diag(v) A
//
// A bias is a weight whose input is 1.
#pragma once

#include <cstdint>

#include "core/arrays.h"
#include "core/types.h"
#include "cpu/mlp/layer.h"
#include "cpu/mlp/matrix.h"
#include "cpu/mlp/sparse.h"
#include "cpu/parallel.h"

namespace gem_fast::cpu {

struct ExampleLayer {
  int64_t outputs, inputs;
  LayerInput x;       // of all N examples: rows with positions, or dense
  ConstMatrix delta;  // (N, padded(outputs)), zeros beyond the outputs
  void* weight;       // its part of g, (outputs, inputs), contiguous; null where it is not wanted
  void* bias;         // (outputs,), likewise
};

// What a pass has left behind: the examples of t tasks, and perhaps those of the current mini-batch, which follow them
// as one more task (t + 2 numbers in tasks.start) in all matrices but the first layer's input.
struct Examples {
  DType dtype;
  Tasks tasks;
  const ExampleLayer* layers;
  int64_t count;
  int64_t current = 0;     // the number of examples of the current mini-batch; 0: g is given
  LayerInput current_x{};  // their input of the first layer, (current, inputs): rows with positions, or dense
};

// g -> g~, as cpu::project does with G. Where g is given, `g` is all of it, of which the layers have parts, and it is
// projected in place. Else it is what the current mini-batch's gradients add up to: g~ is written to the layers' parts,
// and `g` is not read.
//
// q always comes from products of examples, P where `rows` is null, of float32 ones where those are accurate enough and
// else of float64 ones. It takes as many of them as there are pairs of examples; where that is more than rows of G
// take, `rows` is memory for these (example_rows_bytes), and the answer comes from there (example_rows.h). Where
// float64 is not enough, either, it comes from rows in memory of their own.
//
// Returns the status. If it is kNonFinite, v = 0 and the layers' parts have g itself. Results: v (t,), q (t,) = G g of
// the gradient before the projection, and the residual of g~.
int32_t project_examples(const Examples& examples, const TensorList& g, double margin, double ridge, double* v,
                         double* q, double* residual, void* rows, const Executor& executor);

}  // namespace gem_fast::cpu
