// A pass through linear layers and the projection from its examples, without rows of G, on the CPU.
#include <torch/csrc/stable/library.h>

#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "core/status.h"
#include "cpu/buffer.h"
#include "cpu/mlp/example_products.h"
#include "cpu/mlp/example_rows.h"
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

// The current mini-batch's input of the first layer, (n, inputs): as entries where the memory's examples are.
struct CurrentView {
  InputView dense;
  std::vector<int32_t> start, columns;
  cpu::Buffer values;
  std::vector<int64_t> positions;
  cpu::SparseRows rows{};
  cpu::LayerInput input{};

  CurrentView(const Tensor& x, const Tensor& weight, DType dtype, bool by_entries)
      : dense(x, {}, std::nullopt, x.size(0), weight.size(1), weight, "weights[0]"), input(dense.input) {
    const int64_t n = x.size(0);
    const int64_t d = weight.size(1);
    if (!by_entries || input.dense.stride != d) return;
    start.resize(n * cpu::column_blocks(d) + 1);
    const int64_t count = cpu::count_entries(input.dense.data, dtype, n, d, start.data(), cpu::kThisThread);
    columns.resize(count);
    cpu::fill_rows(input.dense.data, dtype, n, d, start.data(), columns.data(), values.of(count * cpu::size_of(dtype)),
                   cpu::kThisThread);
    positions.resize(n);
    std::iota(positions.begin(), positions.end(), 0);
    rows = {start.data(), columns.data(), values.data(), d};
    input = {.rows = &rows, .positions = positions.data()};
  }
};

// The layers as a pass takes them; holds on to what they are views of.
struct PassView {
  std::vector<LayerView> views;
  std::vector<cpu::MlpLayer> layers;

  PassView(const KeptView& kept, const Tensors& weights, const OptionalTensors& biases) {
    check(biases.size() == weights.size(), "there must be one entry of biases per weight");
    for (size_t l = 0; l < weights.size(); ++l) {
      views.emplace_back(weights[l], biases[l], weights[0]);
      layers.push_back({.layer = views[l].layer, .kept_x = kept.x[l], .kept_delta = kept.delta[l]});
    }
  }

  cpu::Mlp mlp(DType dtype, const TasksView& of) const {
    return {dtype, layers.data(), static_cast<int64_t>(layers.size()), of.tasks(), layers[0].kept_delta};
  }
};

void mlp_examples_cpu(const Tensor& kept, const std::optional<Tensor>& x, const Tensors& entries,
                      const std::optional<Tensor>& positions, const Tensor& target, const Tensors& weights,
                      const OptionalTensors& biases, const std::vector<int64_t>& sizes) {
  check_lists(weights, weights.size(), biases.size());
  const DType dtype = float_or_double(weights[0], "weights[0]");
  const TasksView of(sizes);
  const int64_t n = of.rows();
  const PassView pass(KeptView(kept, weights, n, dtype), weights, biases);
  const InputView input(x, entries, positions, n, weights[0].size(1), weights[0], "weights[0]");
  const std::vector<int64_t> targets = targets_of(target, positions, std::nullopt, n, weights.back().size(0));
  cpu::mlp_pass(pass.mlp(dtype, of), input.input, nullptr, targets.data(), kTorchThreads);
}

// The layers as a projection takes them, and all of the gradient.
struct GradientsView {
  std::vector<cpu::ExampleLayer> layers;
  std::vector<TensorRef> all;

  GradientsView(const KeptView& kept, const cpu::LayerInput& input, const Tensors& weights, const Tensors& weight_grads,
                const Tensors& bias_grads, DType dtype) {
    check_lists(weights, weight_grads.size(), bias_grads.size());
    for (size_t l = 0; l < weights.size(); ++l) {
      const int64_t outputs = weights[l].size(0);
      const int64_t inputs = weights[l].size(1);
      layers.push_back({outputs, inputs, l == 0 ? input : cpu::LayerInput{.dense = kept.x[l]}, kept.delta[l],
                        add(weight_grads[l], outputs * inputs, dtype, "weight_grads"),
                        add(bias_grads[l], outputs, dtype, "bias_grads")});
    }
  }

  void* add(const Tensor& grad, int64_t numel, DType dtype, const char* name) {
    void* data = gradient_of(grad, numel, dtype, name);
    if (data != nullptr) all.push_back({data, grad.numel(), 0});
    return data;
  }
};

// What a projection returns.
struct Answer {
  Tensor v, q, status, residual;

  Answer(const Tensor& like, int64_t t)
      : v(new_doubles(like, {t})), q(new_doubles(like, {t})), status(new_int(like)), residual(new_doubles(like, {})) {}

  // rows: memory for rows of G; empty where they come from products, as far as these are enough.
  void solve(const cpu::Examples& examples, const GradientsView& grads, double margin, double ridge,
             const Tensor& rows) const {
    check_not_negative(margin, "margin");
    check_not_negative(ridge, "ridge");
    const bool by_products = rows.numel() == 0;
    const int64_t size = cpu::example_rows_bytes(examples) / cpu::size_of(examples.dtype);
    check(by_products ||
              (rows.is_contiguous() && rows.numel() >= size && float_or_double(rows, "rows") == examples.dtype),
          "rows must be contiguous with ", size, " elements of the weights' dtype, or empty, got ", shape_of(rows));
    *ints(status) = cpu::project_examples(examples, {grads.all.data(), static_cast<int64_t>(grads.all.size())}, margin,
                                          ridge, doubles(v), doubles(q), doubles(residual),
                                          by_products ? nullptr : rows.mutable_data_ptr(), kTorchThreads);
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> mlp_project_cpu(const Tensors& weight_grads, const Tensors& bias_grads,
                                                           const Tensors& other_grads, const Tensor& kept,
                                                           const std::optional<Tensor>& x, const Tensors& entries,
                                                           const std::optional<Tensor>& positions,
                                                           const Tensors& weights, const std::vector<int64_t>& sizes,
                                                           double margin, double ridge, const Tensor& rows) {
  check_lists(weights, weight_grads.size(), bias_grads.size());
  const DType dtype = float_or_double(weights[0], "weights[0]");
  const TasksView of(sizes);
  const int64_t t = of.tasks().t;
  const KeptView view(kept, weights, of.rows(), dtype);
  const InputView input(x, entries, positions, of.rows(), weights[0].size(1), weights[0], "weights[0]");
  GradientsView grads(view, input.input, weights, weight_grads, bias_grads, dtype);
  for (const Tensor& grad : other_grads) grads.add(grad, grad.numel(), dtype, "other_grads");
  const Answer answer(kept, t);
  answer.solve({dtype, of.tasks(), grads.layers.data(), static_cast<int64_t>(grads.layers.size())}, grads, margin,
               ridge, rows);
  return {answer.v, answer.q, answer.status, answer.residual};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mlp_step_cpu(
    const Tensor& kept, const std::optional<Tensor>& x, const Tensors& entries, const std::optional<Tensor>& positions,
    const Tensor& target, const Tensors& weights, const OptionalTensors& biases, const std::vector<int64_t>& sizes,
    const Tensor& current_x, const Tensor& current_target, const Tensors& weight_grads, const Tensors& bias_grads,
    double margin, double ridge, const Tensor& rows) {
  check_lists(weights, weight_grads.size(), bias_grads.size());
  const DType dtype = float_or_double(weights[0], "weights[0]");
  std::vector<int64_t> all_sizes = sizes;
  all_sizes.push_back(current_x.size(0));
  const TasksView of(all_sizes);
  const int64_t t = static_cast<int64_t>(sizes.size());
  const int64_t n = of.rows() - all_sizes.back();
  const KeptView view(kept, weights, of.rows(), dtype);
  const PassView pass(view, weights, biases);
  const InputView input(x, entries, positions, n, weights[0].size(1), weights[0], "weights[0]");
  const CurrentView own(current_x, weights[0], dtype, !entries.empty());
  const std::vector<int64_t> targets = targets_of(target, positions, current_target, n, weights.back().size(0));
  check(static_cast<int64_t>(targets.size()) == of.rows(), "current_target must have as many elements as current_x");
  cpu::Current current{own.input, 0.0};
  cpu::mlp_pass(pass.mlp(dtype, of), input.input, &current, targets.data(), kTorchThreads);

  const GradientsView grads(view, input.input, weights, weight_grads, bias_grads, dtype);
  const Answer answer(kept, t);
  answer.solve({dtype,
                {of.tasks().start, t},
                grads.layers.data(),
                static_cast<int64_t>(grads.layers.size()),
                all_sizes.back(),
                own.input},
               grads, margin, ridge, rows);
  Tensor loss = new_like(weights[0], {});
  if (dtype == DType::kFloat64) {
    *static_cast<double*>(loss.mutable_data_ptr()) = current.loss;
  } else {
    *static_cast<float*>(loss.mutable_data_ptr()) = static_cast<float>(current.loss);
  }
  return {loss, answer.v, answer.q, answer.status, answer.residual};
}

}  // namespace
}  // namespace gem_fast

STABLE_TORCH_LIBRARY_IMPL(gem_fast, CPU, m) {
  m.impl("_mlp_examples_", TORCH_BOX(&gem_fast::mlp_examples_cpu));
  m.impl("_mlp_project_", TORCH_BOX(&gem_fast::mlp_project_cpu));
  m.impl("_mlp_step_", TORCH_BOX(&gem_fast::mlp_step_cpu));
}
