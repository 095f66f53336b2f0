// Compares every CUDA kernel, run by the emulation, with the CPU kernel of the same stage.
//
//     simt_test [few] [pack] [gram] [solve] [combine] [project]
//
// All stages when none is named; `few` leaves out the large problems and half of the others, for a slow sanitizer.
#include <cstring>
#include <functional>

#include "core/nnqp_problem.h"
#include "core/status.h"
#include "cpu/projection/combine.h"
#include "cpu/projection/gram.h"
#include "cpu/projection/pack.h"
#include "cpu/projection/project.h"
#include "cpu/projection/solve.h"
#include "cpu/simd.h"
#include "cuda/combine.h"
#include "cuda/gram.h"
#include "cuda/pack.h"
#include "cuda/project.h"
#include "cuda/solve.h"
#include "cuda_runtime.h"
#include "problems.h"

namespace gem_fast::test {
namespace {

bool few = false;

std::vector<DType> dtypes() {
  if (few) return {DType::kFloat32, DType::kFloat16};
  return {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16};
}

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// Exactly as many doubles as a kernel asks for; NaN until written.
std::unique_ptr<double[]> doubles(int64_t n) {
  auto x = std::make_unique_for_overwrite<double[]>(n);
  std::fill_n(x.get(), n, kNan);
  return x;
}

// Many tensors of few elements; longer lists than a kernel parameter holds.
std::vector<int64_t> many_sizes(int64_t count, int64_t most) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < count; ++i) sizes.push_back(random_int(0, most));
  return sizes;
}

struct Shape {
  int64_t t;
  std::vector<int64_t> sizes;
  int64_t padding = 0;
  int64_t offset = 0;
};

// From one element to many, whole and broken vectors, aligned rows and others, empty tensors.
std::vector<Shape> shapes() {
  std::vector<Shape> all{
      {1, {1}},          {1, {0, 1, 0}},
      {2, {3}, 0, 1},    {1, {5000}, 8},
      {3, {1024, 1024}}, {3, {1023, 2, 1025}, 5, 3},
      {5, {2048}, 64},   {19, {400, 10, 300, 7}, 3},
      {31, {700}, 4},    {32, {650, 50}, 4},
      {33, {129}, 7, 1}, {2, many_sizes(few ? 210 : 450, 9)},
  };
  if (!few) all.push_back({70, {300}});
  for (int i = 0; i < (few ? 3 : 12); ++i) {
    all.push_back({random_int(1, 40), many_sizes(random_int(1, 9), 400), random_int(0, 9), random_int(0, 3)});
  }
  return all;
}

// ---- pack --------------------------------------------------------------------------------------------------------

void test_pack() {
  for (const DType dtype : dtypes()) {
    for (const Shape& shape : shapes()) {
      Problem problem(dtype, 0, shape.sizes, 0, shape.offset);
      for (size_t i = 0; i < problem.items.size(); i += 3) problem.items[i].data = nullptr;
      Array expected(dtype, problem.p, shape.padding % 4);
      Array row = expected.copy();
      for (int64_t i = 0; i < problem.p; ++i) row.set(i, 7.0);
      cpu::pack(problem.list(), expected.data(), problem.p, dtype, kThisThread);
      cuda::pack(problem.list(), row.data(), dtype, nullptr);
      expect(row.same_bits(expected), "pack " + problem.name());
    }
  }
}

// ---- gram --------------------------------------------------------------------------------------------------------

struct Gramian {
  std::unique_ptr<double[]> P, q, g_squared;

  explicit Gramian(int64_t t) : P(doubles(t * t)), q(doubles(t)), g_squared(doubles(1)) {}
};

Gramian run_gram(const Problem& x, Products products, const int32_t* status = nullptr) {
  Gramian out(x.t);
  const auto workspace = doubles(cuda::gram_workspace(x.rows(), x.list(), products));
  cuda::gram(x.rows(), x.list(), products, status, {out.P.get(), out.q.get(), out.g_squared.get()}, workspace.get(),
             nullptr);
  return out;
}

bool same_bits(const double* a, const double* b, int64_t n) { return std::memcmp(a, b, n * sizeof(double)) == 0; }

void compare_gram(const Problem& x, Products products) {
  const Gramian ours = run_gram(x, products);
  const Gramian theirs(x.t);
  const auto workspace = doubles(cpu::gram_doubles(x.t, x.p));
  cpu::gram(x.rows(), x.list(), products, theirs.P.get(), theirs.q.get(), theirs.g_squared.get(), workspace.get(),
            kThisThread);
  long double sum = 0.0;
  for (const double gi : x.g()) sum += static_cast<long double>(gi) * gi;
  const auto g_squared = static_cast<double>(sum);
  const double rounding = products == Products::kFloat64 ? 1e-14 : 4e-6;
  bool close = x.t == 0 || std::abs(ours.g_squared[0] - g_squared) <= rounding * g_squared;
  for (int64_t i = 0; i < x.t; ++i) {
    const double length = std::sqrt(theirs.P[i * x.t + i]);
    close &= std::abs(ours.q[i] - theirs.q[i]) <= rounding * length * std::sqrt(g_squared);
    for (int64_t j = 0; j < x.t; ++j) {
      const double scale = length * std::sqrt(theirs.P[j * x.t + j]);
      close &= std::abs(ours.P[i * x.t + j] - theirs.P[i * x.t + j]) <= rounding * scale;
    }
  }
  const std::string name = std::string(products == Products::kFloat64 ? "float64 products, " : "") + x.name();
  expect(close, "gram " + name);
  const Gramian again = run_gram(x, products);
  expect(same_bits(again.P.get(), ours.P.get(), x.t * x.t) && same_bits(again.q.get(), ours.q.get(), x.t),
         "gram has the same bits in another order of threads, " + name);
}

void compare_gram(const Problem& x) {
  compare_gram(x, products_of(x.dtype));
  if (x.dtype != DType::kFloat64) compare_gram(x, Products::kFloat64);
}

void test_gram() {
  for (const DType dtype : dtypes()) {
    for (const Shape& shape : shapes()) compare_gram(Problem(dtype, shape.t, shape.sizes, shape.padding, shape.offset));
  }
  // A device without tensor cores for these types.
  simt::capability = 7;
  for (const DType dtype : dtypes()) compare_gram(Problem(dtype, 19, {400, 10, 300, 7}, 3));
  simt::capability = 9;
  compare_gram(Problem(DType::kFloat32, 0, {10}));
  compare_gram(Problem(DType::kFloat32, 3, {0, 0}));
  if (few) return;
  compare_gram(Problem(DType::kFloat32, 300, {90}, 2));
  compare_gram(Problem(DType::kFloat32, 2, {130000, 1, 69999}, 1));
  compare_gram(Problem(DType::kBFloat16, 19, {784 * 30, 30, 300, 10}, 6));

  for (const int64_t t : {1, 19}) {
    // A float32 sum of ones would stop growing at 2^24; here it would lose the small terms long before.
    Problem ones(DType::kFloat32, t, {30000});
    for (int64_t i = 0; i < 30000; ++i) ones.G.set(i, i == 0 ? 4096.0 : 1.0 / 4096.0);
    expect(std::abs(run_gram(ones, Products::kFloat32).P[0] - 4096.0 * 4096.0 - 29999.0 / (4096.0 * 4096.0)) < 1e-4,
           "gram keeps small terms beside large ones");
  }

  // Where the status says that products are not wanted, nothing is written.
  const int32_t solved = kSolved, inaccurate = kInaccurate;
  const Problem x(DType::kFloat32, 3, {70, 50});
  const Gramian left = run_gram(x, Products::kFloat64, &solved), done = run_gram(x, Products::kFloat64, &inaccurate);
  expect(std::isnan(left.P[0]) && std::isnan(left.q[2]) && std::isnan(left.g_squared[0]),
         "gram that is not wanted leaves the results");
  expect(same_bits(done.P.get(), run_gram(x, Products::kFloat64).P.get(), 9), "gram that is wanted");
}

// ---- solve -------------------------------------------------------------------------------------------------------

struct Solved {
  std::unique_ptr<double[]> v, residual;
  std::unique_ptr<int32_t[]> status;

  Solved(int64_t count, int64_t t)
      : v(doubles(count * t)), residual(doubles(count)), status(std::make_unique<int32_t[]>(count)) {}
};

// The block must find what one thread finds, bit for bit: both do the same arithmetic.
void compare_solve(const NnqpBatch& batch, const std::string& name) {
  Solved ours(batch.count, batch.t), theirs(batch.count, batch.t);
  const auto workspace = doubles(cuda::nnqp_workspace(batch.count, batch.t));
  cuda::nnqp(batch, ours.v.get(), ours.status.get(), ours.residual.get(), workspace.get(), nullptr);
  cpu::nnqp(batch, theirs.v.get(), theirs.status.get(), theirs.residual.get(), nullptr, kThisThread);
  expect(same_bits(ours.v.get(), theirs.v.get(), batch.count * batch.t) &&
             same_bits(ours.residual.get(), theirs.residual.get(), batch.count) &&
             std::equal(ours.status.get(), ours.status.get() + batch.count, theirs.status.get()),
         "solve " + name + " t=" + std::to_string(batch.t));
}

enum class Kind { kFull, kRankDeficient, kDuplicates, kZeroRows, kConflicting, kNonFinite };
constexpr Kind kKinds[] = {Kind::kFull,     Kind::kRankDeficient, Kind::kDuplicates,
                           Kind::kZeroRows, Kind::kConflicting,   Kind::kNonFinite};

// P = G G^T and q = G g for a random G of the kind.
void sample(Kind kind, int64_t t, double* P, double* q) {
  const int64_t p = kind == Kind::kRankDeficient ? std::max<int64_t>(1, t / 3) : 2 * t + 1;
  std::vector<double> G(t * p), g(p);
  for (double& x : g) x = normal();
  for (int64_t k = 0; k < t; ++k) {
    const double scale = std::pow(10.0, random_int(-6, 6));
    for (int64_t i = 0; i < p; ++i) {
      double x = normal() * scale;
      if (kind == Kind::kConflicting) x = 0.1 * normal() - g[i];
      if (kind == Kind::kDuplicates && k > 0 && k % 2 == 1) x = G[(k - 1) * p + i];
      if (kind == Kind::kZeroRows && k % 3 == 0) x = 0.0;
      G[k * p + i] = x;
    }
  }
  for (int64_t i = 0; i < t; ++i) {
    q[i] = 0.0;
    for (int64_t c = 0; c < p; ++c) q[i] += G[i * p + c] * g[c];
    for (int64_t j = 0; j < t; ++j) {
      P[i * t + j] = 0.0;
      for (int64_t c = 0; c < p; ++c) P[i * t + j] += G[i * p + c] * G[j * p + c];
    }
  }
  if (kind == Kind::kNonFinite) (random_int(0, 1) == 0 ? q : P)[random_int(0, t - 1)] = kNan;
}

void solve_kinds(int64_t t, int64_t count, const std::string& name) {
  for (const Kind kind : kKinds) {
    const auto P = doubles(count * t * t);
    const auto q = doubles(count * t);
    for (int64_t b = 0; b < count; ++b) sample(kind, t, P.get() + b * t * t, q.get() + b * t);
    const std::string of_kind = name + " kind " + std::to_string(static_cast<int>(kind));
    compare_solve({P.get(), q.get(), count, t, false, 0.0, 0.0}, of_kind);
    compare_solve({P.get(), q.get(), count, t, true, 0.5, 1e-3}, of_kind + " one P");
  }
}

void test_solve() {
  for (const int64_t t : {1, 2, 3, 5, 8, 19, 31, 32, 33, 40}) {
    solve_kinds(t, t < 20 && !few ? 6 : 1, "in shared memory");
  }
  // No constraints at all.
  compare_solve({nullptr, nullptr, 3, 0, false, 0.5, 0.0}, "without constraints");
  if (few) return;

  solve_kinds(70, 1, "by several warps");
  const int optin = simt::shared_bytes_optin;
  simt::shared_bytes_optin = 48 * 1024;
  solve_kinds(120, 1, "in global memory");
  simt::shared_bytes_optin = optin;

  // t = 300 with few violated constraints.
  const int64_t t = 300;
  const auto P = doubles(t * t);
  const auto q = doubles(t);
  sample(Kind::kFull, t, P.get(), q.get());
  for (int64_t k = 0; k < t; ++k) q[k] = k % 60 == 0 ? -std::abs(q[k]) : 2.0 * std::abs(q[k]);
  compare_solve({P.get(), q.get(), 1, t, false, 0.0, 0.0}, "in global memory");
}

// ---- combine -----------------------------------------------------------------------------------------------------

// The same sum in another order: at most one unit in the last place apart, of the result or of its largest term.
bool close_grads(const Problem& a, const Problem& b, double scale) {
  const std::vector<double> x = a.g(), y = b.g();
  for (size_t i = 0; i < x.size(); ++i) {
    if (!(std::abs(x[i] - y[i]) <= epsilon_of(a.dtype) * std::abs(y[i]) + 1e-14 * scale)) return false;
  }
  return true;
}

void compare_combine(const Problem& before, int64_t every) {
  const auto v = doubles(before.t);
  for (int64_t k = 0; k < before.t; ++k) v[k] = every > 0 && k % every == 0 ? std::abs(normal()) : 0.0;
  Problem ours(before), theirs(before);
  // Rows without a weight are not read: a NaN there would show.
  for (int64_t k = 0; k < before.t; ++k) {
    for (int64_t i = 0; v[k] == 0.0 && i < before.p; ++i) ours.G.set(k * ours.stride + i, kNan);
  }
  cuda::combine(ours.list(), ours.rows(), v.get(), nullptr);
  cpu::combine(theirs.list(), theirs.rows(), v.get(), kThisThread);
  expect(close_grads(ours, theirs, 4.0 * before.t), "combine " + before.name());
  if (every == 0) expect(ours.same_grads(before), "combine without weights keeps every bit, " + before.name());
}

void test_combine() {
  for (const DType dtype : dtypes()) {
    for (const Shape& shape : shapes()) {
      const Problem problem(dtype, shape.t, shape.sizes, shape.padding, shape.offset);
      compare_combine(problem, random_int(1, 3));
      compare_combine(problem, 0);
    }
  }
  compare_combine(Problem(DType::kFloat32, 0, {10}), 1);
  if (few) return;
  compare_combine(Problem(DType::kFloat32, 300, {70, 3}, 1), 2);
  compare_combine(Problem(DType::kFloat32, 3, {200000, 33}, 3), 1);
}

// ---- project -----------------------------------------------------------------------------------------------------

struct Projection {
  std::unique_ptr<double[]> v, q;
  int32_t status = -1;
  double residual = kNan;
};

Projection run_project(Problem& x, double margin, double ridge) {
  Projection out{doubles(x.t), doubles(x.t)};
  const auto workspace = doubles(cuda::project_workspace(x.rows(), x.list()));
  cuda::project(x.list(), x.rows(), margin, ridge, out.v.get(), out.q.get(), &out.status, &out.residual,
                workspace.get(), nullptr);
  return out;
}

void compare_project(const Problem& before, double margin, double ridge) {
  Problem ours(before), theirs(before);
  const Projection mine = run_project(ours, margin, ridge);
  Projection other{doubles(before.t), doubles(before.t)};
  const auto outcome = cpu::project(theirs.list(), theirs.rows(), margin, ridge, other.v.get(), other.q.get(),
                                    &other.status, &other.residual, kThisThread);
  const std::string name = "project margin=" + std::to_string(margin) + " " + before.name();
  const bool violated = std::any_of(other.v.get(), other.v.get() + before.t, [](double v) { return v != 0.0; });
  if (outcome == cpu::Projected::kNonFinite) {
    expect(mine.status == kNonFinite, name + " reports input that is not finite");
  } else {
    expect(mine.status == other.status, name + " has the status");
  }
  if (outcome == cpu::Projected::kNonFinite || !violated) {
    expect(ours.same_grads(before), name + " keeps every bit");
    expect(std::all_of(mine.v.get(), mine.v.get() + before.t, [](double v) { return v == 0.0; }), name + " has v = 0");
    return;
  }
  // Both solve the same problem up to the rounding of P and q.
  const std::vector<double> x = ours.g(), y = theirs.g(), g = before.g();
  double distance = 0.0, length = 0.0;
  for (size_t i = 0; i < x.size(); ++i) {
    distance += (x[i] - y[i]) * (x[i] - y[i]);
    length += y[i] * y[i] + g[i] * g[i];
  }
  const double rounding = before.dtype == DType::kFloat64 ? 1e-10 : 1e-4 + 4.0 * epsilon_of(before.dtype);
  expect(std::sqrt(distance) <= rounding * std::sqrt(length), name + " moves the gradient to the same place");
}

// The kernels decide on the device whether products are formed again, in float64: q tells which ones were used.
void compare_products(const Problem& before, Products expected) {
  Problem x(before);
  const Projection out = run_project(x, 0.0, 0.0);
  const std::string name = "project's products, " + before.name();
  expect(out.status == kSolved, name + ", are enough");
  const Gramian gram = run_gram(before, expected);
  expect(same_bits(out.q.get(), gram.q.get(), before.t), name);
  double length = 0.0, projected = 0.0;
  for (const double xi : before.g()) length += xi * xi;
  for (const double xi : x.g()) projected += xi * xi;
  const double rounding = 1e-6 + epsilon_of(before.dtype);
  expect(std::sqrt(projected) <= (1.0 + rounding) * std::sqrt(length), name + ": no longer than before");
  for (int64_t k = 0; k < x.t; ++k) {
    double slope = 0.0, row = 0.0;
    const std::vector<double> g = x.g();
    for (int64_t i = 0; i < x.p; ++i) slope += x.row(k, i) * g[i], row += x.row(k, i) * x.row(k, i);
    expect(slope >= -2.0 * rounding * std::sqrt(row * length), name + ": no past loss rises");
  }
}

void test_products() {
  for (const DType dtype : dtypes()) {
    const Products first = products_of(dtype);
    Problem plain(dtype, 5, {300, 211}, 3);
    plain.shift(-0.5);
    compare_products(plain, first);
    Problem many_rows(dtype, 40, {7, 5}, 1);
    compare_products(many_rows, Products::kFloat64);
    // Rank 3 but for 0.1 %.
    Problem dependent(dtype, 12, {150, 61}, 0, 1);
    for (int64_t k = 3; k < dependent.t; ++k) {
      for (int64_t i = 0; i < dependent.p; ++i) {
        const double combined = dependent.row(k % 3, i) + 0.3 * k * dependent.row((k + 1) % 3, i);
        dependent.G.set(k * dependent.stride + i, combined + 1e-3 * dependent.row(k, i));
      }
    }
    dependent.shift(-0.1);
    compare_products(dependent, Products::kFloat64);
  }
}

void test_project() {
  test_products();
  for (const DType dtype : dtypes()) {
    for (const Shape& shape : shapes()) {
      for (const double shift : {-0.1, 0.0, 5.0}) {
        Problem problem(dtype, shape.t, shape.sizes, shape.padding, shape.offset);
        problem.shift(shift);
        compare_project(problem, random_int(0, 1) * 0.5, random_int(0, 1) * 1e-3);
      }
    }
    for (const int64_t t : {4, 17}) {
      Problem bad(dtype, t, {60, 40}, 1);
      bad.shift(-1.0);
      for (const double value : {kNan, HUGE_VAL, -HUGE_VAL}) {
        Problem in_g(bad), in_G(bad);
        in_g.grads[1].set(39, value);
        in_G.G.set(2 * bad.stride + 99, value);
        compare_project(in_g, 0.5, 0.0);
        compare_project(in_G, 0.5, 0.0);
      }
    }
  }
  compare_project(Problem(DType::kFloat32, 0, {10}), 0.5, 0.0);
  compare_project(Problem(DType::kFloat32, 2, {0}), 0.5, 0.0);

  // Products beyond float32's range.
  Problem huge(DType::kFloat32, 2, {10});
  for (int64_t i = 0; i < 20; ++i) huge.G.set(i, 1e30);
  for (int64_t i = 0; i < 10; ++i) huge.grads[0].set(i, -1e30);
  compare_project(huge, 0.5, 0.0);
}

}  // namespace
}  // namespace gem_fast::test

int main(int argc, char** argv) {
  using namespace gem_fast::test;
  // The instruction set whose arithmetic is that of the kernels as g++ compiles them.
  gem_fast::cpu::set_simd_level(gem_fast::cpu::Simd::kBase);
  const std::pair<const char*, void (*)()> tests[] = {{"pack", test_pack},
                                                      {"gram", test_gram},
                                                      {"solve", test_solve},
                                                      {"combine", test_combine},
                                                      {"project", test_project}};
  const auto named = [&](const char* name) {
    return std::any_of(argv + 1, argv + argc, [&](const char* x) { return std::strcmp(x, name) == 0; });
  };
  few = named("few");
  for (const auto& [name, test] : tests) {
    if (argc == (few ? 2 : 1) || named(name)) test();
  }
  printf("%d checks, %d failed\n", checks(), failures());
  return failures() == 0 ? 0 : 1;
}
