// The operators behind a first linear layer over a memory of mostly zeros, on the CPU. They are private (their names
// begin with an underscore): the entries that operators take come from `_sparse_rows` and `_sparse_pairs`, and are not
// checked again.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "cpu/pairing.h"
#include "cpu/sparse.h"
#include "layers.h"
#include "torch_threads.h"

namespace gem_fast {
namespace {

// Pairs of rows are looked for among so many.
constexpr int64_t kPairedRows = 256;

std::tuple<Tensor, Tensor, Tensor> sparse_rows(const Tensor& x) {
  const DType dtype = full_dtype(x, "x");
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

std::tuple<Tensor, Tensor, Tensor, Tensor> sparse_pairs(const Tensor& start, const Tensor& columns,
                                                        const Tensor& values, int64_t d, bool of_columns) {
  const DType dtype = full_dtype(values, "values");
  const cpu::SparseRows x = sparse_rows_of({start, columns, values}, d);
  const int64_t n = x.count(start.size(0));
  const cpu::Lines lines = of_columns ? cpu::columns_of(x, dtype, n) : cpu::rows_of(x, n);
  const cpu::Pairing pairing = cpu::pair(lines, of_columns ? cpu::kColumnBlock : kPairedRows);
  const auto pairs = static_cast<int64_t>(pairing.start.size()) - 1;
  Tensor members = new_ints(values, 2 * pairs), pair_start = new_ints(values, pairs + 1);
  std::copy(pairing.members.begin(), pairing.members.end(), ints(members));
  std::copy(pairing.start.begin(), pairing.start.end(), ints(pair_start));
  Tensor index = new_ints(values, pairing.start.back()), both = new_like(values, {pairing.start.back(), 2});
  cpu::fill_pairs(lines, dtype, pairing, ints(index), both.mutable_data_ptr());
  return {members, pair_start, index, both};
}

Tensor sparse_linear_cpu(const Tensor& row_start, const Tensor& columns, const Tensor& values,
                         const std::optional<Tensor>& positions, const Tensor& weight,
                         const std::optional<Tensor>& bias) {
  const DType dtype = full_dtype(values, "values");
  const LayerView layer(weight, bias, values);
  const cpu::SparseRows x = sparse_rows_of({row_start, columns, values}, layer.inputs());
  const int64_t rows = x.count(row_start.size(0));
  const int64_t n = positions.has_value() ? positions->size(0) : rows;
  Tensor y = new_like(values, {n, layer.outputs()});
  cpu::sparse_linear(x, dtype, positions_of(positions, rows, n), n, layer.layer, matrix_of(y), kTorchThreads);
  return y;
}

}  // namespace
}  // namespace gem_fast

STABLE_TORCH_LIBRARY_FRAGMENT(gem_fast, m) {
  m.def("_sparse_rows(Tensor x) -> (Tensor start, Tensor columns, Tensor values)");
  m.def(
      "_sparse_pairs(Tensor start, Tensor columns, Tensor values, int d, bool of_columns) -> "
      "(Tensor members, Tensor start, Tensor index, Tensor values)");
  m.def(
      "_sparse_linear(Tensor row_start, Tensor columns, Tensor values, Tensor? positions, Tensor weight, "
      "Tensor? bias) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(gem_fast, CPU, m) {
  m.impl("_sparse_rows", TORCH_BOX(&gem_fast::sparse_rows));
  m.impl("_sparse_pairs", TORCH_BOX(&gem_fast::sparse_pairs));
  m.impl("_sparse_linear", TORCH_BOX(&gem_fast::sparse_linear_cpu));
}
