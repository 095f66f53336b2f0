#include "layers.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/mlp/cross_entropy.h"
#include "cpu/mlp/example_products.h"
#include "cpu/mlp/example_rows.h"
#include "cpu/mlp/layer_gradient.h"
#include "cpu/mlp/mlp.h"
#include "cpu/mlp/pairing.h"
#include "threads.h"

namespace gem_fast::native {
namespace {

void expect_close(double got, double right, const char* what) {
  expect(std::fabs(got - right) <= 1e-3 * (1 + std::fabs(right)), what);
}

std::vector<int64_t> random_starts(Random& random, int64_t t, int64_t most) {
  std::vector<int64_t> start{0};
  for (int64_t k = 0; k < t; ++k) start.push_back(start.back() + 1 + static_cast<int64_t>(random() % most));
  return start;
}

// A memory of mostly zeros, its entries by rows, and its tasks' pairs one after the other.
template <class T>
struct SparseMemory {
  int64_t d;
  std::vector<int64_t> start;
  Buffer<T> x;
  std::vector<int32_t> row_start, columns;
  std::vector<T> values;
  struct Pairs {
    std::vector<int32_t> lines, start{0}, index;
    std::vector<T> values;
    cpu::SparsePairs view() const { return {lines.data(), start.data(), index.data(), values.data()}; }
  } row_pairs, column_pairs;

  SparseMemory(Random& random, DType dtype, int64_t t, int64_t inputs)
      : d(inputs), start(random_starts(random, t, 40)), x(start.back() * d, 0) {
    for (int64_t i = 0; i < x.size(); ++i) x[i] = random() % 5 == 0 ? T(value(random, Values::kOrdinary)) : T(0);
    const int64_t N = start.back();
    row_start.resize(N * cpu::column_blocks(d) + 1);
    const int64_t count = cpu::count_entries(x.data(), dtype, N, d, row_start.data(), kPlainThreads);
    columns.resize(count);
    values.resize(count);
    cpu::fill_rows(x.data(), dtype, N, d, row_start.data(), columns.data(), values.data(), kPlainThreads);
    for (int64_t k = 0; k < t; ++k) {
      const int64_t n = start[k + 1] - start[k];
      const cpu::SparseRows mine{row_start.data() + start[k] * cpu::column_blocks(d), columns.data(), values.data(), d};
      add(cpu::rows_of(mine, n), dtype, 6, row_pairs);
      add(cpu::columns_of(mine, dtype, n), dtype, cpu::kColumnBlock, column_pairs);
    }
  }

  cpu::SparseRows rows() const { return {row_start.data(), columns.data(), values.data(), d}; }

 private:
  static void add(const cpu::SparseLines& lines, DType dtype, int64_t group, Pairs& pairs) {
    const cpu::Pairing pairing = cpu::pair(lines, group);
    const int32_t before = pairs.start.back();
    pairs.lines.insert(pairs.lines.end(), pairing.lines.begin(), pairing.lines.end());
    for (size_t i = 1; i < pairing.start.size(); ++i) pairs.start.push_back(before + pairing.start[i]);
    pairs.index.resize(pairs.start.back());
    pairs.values.resize(2 * pairs.start.back());
    cpu::fill_pairs(lines, dtype, pairing, pairs.index.data() + before, pairs.values.data() + 2 * before);
  }
};

// Some of each task's examples, and where each task's begin among them.
struct Sampled {
  std::vector<int64_t> positions, start{0};

  Sampled(Random& random, const std::vector<int64_t>& tasks) {
    for (size_t k = 0; k + 1 < tasks.size(); ++k) {
      for (int64_t i = tasks[k]; i < tasks[k + 1]; i += 1 + static_cast<int64_t>(random() % 5)) positions.push_back(i);
      start.push_back(static_cast<int64_t>(positions.size()));
    }
  }
};

// The gradients of a first layer's weight, in all its inputs' forms, as rows of G.
template <class T>
void run_first_layer(Random& random, DType dtype) {
  const int64_t t = pick(random, {1, 2, 3, 7, 33}), d = pick(random, {1, 3, 31, 32, 33, 64, 100}),
                outputs = pick(random, {1, 2, 15, 16, 17, 33, 100, 129, 300});
  SparseMemory<T> memory(random, dtype, t, d);
  const Sampled sampled(random, memory.start);
  const bool some = random() % 3 == 0;
  const std::vector<int64_t>& start = some ? sampled.start : memory.start;
  const int64_t n = start.back(), width = cpu::padded(outputs), size = outputs * d;
  const auto row_of = [&](int64_t i) { return some ? sampled.positions[i] : i; };

  Buffer<T> grad(n * outputs, 1), delta(n * width, 0);
  grad.fill(random, Values::kOrdinary);
  cpu::pad_rows({grad.data(), outputs}, dtype, n, outputs, delta.data(), kPlainThreads);
  const cpu::SparseRows rows = memory.rows();
  const cpu::SparsePairs pairs = memory.column_pairs.view();
  cpu::LayerGradients gradients{dtype, {start.data(), t}, outputs, d, {delta.data(), width}, {}};
  if (some) {
    gradients.x.rows = &rows;
    gradients.x.positions = sampled.positions.data();
  } else if (random() % 2 == 0) {
    gradients.x.pairs = &pairs;
  } else {
    gradients.x.dense = {memory.x.data(), d};
  }
  const int64_t stride = size + static_cast<int64_t>(random() % 3);
  Buffer<T> G((t - 1) * stride + size, 0);
  cpu::layer_gradients(gradients, {G.data(), stride}, kPlainThreads);
  for (int64_t k = 0; k < t; ++k) {
    const int64_t o = random() % outputs, j = random() % d;
    double sum = 0;
    for (int64_t i = start[k]; i < start[k + 1]; ++i) sum += grad.at(i * outputs + o) * memory.x.at(row_of(i) * d + j);
    expect_close(G.at(k * stride + o * d + j), sum, "the gradient of W");
  }
}

// A first layer over mostly zeros, row by row.
template <class T>
void run_sparse_forward(Random& random, DType dtype) {
  const int64_t d = pick(random, {1, 3, 31, 32, 33, 100}), outputs = pick(random, {1, 2, 16, 17, 100, 129, 300});
  SparseMemory<T> memory(random, dtype, 2, d);
  Buffer<T> weight(outputs * d, 1), bias(outputs, 0);
  weight.fill(random, Values::kOrdinary);
  bias.fill(random, Values::kOrdinary);
  const Sampled sampled(random, memory.start);
  for (const bool some : {false, true}) {
    const auto n = some ? static_cast<int64_t>(sampled.positions.size()) : memory.start.back();
    Buffer<T> y(n * outputs, 0);
    cpu::sparse_linear(memory.rows(), dtype, some ? sampled.positions.data() : nullptr, n,
                       {weight.data(), bias.data(), outputs, d}, {y.data(), outputs}, kPlainThreads);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t o = random() % outputs, row = some ? sampled.positions[i] : i;
      double sum = bias.at(o);
      for (int64_t j = 0; j < d; ++j) sum += memory.x.at(row * d + j) * weight.at(o * d + j);
      expect_close(y.at(i * outputs + o), sum, "W x + b");
    }
  }
}

// Layers with ReLU between them and their tensors.
template <class T>
struct RandomMlp {
  int64_t t, count;
  std::vector<int64_t> widths;  // from the input of the first layer to the classes
  std::vector<Buffer<T>> weights, biases, weight_rows, bias_rows;
  std::vector<cpu::MlpLayer> layers;

  RandomMlp(Random& random, int64_t tasks, int64_t inputs) : t(tasks), count(pick(random, {2, 3, 4})), widths{inputs} {
    for (int64_t l = 0; l < count; ++l) {
      widths.push_back(pick(random, {1, 2, 10, 15, 16, 17, 64, 65, 100}));
      const int64_t size = widths[l + 1] * widths[l];
      weights.emplace_back(size, 1).fill(random, Values::kOrdinary);
      biases.emplace_back(widths[l + 1], 0).fill(random, Values::kOrdinary);
      weight_rows.emplace_back(t * size, 0);
      bias_rows.emplace_back(t * widths[l + 1], 0);
      cpu::MlpLayer& layer = layers.emplace_back();
      layer.layer = {weights[l].data(), biases[l].data(), widths[l + 1], widths[l]};
      layer.weight_rows = {l == 0 ? nullptr : weight_rows[l].data(), size};
      layer.bias_rows = {random() % 4 == 0 ? nullptr : bias_rows[l].data(), widths[l + 1]};
    }
  }

  int64_t classes() const { return widths.back(); }

  // y (N, padded(outputs)) = layer l of x, whose rows are `stride` elements apart.
  Buffer<T> forward(int64_t l, int64_t N, const T* x, int64_t stride) {
    const int64_t outputs = widths[l + 1], width = cpu::padded(outputs);
    Buffer<T> y(N * width, 0);
    std::fill_n(y.data(), y.size(), T(0));
    for (int64_t n = 0; n < N; ++n) {
      for (int64_t o = 0; o < outputs; ++o) {
        double sum = biases[l].at(o);
        for (int64_t i = 0; i < widths[l]; ++i) sum += x[n * stride + i] * weights[l].at(o * widths[l] + i);
        y[n * width + o] = static_cast<T>(l + 1 < count ? std::fmax(sum, 0.0) : sum);
      }
    }
    return y;
  }
};

// The backward, and forward and backward as one call, against each other and, by one element each, float64.
template <class T>
void run_mlp(Random& random, DType dtype) {
  const int64_t t = pick(random, {1, 2, 3}), d = pick(random, {1, 16, 33, 70});
  SparseMemory<T> memory(random, dtype, t, d);
  RandomMlp<T> net(random, t, d);
  const Sampled sampled(random, memory.start);
  const int64_t form = random() % 3;
  const std::vector<int64_t>& start = form == 2 ? sampled.start : memory.start;
  const int64_t N = start.back(), count = net.count, classes = net.classes();
  const cpu::Tasks tasks{start.data(), t};

  Buffer<T> first(N * d, 0);
  for (int64_t n = 0; n < N; ++n) std::copy_n(&memory.x[(form == 2 ? sampled.positions[n] : n) * d], d, &first[n * d]);
  std::vector<Buffer<T>> outputs;
  outputs.push_back(net.forward(0, N, first.data(), d));
  for (int64_t l = 1; l < count; ++l) {
    net.layers[l].x = {outputs[l - 1].data(), cpu::padded(net.widths[l])};
    outputs.push_back(net.forward(l, N, outputs[l - 1].data(), cpu::padded(net.widths[l])));
  }

  std::vector<int64_t> target(N);
  for (int64_t& y : target) y = random() % classes;
  Buffer<T> grad(N * classes, 0), delta(N * cpu::padded(net.widths[1]), 0);
  cpu::cross_entropy_gradient({outputs.back().data(), cpu::padded(classes)}, dtype, target.data(), tasks, classes,
                              {grad.data(), classes}, kPlainThreads);
  for (int64_t n = 0; n < N; ++n) {
    double total = 0;
    for (int64_t c = 0; c < classes; ++c) total += grad.at(n * classes + c);
    expect(std::fabs(total) <= 1e-5, "the gradient of cross entropy");
  }

  const cpu::Mlp mlp{dtype, net.layers.data(), count, tasks, {delta.data(), cpu::padded(net.widths[1])}};
  cpu::mlp_backward(mlp, {grad.data(), classes}, kPlainThreads);
  const int64_t last = net.widths[count - 1];
  const int64_t k = random() % t, o = random() % classes, i = random() % last;
  double sum = 0;
  for (int64_t n = start[k]; n < start[k + 1]; ++n) {
    sum += grad.at(n * classes + o) * outputs[count - 2].at(n * cpu::padded(last) + i);
  }
  const int64_t place = (k * classes + o) * last + i;
  expect_close(net.weight_rows[count - 1].at(place), sum, "a layer's gradient");

  std::vector<double> one_by_one(delta.size());
  for (int64_t n = 0; n < delta.size(); ++n) one_by_one[n] = delta.at(n);
  const cpu::SparseRows rows = memory.rows();
  const cpu::SparsePairs pairs = memory.row_pairs.view();
  cpu::LayerInput input;
  if (form == 0) input.dense = {memory.x.data(), d};
  if (form == 1) input.pairs = &pairs;
  if (form == 2) input.rows = &rows, input.positions = sampled.positions.data();
  cpu::mlp_pass(mlp, input, nullptr, target.data(), kPlainThreads);
  // A ReLU's input may be zero but for rounding: only float64 is compared as closely.
  if (dtype != DType::kFloat64) return;
  expect_close(net.weight_rows[count - 1].at(place), sum, "a gradient in one pass");
  for (int64_t n = 0; n < delta.size(); ++n) expect_close(delta.at(n), one_by_one[n], "delta in one pass");
}

// The projection without rows, of a g that is given and of a mini-batch's own, against rows in float64 that are formed
// from what the pass has left behind.
template <class T>
void run_examples(Random& random, DType dtype) {
  const int64_t t = pick(random, {1, 2, 3, 9}), d = pick(random, {1, 16, 33, 70});
  SparseMemory<T> memory(random, dtype, t, d);
  Sampled sampled(random, memory.start);
  // A few examples again and again: the tasks' gradients depend on each other, for which float32 has too few digits.
  const int64_t own_examples = random() % 2 == 0 ? 3 : static_cast<int64_t>(sampled.positions.size());
  for (size_t i = own_examples; i < sampled.positions.size(); ++i) {
    sampled.positions[i] = sampled.positions[i - own_examples];
  }
  RandomMlp<T> net(random, t, d);
  const bool by_entries = random() % 2 == 0;
  const int64_t n = sampled.start.back(), current = random() % 2 == 0 ? 1 + static_cast<int64_t>(random() % 20) : 0;
  std::vector<int64_t> start = sampled.start;
  if (current > 0) start.push_back(n + current);
  const int64_t N = n + current, tasks = t + (current > 0 ? 1 : 0);
  Buffer<T> x(N * d, 0);
  for (int64_t i = 0; i < N; ++i) {
    const int64_t row = i < n ? sampled.positions[i] : static_cast<int64_t>(random() % memory.start.back());
    std::copy_n(&memory.x[row * d], d, &x[i * d]);
  }
  std::vector<int64_t> target(N);
  for (int64_t i = 0; i < N; ++i) {
    target[i] = i < own_examples || i >= n ? static_cast<int64_t>(random() % net.classes()) : target[i - own_examples];
  }
  std::vector<Buffer<T>> deltas, inputs, weight_grads, bias_grads;
  for (int64_t l = 0; l < net.count; ++l) {
    deltas.emplace_back(N * cpu::padded(net.widths[l + 1]), 0);
    inputs.emplace_back(N * cpu::padded(net.widths[l]), 0);
    net.layers[l].weight_rows = net.layers[l].bias_rows = {nullptr, 0};
    net.layers[l].kept_delta = {deltas[l].data(), cpu::padded(net.widths[l + 1])};
    net.layers[l].kept_x = {l == 0 ? nullptr : inputs[l].data(), cpu::padded(net.widths[l])};
    weight_grads.emplace_back(net.widths[l + 1] * net.widths[l], 0).fill(random, Values::kOrdinary);
    bias_grads.emplace_back(net.widths[l + 1], 0).fill(random, Values::kOrdinary);
  }
  const cpu::SparseRows rows = memory.rows();
  cpu::LayerInput input, own;
  if (by_entries) {
    input.rows = &rows, input.positions = sampled.positions.data();
  } else {
    input.dense = {x.data(), d};
  }
  own.dense = {&x[n * d], d};
  if (current == 0) own.dense = {nullptr, 0};
  cpu::Current mini_batch{own, 0.0};
  cpu::mlp_pass({dtype, net.layers.data(), net.count, {start.data(), tasks}, net.layers[0].kept_delta}, input,
                current > 0 ? &mini_batch : nullptr, target.data(), kPlainThreads);

  // The rows of one weight and one bias after the other; the last row is g.
  std::vector<std::vector<double>> G(t + 1);
  std::vector<cpu::ExampleLayer> layers;
  std::vector<TensorRef> g;
  for (int64_t l = 0; l < net.count; ++l) {
    const int64_t in = net.widths[l], out = net.widths[l + 1], in_stride = l == 0 ? d : cpu::padded(in);
    Buffer<T>& of_x = l == 0 ? x : inputs[l];
    for (int64_t k = 0; k < tasks; ++k) {
      std::vector<double> row(out * in + out, 0.0);
      for (int64_t i = start[k]; i < start[k + 1]; ++i) {
        for (int64_t o = 0; o < out; ++o) {
          const double delta = deltas[l].at(i * cpu::padded(out) + o);
          row[out * in + o] += delta;
          for (int64_t j = 0; j < in; ++j) row[o * in + j] += delta * of_x.at(i * in_stride + j);
        }
      }
      G[k].insert(G[k].end(), row.begin(), row.end());
    }
    for (int64_t i = 0; current == 0 && i < out * in; ++i) G[t].push_back(weight_grads[l].at(i));
    for (int64_t o = 0; current == 0 && o < out; ++o) G[t].push_back(bias_grads[l].at(o));
    layers.push_back({out, in, l == 0 ? input : cpu::LayerInput{.dense = net.layers[l].kept_x},
                      net.layers[l].kept_delta, weight_grads[l].data(), bias_grads[l].data()});
    g.push_back({weight_grads[l].data(), out * in, 0});
    g.push_back({bias_grads[l].data(), out, 0});
  }
  std::vector<double> v(t), q(t);
  double residual = -1.0;
  const cpu::Examples examples{dtype, {start.data(), t}, layers.data(), net.count, current, own};
  const double margin = random() % 2 == 0 ? 0.0 : 0.5;
  // By products where they are enough, with rows in memory of its own where they are not; or by rows in ours.
  const bool by_products = random() % 2 == 0;
  Buffer<T> workspace(cpu::example_rows_bytes(examples) / static_cast<int64_t>(sizeof(T)), 0);
  cpu::project_examples(examples, {g.data(), static_cast<int64_t>(g.size())}, margin, 0.0, v.data(), q.data(),
                        &residual, by_products ? nullptr : workspace.data(), kPlainThreads);
  const auto dot = [](const std::vector<double>& a, const std::vector<double>& b) {
    double sum = 0.0;
    for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
    return sum;
  };
  std::vector<double> moved = G[t];
  double scale = std::sqrt(dot(moved, moved));
  for (int64_t k = 0; k < t; ++k) {
    const double length = std::sqrt(dot(G[k], G[k]));
    expect(std::fabs(q[k] - dot(G[k], G[t])) <= 1e-4 * (1 + length * std::sqrt(dot(G[t], G[t]))), "q from examples");
    for (size_t i = 0; i < moved.size(); ++i) moved[i] += v[k] * G[k][i];
    scale += v[k] * length;
  }
  int64_t at = 0;
  for (int64_t l = 0; l < net.count; ++l) {
    for (int64_t i = 0; i < weight_grads[l].size(); ++i) {
      expect(std::fabs(weight_grads[l].at(i) - moved[at++]) <= 1e-4 * (1 + scale), "a weight's g + G'v from examples");
    }
    for (int64_t i = 0; i < bias_grads[l].size(); ++i) {
      expect(std::fabs(bias_grads[l].at(i) - moved[at++]) <= 1e-4 * (1 + scale), "a bias's g + G'v from examples");
    }
  }
}

}  // namespace

void run_layers(Random& random) {
  run_first_layer<float>(random, DType::kFloat32);
  run_first_layer<double>(random, DType::kFloat64);
  run_sparse_forward<float>(random, DType::kFloat32);
  run_sparse_forward<double>(random, DType::kFloat64);
  run_mlp<float>(random, DType::kFloat32);
  run_mlp<double>(random, DType::kFloat64);
  run_examples<float>(random, DType::kFloat32);
  run_examples<double>(random, DType::kFloat64);
}

}  // namespace gem_fast::native
