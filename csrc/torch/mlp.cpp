// What the private operators for linear layers run on the CPU.
#include "cpu/mlp/mlp.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/mlp/cross_entropy.h"
#include "cpu/mlp/layer_gradient.h"
#include "cpu/mlp/pairing.h"
#include "cpu/mlp/sparse.h"
#include "torch/checks.h"
#include "torch/mlp_views.h"
#include "torch/torch_threads.h"
#include "torch/views.h"

namespace gem_fast {
namespace {

using OptionalTensors = std::vector<std::optional<Tensor>>;

// ---- a sparse first layer ----------------------------------------------------------------------------------

// The number of consecutive rows among which pairs are formed.
constexpr int64_t kPairedRows = 256;

std::tuple<Tensor, Tensor, Tensor> sparse_rows_cpu(const Tensor& x) {
  const DType dtype = float_or_double(x, "x");
  check(x.dim() == 2 && x.is_contiguous(), "x must be contiguous with shape (n, d), got ", shape_of(x));
  const int64_t n = x.size(0);
  const int64_t d = x.size(1);
  check(x.numel() <= std::numeric_limits<int32_t>::max(), "x must have fewer than 2^31 elements, got ", x.numel());
  Tensor start = new_ints(x, n * cpu::column_blocks(d) + 1);
  const int64_t count = cpu::count_entries(x.const_data_ptr(), dtype, n, d, ints(start), kTorchThreads);
  Tensor columns = new_ints(x, count), values = new_like(x, {count});
  cpu::fill_rows(x.const_data_ptr(), dtype, n, d, ints(start), ints(columns), values.mutable_data_ptr(), kTorchThreads);
  return {start, columns, values};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sparse_pairs_cpu(const Tensor& start, const Tensor& columns,
                                                            const Tensor& values, int64_t d, bool of_columns) {
  const DType dtype = float_or_double(values, "values");
  const cpu::SparseRows x = sparse_rows_of({start, columns, values}, d);
  const int64_t n = x.count(start.size(0));
  const cpu::SparseLines lines = of_columns ? cpu::columns_of(x, dtype, n) : cpu::rows_of(x, n);
  const cpu::Pairing pairing = cpu::pair(lines, of_columns ? cpu::kColumnBlock : kPairedRows);
  const auto pairs = static_cast<int64_t>(pairing.start.size()) - 1;
  Tensor pair_lines = new_ints(values, 2 * pairs), pair_start = new_ints(values, pairs + 1);
  std::copy(pairing.lines.begin(), pairing.lines.end(), ints(pair_lines));
  std::copy(pairing.start.begin(), pairing.start.end(), ints(pair_start));
  Tensor index = new_ints(values, pairing.start.back()), both = new_like(values, {pairing.start.back(), 2});
  cpu::fill_pairs(lines, dtype, pairing, ints(index), both.mutable_data_ptr());
  return {pair_lines, pair_start, index, both};
}

Tensor sparse_linear_cpu(const Tensor& start, const Tensor& columns, const Tensor& values,
                         const std::optional<Tensor>& positions, const Tensor& weight,
                         const std::optional<Tensor>& bias) {
  const DType dtype = float_or_double(values, "values");
  const LayerView view(weight, bias, values);
  const cpu::SparseRows x = sparse_rows_of({start, columns, values}, view.layer.inputs);
  const int64_t rows = x.count(start.size(0));
  const int64_t n = positions.has_value() ? positions->size(0) : rows;
  Tensor y = new_like(values, {n, view.layer.outputs});
  cpu::sparse_linear(x, dtype, positions_of(positions, rows, n), n, view.layer, matrix_of(y), kTorchThreads);
  return y;
}

// ---- the gradients of a layer's weight ---------------------------------------------------------------------

// delta is (n, outputs), or (n, padded(outputs)) with zeros beyond the outputs, which spares a copy.
void layer_gradient_cpu(const Tensor& out, const Tensor& delta, const std::optional<Tensor>& x, const Tensors& entries,
                        const std::optional<Tensor>& positions, const std::vector<int64_t>& sizes) {
  check(out.scalar_type() == delta.scalar_type() && out.dim() == 3 &&
            out.size(0) == static_cast<int64_t>(sizes.size()) && out.stride(2) == 1 && out.stride(1) == out.size(2),
        "out must have shape (t, outputs, inputs) with contiguous tasks and delta's dtype, got ", shape_of(out));
  const TasksView of(sizes);
  const int64_t n = of.rows();
  const int64_t outputs = out.size(1);
  const InputView view(x, entries, positions, n, out.size(2), delta, "delta");
  const DType dtype = float_or_double(delta, "delta");
  const bool is_padded = delta.dim() == 2 && delta.size(1) == cpu::padded(outputs);
  check(delta.dim() == 2 && delta.size(0) == n && (delta.size(1) == outputs || is_padded),
        "delta must have shape (n, outputs) = (", n, ", ", outputs, "), got ", shape_of(delta));
  const Tensor padded = is_padded && delta.stride(1) == 1 ? delta : padded_copy(as_contiguous(delta));
  cpu::layer_gradients({dtype, of.tasks(), outputs, out.size(2), const_matrix_of(padded), view.input},
                       {out.mutable_data_ptr(), out.stride(0)}, kTorchThreads);
}

// ---- the gradient of the cross entropy ---------------------------------------------------------------------

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

Tensor cross_entropy_gradient_cpu(const Tensor& logits, const Tensor& target, const std::vector<int64_t>& sizes) {
  const DType dtype = float_or_double(logits, "logits");
  check(logits.dim() == 2, "logits must have shape (n, classes), got ", shape_of(logits));
  const Tensor dense = as_contiguous(logits);
  const int64_t n = logits.size(0);
  const int64_t classes = logits.size(1);
  const TargetView view(target, n, classes);
  const TasksView of(sizes);
  check(of.rows() == n, "sizes must add up to n = ", n, ", got ", of.rows());
  Tensor grad = new_like(logits, {n, classes});
  cpu::cross_entropy_gradient(const_matrix_of(dense), dtype, view.data(), of.tasks(), classes, matrix_of(grad),
                              kTorchThreads);
  return grad;
}

// ---- an MLP ------------------------------------------------------------------------------------------------

// The rows of G of one parameter, (t, ...) with contiguous tasks; null for an empty tensor, which means: not wanted.
cpu::Matrix rows_of_g(const Tensor& rows, int64_t t, int64_t size, const char* name) {
  if (rows.numel() == 0) return {nullptr, 0};
  const int64_t last = rows.dim() - 1;
  check(rows.dim() >= 2 && rows.size(0) == t && rows.numel() == t * size && rows.stride(last) == 1 &&
            (last == 1 || rows.stride(1) == rows.size(2)),
        name, " must have one contiguous matrix of ", size, " elements per task, got ", shape_of(rows));
  return {rows.mutable_data_ptr(), rows.stride(0)};
}

// The layers, the rows of G of all weights but the first and of all biases, and delta, which a pass returns.
struct MlpView {
  DType dtype;
  TasksView of;
  std::vector<LayerView> views;
  std::vector<cpu::MlpLayer> layers;
  Tensor delta;

  MlpView(const Tensors& weights, const OptionalTensors& biases, const Tensors& weight_rows, const Tensors& bias_rows,
          const std::vector<int64_t>& sizes, const Tensor& like, const char* like_name)
      : dtype(float_or_double(like, like_name)), of(sizes) {
    const size_t count = weights.size();
    check(biases.size() == count, "biases must have one entry per weight, got ", biases.size(), " for ", count);
    for (size_t l = 0; l < count; ++l) {
      views.emplace_back(weights[l], biases[l], like);
      layers.push_back({views[l].layer});
      check(l == 0 || layer(l).inputs == layer(l - 1).outputs, "weights[", l, "] must take the ",
            layer(l - (l > 0)).outputs, " outputs of the layer before, got shape ", shape_of(weights[l]));
    }
    check(count > 1 && weight_rows.size() == count - 1 && bias_rows.size() == count,
          "weights must be two or more, with weight_rows for all but the first and bias_rows for all, got ", count,
          ", ", weight_rows.size(), " and ", bias_rows.size());
    const int64_t t = of.tasks().t;
    for (size_t l = 0; l < count; ++l) {
      layers[l].bias_rows = rows_of_g(bias_rows[l], t, layer(l).outputs, "bias_rows");
      if (l == 0) continue;
      layers[l].weight_rows = rows_of_g(weight_rows[l - 1], t, layer(l).outputs * layer(l).inputs, "weight_rows");
    }
    delta = new_like(like, {of.rows(), cpu::padded(layer(0).outputs)});
  }

  const cpu::Layer& layer(size_t l) const { return layers[l].layer; }
  int64_t classes() const { return layers.back().layer.outputs; }
  cpu::Mlp mlp() const {
    return {dtype, layers.data(), static_cast<int64_t>(layers.size()), of.tasks(), matrix_of(delta)};
  }
};

Tensor mlp_backward_cpu(const Tensor& grad, const Tensors& inputs, const Tensors& weights, const Tensors& weight_rows,
                        const Tensors& bias_rows, const std::vector<int64_t>& sizes) {
  MlpView view(weights, OptionalTensors(weights.size()), weight_rows, bias_rows, sizes, grad, "grad");
  const int64_t n = view.of.rows();
  check(inputs.size() + 1 == weights.size(), "inputs must be those of all layers but the first, got ", inputs.size(),
        " for ", weights.size(), " weights");
  for (size_t l = 1; l < weights.size(); ++l) {
    const Tensor& x = inputs[l - 1];
    const int64_t columns = view.layer(l).inputs;
    check(x.dim() == 2 && x.size(0) == n && x.size(1) == columns && x.scalar_type() == grad.scalar_type() &&
              x.stride(1) == 1,
          "inputs[", l - 1, "] must have shape (n, ", columns, "), ", name_of(grad.scalar_type()),
          " and contiguous rows, got ", shape_of(x));
    view.layers[l].x = const_matrix_of(x);
  }
  check(grad.dim() == 2 && grad.size(0) == n && grad.size(1) == view.classes(), "grad must have shape (n, outputs) = (",
        n, ", ", view.classes(), "), got ", shape_of(grad));
  const Tensor dense = as_contiguous(grad);
  cpu::mlp_backward(view.mlp(), const_matrix_of(dense), kTorchThreads);
  return view.delta;
}

Tensor mlp_pass_cpu(const std::optional<Tensor>& x, const Tensors& entries, const std::optional<Tensor>& positions,
                    const Tensor& target, const Tensors& weights, const OptionalTensors& biases,
                    const Tensors& weight_rows, const Tensors& bias_rows, const std::vector<int64_t>& sizes) {
  check(!weights.empty(), "weights must be given, got none");
  const MlpView view(weights, biases, weight_rows, bias_rows, sizes, weights[0], "weights[0]");
  const int64_t n = view.of.rows();
  const InputView input(x, entries, positions, n, view.layer(0).inputs, weights[0], "weights[0]");
  const TargetView targets(target, n, view.classes());
  cpu::mlp_pass(view.mlp(), input.input, nullptr, targets.data(), kTorchThreads);
  return view.delta;
}

}  // namespace
}  // namespace gem_fast

STABLE_TORCH_LIBRARY_IMPL(gem_fast, CPU, m) {
  m.impl("_sparse_rows", TORCH_BOX(&gem_fast::sparse_rows_cpu));
  m.impl("_sparse_pairs", TORCH_BOX(&gem_fast::sparse_pairs_cpu));
  m.impl("_sparse_linear", TORCH_BOX(&gem_fast::sparse_linear_cpu));
  m.impl("_layer_gradient_", TORCH_BOX(&gem_fast::layer_gradient_cpu));
  m.impl("_cross_entropy_gradient", TORCH_BOX(&gem_fast::cross_entropy_gradient_cpu));
  m.impl("_mlp_backward", TORCH_BOX(&gem_fast::mlp_backward_cpu));
  m.impl("_mlp_pass", TORCH_BOX(&gem_fast::mlp_pass_cpu));
}
