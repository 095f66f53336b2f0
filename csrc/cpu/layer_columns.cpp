#include "cpu/layer_columns.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/blocks.h"
#include "cpu/combine.h"
#include "cpu/gram.h"

namespace gem_fast::cpu {
namespace {

// One block of G's rows, and of g, turned around.
struct Block {
  const LayerColumns& G;
  int64_t number;
  BlockInputs inputs;
  int64_t p;  // elements of a row

  Block(const LayerColumns& columns, int64_t block)
      : G(columns), number(block), inputs(columns.of, block), p(inputs.count() * padded(columns.of.outputs)) {}

  // Valid until this thread forms another block.
  Rows rows() const {
    thread_local Buffer buffer;
    const int64_t t = G.of.tasks.t;
    const int64_t stride = G.of.block_elements();
    void* data = buffer.of(t * stride * size_of(G.of.dtype));
    memset(data, 0, t * stride * size_of(G.of.dtype));
    for (int64_t k = 0; k < t; ++k) G.of.add_block(k, number, at(data, k * stride, G.of.dtype));
    return {data, stride, t, p, G.of.dtype};
  }

  // Likewise.
  Segment gradient() const {
    thread_local Buffer buffer;
    void* data = buffer.of(G.of.block_elements() * size_of(G.of.dtype));
    turn(G.g, G.of.dtype, G.of.outputs, G.of.inputs, inputs.first, inputs.last, data);
    return {data, p, 0};
  }

  void write_gradient(const Segment& g) const {
    turn_back(g.data, G.of.dtype, inputs.count(), G.of.outputs, at(G.g, inputs.first, G.of.dtype), G.of.inputs);
  }

  // Of this block within the sum of all rows.
  template <class Data>
  Data* of_sum(Data* row_sum) const {
    return at(row_sum, number * G.of.block_elements(), G.of.dtype);
  }
};

// Adds n doubles.
void add(const double* from, int64_t n, double* to) {
  for (int64_t i = 0; i < n; ++i) to[i] += from[i];
}

// Calls f(rows, g, result) for each block, where result has so many doubles to be written, and returns the sum of all
// results, added in the same order whatever the number of threads. On the way it leaves the sum of all rows.
template <class F>
std::vector<double> sum_over_blocks(const LayerColumns& G, int64_t doubles, void* sum_of_rows, const Executor& executor,
                                    const F& f) {
  const int64_t blocks = G.of.blocks();
  const int64_t most = std::clamp<int64_t>(kPartials / doubles, 1, kMostSlabs);
  const int64_t per_slab = (blocks + most - 1) / most;
  const int64_t slabs = (blocks + per_slab - 1) / per_slab;
  std::vector<double> sums((slabs + 1) * doubles);
  executor.each(slabs, 1, [&](int64_t slab) {
    thread_local std::vector<double> result;
    result.resize(doubles);
    for (int64_t b = slab * per_slab; b < std::min(blocks, (slab + 1) * per_slab); ++b) {
      const Block block(G, b);
      const Segment g = block.gradient();
      const Rows rows = block.rows();
      row_sum(rows, block.of_sum(sum_of_rows));
      f(rows, Segments{&g, 1}, result.data());
      add(result.data(), doubles, &sums[(slab + 1) * doubles]);
    }
  });
  for (int64_t slab = 0; slab < slabs; ++slab) add(&sums[(slab + 1) * doubles], doubles, sums.data());
  return sums;
}

// delta with task k's rows times v_k.
ConstMatrix scaled_rows(const LayerGradients& of, const double* v, Buffer& buffer, const Executor& executor) {
  const int64_t width = padded(of.outputs);
  void* scaled = buffer.of(of.tasks.start[of.tasks.t] * width * size_of(of.dtype));
  executor.each(of.tasks.t, 1, [&](int64_t k) {
    GEM_FAST_DISPATCH_FULL(of.dtype, {
      for (int64_t n = of.tasks.start[k]; n < of.tasks.start[k + 1]; ++n) {
        const T* from = static_cast<const T*>(of.delta.data) + n * of.delta.stride;
        T* to = static_cast<T*>(scaled) + n * width;
        for (int64_t o = 0; o < width; ++o) to[o] = static_cast<T>(v[k] * static_cast<double>(from[o]));
      }
    });
  });
  return {scaled, width};
}

}  // namespace

void gram(const LayerColumns& G, double* P, double* q, void* row_sum, const Executor& executor) {
  const int64_t t = G.of.tasks.t;
  const int64_t doubles = gram_doubles(t, G.of.block_elements());
  const auto sum =
      sum_over_blocks(G, t * t + t, row_sum, executor, [&](const Rows& rows, const Segments& g, double* result) {
        std::vector<double> workspace(doubles);
        gram(rows, g, result, result + t * t, workspace.data(), kThisThread);
      });
  add(sum.data(), t * t, P);
  add(sum.data() + t * t, t, q);
}

void probe(const LayerColumns& G, double* q, double* sums, void* row_sum, const Executor& executor) {
  const int64_t t = G.of.tasks.t;
  const int64_t doubles = probe_doubles(t, G.of.block_elements());
  const auto sum =
      sum_over_blocks(G, 2 * t, row_sum, executor, [&](const Rows& rows, const Segments& g, double* result) {
        std::vector<double> workspace(doubles);
        probe(rows, g, result, result + t, workspace.data(), kThisThread);
      });
  add(sum.data(), t, q);
  add(sum.data() + t, t, sums);
}

void combine(const LayerColumns& G, const double* v, const void* row_sum, const Executor& executor) {
  const int64_t t = G.of.tasks.t;
  const bool equal = std::all_of(v, v + t, [&](double value) { return value == v[0]; });
  Buffer buffer;
  LayerColumns weighted = G;
  if (!equal) weighted.of.delta = scaled_rows(G.of, v, buffer, executor);
  executor.each(G.of.blocks(), 1, [&](int64_t b) {
    const Block block(weighted, b);
    const Segment g = block.gradient();
    if (equal) {
      combine({&g, 1}, {block.of_sum(row_sum), block.p, 1, block.p, G.of.dtype}, v, kThisThread);
    } else {
      for (int64_t k = 0; k < t; ++k) {
        if (v[k] != 0.0) weighted.of.add_block(k, b, g.data);
      }
    }
    block.write_gradient(g);
  });
}

}  // namespace gem_fast::cpu
