// Runs every kernel of csrc/ over random and hard shapes on plain threads, for the sanitizers
// (tests/csrc/test_sanitizers.py).
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
#include "cpu/projection/combine.h"
#include "cpu/projection/gram.h"
#include "cpu/projection/pack.h"
#include "cpu/projection/project.h"
#include "cpu/projection/solve.h"
#include "cpu/simd.h"
#include "inputs.h"
#include "layers.h"
#include "threads.h"

namespace gem_fast::native {
namespace {

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
void run_gram(Random& random, Matrix<T>& G, Gradient<T>& g) {
  Buffer<double> P(G.t * G.t, 0), q(G.t, 1), g_squared(1, 0), workspace(cpu::gram_doubles(G.t, G.p), 0);
  const Products products = random() % 3 == 0 ? Products::kFloat64 : products_of(G.rows.dtype);
  cpu::gram(G.rows, g.list(), products, P.data(), q.data(), g_squared.data(), workspace.data(), kPlainThreads);
  Buffer<double> row_q(G.t, 1), sums(G.t, 0), more(cpu::gram_row_sums_doubles(G.t, G.p), 0);
  Buffer<Compute<T>> column_sums(cpu::column_sums_bytes(G.rows.dtype, G.p) / sizeof(Compute<T>), 0);
  cpu::gram_row_sums(G.rows, g.list(), row_q.data(), sums.data(), column_sums.data(), more.data(), kPlainThreads);
  if (cpu::first_non_finite(G.rows, g.list()) >= 0) return;
  const std::vector<double> flat = g.flat();
  double squared = 0;
  for (const double x : flat) squared += x * x;
  expect(std::fabs(g_squared[0] - squared) <= 1e-4 * squared, "|g|^2");
  for (int trial = 0; trial < 5 && G.p > 0; ++trial) {
    const int64_t c = random() % G.p;
    double sum = 0, size = 0;
    for (int64_t k = 0; k < G.t; ++k) sum += G.at(k, c), size += std::fabs(G.at(k, c));
    expect(std::fabs(column_sums.at(c) - sum) <= 1e-5 * size, "G^T 1");
  }
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
    expect(std::fabs(row_q[i] - with_g) <= 1e-4 * size_g, "q beside the row sums of P");
    double row_sum = 0, row_size = 0;
    for (int64_t k = 0; k < G.t; ++k) row_sum += P[i * G.t + k], row_size += std::fabs(P[i * G.t + k]);
    expect(std::fabs(sums[i] - row_sum) <= 1e-3 * (row_size + P[i * G.t + i]), "the row sums of P");
  }
}

template <class T>
void run_combine(Random& random, Matrix<T>& G, Gradient<T>& g) {
  Buffer<double> v(G.t, 1);
  for (int64_t k = 0; k < G.t; ++k) v[k] = random() % 3 == 0 ? 0.0 : value(random, Values::kOrdinary);
  const bool finite = cpu::first_non_finite(G.rows, g.list()) < 0;
  const std::vector<double> before = g.flat();
  cpu::combine(g.list(), G.rows, v.data(), kPlainThreads);
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
  std::vector<TensorRef> items = g.items;
  if (random() % 2 == 0) items[random() % items.size()].data = nullptr;  // a parameter without a gradient
  cpu::pack({items.data(), static_cast<int64_t>(items.size())}, row.data(), p, dtype, kPlainThreads);
  for (const TensorRef& item : items) {
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
      cpu::project(g.list(), G.rows, margin, 0.0, v.data(), q.data(), &status, &residual, kPlainThreads);
  const std::vector<double> after = g.flat();
  if (outcome != cpu::Projected::kNonFinite) {
    // |g~| <= |g + margin G^T 1|, whatever the rows are; values whose squares overflow are left out.
    const bool moved = std::any_of(&v[0], &v[0] + G.t, [](double x) { return x != 0.0; });
    double least = 0.0, most = 0.0;
    for (int64_t c = 0; c < G.p; ++c) {
      double at_margin = before[c];
      for (int64_t k = 0; k < G.t; ++k) at_margin += moved ? margin * G.at(k, c) : 0.0;
      least += after[c] * after[c], most += at_margin * at_margin;
    }
    expect(!std::isfinite(most) || std::sqrt(least) <= 1.02 * std::sqrt(most) + 1e-30, "|g~| <= |g_m|");
    return;
  }
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

void run_round(Random& random) {
  const Shape shape = random_shape(random);
  for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
    GEM_FAST_DISPATCH_DTYPE(dtype, {
      Matrix<T> G(random, shape.t, shape.p, dtype, shape.values);
      Gradient<T> g(random, shape.p, shape.values);
      run_gram(random, G, g);
      run_pack(random, g, shape.p, dtype);
      run_project(random, G, g);
      run_combine(random, G, g);
    });
  }
  run_nnqp(random, shape.values);
  run_layers(random);
}

// The kernels are sound; what they are handed is not. Each planted fault happens inside a kernel.
void write_out_of_bounds(Random& random) {
  Gradient<float> g(random, 1001, Values::kOrdinary);
  Buffer<float> row(1000, 0);
  cpu::pack(g.list(), row.data(), 1001, DType::kFloat32, kPlainThreads);
}

void race(Random& random) {
  Matrix<float> G(random, 3, 100000, DType::kFloat32, Values::kOrdinary);
  Buffer<float> g(100000, 0);
  g.fill(random, Values::kOrdinary);
  const TensorRef whole{g.data(), 100000, 0};
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
