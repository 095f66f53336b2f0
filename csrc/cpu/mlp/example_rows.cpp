#include "cpu/mlp/example_rows.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "core/status.h"
#include "cpu/mlp/layer_gradient.h"
#include "cpu/mlp/transpose.h"
#include "cpu/projection/project.h"

namespace gem_fast::cpu {
namespace {

// Where a layer's part of a row begins.
struct Part {
  int64_t weight, bias;
};

// The parts of a row, and behind them its length.
std::vector<Part> parts_of(const Examples& of) {
  std::vector<Part> parts;
  int64_t at = 0;
  for (int64_t l = 0; l < of.count; ++l) {
    const ExampleLayer& layer = of.layers[l];
    const int64_t width = padded(layer.outputs);
    const int64_t bias = at + (layer.weight == nullptr ? 0 : layer.inputs * width);
    parts.push_back({at, bias});
    at = bias + (layer.bias == nullptr ? 0 : width);
  }
  parts.push_back({at, at});
  return parts;
}

// The rows of tasks whose examples begin at row `first` of delta, and whose inputs are x.
void write_rows(const Examples& of, int64_t l, const Part& part, const Tasks& tasks, int64_t first, const LayerInput& x,
                const Matrix& rows, const Executor& executor) {
  const ExampleLayer& layer = of.layers[l];
  const ConstMatrix delta = rows_from(layer.delta, first, of.dtype);
  if (layer.weight != nullptr) {
    layer_gradients_transposed({of.dtype, tasks, layer.outputs, layer.inputs, delta, x},
                               {at(rows.data, part.weight, of.dtype), rows.stride}, executor);
  }
  for (int64_t k = 0; layer.bias != nullptr && k < tasks.t; ++k) {
    sum_rows(rows_from(delta, tasks.start[k], of.dtype), of.dtype, tasks.start[k + 1] - tasks.start[k],
             padded(layer.outputs), at(rows.data, k * rows.stride + part.bias, of.dtype));
  }
}

// A layer's part of g, from the layer to the row or back.
void read_g(const ExampleLayer& layer, DType dtype, const Part& part, void* row, const Executor& executor) {
  if (layer.weight != nullptr) {
    transpose_padded(dtype, {layer.weight, layer.inputs}, layer.outputs, layer.inputs, at(row, part.weight, dtype),
                     executor);
  }
  if (layer.bias != nullptr) pad_row(layer.bias, dtype, layer.outputs, at(row, part.bias, dtype));
}

void write_g(const ExampleLayer& layer, DType dtype, const Part& part, const void* row, const Executor& executor) {
  if (layer.weight != nullptr) {
    const int64_t width = padded(layer.outputs);
    executor.each(column_blocks(layer.inputs), 2, [&](int64_t block) {
      const int64_t first = block * kColumnBlock;
      const int64_t last = std::min(layer.inputs, first + kColumnBlock);
      transpose(dtype, {at(row, part.weight + first * width, dtype), width}, last - first, layer.outputs,
                {at(layer.weight, first, dtype), layer.inputs});
    });
  }
  if (layer.bias != nullptr) memcpy(layer.bias, at(row, part.bias, dtype), layer.outputs * size_of(dtype));
}

}  // namespace

int64_t example_rows_bytes(const Examples& of) {
  return (of.tasks.t + 1) * parts_of(of).back().weight * size_of(of.dtype);
}

int32_t project_by_rows(const Examples& of, double margin, double ridge, double* v, double* q, double* residual,
                        void* workspace, const Executor& executor) {
  const int64_t t = of.tasks.t;
  const int64_t n = of.tasks.start[t];
  const std::vector<Part> parts = parts_of(of);
  const int64_t p = parts.back().weight;
  const Matrix rows{workspace, p};
  const Matrix g = rows_from(rows, t, of.dtype);
  const int64_t of_current[] = {0, of.current};
  for (int64_t l = 0; l < of.count; ++l) {
    const ExampleLayer& layer = of.layers[l];
    write_rows(of, l, parts[l], of.tasks, 0, layer.x, rows, executor);
    if (of.current == 0) {
      read_g(layer, of.dtype, parts[l], g.data, executor);
    } else {
      const LayerInput own = l == 0 ? of.current_x : LayerInput{.dense = rows_from(layer.x.dense, n, of.dtype)};
      write_rows(of, l, parts[l], {of_current, 1}, n, own, g, executor);
    }
  }
  const TensorRef whole{g.data, p, 0};
  int32_t status;
  if (project({&whole, 1}, {rows.data, p, t, p, of.dtype}, margin, ridge, v, q, &status, residual, executor) ==
      Projected::kNonFinite) {
    std::fill_n(v, t, 0.0);
    return kNonFinite;
  }
  for (int64_t l = 0; l < of.count; ++l) write_g(of.layers[l], of.dtype, parts[l], g.data, executor);
  return status;
}

}  // namespace gem_fast::cpu
