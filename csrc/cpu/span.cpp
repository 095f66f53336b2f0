#include "cpu/span.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/product.h"
#include "cpu/simd.h"
#include "cpu/transpose.h"

namespace gem_fast::cpu {
namespace {

// Rows of g that one thread takes at a time.
constexpr int64_t kGrain = 16;

// q <- q - (q . u) u, for rows of whole cache lines.
template <class T, int L>
GEM_FAST_KERNEL void remove_component(T* q, const T* u, int64_t width) {
  using V = typename Lanes<T, L>::type;
  V sums = {};
  for (int64_t i = 0; i < width; i += L) sums += *reinterpret_cast<const V*>(q + i) * *reinterpret_cast<const V*>(u + i);
  T sum = 0;
  for (int l = 0; l < L; ++l) sum += sums[l];
  for (int64_t i = 0; i < width; i += L) *reinterpret_cast<V*>(q + i) -= sum * *reinterpret_cast<const V*>(u + i);
}

// The sum of squares of a - b; in separate sums, which the compiler turns into vectors.
template <class T>
GEM_FAST_KERNEL double squares(const T* a, const T* b, int64_t n) {
  constexpr int kSums = 16;
  T sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums) {
    for (int l = 0; l < kSums; ++l) sums[l] += (a[i + l] - b[i + l]) * (a[i + l] - b[i + l]);
  }
  for (; i < n; ++i) sums[0] += (a[i] - b[i]) * (a[i] - b[i]);
  double total = 0;
  for (const T sum : sums) total += static_cast<double>(sum);
  return total;
}

// Gram-Schmidt, each row twice, in place; a row that depends on those before becomes zero.
template <class Isa, class T>
GEM_FAST_KERNEL void orthonormalise(T* Q, int64_t count, int64_t width, const T* zeros) {
  const double smallest = 64 * std::numeric_limits<T>::epsilon();
  for (int64_t r = 0; r < count; ++r) {
    T* q = Q + r * width;
    const double before = std::sqrt(squares(q, zeros, width));
    for (int pass = 0; pass < 2; ++pass) {
      for (int64_t j = 0; j < r; ++j) remove_component<T, kLanesOf<Isa, T>>(q, Q + j * width, width);
    }
    const double after = std::sqrt(squares(q, zeros, width));
    const T scale = after > smallest * before ? static_cast<T>(1 / after) : T(0);
    for (int64_t i = 0; i < width; ++i) q[i] *= scale;
  }
}

template <class Isa>
GEM_FAST_KERNEL void orthonormalise_any_impl(DType dtype, void* Q, int64_t count, int64_t width, const void* zeros) {
  GEM_FAST_DISPATCH_FULL(dtype,
                         orthonormalise<Isa, T>(static_cast<T*>(Q), count, width, static_cast<const T*>(zeros)));
}
GEM_FAST_MULTIVERSION(orthonormalise_any,
                      (DType dtype, void* Q, int64_t count, int64_t width, const void* zeros),
                      (dtype, Q, count, width, zeros))

template <class Isa>
GEM_FAST_KERNEL void squares_any_impl(DType dtype, const void* a, const void* b, int64_t n, double* sum) {
  GEM_FAST_DISPATCH_FULL(dtype, *sum = squares(static_cast<const T*>(a), static_cast<const T*>(b), n));
}
GEM_FAST_MULTIVERSION(squares_any, (DType dtype, const void* a, const void* b, int64_t n, double* sum),
                      (dtype, a, b, n, sum))

}  // namespace

int64_t span_scratch(int64_t rows, int64_t columns, int64_t most) {
  // Two float64 sums per row, Q with padded rows and a row of zeros, Q turned around.
  return 4 * rows + (most + 1) * padded(columns) + columns * padded(most);
}

double span_factors(const ConstMatrix& g, const ConstMatrix& x, DType dtype, int64_t rows, int64_t columns,
                    int64_t most, void* A, void* Q, void* scratch, const Executor& executor) {
  const int64_t width = padded(columns);
  auto* sums = static_cast<double*>(scratch);  // first, so that they are aligned
  void* basis = at(scratch, 4 * rows, dtype);
  void* zeros = at(basis, most * width, dtype);
  void* turned = at(zeros, width, dtype);
  pad_rows(x, dtype, most, columns, basis, executor);
  memset(zeros, 0, width * size_of(dtype));
  orthonormalise_any(dtype, basis, most, width, zeros);
  for (int64_t r = 0; r < most; ++r) {
    memcpy(at(Q, r * columns, dtype), at(basis, r * width, dtype), columns * size_of(dtype));
  }
  transpose(Q, dtype, most, columns, turned, executor);
  executor.each((rows + kGrain - 1) / kGrain, 1, [&](int64_t block) {
    const int64_t first = block * kGrain;
    const int64_t n = std::min(kGrain, rows - first);
    thread_local std::vector<char> product;
    product.resize(n * columns * size_of(dtype));
    multiply(dtype, {.a = at(g.data, first * g.stride, dtype),
                     .a_row = g.stride,
                     .a_k = 1,
                     .b = turned,
                     .b_k = padded(most),
                     .rows = n,
                     .columns = most,
                     .n = columns,
                     .mask = nullptr,
                     .mask_row = 0,
                     .out = at(A, first * most, dtype),
                     .out_row = most});
    multiply(dtype, {.a = at(A, first * most, dtype),
                     .a_row = most,
                     .a_k = 1,
                     .b = basis,
                     .b_k = width,
                     .rows = n,
                     .columns = columns,
                     .n = most,
                     .mask = nullptr,
                     .mask_row = 0,
                     .out = product.data(),
                     .out_row = columns});
    for (int64_t row = first; row < first + n; ++row) {
      const void* mine = at(g.data, row * g.stride, dtype);
      squares_any(dtype, mine, zeros, columns, &sums[2 * row]);
      squares_any(dtype, mine, at(product.data(), (row - first) * columns, dtype), columns, &sums[2 * row + 1]);
    }
  });
  double of_g = 0, of_rest = 0;
  for (int64_t row = 0; row < rows; ++row) {
    of_g += sums[2 * row];
    of_rest += sums[2 * row + 1];
  }
  return of_rest == 0 ? 0.0 : std::sqrt(of_rest / of_g);
}

}  // namespace gem_fast::cpu
