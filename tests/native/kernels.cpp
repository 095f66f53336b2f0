// Runs every kernel of csrc/ over random and hard shapes on plain threads, for the sanitizers
// (tests/test_sanitizers.py).
//
//     kernels SEED ROUNDS                 prints how many shapes were run
//     kernels out-of-bounds | race        does what the sanitizers must not let pass
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "core/status.h"
#include "cpu/combine.h"
#include "cpu/cross_entropy.h"
#include "cpu/gram.h"
#include "cpu/linear.h"
#include "cpu/pack.h"
#include "cpu/project.h"
#include "cpu/simd.h"
#include "cpu/solve.h"
#include "cpu/sparse.h"
#include "inputs.h"
#include "threads.h"

namespace gem_fast::native {
namespace {

void expect(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "wrong result: %s\n", what);
  std::exit(1);
}

struct Shape {
  int64_t t, p;
  Values values;
};

// Sizes around those of panels (64), blocks (1024), tiles (4) and chunks (4096, 32768).
Shape random_shape(Random& random) {
  const Values values[] = {Values::kOrdinary, Values::kOrdinary, Values::kOrdinary, Values::kZeros,
                           Values::kHuge,     Values::kNan,      Values::kInfinity};
  const int64_t t = pick(random, {0, 1, 2, 3, 4, 5, 7, 8, 9, 19, 63, 64, 65, 130});
  const int64_t p = t > 20 ? pick(random, {0, 1, 2, 33, 1025, 2050})
                           : pick(random, {0, 1, 2, 3, 15, 16, 17, 511, 513, 1023, 1024, 1025, 4097, 9000, 70000});
  return {t, p, values[random() % 7]};
}

template <class T>
void run_gram_and_probe(Random& random, Matrix<T>& G, Gradient<T>& g) {
  Buffer<double> P(G.t * G.t, 0), q(G.t, 1), workspace(cpu::gram_doubles(G.t, G.p), 0);
  cpu::gram(G.rows, g.segments(), P.data(), q.data(), workspace.data(), kPlainThreads);
  Buffer<double> probed(G.t, 1), sums(G.t, 0), more(cpu::probe_doubles(G.t, G.p), 0);
  cpu::probe(G.rows, g.segments(), probed.data(), sums.data(), more.data(), kPlainThreads);
  if (cpu::first_non_finite(G.rows, g.segments()) >= 0) return;
  const std::vector<double> flat = g.flat();
  for (int trial = 0; trial < 5 && G.t > 0; ++trial) {
    const int64_t i = random() % G.t, j = random() % G.t;
    double product = 0, size = 0, with_g = 0, size_g = 0;
    for (int64_t c = 0; c < G.p; ++c) {
      product += G.at(i, c) * G.at(j, c);
      size += std::fabs(G.at(i, c) * G.at(j, c));
      with_g += G.at(i, c) * flat[c];
      size_g += std::fabs(G.at(i, c) * flat[c]);
    }
    expect(std::fabs(P[i * G.t + j] - product) <= 1e-4 * size, "P");
    expect(std::fabs(q[i] - with_g) <= 1e-4 * size_g, "q");
    expect(std::fabs(probed[i] - with_g) <= 1e-4 * size_g, "q of the probe");
  }
}

template <class T>
void run_combine(Random& random, Matrix<T>& G, Gradient<T>& g) {
  Buffer<double> v(G.t, 1);
  for (int64_t k = 0; k < G.t; ++k) v[k] = random() % 3 == 0 ? 0.0 : value(random, Values::kOrdinary);
  const bool finite = cpu::first_non_finite(G.rows, g.segments()) < 0;
  const std::vector<double> before = g.flat();
  cpu::combine(g.segments(), G.rows, v.data(), kPlainThreads);
  const std::vector<double> after = g.flat();
  for (int trial = 0; trial < 20 && G.p > 0 && finite; ++trial) {
    const int64_t c = random() % G.p;
    double sum = before[c], size = std::fabs(before[c]);
    for (int64_t k = 0; k < G.t; ++k) {
      sum += v[k] * G.at(k, c);
      size += std::fabs(v[k] * G.at(k, c));
    }
    expect(!std::isfinite(after[c]) || std::fabs(after[c] - sum) <= 1e-2 * size, "g + G^T v");
  }
}

template <class T>
void run_pack(Random& random, Gradient<T>& g, int64_t p, DType dtype) {
  Buffer<T> row(p, static_cast<int64_t>(random() % 5));
  std::vector<Segment> items = g.items;
  if (random() % 2 == 0) items[random() % items.size()].data = nullptr;  // a parameter without a gradient
  cpu::pack({items.data(), static_cast<int64_t>(items.size())}, row.data(), p, dtype, kPlainThreads);
  for (const Segment& item : items) {
    for (int64_t i = 0; i < item.numel; ++i) {
      const T expected = item.data != nullptr ? static_cast<const T*>(item.data)[i] : T(Compute<T>(0));
      expect(std::memcmp(&row[item.offset + i], &expected, sizeof(T)) == 0, "packed row");
    }
  }
}

template <class T>
void run_project(Random& random, Matrix<T>& G, Gradient<T>& g) {
  Buffer<double> v(G.t, 0), q(G.t, 1);
  int32_t status = -1;
  double residual = -1.0;
  const double margin = random() % 2 == 0 ? 0.0 : 0.5;
  const std::vector<double> before = g.flat();
  const auto outcome =
      cpu::project(g.segments(), G.rows, nullptr, margin, 0.0, v.data(), q.data(), &status, &residual, kPlainThreads);
  if (outcome != cpu::Projected::kNonFinite) return;
  const std::vector<double> after = g.flat();
  expect(before.size() == after.size() &&
             (before.empty() || std::memcmp(before.data(), after.data(), before.size() * sizeof(double)) == 0),
         "a refused gradient was changed");
}

void run_nnqp(Random& random, Values values) {
  const int64_t t = pick(random, {0, 1, 2, 3, 8, 17, 40}), rank = pick(random, {1, 3, 20, 60});
  const int64_t count = pick(random, {0, 1, 2, 9});
  const bool shared = random() % 3 == 0;
  const int64_t matrices = shared ? 1 : count;
  Buffer<double> G(t * rank, 0), P(matrices * t * t, 1), q(count * t, 1);
  for (int64_t b = 0; b < matrices; ++b) {
    G.fill(random, values);
    for (int64_t i = 0; i < t; ++i) {
      for (int64_t j = 0; j < t; ++j) {
        double& sum = P[(b * t + i) * t + j] = 0.0;
        for (int64_t c = 0; c < rank; ++c) sum += G[i * rank + c] * G[j * rank + c];
      }
    }
  }
  for (int64_t i = 0; i < count * t; ++i) q[i] = value(random, Values::kOrdinary);
  Buffer<double> v(count * t, 0), residual(count, 0);
  Buffer<int32_t> status(count, 0), iterations(count, 0);
  const bool count_iterations = random() % 2 == 0;
  cpu::nnqp({P.data(), q.data(), count, t, shared, 0.5, random() % 2 == 0 ? 0.0 : 1e-3}, v.data(), status.data(),
            residual.data(), count_iterations ? iterations.data() : nullptr, kPlainThreads);
  for (int64_t i = 0; i < count * t; ++i) expect(std::isfinite(v[i]), "v");
}

// A first layer over mostly zeros, of all examples and of a sample of them, against sums in float64.
template <class T>
void run_sparse(Random& random, DType dtype) {
  const int64_t t = pick(random, {1, 2, 3, 7}), d = pick(random, {1, 3, 15, 16, 17, 64, 100}),
                outputs = pick(random, {1, 2, 15, 16, 17, 33, 100, 129, 300});
  std::vector<int64_t> start{0}, positions;
  for (int64_t k = 0; k < t; ++k) start.push_back(start.back() + 1 + static_cast<int64_t>(random() % 40));
  const int64_t N = start.back();
  for (int64_t k = 0; k < t; ++k) {
    const int64_t n = start[k + 1] - start[k];
    for (int64_t i = 0; i < n; i += 1 + static_cast<int64_t>(random() % 5)) positions.push_back(start[k] + i);
  }
  Buffer<T> x(N * d, 0), weight(outputs * d, 1), bias(outputs, 0), grad(N * outputs, 1);
  for (int64_t i = 0; i < N * d; ++i) x[i] = random() % 5 == 0 ? T(value(random, Values::kOrdinary)) : T(0);
  weight.fill(random, Values::kOrdinary);
  bias.fill(random, Values::kOrdinary);
  grad.fill(random, Values::kOrdinary);

  Buffer<int32_t> row_start(N + 1, 0);
  const int64_t count = cpu::count_entries(x.data(), dtype, N, d, row_start.data(), kPlainThreads);
  Buffer<int32_t> columns(count, 0);
  Buffer<T> values(count, 0);
  cpu::fill_rows(x.data(), dtype, N, d, row_start.data(), columns.data(), values.data(), kPlainThreads);
  const cpu::SparseRows by_rows{row_start.data(), columns.data(), values.data(), d};
  const cpu::Tasks tasks{start.data(), t};
  const int64_t together = d > 1 && random() % 2 == 0 ? 2 : cpu::columns_together(by_rows, N);
  std::vector<int64_t> first(t + 1);
  cpu::count_columns(by_rows, tasks, together, first.data());
  Buffer<int32_t> column_start(t * (cpu::column_groups(d, together) + 1), 0), rows(first[t], 0);
  Buffer<T> column_values(first[t] * together, 0);
  cpu::fill_columns(by_rows, dtype, tasks, together, first.data(), column_start.data(), rows.data(),
                    column_values.data(), kPlainThreads);
  const cpu::SparseColumns by_columns{column_start.data(), rows.data(), column_values.data(), d, together};

  const auto check_layer = [&](int64_t n, const int64_t* at) {
    Buffer<T> y(n * outputs, 0), scratch(d * cpu::padded(outputs), 0);
    cpu::sparse_linear(by_rows, dtype, at, n, {weight.data(), bias.data(), outputs, d}, {y.data(), outputs},
                       scratch.data(), kPlainThreads);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t o = random() % outputs, row = at == nullptr ? i : at[i];
      double sum = bias.at(o);
      for (int64_t j = 0; j < d; ++j) sum += x.at(row * d + j) * weight.at(o * d + j);
      expect(std::fabs(y.at(i * outputs + o) - sum) <= 1e-3, "W x + b");
    }
  };
  check_layer(N, nullptr);
  check_layer(static_cast<int64_t>(positions.size()), positions.data());

  const int64_t width = cpu::padded(outputs);
  Buffer<T> delta(N * width, 0);
  cpu::pad_rows({grad.data(), outputs}, dtype, N, outputs, delta.data(), kPlainThreads);
  const int64_t stride = outputs * d + static_cast<int64_t>(random() % 3);
  Buffer<T> out((t - 1) * stride + outputs * d, 0);
  cpu::sparse_gradient(by_columns, dtype, tasks, {delta.data(), width}, outputs, {out.data(), stride}, kPlainThreads);
  for (int64_t k = 0; k < t; ++k) {
    const int64_t o = random() % outputs, j = random() % d;
    double sum = 0;
    for (int64_t i = start[k]; i < start[k + 1]; ++i) sum += grad.at(i * outputs + o) * x.at(i * d + j);
    expect(std::fabs(out.at(k * stride + o * d + j) - sum) <= 1e-3, "the gradient of W");
  }
}

// Layers with ReLU between them, forward and backward, against float64 row by row.
template <class T>
void run_chain(Random& random, DType dtype) {
  const int64_t t = pick(random, {1, 2, 3}), count = pick(random, {2, 3, 4});
  std::vector<int64_t> start{0}, widths;
  for (int64_t k = 0; k < t; ++k) start.push_back(start.back() + 1 + static_cast<int64_t>(random() % 70));
  const int64_t N = start.back();
  for (int64_t l = 0; l <= count; ++l) widths.push_back(pick(random, {1, 2, 10, 15, 16, 17, 64, 65, 100}));
  // z is what the first layer, whose inputs play no part here, puts out.
  Buffer<T> z(N * widths[0], 1);
  z.fill(random, Values::kOrdinary);
  std::vector<Buffer<T>> weights, biases, inputs, weight_rows, bias_rows;
  std::vector<cpu::Layer> layers;
  std::vector<cpu::Matrix> hidden;
  for (int64_t l = 0; l < count; ++l) {
    weights.emplace_back(widths[l + 1] * widths[l], 1).fill(random, Values::kOrdinary);
    biases.emplace_back(widths[l + 1], 0).fill(random, Values::kOrdinary);
    inputs.emplace_back(N * cpu::padded(widths[l]), 0);
    layers.push_back({weights[l].data(), biases[l].data(), widths[l + 1], widths[l]});
    hidden.push_back({inputs[l].data(), cpu::padded(widths[l])});
  }
  const int64_t classes = widths[count];
  Buffer<T> outputs(N * classes, 0), scratch(cpu::chain_scratch(layers.data(), count), 0);
  cpu::chain_forward({z.data(), widths[0]}, dtype, N, layers.data(), count, hidden.data(), {outputs.data(), classes},
                     scratch.data(), kPlainThreads);
  for (int64_t l = 0; l < count; ++l) {
    const int64_t n = random() % N, o = random() % widths[l + 1], width = cpu::padded(widths[l]);
    double sum = biases[l].at(o);
    for (int64_t i = 0; i < widths[l]; ++i) sum += inputs[l].at(n * width + i) * weights[l].at(o * widths[l] + i);
    const double got =
        l + 1 < count ? inputs[l + 1].at(n * cpu::padded(widths[l + 1]) + o) : outputs.at(n * classes + o);
    expect(std::fabs(got - (l + 1 < count ? std::fmax(sum, 0.0) : sum)) <= 1e-3 * (1 + std::fabs(sum)), "a layer");
  }

  // The backward has the layer before as its first: one that only passes its delta on.
  Buffer<T> grad(N * classes, 0), delta(N * cpu::padded(widths[0]), 0);
  grad.fill(random, Values::kOrdinary);
  std::vector<cpu::Layer> all{{nullptr, nullptr, widths[0], 0}};
  std::vector<cpu::Link> links{{{nullptr, 0}, false, {nullptr, 0}, {nullptr, 0}}};
  for (int64_t l = 0; l < count; ++l) {
    const int64_t size = layers[l].outputs * layers[l].inputs;
    weight_rows.emplace_back(t * size, 0);
    bias_rows.emplace_back(t * layers[l].outputs, 0);
    all.push_back(layers[l]);
    links.push_back({{inputs[l].data(), hidden[l].stride},
                     random() % 2 == 0,
                     {weight_rows[l].data(), size},
                     {random() % 4 == 0 ? nullptr : bias_rows[l].data(), layers[l].outputs}});
  }
  const cpu::Tasks tasks{start.data(), t};
  cpu::chain_backward({grad.data(), classes}, dtype, all.data(), links.data(), count + 1, tasks,
                      {delta.data(), cpu::padded(widths[0])}, scratch.data(), kPlainThreads);
  const int64_t k = random() % t, last = count - 1, o = random() % classes, i = random() % widths[last];
  double sum = 0;
  for (int64_t n = start[k]; n < start[k + 1]; ++n) {
    sum += grad.at(n * classes + o) * inputs[last].at(n * hidden[last].stride + i);
  }
  const double got = weight_rows[last].at((k * classes + o) * widths[last] + i);
  expect(std::fabs(got - sum) <= 1e-3 * (1 + std::fabs(sum)), "a layer's gradient");

  std::vector<int64_t> target(N);
  for (int64_t& y : target) y = random() % classes;
  cpu::cross_entropy_gradient({outputs.data(), classes}, dtype, target.data(), tasks, classes, {grad.data(), classes},
                              kPlainThreads);
  for (int64_t n = 0; n < N; ++n) {
    double total = 0;
    for (int64_t c = 0; c < classes; ++c) total += grad.at(n * classes + c);
    expect(std::fabs(total) <= 1e-5, "the gradient of cross entropy");
  }
}

// Dense products of a few and of many rows, from padded rows and into rows of G.
template <class T>
void run_linear_gradient(Random& random, DType dtype) {
  const int64_t t = pick(random, {1, 2, 5}), inputs = pick(random, {1, 16, 63, 64, 65, 130}),
                outputs = pick(random, {1, 3, 4, 10, 17});
  std::vector<int64_t> start{0};
  for (int64_t k = 0; k < t; ++k) start.push_back(start.back() + 1 + static_cast<int64_t>(random() % 40));
  const int64_t N = start.back(), width = cpu::padded(inputs), size = outputs * inputs;
  Buffer<T> x(N * width, 0), delta(N * outputs, 1), out(t * size, 1);
  x.fill(random, Values::kOrdinary);
  delta.fill(random, Values::kOrdinary);
  cpu::linear_gradient({delta.data(), outputs}, {x.data(), width}, dtype, {start.data(), t}, outputs, inputs,
                       {out.data(), size}, kPlainThreads);
  const int64_t k = random() % t, o = random() % outputs, i = random() % inputs;
  double sum = 0;
  for (int64_t n = start[k]; n < start[k + 1]; ++n) sum += delta.at(n * outputs + o) * x.at(n * width + i);
  expect(std::fabs(out.at(k * size + o * inputs + i) - sum) <= 1e-3 * (1 + std::fabs(sum)), "a dense gradient");
}

void run_round(Random& random) {
  const Shape shape = random_shape(random);
  for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
    GEM_FAST_DISPATCH_DTYPE(dtype, {
      Matrix<T> G(random, shape.t, shape.p, dtype, shape.values);
      Gradient<T> g(random, shape.p, shape.values);
      run_gram_and_probe(random, G, g);
      run_pack(random, g, shape.p, dtype);
      run_project(random, G, g);
      run_combine(random, G, g);
    });
  }
  run_nnqp(random, shape.values);
  run_sparse<float>(random, DType::kFloat32);
  run_sparse<double>(random, DType::kFloat64);
  run_chain<float>(random, DType::kFloat32);
  run_chain<double>(random, DType::kFloat64);
  run_linear_gradient<float>(random, DType::kFloat32);
  run_linear_gradient<double>(random, DType::kFloat64);
}

// The kernels are sound; what they are handed is not. Each planted fault happens inside a kernel.
void write_out_of_bounds(Random& random) {
  Gradient<float> g(random, 1001, Values::kOrdinary);
  Buffer<float> row(1000, 0);
  cpu::pack(g.segments(), row.data(), 1001, DType::kFloat32, kPlainThreads);
}

void race(Random& random) {
  Matrix<float> G(random, 3, 100000, DType::kFloat32, Values::kOrdinary);
  Buffer<float> g(100000, 0);
  g.fill(random, Values::kOrdinary);
  const Segment whole{g.data(), 100000, 0};
  const double v[] = {1.0, 2.0, 3.0};
  cpu::combine({&whole, 1}, G.rows, v, kRacingThreads);
}

int run(const std::string& first, int rounds) {
  Random random(rounds > 0 ? std::strtoull(first.c_str(), nullptr, 10) : 0);
  if (first == "out-of-bounds") {
    write_out_of_bounds(random);
  } else if (first == "race") {
    race(random);
  } else {
    int shapes = 0;
    for (int round = 0; round < rounds; ++round) {
      for (int level = 0; level <= static_cast<int>(cpu::simd_available()); ++level, ++shapes) {
        cpu::set_simd_level(static_cast<cpu::Simd>(level));
        run_round(random);
      }
    }
    std::printf("%d shapes on %d instruction sets\n", shapes, static_cast<int>(cpu::simd_available()) + 1);
  }
  return 0;
}

}  // namespace
}  // namespace gem_fast::native

int main(int argc, char** argv) {
  if (argc < 2) return 2;
  return gem_fast::native::run(argv[1], argc > 2 ? std::atoi(argv[2]) : 0);
}
