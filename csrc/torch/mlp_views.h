// Tensors as linear layers and their inputs, for the operators of mlp.cpp.
#pragma once

#include <initializer_list>
#include <optional>
#include <vector>

#include "cpu/mlp/layer.h"
#include "cpu/mlp/matrix.h"
#include "cpu/mlp/sparse.h"
#include "torch/checks.h"
#include "torch/torch_threads.h"
#include "torch/views.h"

namespace gem_fast {

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
  cpu::pad_rows(const_matrix_of(x), float_or_double(x, "x"), x.size(0), x.size(1), wide.mutable_data_ptr(),
                kTorchThreads);
  return wide;
}

// Which rows are which task's, from the number of each task's rows.
struct TasksView {
  std::vector<int64_t> start{0};

  explicit TasksView(const std::vector<int64_t>& sizes) {
    for (const int64_t size : sizes) start.push_back(start.back() + size);
  }

  int64_t rows() const { return start.back(); }
  cpu::Tasks tasks() const { return {start.data(), static_cast<int64_t>(start.size()) - 1}; }
};

// Which n of `rows` rows are meant; null for all of them.
inline const int64_t* positions_of(const std::optional<Tensor>& positions, int64_t rows, int64_t n) {
  if (!positions.has_value()) return nullptr;
  check(positions->scalar_type() == ScalarType::Long && positions->dim() == 1 && positions->is_contiguous(),
        "positions must be int64, contiguous and of shape (n,), got ", shape_of(*positions));
  check(positions->size(0) == n, "positions must have shape (n,) = (", n, ",), got ", shape_of(*positions));
  const auto* numbers = static_cast<const int64_t*>(positions->const_data_ptr());
  for (int64_t i = 0; i < n; ++i) {
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
};

// The entries of a memory's rows, from the tensors (start, columns, values) of `_sparse_rows`.
inline cpu::SparseRows sparse_rows_of(const Tensors& entries, int64_t d) {
  check(entries.size() == 3, "entries by rows must be three tensors, got ", entries.size());
  return {ints(entries[0]), ints(entries[1]), entries[2].const_data_ptr(), d};
}

// Pairs of lines, from the tensors (lines, start, index, values) of `_sparse_pairs`.
inline cpu::SparsePairs sparse_pairs_of(const Tensors& entries) {
  check(entries.size() == 4, "pairs must be four tensors, got ", entries.size());
  return {ints(entries[0]), ints(entries[1]), ints(entries[2]), entries[3].const_data_ptr()};
}

// The input of a layer for n examples, see cpu::LayerInput: without entries x (n, inputs), with positions the entries
// of a memory's rows, else pairs of lines. Holds on to a copy of x where one was needed.
struct InputView {
  Tensor x;
  cpu::SparsePairs pairs{};
  cpu::SparseRows rows{};
  cpu::LayerInput input{};

  InputView(const std::optional<Tensor>& dense, const Tensors& entries, const std::optional<Tensor>& positions,
            int64_t n, int64_t inputs, const Tensor& like, const char* like_name) {
    if (entries.empty()) {
      check(dense.has_value() && dense->dim() == 2 && dense->size(0) == n && dense->size(1) == inputs &&
                dense->scalar_type() == like.scalar_type(),
            "x must have shape (n, inputs) = (", n, ", ", inputs, ") and ", like_name, "'s dtype, got ",
            shape_of(dense));
      x = dense->stride(1) == 1 ? *dense : as_contiguous(*dense);
      input.dense = const_matrix_of(x);
    } else if (positions.has_value()) {
      rows = sparse_rows_of(entries, inputs);
      input.rows = &rows;
      input.positions = positions_of(positions, rows.count(entries[0].size(0)), n);
    } else {
      pairs = sparse_pairs_of(entries);
      input.pairs = &pairs;
    }
  }
  InputView(const InputView&) = delete;
  InputView& operator=(const InputView&) = delete;
};

}  // namespace gem_fast
