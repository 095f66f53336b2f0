// What the operators behind layers have in common: tensors as layers, activations and rows of G. They are private
// (their names begin with an underscore), on the CPU, in float32 and float64.
#pragma once

#include <initializer_list>
#include <optional>
#include <vector>

#include "arguments.h"
#include "cpu/linear.h"
#include "torch_threads.h"

namespace gem_fast {

inline DType full_dtype(const Tensor& x, const char* name) {
  const DType dtype = dtype_of(x, name);
  check(dtype == DType::kFloat32 || dtype == DType::kFloat64, name, " must be float32 or float64, got ",
        name_of(x.scalar_type()));
  return dtype;
}

inline int32_t* ints(const Tensor& x) { return static_cast<int32_t*>(x.mutable_data_ptr()); }

inline Tensor new_ints(const Tensor& like, int64_t n) { return allocate(like, &n, 1, aoti_torch_dtype_int32()); }

inline Tensor new_like(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return allocate(like, sizes.begin(), static_cast<int64_t>(sizes.size()),
                  like.scalar_type() == ScalarType::Double ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32());
}

// A matrix with contiguous rows.
inline cpu::Matrix matrix_of(const Tensor& x) { return {x.mutable_data_ptr(), x.stride(0)}; }
inline cpu::ConstMatrix const_matrix_of(const Tensor& x) { return {x.const_data_ptr(), x.stride(0)}; }

// x (n, columns), with contiguous rows, as (n, padded(columns)).
inline Tensor padded_copy(const Tensor& x) {
  Tensor wide = new_like(x, {x.size(0), cpu::padded(x.size(1))});
  cpu::pad_rows(const_matrix_of(x), full_dtype(x, "x"), x.size(0), x.size(1), wide.mutable_data_ptr(), kTorchThreads);
  return wide;
}

// Where each task's rows begin, and after the last one their number.
inline std::vector<int64_t> starts(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> start{0};
  for (const int64_t size : sizes) start.push_back(start.back() + size);
  return start;
}

// The numbers of the rows that are meant, each smaller than `rows`; null for all of them.
inline const int64_t* positions_of(const std::optional<Tensor>& positions, int64_t rows) {
  if (!positions.has_value()) return nullptr;
  check(positions->scalar_type() == ScalarType::Long && positions->dim() == 1 && positions->is_contiguous(),
        "positions must be int64, contiguous and of shape (n,), got ", shape_of(*positions));
  const auto* numbers = static_cast<const int64_t*>(positions->const_data_ptr());
  for (int64_t i = 0; i < positions->size(0); ++i) {
    check(numbers[i] >= 0 && numbers[i] < rows, "positions must be from 0 to ", rows - 1, ", got ", numbers[i]);
  }
  return numbers;
}

// Weight (outputs, inputs) and bias (outputs,) of a linear layer; holds on to copies where they were needed.
struct LayerView {
  Tensor weight;
  std::optional<Tensor> bias;
  cpu::Layer layer;

  LayerView(const Tensor& W, const std::optional<Tensor>& b, const Tensor& like) : weight(W) {
    check(W.scalar_type() == like.scalar_type() && W.dim() == 2, "weight must have shape (outputs, inputs) and ",
          name_of(like.scalar_type()), ", got ", shape_of(W), " ", name_of(W.scalar_type()));
    weight = as_contiguous(W);
    if (b.has_value()) {
      check(b->scalar_type() == like.scalar_type() && b->dim() == 1 && b->size(0) == W.size(0),
            "bias must have shape (outputs,) = (", W.size(0), ",) and ", name_of(like.scalar_type()), ", got ",
            shape_of(*b), " ", name_of(b->scalar_type()));
      bias = as_contiguous(*b);
    }
    layer = {weight.const_data_ptr(), bias.has_value() ? bias->const_data_ptr() : nullptr, W.size(0), W.size(1)};
  }

  int64_t outputs() const { return layer.outputs; }
  int64_t inputs() const { return layer.inputs; }
};

// Rows of G of one weight, out (t, outputs, inputs), from the gradients at the layer's output: delta (n, outputs), or
// (n, padded(outputs)) with zeros beyond the outputs, which spares a copy.
struct GradientCall {
  const Tensor& rows_of_g;
  int64_t outputs;
  std::vector<int64_t> start;
  Tensor wide;

  GradientCall(const Tensor& out, const Tensor& delta, const Tensor& like, const std::vector<int64_t>& sizes)
      : rows_of_g(out), outputs(out.dim() == 3 ? out.size(1) : 0), start(starts(sizes)), wide(delta) {
    check(out.scalar_type() == like.scalar_type() && out.dim() == 3 &&
              out.size(0) == static_cast<int64_t>(sizes.size()) && out.stride(2) == 1 && out.stride(1) == out.size(2),
          "out must have shape (t, outputs, d) with contiguous tasks, got ", shape_of(out));
    const int64_t width = cpu::padded(outputs);
    const bool fits = delta.dim() == 2 && (delta.size(1) == outputs || delta.size(1) == width);
    check(delta.scalar_type() == like.scalar_type() && fits && delta.size(0) == start.back(),
          "delta must have shape (n, outputs), got ", shape_of(delta));
    if (delta.size(1) < width || delta.stride(1) != 1) wide = padded_copy(as_contiguous(delta));
  }

  cpu::Tasks tasks() const { return {start.data(), static_cast<int64_t>(start.size()) - 1}; }
  cpu::ConstMatrix delta() const { return const_matrix_of(wide); }
  cpu::Matrix out() const { return {rows_of_g.mutable_data_ptr(), rows_of_g.stride(0)}; }
};

}  // namespace gem_fast
