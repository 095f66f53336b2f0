// Random inputs for the kernels, in memory that ends exactly where the data ends, so that a sanitizer sees one element
// too many.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "core/arrays.h"
#include "core/dispatch.h"

namespace gem_fast::native {

using Random = std::mt19937_64;

inline void expect(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "wrong result: %s\n", what);
  std::exit(1);
}

inline int64_t pick(Random& random, const std::vector<int64_t>& choices) { return choices[random() % choices.size()]; }

enum class Values { kOrdinary, kZeros, kHuge, kNan, kInfinity };

inline double value(Random& random, Values values) {
  std::normal_distribution<double> normal;
  switch (values) {
    case Values::kZeros: return 0.0;
    case Values::kHuge: return 3e4 * normal(random);  // squares overflow float16 and nothing else
    case Values::kNan: return random() % 50 == 0 ? std::numeric_limits<double>::quiet_NaN() : normal(random);
    case Values::kInfinity: return random() % 50 == 0 ? HUGE_VAL : normal(random);
    default: return normal(random);
  }
}

// n elements of T behind `skipped` others, which make their address odd.
template <class T>
class Buffer {
 public:
  Buffer(int64_t n, int64_t skipped) : data_(new T[static_cast<size_t>(n + skipped)]), n_(n), skipped_(skipped) {}

  T* data() { return data_.get() + skipped_; }
  int64_t size() const { return n_; }
  T& operator[](int64_t i) { return data()[i]; }
  double at(int64_t i) { return static_cast<double>(static_cast<Compute<T>>(data()[i])); }

  void fill(Random& random, Values values) {
    for (int64_t i = 0; i < n_; ++i) data()[i] = T(static_cast<Compute<T>>(value(random, values)));
  }

 private:
  std::unique_ptr<T[]> data_;
  int64_t n_;
  int64_t skipped_;
};

// A gradient (p,) cut into tensors of random sizes, some of them empty.
template <class T>
struct Gradient {
  std::vector<Buffer<T>> tensors;
  std::vector<TensorRef> items;

  Gradient(Random& random, int64_t p, Values values) {
    for (int64_t at = 0; at < p || items.empty();) {
      const bool rest = random() % 4 == 0 || items.size() > 40;
      const int64_t n = rest ? p - at : static_cast<int64_t>(random() % static_cast<uint64_t>(p - at + 1));
      Buffer<T>& tensor = tensors.emplace_back(n, static_cast<int64_t>(random() % 5));
      tensor.fill(random, values);
      items.push_back({n > 0 ? tensor.data() : nullptr, n, at});
      at += n;
    }
    if (random() % 2 == 0) items.push_back({nullptr, 0, p});
  }

  TensorList list() const { return {items.data(), static_cast<int64_t>(items.size())}; }

  std::vector<double> flat() {
    std::vector<double> all;
    for (Buffer<T>& tensor : tensors) {
      for (int64_t i = 0; i < tensor.size(); ++i) all.push_back(tensor.at(i));
    }
    return all;
  }
};

// G (t, p) whose rows are a random distance apart.
template <class T>
struct Matrix {
  int64_t t, p, stride;
  Buffer<T> buffer;

  Matrix(Random& random, int64_t t, int64_t p, DType dtype, Values values)
      : t(t),
        p(p),
        stride(p + static_cast<int64_t>(random() % 4)),
        buffer(t > 0 ? (t - 1) * stride + p : 0, static_cast<int64_t>(random() % 5)),
        rows{buffer.data(), stride, t, p, dtype} {
    buffer.fill(random, values);
    if (t > 1 && p > 0 && random() % 3 == 0) std::copy_n(buffer.data(), p, buffer.data() + (t - 1) * stride);
  }

  double at(int64_t k, int64_t i) { return buffer.at(k * stride + i); }

  RowMatrix rows;
};

}  // namespace gem_fast::native
