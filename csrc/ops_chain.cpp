// The operators behind chains of linear layers and their cross entropy, on the CPU: see layers.h.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <vector>

#include "cpu/chain.h"
#include "cpu/cross_entropy.h"
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

// The layers of a chain, one after the other.
struct ChainView {
  std::vector<LayerView> views;
  std::vector<cpu::Layer> layers;

  ChainView(const Tensors& weights, const std::vector<std::optional<Tensor>>& biases, const Tensor& like) {
    check(!weights.empty() && weights.size() == biases.size(), "biases must have one entry per weight, got ",
          biases.size(), " for ", weights.size());
    for (size_t l = 0; l < weights.size(); ++l) {
      views.emplace_back(weights[l], biases[l], like);
      layers.push_back(views[l].layer);
      check(l == 0 || layers[l].inputs == layers[l - 1].outputs, "weights[", l, "] must take the ",
            layers[l - (l > 0)].outputs, " outputs of the layer before, got shape ", shape_of(weights[l]));
    }
  }

  int64_t count() const { return static_cast<int64_t>(layers.size()); }
};

// A matrix (n, columns), or (n, padded(columns)), with contiguous rows.
void check_rows(const Tensor& x, int64_t n, int64_t columns, const Tensor& like, const std::string& name) {
  check(x.dim() == 2 && x.size(0) == n && (x.size(1) == columns || x.size(1) == cpu::padded(columns)) &&
            x.scalar_type() == like.scalar_type() && x.stride(1) == 1,
        name, " must have shape (n, ", columns, "), ", name_of(like.scalar_type()), " and contiguous rows, got ",
        shape_of(x));
}

Tensors chain_forward_cpu(const Tensor& z, const Tensors& weights, const std::vector<std::optional<Tensor>>& biases) {
  const DType dtype = full_dtype(z, "z");
  const ChainView chain(weights, biases, z);
  const int64_t n = z.size(0);
  check_rows(z, n, chain.layers[0].inputs, z, "z");
  Tensors results;
  std::vector<cpu::Matrix> inputs;
  for (const cpu::Layer& layer : chain.layers) {
    results.push_back(new_like(z, {n, cpu::padded(layer.inputs)}));
    inputs.push_back(matrix_of(results.back()));
  }
  results.push_back(new_like(z, {n, chain.layers.back().outputs}));
  cpu::chain_forward(const_matrix_of(z), dtype, n, chain.layers.data(), chain.count(), inputs.data(),
                     matrix_of(results.back()), kTorchThreads);
  return results;
}

// Where the gradients of a chain go: the rows of G of all weights but the first, and of all biases.
std::vector<cpu::Link> links_of(const ChainView& chain, const Tensors& weight_rows, const Tensors& bias_rows,
                                int64_t t) {
  const size_t count = chain.layers.size();
  check(count > 1 && weight_rows.size() == count - 1 && bias_rows.size() == count,
        "weights must be two or more, with weight_rows for all but the first and bias_rows for all, got ", count, ", ",
        weight_rows.size(), " and ", bias_rows.size());
  std::vector<cpu::Link> links;
  for (size_t l = 0; l < count; ++l) {
    const cpu::Layer& layer = chain.layers[l];
    links.push_back({{nullptr, 0}, false, {nullptr, 0}, rows_of_g(bias_rows[l], t, layer.outputs, "bias_rows")});
    if (l > 0) {
      links[l].weight_rows = rows_of_g(weight_rows[l - 1], t, layer.outputs * layer.inputs, "weight_rows");
    }
  }
  return links;
}

Tensor chain_backward_cpu(const Tensor& grad, const Tensors& inputs, const Tensors& weights, const Tensors& weight_rows,
                          const Tensors& bias_rows, const std::vector<int64_t>& sizes) {
  const DType dtype = full_dtype(grad, "grad");
  const std::vector<int64_t> start = starts(sizes);
  const cpu::Tasks tasks{start.data(), static_cast<int64_t>(sizes.size())};
  const int64_t n = start.back();
  const ChainView chain(weights, std::vector<std::optional<Tensor>>(weights.size()), grad);
  std::vector<cpu::Link> links = links_of(chain, weight_rows, bias_rows, tasks.t);
  check(inputs.size() + 1 == weights.size(), "inputs must be those of all layers but the first, got ", inputs.size(),
        " for ", weights.size(), " weights");
  for (size_t l = 1; l < weights.size(); ++l) {
    const Tensor& x = inputs[l - 1];
    const int64_t columns = chain.layers[l].inputs;
    check_rows(x, n, columns, grad, "inputs[" + std::to_string(l - 1) + "]");
    links[l].x = const_matrix_of(x);
    links[l].is_padded = x.size(1) == cpu::padded(columns);
  }
  check(grad.dim() == 2 && grad.size(0) == n && grad.size(1) == chain.layers.back().outputs,
        "grad must have shape (n, outputs) = (", n, ", ", chain.layers.back().outputs, "), got ", shape_of(grad));
  const Tensor dense = as_contiguous(grad);
  Tensor delta = new_like(grad, {n, cpu::padded(chain.layers[0].outputs)});
  cpu::chain_backward(const_matrix_of(dense), dtype, chain.layers.data(), links.data(), chain.count(), tasks,
                      matrix_of(delta), kTorchThreads);
  return delta;
}

// Class numbers as cross entropy takes them; holds on to a copy where one was needed.
struct TargetView {
  Tensor tensor;

  TargetView(const Tensor& target, int64_t n, int64_t classes) : tensor(target) {
    check(target.dim() == 1 && target.size(0) == n && target.scalar_type() == ScalarType::Long,
          "target must have shape (n,) = (", n, ",) and int64, got ", shape_of(target));
    tensor = as_contiguous(target);
    for (int64_t i = 0; i < n; ++i) {
      check(data()[i] >= 0 && data()[i] < classes, "target must be from 0 to ", classes - 1, ", got ", data()[i]);
    }
  }
  const int64_t* data() const { return static_cast<const int64_t*>(tensor.const_data_ptr()); }
};

Tensor chain_pass_cpu(const std::optional<Tensor>& x, const Tensors& entries, const std::optional<Tensor>& positions,
                      const Tensor& target, const Tensors& weights, const std::vector<std::optional<Tensor>>& biases,
                      const Tensors& weight_rows, const Tensors& bias_rows, const std::vector<int64_t>& sizes) {
  check(!weights.empty(), "weights must be given, got none");
  const DType dtype = full_dtype(weights[0], "weights[0]");
  const std::vector<int64_t> start = starts(sizes);
  const int64_t n = start.back();
  const cpu::Tasks tasks{start.data(), static_cast<int64_t>(sizes.size())};
  const ChainView chain(weights, biases, weights[0]);
  const std::vector<cpu::Link> links = links_of(chain, weight_rows, bias_rows, tasks.t);
  const InputView view(x, entries, positions, n, chain.layers[0].inputs, weights[0], "weights[0]");
  const TargetView classes(target, n, chain.layers.back().outputs);
  Tensor delta = new_like(weights[0], {n, cpu::padded(chain.layers[0].outputs)});
  cpu::chain_pass(view.input, classes.data(), dtype, chain.layers.data(), links.data(), chain.count(), tasks,
                  matrix_of(delta), kTorchThreads);
  return delta;
}

Tensor cross_entropy_gradient_cpu(const Tensor& logits, const Tensor& target, const std::vector<int64_t>& sizes) {
  const DType dtype = full_dtype(logits, "logits");
  check(logits.dim() == 2, "logits must have shape (n, classes), got ", shape_of(logits));
  const Tensor dense = as_contiguous(logits);
  const int64_t n = logits.size(0);
  const int64_t count = logits.size(1);
  const TargetView classes(target, n, count);
  const std::vector<int64_t> start = starts(sizes);
  check(start.back() == n, "sizes must add up to n = ", n, ", got ", start.back());
  Tensor grad = new_like(logits, {n, count});
  cpu::cross_entropy_gradient(const_matrix_of(dense), dtype, classes.data(),
                              {start.data(), static_cast<int64_t>(sizes.size())}, count, matrix_of(grad),
                              kTorchThreads);
  return grad;
}

}  // namespace
}  // namespace gem_fast

STABLE_TORCH_LIBRARY_FRAGMENT(gem_fast, m) {
  m.def("_chain_forward(Tensor z, Tensor[] weights, Tensor?[] biases) -> Tensor[]");
  m.def(
      "_chain_backward(Tensor grad, Tensor[] inputs, Tensor[] weights, Tensor(a!)[] weight_rows, "
      "Tensor(b!)[] bias_rows, int[] sizes) -> Tensor");
  m.def(
      "_chain_pass(Tensor? x, Tensor[] entries, Tensor? positions, Tensor target, Tensor[] weights, Tensor?[] biases, "
      "Tensor(a!)[] weight_rows, Tensor(b!)[] bias_rows, int[] sizes) -> Tensor");
  m.def("_cross_entropy_gradient(Tensor logits, Tensor target, int[] sizes) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(gem_fast, CPU, m) {
  m.impl("_chain_forward", TORCH_BOX(&gem_fast::chain_forward_cpu));
  m.impl("_chain_backward", TORCH_BOX(&gem_fast::chain_backward_cpu));
  m.impl("_chain_pass", TORCH_BOX(&gem_fast::chain_pass_cpu));
  m.impl("_cross_entropy_gradient", TORCH_BOX(&gem_fast::cross_entropy_gradient_cpu));
}
