// The operators behind a first linear layer over a memory of mostly zeros, on the CPU. They are private (their names
// begin with an underscore): the entries that they take come from `_sparse_entries` and are not checked again.
#include <torch/csrc/stable/library.h>

#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "cpu/sparse.h"
#include "layers.h"
#include "torch_threads.h"

namespace gem_fast {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sparse_entries(const Tensor& x,
                                                                          const std::vector<int64_t>& sizes) {
  const DType dtype = full_dtype(x, "x");
  check(x.dim() == 2 && x.is_contiguous(), "x must be contiguous with shape (N, d), got ", shape_of(x));
  const std::vector<int64_t> start = starts(sizes);
  const int64_t N = x.size(0);
  const int64_t d = x.size(1);
  const auto t = static_cast<int64_t>(sizes.size());
  check(start.back() == N, "sizes must add up to N = ", N, ", got ", start.back());
  check(x.numel() <= std::numeric_limits<int32_t>::max(), "x must have fewer than 2^31 elements, got ", x.numel());
  Tensor row_start = new_ints(x, N * cpu::column_blocks(d) + 1);
  const int64_t count = cpu::count_entries(x.const_data_ptr(), dtype, N, d, ints(row_start), kTorchThreads);
  Tensor columns = new_ints(x, count);
  Tensor values = new_like(x, {count});
  cpu::fill_rows(x.const_data_ptr(), dtype, N, d, ints(row_start), ints(columns), values.mutable_data_ptr(),
                 kTorchThreads);
  const cpu::SparseRows by_rows{ints(row_start), ints(columns), values.const_data_ptr(), d};
  const int64_t together = cpu::columns_together(by_rows, N);
  std::vector<int64_t> first(t + 1);
  cpu::count_columns(by_rows, {start.data(), t}, together, first.data());
  Tensor rows = new_ints(x, first[t]), column_start = new_ints(x, t * (cpu::column_groups(d, together) + 1));
  Tensor column_values = new_like(x, {first[t], together});
  cpu::fill_columns(by_rows, dtype, {start.data(), t}, together, first.data(), ints(column_start), ints(rows),
                    column_values.mutable_data_ptr(), kTorchThreads);
  return {row_start, columns, values, column_start, rows, column_values};
}

Tensor sparse_linear_cpu(const Tensor& row_start, const Tensor& columns, const Tensor& values,
                         const std::optional<Tensor>& positions, const Tensor& weight,
                         const std::optional<Tensor>& bias) {
  const DType dtype = full_dtype(values, "values");
  const LayerView layer(weight, bias, values);
  const cpu::SparseRows x{ints(row_start), ints(columns), values.const_data_ptr(), layer.inputs()};
  const int64_t rows = x.count(row_start.size(0));
  const int64_t n = positions.has_value() ? positions->size(0) : rows;
  Tensor y = new_like(values, {n, layer.outputs()});
  cpu::sparse_linear(x, dtype, positions_of(positions, rows), n, layer.layer, matrix_of(y),
                     kTorchThreads);
  return y;
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
}

STABLE_TORCH_LIBRARY_IMPL(gem_fast, CPU, m) {
  m.impl("_sparse_entries", TORCH_BOX(&gem_fast::sparse_entries));
  m.impl("_sparse_linear", TORCH_BOX(&gem_fast::sparse_linear_cpu));
}
