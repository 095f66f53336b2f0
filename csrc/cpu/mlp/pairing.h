// Which lines of a sparse matrix, rows or columns, make pairs: see SparsePairs.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/buffer.h"
#include "cpu/mlp/sparse.h"

namespace gem_fast::cpu {

// Line i has the entries [start[i], start[i + 1]), whose indices ascend and are smaller than `length`.
struct SparseLines {
  int64_t count, length;
  std::vector<int32_t> start;
  const int32_t* index;
  const void* values;
  std::vector<int32_t> own_index{};
  Buffer own_values{};
};

// Of x (n, d).
SparseLines rows_of(const SparseRows& x, int64_t n);
SparseLines columns_of(const SparseRows& x, DType dtype, int64_t n);

struct Pairing {
  std::vector<int32_t> lines;  // (pairs, 2)
  std::vector<int32_t> start;  // (pairs + 1,)
};

// Pairs the lines within each group of `group` consecutive ones (an even number): a line's partner is the one, of those
// still without, that is not zero in most of the same places.
Pairing pair(const SparseLines& lines, int64_t group);

// Fills in index and values (entries, 2).
void fill_pairs(const SparseLines& lines, DType dtype, const Pairing& pairing, int32_t* index, void* values);

}  // namespace gem_fast::cpu
