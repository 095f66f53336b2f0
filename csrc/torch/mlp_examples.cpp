// A pass through linear layers and the projection from its examples, without rows of G, on the CPU.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "core/status.h"
#include "cpu/mlp/example_products.h"
#include "cpu/mlp/layer_gradient.h"
#include "cpu/mlp/mlp.h"
#include "torch/checks.h"
#include "torch/mlp_views.h"
#include "torch/torch_threads.h"
#include "torch/views.h"

namespace gem_fast {
namespace {

using OptionalTensors = std::vector<std::optional<Tensor>>;

// What a pass leaves behind, in one tensor: of each layer the gradient at its output, (n, padded(outputs)), and of all
// but the first the input, (n, padded(inputs)).
struct KeptView {
  std::vector<cpu::Matrix> delta, x;

  KeptView(const Tensor& kept, const Tensors& weights, int64_t n, DType dtype) {
    check(kept.dim() == 1 && kept.is_contiguous() && float_or_double(kept, "kept") == dtype,
          "kept must be contiguous, of one dimension and of the weights' dtype, got ", shape_of(kept));
    int64_t offset = 0;
    const auto plane = [&](int64_t columns) {
      const int64_t width = cpu::padded(columns);
      const int64_t start = offset;
      offset += n * width;
      return cpu::Matrix{cpu::at(kept.mutable_data_ptr(), start, dtype), width};
    };
    for (size_t l = 0; l < weights.size(); ++l) {
      delta.push_back(plane(weights[l].size(0)));
      x.push_back(l == 0 ? cpu::Matrix{nullptr, 0} : plane(weights[l].size(1)));
    }
    check(offset <= kept.numel(), "kept must have room for ", offset, " elements, got ", kept.numel());
  }
};

// A gradient as the kernels write it; null for an empty tensor, which means: not wanted.
void* gradient_of(const Tensor& grad, int64_t numel, DType dtype, const char* name) {
  if (grad.numel() == 0) return nullptr;
  check(grad.is_contiguous() && grad.numel() == numel && float_or_double(grad, name) == dtype, name,
        " must be contiguous with ", numel, " elements of the weights' dtype, got ", shape_of(grad));
  return grad.mutable_data_ptr();
}

void check_lists(const Tensors& weights, size_t weight_grads, size_t bias_grads) {
  check(weights.size() > 1 && weight_grads == weights.size() && bias_grads == weights.size(),
        "weights must be two or more, with a weight_grad and a bias_grad each, got ", weights.size(), ", ",
        weight_grads, " and ", bias_grads);
}

// The targets of the memory's examples that count, and those of the current mini-batch after them.
std::vector<int64_t> targets_of(const Tensor& target, const std::optional<Tensor>& positions,
                                const std::optional<Tensor>& current, int64_t n, int64_t classes) {
  std::vector<int64_t> result;
  const auto take = [&](const Tensor& from, const int64_t* at, int64_t count, const char* name) {
    check(from.dim() == 1 && from.scalar_type() == ScalarType::Long && from.is_contiguous() &&
              (at != nullptr || from.size(0) == count),
          name, " must be contiguous int64 of shape (n,), got ", shape_of(from));
    const auto* numbers = static_cast<const int64_t*>(from.const_data_ptr());
    for (int64_t i = 0; i < count; ++i) {
      result.push_back(numbers[at == nullptr ? i : at[i]]);
      check(result.back() >= 0 && result.back() < classes, name, " must be from 0 to ", classes - 1, ", got ",
            result.back());
    }
  };
  take(target, positions_of(positions, target.size(0), n), n, "target");
  if (current.has_value()) take(*current, nullptr, current->size(0), "current_target");
  return result;
}

Tensor mlp_examples_cpu(const Tensor& kept, const std::optional<Tensor>& x, const Tensors& entries,
                        const std::optional<Tensor>& positions, const Tensor& target, const Tensors& weights,
                        const OptionalTensors& biases, const std::vector<int64_t>& sizes,
                        const std::optional<Tensor>& current_x, const std::optional<Tensor>& current_target,
                        const Tensors& weight_grads, const Tensors& bias_grads) {
  const bool has_current = current_x.has_value();
  check(biases.size() == weights.size() && has_current == current_target.has_value(),
        "there must be one entry of biases per weight, and current_target with current_x");
  if (has_current) check_lists(weights, weight_grads.size(), bias_grads.size());
  const DType dtype = float_or_double(weights[0], "weights[0]");
  const TasksView of(sizes);
  const int64_t n = of.rows();
  const int64_t current_n = has_current ? current_x->size(0) : 0;
  check(!has_current || sizes.back() == current_n, "the last of sizes must be the current mini-batch's");
  const KeptView view(kept, weights, n, dtype);
  std::vector<LayerView> views;
  std::vector<cpu::MlpLayer> layers;
  for (size_t l = 0; l < weights.size(); ++l) {
    views.emplace_back(weights[l], biases[l], weights[0]);
    layers.push_back({.layer = views[l].layer, .kept_x = view.x[l], .kept_delta = view.delta[l]});
  }
  const int64_t inputs = weights[0].size(1);
  const InputView input(x, entries, positions, n - current_n, inputs, weights[0], "weights[0]");
  std::optional<InputView> own;
  if (has_current) own.emplace(current_x, Tensors{}, std::nullopt, current_n, inputs, weights[0], "weights[0]");
  cpu::Current current{has_current ? own->input : cpu::LayerInput{}, 0.0};
  const std::vector<int64_t> targets =
      targets_of(target, positions, current_target, n - current_n, weights.back().size(0));
  cpu::mlp_pass({dtype, layers.data(), static_cast<int64_t>(layers.size()), of.tasks(), view.delta[0]}, input.input,
                has_current ? &current : nullptr, targets.data(), kTorchThreads);
  if (has_current) {
    const int64_t first = n - current_n;
    const int64_t all[] = {0, current_n};
    for (size_t l = 0; l < weights.size(); ++l) {
      cpu::LayerInput layer_x = own->input;
      if (l > 0) layer_x.dense = cpu::rows_from(view.x[l], first, dtype);
      const cpu::Layer& layer = views[l].layer;
      const cpu::ConstMatrix delta = cpu::rows_from(view.delta[l], first, dtype);
      void* weight = gradient_of(weight_grads[l], layer.outputs * layer.inputs, dtype, "weight_grads");
      void* bias = gradient_of(bias_grads[l], layer.outputs, dtype, "bias_grads");
      if (bias != nullptr) cpu::sum_rows(delta, dtype, current_n, layer.outputs, bias);
      if (weight == nullptr) continue;
      cpu::layer_gradients({dtype, {all, 1}, layer.outputs, layer.inputs, delta, layer_x}, {weight, 0}, kTorchThreads);
    }
  }
  Tensor loss = new_like(weights[0], {});
  if (dtype == DType::kFloat64) {
    *static_cast<double*>(loss.mutable_data_ptr()) = current.loss;
  } else {
    *static_cast<float*>(loss.mutable_data_ptr()) = static_cast<float>(current.loss);
  }
  return loss;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mlp_project_cpu(const Tensors& weight_grads, const Tensors& bias_grads,
                                                           const Tensors& other_grads, const Tensor& kept,
                                                           const std::optional<Tensor>& x, const Tensors& entries,
                                                           const std::optional<Tensor>& positions,
                                                           const Tensors& weights, const std::vector<int64_t>& sizes,
                                                           const std::optional<Tensor>& current_x, int64_t rows,
                                                           double margin, double ridge) {
  check_lists(weights, weight_grads.size(), bias_grads.size());
  check_not_negative(margin, "margin");
  check_not_negative(ridge, "ridge");
  const DType dtype = float_or_double(weights[0], "weights[0]");
  const TasksView of(sizes);
  const int64_t t = of.tasks().t;
  const KeptView view(kept, weights, rows, dtype);
  const InputView input(x, entries, positions, of.rows(), weights[0].size(1), weights[0], "weights[0]");
  std::vector<cpu::ExampleLayer> layers;
  std::vector<TensorRef> all;
  const auto add = [&](const Tensor& grad, int64_t numel, const char* name) {
    void* data = gradient_of(grad, numel, dtype, name);
    if (data != nullptr) all.push_back({data, grad.numel(), 0});
    return data;
  };
  for (size_t l = 0; l < weights.size(); ++l) {
    const int64_t outputs = weights[l].size(0);
    const int64_t inputs = weights[l].size(1);
    cpu::LayerInput layer_x = input.input;
    if (l > 0) layer_x = {.dense = view.x[l]};
    layers.push_back({outputs, inputs, layer_x, view.delta[l], add(weight_grads[l], outputs * inputs, "weight_grads"),
                      add(bias_grads[l], outputs, "bias_grads")});
  }
  for (const Tensor& grad : other_grads) add(grad, grad.numel(), "other_grads");
  Tensor v = new_doubles(kept, {t}), q = new_doubles(kept, {t}), status = new_int(kept);
  Tensor residual = new_doubles(kept, {});
  cpu::Examples examples{dtype, of.tasks(), layers.data(), static_cast<int64_t>(layers.size())};
  std::optional<InputView> own;
  if (current_x.has_value()) {
    examples.current = rows - of.rows();
    own.emplace(current_x, Tensors{}, std::nullopt, examples.current, weights[0].size(1), weights[0], "weights[0]");
    examples.current_x = own->input.dense;
  }
  const bool done = cpu::project_examples(examples, {all.data(), static_cast<int64_t>(all.size())}, margin, ridge,
                                          doubles(v), doubles(q), doubles(residual), kTorchThreads);
  *ints(status) = done ? kSolved : kInaccurate;
  return {v, q, status, residual};
}

}  // namespace
}  // namespace gem_fast

STABLE_TORCH_LIBRARY_IMPL(gem_fast, CPU, m) {
  m.impl("_mlp_examples_", TORCH_BOX(&gem_fast::mlp_examples_cpu));
  m.impl("_mlp_project_", TORCH_BOX(&gem_fast::mlp_project_cpu));
}
