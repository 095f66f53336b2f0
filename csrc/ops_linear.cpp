// The operators behind chains of linear layers and their cross entropy, on the CPU: see layers.h.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cpu/cross_entropy.h"
#include "cpu/linear.h"
#include "cpu/span.h"
#include "layers.h"

namespace gem_fast {
namespace {

// A list of one matrix per task, with contiguous matrices; null where the tensor is empty, which means: not wanted.
cpu::Matrix rows_of_g(const Tensor& rows, int64_t t, int64_t size, const char* name) {
  if (rows.numel() == 0) return {nullptr, 0};
  const int64_t last = rows.dim() - 1;
  check(rows.dim() >= 2 && rows.size(0) == t && rows.numel() == t * size && rows.stride(last) == 1 &&
            (last == 1 || rows.stride(1) == rows.size(2)),
        name, " must have one contiguous matrix of ", size, " elements per task, got ", shape_of(rows));
  return {rows.mutable_data_ptr(), rows.stride(0)};
}

Tensor chain_backward_cpu(const Tensor& grad, const Tensors& inputs, const Tensors& weights, const Tensors& weight_rows,
                          const Tensors& bias_rows, const std::vector<int64_t>& sizes) {
  const size_t count = weights.size();
  check(count > 1 && inputs.size() == count - 1 && weight_rows.size() == count - 1 && bias_rows.size() == count,
        "weights must be two or more, with inputs and weight_rows for all but the first and bias_rows for all, got ",
        count, ", ", inputs.size(), ", ", weight_rows.size(), " and ", bias_rows.size());
  const DType dtype = full_dtype(grad, "grad");
  const std::vector<int64_t> start = starts(sizes);
  const cpu::Tasks tasks{start.data(), static_cast<int64_t>(sizes.size())};
  const int64_t n = start.back();
  std::vector<LayerView> layers;
  std::vector<cpu::Link> links;
  for (size_t l = 0; l < count; ++l) {
    layers.emplace_back(weights[l], std::nullopt, grad);
    const cpu::Layer& layer = layers[l].layer;
    cpu::Link link{layer, {nullptr, 0}, {nullptr, 0}, rows_of_g(bias_rows[l], tasks.t, layer.outputs, "bias_rows")};
    if (l > 0) {
      const Tensor& x = inputs[l - 1];
      check(layer.inputs == layers[l - 1].outputs(), "weights[", l, "] must take the ", layers[l - 1].outputs(),
            " outputs of the layer before, got shape ", shape_of(weights[l]));
      check(x.dim() == 2 && x.size(0) == n && x.size(1) == layer.inputs && x.scalar_type() == grad.scalar_type() &&
                x.stride(1) == 1,
            "inputs[", l - 1, "] must have shape (n, inputs), grad's dtype and contiguous rows, got ", shape_of(x));
      link.x = const_matrix_of(x);
      link.weight_rows = rows_of_g(weight_rows[l - 1], tasks.t, layer.outputs * layer.inputs, "weight_rows");
    }
    links.push_back(link);
  }
  check(grad.dim() == 2 && grad.size(0) == n && grad.size(1) == layers.back().outputs(),
        "grad must have shape (n, outputs) = (", n, ", ", layers.back().outputs(), "), got ", shape_of(grad));
  const Tensor dense = as_contiguous(grad);
  Tensor scratch = new_like(grad, {cpu::chain_scratch(links.data(), static_cast<int64_t>(count))});
  Tensor delta = new_like(grad, {n, cpu::padded(layers[0].outputs())});
  cpu::chain_backward(const_matrix_of(dense), dtype, links.data(), static_cast<int64_t>(count), tasks, matrix_of(delta),
                      scratch.mutable_data_ptr(), kTorchThreads);
  return delta;
}

void linear_gradient_cpu(const Tensor& out, const Tensor& delta, const Tensor& x, const std::vector<int64_t>& sizes) {
  const GradientCall call(out, delta, out, sizes);
  const int64_t inputs = out.size(2);
  check(x.dim() == 2 && x.size(0) == call.start.back() && x.scalar_type() == out.scalar_type() && x.stride(1) == 1 &&
            (x.size(1) == inputs || x.size(1) == cpu::padded(inputs)),
        "x must have shape (n, inputs), out's dtype and contiguous rows, got ", shape_of(x));
  const DType dtype = full_dtype(out, "out");
  Tensor wide = x;
  if (x.size(1) < cpu::padded(inputs)) {
    wide = new_like(x, {x.size(0), cpu::padded(inputs)});
    cpu::pad_rows(const_matrix_of(x), dtype, x.size(0), inputs, wide.mutable_data_ptr(), kTorchThreads);
  }
  cpu::linear_gradient(call.delta(), const_matrix_of(wide), dtype, call.tasks(), call.outputs, inputs, call.out(),
                       kTorchThreads);
}

std::tuple<Tensor, Tensor, double> span_factors_cpu(const Tensor& g, const Tensor& x) {
  const DType dtype = full_dtype(g, "g");
  check(g.dim() == 2 && x.dim() == 2 && g.size(1) == x.size(1) && x.scalar_type() == g.scalar_type() &&
            g.stride(1) == 1 && x.stride(1) == 1,
        "x must have g's number of columns, its dtype and contiguous rows, got ", shape_of(x), " for ", shape_of(g));
  const int64_t rows = g.size(0), columns = g.size(1), most = x.size(0);
  Tensor A = new_like(g, {rows, most}), Q = new_like(g, {most, columns});
  Tensor scratch = new_like(g, {cpu::span_scratch(rows, columns, most)});
  const double rest = cpu::span_factors(const_matrix_of(g), const_matrix_of(x), dtype, rows, columns, most,
                                        A.mutable_data_ptr(), Q.mutable_data_ptr(), scratch.mutable_data_ptr(),
                                        kTorchThreads);
  return {A, Q, rest};
}

Tensor cross_entropy_gradient_cpu(const Tensor& logits, const Tensor& target, const std::vector<int64_t>& sizes) {
  const DType dtype = full_dtype(logits, "logits");
  check(logits.dim() == 2 && target.dim() == 1 && target.size(0) == logits.size(0) &&
            target.scalar_type() == ScalarType::Long,
        "target must have shape (n,) and int64 for logits of shape (n, classes), got ", shape_of(target), " for ",
        shape_of(logits));
  const Tensor dense = as_contiguous(logits), classes = as_contiguous(target);
  const int64_t n = logits.size(0);
  const int64_t count = logits.size(1);
  const std::vector<int64_t> start = starts(sizes);
  check(start.back() == n, "sizes must add up to n = ", n, ", got ", start.back());
  const auto* wanted = static_cast<const int64_t*>(classes.const_data_ptr());
  for (int64_t i = 0; i < n; ++i) {
    check(wanted[i] >= 0 && wanted[i] < count, "target must be from 0 to ", count - 1, ", got ", wanted[i]);
  }
  Tensor grad = new_like(logits, {n, count});
  cpu::cross_entropy_gradient(const_matrix_of(dense), dtype, wanted, {start.data(), static_cast<int64_t>(sizes.size())},
                              count, matrix_of(grad), kTorchThreads);
  return grad;
}

}  // namespace
}  // namespace gem_fast

STABLE_TORCH_LIBRARY_FRAGMENT(gem_fast, m) {
  m.def(
      "_chain_backward(Tensor grad, Tensor[] inputs, Tensor[] weights, Tensor(a!)[] weight_rows, "
      "Tensor(b!)[] bias_rows, int[] sizes) -> Tensor");
  m.def("_linear_gradient_(Tensor(a!) out, Tensor delta, Tensor x, int[] sizes) -> ()");
  m.def("_span_factors(Tensor g, Tensor x) -> (Tensor A, Tensor Q, float rest)");
  m.def("_cross_entropy_gradient(Tensor logits, Tensor target, int[] sizes) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(gem_fast, CPU, m) {
  m.impl("_chain_backward", TORCH_BOX(&gem_fast::chain_backward_cpu));
  m.impl("_linear_gradient_", TORCH_BOX(&gem_fast::linear_gradient_cpu));
  m.impl("_span_factors", TORCH_BOX(&gem_fast::span_factors_cpu));
  m.impl("_cross_entropy_gradient", TORCH_BOX(&gem_fast::cross_entropy_gradient_cpu));
}
