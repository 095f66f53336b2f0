// The operators behind a first linear layer over a memory of mostly zeros, on the CPU. They are private (their names
// begin with an underscore): the entries that they take come from `_sparse_entries` and are not checked again.
#include <torch/csrc/stable/library.h>

#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "cpu/sparse.h"
#include "torch_threads.h"

namespace gem_fast {
namespace {

DType sparse_dtype(const Tensor& x, const char* name) {
  const DType dtype = dtype_of(x, name);
  check(dtype == DType::kFloat32 || dtype == DType::kFloat64, name, " must be float32 or float64, got ",
        name_of(x.scalar_type()));
  return dtype;
}

int32_t* ints(const Tensor& x) { return static_cast<int32_t*>(x.mutable_data_ptr()); }

Tensor new_ints(const Tensor& like, int64_t n) { return allocate(like, &n, 1, aoti_torch_dtype_int32()); }

Tensor new_like(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return allocate(like, sizes.begin(), static_cast<int64_t>(sizes.size()),
                  like.scalar_type() == ScalarType::Double ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32());
}

// Where each task's rows begin, and after the last one their number.
std::vector<int64_t> starts(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> start{0};
  for (const int64_t size : sizes) start.push_back(start.back() + size);
  return start;
}

// The numbers of the rows that are meant, each within those of `row_start`; null for all of them.
const int64_t* positions_of(const std::optional<Tensor>& positions, const Tensor& row_start) {
  if (!positions.has_value()) return nullptr;
  check(positions->scalar_type() == ScalarType::Long && positions->dim() == 1 && positions->is_contiguous(),
        "positions must be int64, contiguous and of shape (n,), got ", shape_of(*positions));
  const auto* numbers = static_cast<const int64_t*>(positions->const_data_ptr());
  const int64_t most = row_start.size(0) - 2;
  for (int64_t i = 0; i < positions->size(0); ++i) {
    check(numbers[i] >= 0 && numbers[i] <= most, "positions must be from 0 to ", most, ", got ", numbers[i]);
  }
  return numbers;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sparse_entries(const Tensor& x,
                                                                          const std::vector<int64_t>& sizes) {
  const DType dtype = sparse_dtype(x, "x");
  check(x.dim() == 2 && x.is_contiguous(), "x must be contiguous with shape (N, d), got ", shape_of(x));
  const std::vector<int64_t> start = starts(sizes);
  const int64_t N = x.size(0);
  const int64_t d = x.size(1);
  const auto t = static_cast<int64_t>(sizes.size());
  check(start.back() == N, "sizes must add up to N = ", N, ", got ", start.back());
  check(x.numel() <= std::numeric_limits<int32_t>::max(), "x must have fewer than 2^31 elements, got ", x.numel());
  Tensor row_start = new_ints(x, N + 1);
  const int64_t count = cpu::count_entries(x.const_data_ptr(), dtype, N, d, ints(row_start), kTorchThreads);
  Tensor columns = new_ints(x, count), rows = new_ints(x, count), column_start = new_ints(x, t * (d + 1));
  Tensor values = new_like(x, {count}), column_values = new_like(x, {count});
  cpu::fill_rows(x.const_data_ptr(), dtype, N, d, ints(row_start), ints(columns), values.mutable_data_ptr(),
                 kTorchThreads);
  const cpu::SparseRows by_rows{ints(row_start), ints(columns), values.const_data_ptr(), d};
  cpu::fill_columns(by_rows, dtype, {start.data(), t}, ints(column_start), ints(rows), column_values.mutable_data_ptr(),
                    kTorchThreads);
  return {row_start, columns, values, column_start, rows, column_values};
}

Tensor sparse_linear_cpu(const Tensor& row_start, const Tensor& columns, const Tensor& values,
                         const std::optional<Tensor>& positions, const Tensor& weight,
                         const std::optional<Tensor>& bias) {
  const DType dtype = sparse_dtype(values, "values");
  check(weight.scalar_type() == values.scalar_type() && weight.dim() == 2, "weight must have shape (outputs, d) and ",
        name_of(values.scalar_type()), ", got ", shape_of(weight), " ", name_of(weight.scalar_type()));
  const Tensor dense = as_contiguous(weight);
  const int64_t outputs = weight.size(0);
  const int64_t d = weight.size(1);
  const int64_t n = positions.has_value() ? positions->size(0) : row_start.size(0) - 1;
  Tensor y = new_like(values, {n, outputs});
  Tensor scratch = new_like(values, {cpu::sparse_scratch(d, outputs)});
  const std::optional<Tensor> b = bias.has_value() ? std::optional(as_contiguous(*bias)) : std::nullopt;
  cpu::sparse_linear({ints(row_start), ints(columns), values.const_data_ptr(), d}, dtype,
                     positions_of(positions, row_start), n, dense.const_data_ptr(),
                     b.has_value() ? b->const_data_ptr() : nullptr, outputs, y.mutable_data_ptr(),
                     scratch.mutable_data_ptr(), kTorchThreads);
  return y;
}

void sparse_gradient_cpu(const Tensor& out, const Tensor& grad, const std::vector<int64_t>& sizes,
                         const Tensor& row_start, const Tensor& columns, const Tensor& values,
                         const Tensor& column_start, const Tensor& rows, const Tensor& column_values,
                         const std::optional<Tensor>& positions) {
  const DType dtype = sparse_dtype(values, "values");
  const std::vector<int64_t> start = starts(sizes);
  const auto t = static_cast<int64_t>(sizes.size());
  check(out.scalar_type() == values.scalar_type() && out.dim() == 3 && out.size(0) == t && out.stride(2) == 1 &&
            out.stride(1) == out.size(2),
        "out must have shape (t, outputs, d) with contiguous tasks, got ", shape_of(out));
  check(grad.scalar_type() == values.scalar_type() && grad.dim() == 2 && grad.size(0) == start.back() &&
            grad.size(1) == out.size(1),
        "grad must have shape (n, outputs), got ", shape_of(grad));
  const int64_t outputs = out.size(1);
  const int64_t d = out.size(2);
  const Tensor dense = as_contiguous(grad);
  Tensor scratch = new_like(values, {cpu::sparse_scratch(grad.size(0), outputs)});
  const cpu::Matrix rows_of_g{out.mutable_data_ptr(), out.stride(0)};
  const cpu::Tasks tasks{start.data(), t};
  if (positions.has_value()) {
    cpu::sparse_gradient_of_sample({ints(row_start), ints(columns), values.const_data_ptr(), d}, dtype,
                                   positions_of(positions, row_start), tasks, dense.const_data_ptr(), outputs,
                                   rows_of_g, scratch.mutable_data_ptr(), kTorchThreads);
  } else {
    cpu::sparse_gradient({ints(column_start), ints(rows), column_values.const_data_ptr(), d}, dtype, tasks,
                         dense.const_data_ptr(), outputs, rows_of_g, scratch.mutable_data_ptr(), kTorchThreads);
  }
}

}  // namespace
}  // namespace gem_fast

STABLE_TORCH_LIBRARY_FRAGMENT(gem_fast, m) {
  m.def(
      "_sparse_entries(Tensor x, int[] sizes) -> (Tensor row_start, Tensor columns, Tensor values, "
      "Tensor column_start, Tensor rows, Tensor column_values)");
  m.def(
      "_sparse_linear(Tensor row_start, Tensor columns, Tensor values, Tensor? positions, Tensor weight, "
      "Tensor? bias) -> Tensor");
  m.def(
      "_sparse_gradient_(Tensor(a!) out, Tensor grad, int[] sizes, Tensor row_start, Tensor columns, Tensor values, "
      "Tensor column_start, Tensor rows, Tensor column_values, Tensor? positions) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(gem_fast, CPU, m) {
  m.impl("_sparse_entries", TORCH_BOX(&gem_fast::sparse_entries));
  m.impl("_sparse_linear", TORCH_BOX(&gem_fast::sparse_linear_cpu));
  m.impl("_sparse_gradient_", TORCH_BOX(&gem_fast::sparse_gradient_cpu));
}
