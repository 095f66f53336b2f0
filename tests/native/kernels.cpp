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
#include "cpu/gram.h"
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
      cpu::project(g.segments(), G.rows, margin, 0.0, v.data(), q.data(), &status, &residual, kPlainThreads);
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
  std::vector<int64_t> start{0}, sample_start{0}, positions;
  for (int64_t k = 0; k < t; ++k) start.push_back(start.back() + 1 + static_cast<int64_t>(random() % 40));
  const int64_t N = start.back();
  for (int64_t k = 0; k < t; ++k) {
    const int64_t n = start[k + 1] - start[k];
    for (int64_t i = 0; i < n; i += 1 + static_cast<int64_t>(random() % 5)) positions.push_back(start[k] + i);
    sample_start.push_back(static_cast<int64_t>(positions.size()));
  }
  Buffer<T> x(N * d, 0), weight(outputs * d, 1), bias(outputs, 0), grad(N * outputs, 1);
  for (int64_t i = 0; i < N * d; ++i) x[i] = random() % 5 == 0 ? T(value(random, Values::kOrdinary)) : T(0);
  weight.fill(random, Values::kOrdinary);
  bias.fill(random, Values::kOrdinary);
  grad.fill(random, Values::kOrdinary);

  Buffer<int32_t> row_start(N + 1, 0), column_start(t * (d + 1), 0);
  const int64_t count = cpu::count_entries(x.data(), dtype, N, d, row_start.data(), kPlainThreads);
  Buffer<int32_t> columns(count, 0), rows(count, 0);
  Buffer<T> values(count, 0), column_values(count, 0);
  cpu::fill_rows(x.data(), dtype, N, d, row_start.data(), columns.data(), values.data(), kPlainThreads);
  const cpu::SparseRows by_rows{row_start.data(), columns.data(), values.data(), d};
  const cpu::Tasks tasks{start.data(), t}, sampled{sample_start.data(), t};
  cpu::fill_columns(by_rows, dtype, tasks, column_start.data(), rows.data(), column_values.data(), kPlainThreads);
  const cpu::SparseColumns by_columns{column_start.data(), rows.data(), column_values.data(), d};

  const auto check_layer = [&](int64_t n, const int64_t* at) {
    Buffer<T> y(n * outputs, 0), scratch(cpu::sparse_scratch(d, outputs), 0);
    cpu::sparse_linear(by_rows, dtype, at, n, weight.data(), bias.data(), outputs, y.data(), scratch.data(),
                       kPlainThreads);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t o = random() % outputs, row = at == nullptr ? i : at[i];
      double sum = bias.at(o);
      for (int64_t j = 0; j < d; ++j) sum += x.at(row * d + j) * weight.at(o * d + j);
      expect(std::fabs(y.at(i * outputs + o) - sum) <= 1e-3, "W x + b");
    }
  };
  const auto check_gradient = [&](const cpu::Tasks& list, const int64_t* at) {
    const int64_t stride = outputs * d + static_cast<int64_t>(random() % 3);
    Buffer<T> out((t - 1) * stride + outputs * d, 0), scratch(cpu::sparse_scratch(list.start[t], outputs), 0);
    if (at == nullptr) {
      cpu::sparse_gradient(by_columns, dtype, list, grad.data(), outputs, {out.data(), stride}, scratch.data(),
                           kPlainThreads);
    } else {
      cpu::sparse_gradient_of_sample(by_rows, dtype, at, list, grad.data(), outputs, {out.data(), stride},
                                     scratch.data(), kPlainThreads);
    }
    for (int64_t k = 0; k < t; ++k) {
      const int64_t o = random() % outputs, j = random() % d;
      double sum = 0;
      for (int64_t i = list.start[k]; i < list.start[k + 1]; ++i) {
        sum += grad.at(i * outputs + o) * x.at((at == nullptr ? i : at[i]) * d + j);
      }
      expect(std::fabs(out.at(k * stride + o * d + j) - sum) <= 1e-3, "the gradient of W");
    }
  };
  check_layer(N, nullptr);
  check_layer(static_cast<int64_t>(positions.size()), positions.data());
  check_gradient(tasks, nullptr);
  check_gradient(sampled, positions.data());
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
