#include "cpu/mlp/pairing.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <numeric>

#include "core/dispatch.h"

namespace gem_fast::cpu {
namespace {

constexpr int64_t kBits = 64;

// Which of a line's entries are not zero, of lines [first, last).
struct Masks {
  int64_t words;
  std::vector<uint64_t> bits;

  Masks(const SparseLines& lines, int64_t first, int64_t last)
      : words((lines.length + kBits - 1) / kBits), bits((last - first) * words) {
    for (int64_t i = first; i < last; ++i) {
      for (int32_t e = lines.start[i]; e < lines.start[i + 1]; ++e) {
        bits[(i - first) * words + lines.index[e] / kBits] |= uint64_t{1} << (lines.index[e] % kBits);
      }
    }
  }

  int64_t in_common(int64_t i, int64_t j) const {
    int64_t total = 0;
    for (int64_t w = 0; w < words; ++w) total += std::popcount(bits[i * words + w] & bits[j * words + w]);
    return total;
  }
};

// Calls f(index, entry of the first line or -1, entry of the second line or -1) for the entries of a pair.
template <class F>
void each_of_pair(const SparseLines& lines, int32_t first, int32_t second, const F& f) {
  int32_t a = lines.start[first], a_end = lines.start[first + 1];
  int32_t b = second < 0 ? 0 : lines.start[second], b_end = second < 0 ? 0 : lines.start[second + 1];
  while (a < a_end || b < b_end) {
    const bool has_a = a < a_end && (b == b_end || lines.index[a] <= lines.index[b]);
    const bool has_b = b < b_end && (a == a_end || lines.index[b] <= lines.index[a]);
    f(lines.index[has_a ? a : b], has_a ? a : -1, has_b ? b : -1);
    a += has_a;
    b += has_b;
  }
}

template <class T>
void fill(const SparseLines& lines, const Pairing& pairing, int32_t* index, T* values) {
  const auto* from = static_cast<const T*>(lines.values);
  int64_t e = 0;
  for (size_t i = 0; i < pairing.lines.size(); i += 2) {
    each_of_pair(lines, pairing.lines[i], pairing.lines[i + 1], [&](int32_t at, int32_t a, int32_t b) {
      index[e] = at;
      values[2 * e] = a < 0 ? T(0) : from[a];
      values[2 * e + 1] = b < 0 ? T(0) : from[b];
      ++e;
    });
  }
}

}  // namespace

SparseLines rows_of(const SparseRows& x, int64_t n) {
  SparseLines rows{n, x.d, {}, x.columns, x.values};
  for (int64_t i = 0; i <= n; ++i) rows.start.push_back(x.begin(i));
  return rows;
}

SparseLines columns_of(const SparseRows& x, DType dtype, int64_t n) {
  const int64_t entries = x.begin(n) - x.begin(0);
  SparseLines columns{x.d, n, std::vector<int32_t>(x.d + 1, 0), nullptr, nullptr, std::vector<int32_t>(entries), {}};
  columns.index = columns.own_index.data();
  columns.values = columns.own_values.of(entries * size_of(dtype));
  for (int32_t e = x.begin(0); e < x.begin(n); ++e) ++columns.start[x.columns[e] + 1];
  for (int64_t j = 0; j < x.d; ++j) columns.start[j + 1] += columns.start[j];
  std::vector<int32_t> next(columns.start.begin(), columns.start.end() - 1);
  for (int64_t row = 0; row < n; ++row) {
    for (int32_t e = x.begin(row); e < x.begin(row + 1); ++e) {
      const int32_t to = next[x.columns[e]]++;
      columns.own_index[to] = static_cast<int32_t>(row);
      memcpy(at(const_cast<void*>(columns.values), to, dtype), at(x.values, e, dtype), size_of(dtype));
    }
  }
  return columns;
}

Pairing pair(const SparseLines& lines, int64_t group) {
  Pairing result{{}, {0}};
  for (int64_t first = 0; first < lines.count; first += group) {
    const int64_t n = std::min(group, lines.count - first);
    const Masks masks(lines, first, first + n);
    // Lines with many entries get their partner first.
    std::vector<int32_t> left(n);
    std::iota(left.begin(), left.end(), 0);
    std::stable_sort(left.begin(), left.end(),
                     [&](int32_t i, int32_t j) { return masks.in_common(i, i) > masks.in_common(j, j); });
    while (!left.empty()) {
      const int32_t one = left.front();
      left.erase(left.begin());
      int64_t most = -1;
      size_t best = 0;
      for (size_t i = 0; i < left.size(); ++i) {
        const int64_t common = masks.in_common(one, left[i]);
        if (common > most) most = common, best = i;
      }
      const int32_t other = left.empty() ? -1 : left[best] + static_cast<int32_t>(first);
      if (other >= 0) left.erase(left.begin() + static_cast<int64_t>(best));
      result.lines.push_back(one + static_cast<int32_t>(first));
      result.lines.push_back(other);
      int32_t entries = result.start.back();
      each_of_pair(lines, one + static_cast<int32_t>(first), other, [&](int32_t, int32_t, int32_t) { ++entries; });
      result.start.push_back(entries);
    }
  }
  return result;
}

void fill_pairs(const SparseLines& lines, DType dtype, const Pairing& pairing, int32_t* index, void* values) {
  GEM_FAST_DISPATCH_FLOAT_OR_DOUBLE(dtype, fill(lines, pairing, index, static_cast<T*>(values)));
}

}  // namespace gem_fast::cpu
