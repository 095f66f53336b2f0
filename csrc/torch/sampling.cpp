// Random subsets of every task's examples, on the CPU.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "torch/checks.h"
#include "torch/views.h"

namespace gem_fast {
namespace {

// Floyd's way: each subset of m of n numbers is as likely as any other, and takes m random numbers.
Tensor distinct_cpu(const Tensor& numbers, const std::vector<int64_t>& counts, int64_t size) {
  check(numbers.scalar_type() == ScalarType::Long && numbers.dim() == 1 && numbers.is_contiguous(),
        "numbers must be contiguous int64 of shape (n,), got ", shape_of(numbers));
  check(size >= 1, "size must be at least 1, got ", size);
  int64_t wanted = 0;
  for (const int64_t count : counts) wanted += std::min(count, size);
  check(numbers.size(0) == wanted, "numbers must be as many as are drawn, ", wanted, ", got ", numbers.size(0));
  Tensor positions = allocate(numbers, &wanted, 1, aoti_torch_dtype_int64());
  const auto* random = static_cast<const int64_t*>(numbers.const_data_ptr());
  auto* out = static_cast<int64_t*>(positions.mutable_data_ptr());
  std::vector<char> is_taken;
  int64_t first = 0;
  for (const int64_t count : counts) {
    is_taken.assign(count, 0);
    for (int64_t j = count - std::min(count, size); j < count; ++j) {
      const auto drawn = static_cast<int64_t>(static_cast<uint64_t>(*random++) % static_cast<uint64_t>(j + 1));
      const int64_t taken = is_taken[drawn] ? j : drawn;
      is_taken[taken] = 1;
      *out++ = first + taken;
    }
    first += count;
  }
  return positions;
}

}  // namespace
}  // namespace gem_fast

STABLE_TORCH_LIBRARY_IMPL(gem_fast, CPU, m) { m.impl("_distinct", TORCH_BOX(&gem_fast::distinct_cpu)); }
