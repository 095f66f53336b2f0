#include "cpu/mlp/examples_in_float64.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace gem_fast::cpu {
namespace {

constexpr int64_t kGrain = 1 << 14;  // elements that one thread takes at a time

std::vector<Buffer>& this_threads_buffers() {
  thread_local std::vector<Buffer> buffers;
  return buffers;
}

void widen(const float* from, double* to, int64_t n) { std::copy_n(from, n, to); }

}  // namespace

ExamplesInFloat64::ExamplesInFloat64(const Examples& of, const TensorList& g, const Executor& executor)
    : original_(g), executor_(executor), examples_(of) {
  const int64_t n = of.tasks.start[of.tasks.t];
  const bool is_given = of.current == 0;
  for (int64_t i = 0; i < g.count; ++i) {
    const TensorRef& part = g.items[i];
    g_.push_back({copy(is_given ? part.data : nullptr, part.numel), part.numel, part.offset});
  }
  for (int64_t l = 0; l < of.count; ++l) {
    const ExampleLayer& layer = of.layers[l];
    layers_.push_back(
        {layer.outputs, layer.inputs, copy(layer.x, l == 0 ? n : n + of.current, layer.inputs, of_memory_),
         copy(layer.delta, n + of.current, padded(layer.outputs)), part_of_g(layer.weight), part_of_g(layer.bias)});
  }
  examples_.dtype = DType::kFloat64;
  examples_.layers = layers_.data();
  if (!is_given) examples_.current_x = copy(of.current_x, of.current, layers_[0].inputs, of_current_);
}

bool ExamplesInFloat64::round_gradient() const {
  std::vector<int64_t> parts;
  for (int64_t i = 0; i < original_.count; ++i) {
    const bool is_layers = std::any_of(layers_.begin(), layers_.end(), [&](const ExampleLayer& layer) {
      return g_[i].data == layer.weight || g_[i].data == layer.bias;
    });
    if (!is_layers) continue;
    const double* x = static_cast<const double*>(g_[i].data);
    if (!std::all_of(x, x + g_[i].numel, [](double each) { return std::isfinite(static_cast<float>(each)); })) {
      return false;
    }
    parts.push_back(i);
  }
  for (const int64_t i : parts) {
    const double* from = static_cast<const double*>(g_[i].data);
    std::transform(from, from + g_[i].numel, static_cast<float*>(original_.items[i].data),
                   [](double x) { return static_cast<float>(x); });
  }
  return true;
}

// Memory for so many numbers, with those of `from` where it is not null.
void* ExamplesInFloat64::copy(const void* from, int64_t numel) {
  std::vector<Buffer>& buffers = this_threads_buffers();
  if (buffers.size() <= used_) buffers.resize(used_ + 1);
  void* to = buffers[used_++].of(numel * static_cast<int64_t>(sizeof(double)));
  if (from != nullptr) {
    executor_.each((numel + kGrain - 1) / kGrain, 1, [&](int64_t i) {
      const int64_t begin = i * kGrain;
      widen(static_cast<const float*>(from) + begin, static_cast<double*>(to) + begin, std::min(kGrain, numel - begin));
    });
  }
  return to;
}

// (rows, columns), without what is between the rows.
ConstMatrix ExamplesInFloat64::copy(const ConstMatrix& from, int64_t rows, int64_t columns) {
  void* to = copy(nullptr, rows * columns);
  executor_.each(rows, std::max<int64_t>(1, kGrain / columns), [&](int64_t i) {
    widen(static_cast<const float*>(from.data) + i * from.stride, static_cast<double*>(to) + i * columns, columns);
  });
  return {to, columns};
}

LayerInput ExamplesInFloat64::copy(const LayerInput& from, int64_t n, int64_t inputs, Entries& entries) {
  if (from.rows == nullptr) return {.dense = copy(from.dense, n, inputs)};
  const SparseRows& rows = *from.rows;
  const int64_t blocks = column_blocks(inputs);
  entries.start.assign(1, 0);
  for (int64_t i = 0; i < n; ++i) {
    const int32_t* start = rows.start + from.positions[i] * blocks;
    const int32_t shift = entries.start.back() - start[0];
    for (int64_t b = 1; b <= blocks; ++b) entries.start.push_back(start[b] + shift);
  }
  entries.columns.resize(entries.start.back());
  double* values = static_cast<double*>(copy(nullptr, entries.start.back()));
  executor_.each(n, 64, [&](int64_t i) {
    const int32_t begin = rows.begin(from.positions[i]);
    const int32_t count = rows.begin(from.positions[i] + 1) - begin;
    const int32_t to = entries.start[i * blocks];
    std::copy_n(rows.columns + begin, count, entries.columns.data() + to);
    widen(static_cast<const float*>(rows.values) + begin, values + to, count);
  });
  entries.positions.resize(n);
  std::iota(entries.positions.begin(), entries.positions.end(), 0);
  entries.rows = {entries.start.data(), entries.columns.data(), values, inputs};
  return {.rows = &entries.rows, .positions = entries.positions.data()};
}

void* ExamplesInFloat64::part_of_g(const void* original) const {
  for (int64_t i = 0; original != nullptr && i < original_.count; ++i) {
    if (original_.items[i].data == original) return g_[i].data;
  }
  return nullptr;
}

}  // namespace gem_fast::cpu
