// From tensors to the raw pointers and sizes that the kernels take, and to the results that the operators return.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "core/arrays.h"
#include "core/nnqp_problem.h"
#include "core/projection_problem.h"
#include "torch/checks.h"

namespace gem_fast {

inline Tensor as_contiguous(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

// G with its rows contiguous; holds on to the copy where one was needed.
struct MatrixView {
  Tensor tensor;
  RowMatrix rows;

  explicit MatrixView(const Tensor& G) : tensor(G) {
    check(G.dim() == 2, "G must have shape (t, p), got ", shape_of(G));
    const DType dtype = dtype_of(G, "G");
    const int64_t t = G.size(0);
    const int64_t p = G.size(1);
    if (p > 1 && G.stride(1) != 1) tensor = as_contiguous(G);
    rows = {tensor.const_data_ptr(), t > 1 ? tensor.stride(0) : p, t, p, dtype};
  }
};

// The gradients as one flattened vector; holds on to contiguous copies of those that are not contiguous.
struct TensorListView {
  std::vector<TensorRef> items;
  Tensors copies;
  std::vector<std::pair<size_t, size_t>> copied;  // (index in the list, index in `copies`)
  int64_t numel = 0;

  // `written`: whether the list is written to, see write_back.
  TensorListView(const Tensors& grads, const Tensor& G, bool written) {
    if (written) check_writable(grads, "grads");
    check(!grads.empty(), "grads must hold at least one tensor, got an empty list");
    for (size_t i = 0; i < grads.size(); ++i) {
      const Tensor& x = grads[i];
      check(x.scalar_type() == G.scalar_type(), "grads[", i, "] must have G's dtype ", name_of(G.scalar_type()),
            ", got ", name_of(x.scalar_type()));
      const Tensor data = as_contiguous(x);
      if (!x.is_contiguous()) {
        copied.emplace_back(i, copies.size());
        copies.push_back(data);
      }
      const int64_t n = x.numel();
      items.push_back({n > 0 ? data.mutable_data_ptr() : nullptr, n, numel});
      numel += n;
    }
    check(numel == G.size(1), "grads must hold p = ", G.size(1), " elements in total to match G of shape ", shape_of(G),
          ", got ", numel);
  }

  TensorList list() const { return {items.data(), static_cast<int64_t>(items.size())}; }

  // Writes what was changed in a contiguous copy back where it came from.
  void write_back(const Tensors& grads) const {
    for (const auto& [index, copy] : copied) {
      Tensor target = grads[index];
      torch::stable::copy_(target, copies[copy]);
    }
  }
};

// ---- results ------------------------------------------------------------------------------------------------

// A new contiguous tensor on x's device. The C shim is called directly: through the dispatcher an allocation costs
// as much as solving a small problem.
inline Tensor allocate(const Tensor& x, const int64_t* sizes, int64_t dim, int32_t dtype) {
  std::vector<int64_t> strides(dim, 1);
  for (int64_t d = dim - 1; d > 0; --d) strides[d - 1] = strides[d] * std::max<int64_t>(sizes[d], 1);
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dim, sizes, strides.data(), dtype, device_type, x.get_device_index(), &handle));
  return Tensor(handle);
}

inline Tensor new_doubles(const Tensor& x, std::initializer_list<int64_t> sizes) {
  return allocate(x, sizes.begin(), static_cast<int64_t>(sizes.size()), aoti_torch_dtype_float64());
}

inline Tensor new_int(const Tensor& x) { return allocate(x, nullptr, 0, aoti_torch_dtype_int32()); }

inline int32_t* ints(const Tensor& x) { return static_cast<int32_t*>(x.mutable_data_ptr()); }
inline double* doubles(const Tensor& x) { return static_cast<double*>(x.mutable_data_ptr()); }

// ---- the arguments and results of one operator -----------------------------------------------------------------

// G and the gradients that it is multiplied with or added to.
struct CombineCall {
  MatrixView matrix;
  TensorListView grads;

  CombineCall(const Tensors& list, const Tensor& G, bool written = true) : matrix(G), grads(list, G, written) {}
};

struct GramCall : CombineCall {
  Products products;
  Tensor P, q, g_squared;

  GramCall(const Tensors& list, const Tensor& G, bool in_float64) : CombineCall(list, G, false) {
    products = in_float64 ? Products::kFloat64 : products_of(matrix.rows.dtype);
    P = new_doubles(G, {matrix.rows.t, matrix.rows.t});
    q = new_doubles(G, {matrix.rows.t});
    g_squared = new_doubles(G, {});
  }

  std::tuple<Tensor, Tensor> result() const { return {P, q}; }
};

// A batch of problems and its results, which have q's leading dimensions.
struct NnqpCall {
  Tensor P, q, v, status, residual;
  NnqpBatch batch;

  NnqpCall(const Tensor& P_in, const Tensor& q_in, double lower, double ridge) : P(P_in), q(q_in) {
    check_double(P, "P");
    check_double(q, "q");
    check(std::isfinite(lower), "lower must be finite, got ", lower);
    check_not_negative(ridge, "ridge");
    check(q.dim() >= 1, "q must have shape (..., t), got ()");
    const int64_t t = q.size(q.dim() - 1);
    check(P.dim() >= 2 && P.size(P.dim() - 1) == t && P.size(P.dim() - 2) == t,
          "P must have shape (..., t, t) with t = ", t, " to match q of shape ", shape_of(q), ", got ", shape_of(P));
    const bool shared = P.dim() == 2;
    if (!shared) {
      bool same = P.dim() == q.dim() + 1;
      for (int64_t d = 0; same && d + 1 < q.dim(); ++d) same = P.size(d) == q.size(d);
      check(same, "P must be one matrix (t, t) or have q's leading dimensions, got P ", shape_of(P), " and q ",
            shape_of(q));
    }
    P = as_contiguous(P);
    q = as_contiguous(q);
    const int64_t* sizes = q.sizes().data();
    v = allocate(q, sizes, q.dim(), aoti_torch_dtype_float64());
    status = allocate(q, sizes, q.dim() - 1, aoti_torch_dtype_int32());
    residual = allocate(q, sizes, q.dim() - 1, aoti_torch_dtype_float64());
    batch = {static_cast<const double*>(P.const_data_ptr()),
             static_cast<const double*>(q.const_data_ptr()),
             status.numel(),
             t,
             shared,
             lower,
             ridge};
  }
};

inline Tensor check_weights(const Tensor& v, const Tensor& G) {
  check_double(v, "v");
  check(v.dim() == 1 && v.size(0) == G.size(0), "v must have shape (t,) with t = ", G.size(0), " to match G of shape ",
        shape_of(G), ", got ", shape_of(v));
  return as_contiguous(v);
}

using ProjectResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;

struct ProjectCall : CombineCall {
  Tensor v, q, status, residual;

  ProjectCall(const Tensors& list, const Tensor& G, double margin, double ridge) : CombineCall(list, G) {
    check_not_negative(margin, "margin");
    check_not_negative(ridge, "ridge");
    v = new_doubles(G, {matrix.rows.t});
    q = new_doubles(G, {matrix.rows.t});
    status = new_int(G);
    residual = new_doubles(G, {});
  }

  ProjectResult result() const { return {v, q, status, residual}; }
};

// The dual of one projection, from products of G that the caller has.
struct DualCall {
  Tensor P, q, g_squared, v, status, residual;
  std::optional<Tensor> cancellation;
  ProjectionProblem problem;

  DualCall(const Tensor& P_in, const Tensor& q_in, const Tensor& g_squared_in,
           const std::optional<Tensor>& cancellation_in, double margin, double ridge, bool in_float64)
      : cancellation(cancellation_in) {
    check_not_negative(margin, "margin");
    check_not_negative(ridge, "ridge");
    check_double(P_in, "P");
    check_double(q_in, "q");
    check_double(g_squared_in, "g_squared");
    check(q_in.dim() == 1, "q must have shape (t,), got ", shape_of(q_in));
    const int64_t t = q_in.size(0);
    check(P_in.dim() == 2 && P_in.size(0) == t && P_in.size(1) == t, "P must have shape (t, t) with t = ", t,
          " to match q, got ", shape_of(P_in));
    check(g_squared_in.numel() == 1, "g_squared must have one element, got ", g_squared_in.numel());
    if (cancellation.has_value()) {
      check_double(*cancellation, "cancellation");
      check(cancellation->numel() == 1, "cancellation must have one element, got ", cancellation->numel());
    }
    P = as_contiguous(P_in);
    q = as_contiguous(q_in);
    g_squared = g_squared_in;
    v = new_doubles(q, {t});
    status = new_int(q);
    residual = new_doubles(q, {});
    problem = {{static_cast<const double*>(P.const_data_ptr()), static_cast<const double*>(q.const_data_ptr()),
                static_cast<int>(t), margin, ridge},
               static_cast<const double*>(g_squared.const_data_ptr()),
               in_float64 ? Products::kFloat64 : Products::kFloat32,
               cancellation.has_value() ? static_cast<const double*>(cancellation->const_data_ptr()) : nullptr};
  }

  std::tuple<Tensor, Tensor, Tensor> result() const { return {v, status, residual}; }
};

// The tensors of one row of G; holds on to contiguous copies of those that are not contiguous.
struct PackCall {
  DType dtype;
  Tensors copies;
  std::vector<TensorRef> items;

  PackCall(const Tensor& row, const std::vector<std::optional<Tensor>>& tensors, const std::vector<int64_t>& sizes) {
    check(row.dim() == 1, "row must have shape (p,), got ", shape_of(row));
    dtype = dtype_of(row, "row");
    check(row.size(0) <= 1 || row.stride(0) == 1, "row must be contiguous, got a stride of ",
          row.size(0) > 1 ? row.stride(0) : 1);
    check(tensors.size() == sizes.size(), "sizes must have one entry per tensor, got ", sizes.size(), " for ",
          tensors.size(), " tensors");
    int64_t numel = 0;
    for (size_t i = 0; i < tensors.size(); ++i) {
      check(sizes[i] >= 0 && sizes[i] <= row.size(0), "sizes[", i, "] must be from 0 to p = ", row.size(0), ", got ",
            sizes[i]);
      TensorRef part{nullptr, sizes[i], numel};
      if (tensors[i].has_value()) {
        const Tensor& x = *tensors[i];
        check(x.scalar_type() == row.scalar_type(), "tensors[", i, "] must have row's dtype ",
              name_of(row.scalar_type()), ", got ", name_of(x.scalar_type()));
        check(x.numel() == sizes[i], "tensors[", i, "] must have sizes[", i, "] = ", sizes[i], " elements, got ",
              x.numel());
        copies.push_back(as_contiguous(x));
        if (x.numel() > 0) part.data = copies.back().mutable_data_ptr();
      }
      items.push_back(part);
      numel += sizes[i];
    }
    check(numel == row.size(0), "tensors must hold p = ", row.size(0), " elements in total to fill row, got ", numel);
  }

  TensorList list() const { return {items.data(), static_cast<int64_t>(items.size())}; }
};

}  // namespace gem_fast
