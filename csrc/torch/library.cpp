// torch.ops.gem_fast: the schemas of all operators. What they run is registered beside its code: projection.cpp and
// mlp.cpp for the CPU, cuda.cpp for a GPU. Each checks its arguments, allocates the results and launches the kernels.
//
// csrc/torch is the only folder that knows torch. It is written against LibTorch's stable ABI, so that one binary
// serves every torch from the target version on.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(gem_fast, m) {
  m.def("gram(Tensor G, Tensor[] grads, bool in_float64=False) -> (Tensor P, Tensor q)");
  m.def("nnqp(Tensor P, Tensor q, float lower=0.0, float ridge=0.0) -> (Tensor v, Tensor status, Tensor residual)");
  m.def("combine_(Tensor(a!)[] grads, Tensor G, Tensor v) -> ()");
  m.def("pack_(Tensor(a!) row, Tensor?[] tensors, int[] sizes) -> ()");
  m.def(
      "project_(Tensor(a!)[] grads, Tensor G, float margin=0.5, float ridge=0.0) -> "
      "(Tensor v, Tensor q, Tensor status, Tensor residual)");

  // A private one for a G that is no matrix: the dual alone.
  m.def(
      "_project_dual(Tensor P, Tensor q, Tensor g_squared, Tensor? cancellation, float margin, float ridge, bool "
      "in_float64) -> "
      "(Tensor v, Tensor status, Tensor residual)");

  // Random int64 numbers, min(size, count) for each of the counts, as that many different positions among so many.
  m.def("_distinct(Tensor numbers, int[] counts, int size) -> Tensor");

  // Private ones for linear layers, on the CPU, in float32 and float64. The sparse entries that they take come from
  // _sparse_rows and _sparse_pairs, and are not checked again.
  m.def("_sparse_rows(Tensor x) -> (Tensor start, Tensor columns, Tensor values)");
  m.def(
      "_sparse_pairs(Tensor start, Tensor columns, Tensor values, int d, bool of_columns) -> "
      "(Tensor lines, Tensor start, Tensor index, Tensor values)");
  m.def(
      "_sparse_linear(Tensor start, Tensor columns, Tensor values, Tensor? positions, Tensor weight, Tensor? bias) -> "
      "Tensor");
  m.def(
      "_layer_gradient_(Tensor(a!) out, Tensor delta, Tensor? x, Tensor[] entries, Tensor? positions, int[] sizes) "
      "-> ()");
  m.def("_cross_entropy_gradient(Tensor logits, Tensor target, int[] sizes) -> Tensor");
  m.def(
      "_mlp_backward(Tensor grad, Tensor[] inputs, Tensor[] weights, Tensor(a!)[] weight_rows, "
      "Tensor(b!)[] bias_rows, int[] sizes) -> Tensor");
  m.def(
      "_mlp_pass(Tensor? x, Tensor[] entries, Tensor? positions, Tensor target, Tensor[] weights, Tensor?[] biases, "
      "Tensor(a!)[] weight_rows, Tensor(b!)[] bias_rows, int[] sizes) -> Tensor");

  // The same in two operators, for samples: what a pass leaves behind goes to `kept`, and the projection follows from
  // it, by way of `rows` where that is not empty. A step is both at once with the current mini-batch's examples behind
  // the others: the lists of gradients get its projected gradient, and where the status says so, its gradient as it is.
  m.def(
      "_mlp_examples_(Tensor(a!) kept, Tensor? x, Tensor[] entries, Tensor? positions, Tensor target, "
      "Tensor[] weights, Tensor?[] biases, int[] sizes) -> ()");
  m.def(
      "_mlp_project_(Tensor(a!)[] weight_grads, Tensor(b!)[] bias_grads, Tensor[] other_grads, Tensor kept, Tensor? x, "
      "Tensor[] entries, Tensor? positions, Tensor[] weights, int[] sizes, float margin, float ridge, Tensor(d!) rows) "
      "-> (Tensor v, Tensor q, Tensor status, Tensor residual)");
  m.def(
      "_mlp_step_(Tensor(a!) kept, Tensor? x, Tensor[] entries, Tensor? positions, Tensor target, "
      "Tensor[] weights, Tensor?[] biases, int[] sizes, Tensor current_x, Tensor current_target, "
      "Tensor(b!)[] weight_grads, Tensor(c!)[] bias_grads, float margin, float ridge, Tensor(d!) rows) -> "
      "(Tensor loss, Tensor v, Tensor q, Tensor status, Tensor residual)");
}
