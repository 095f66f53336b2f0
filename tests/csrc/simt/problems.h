// Random problems as the kernels are handed them: every array ends where its allocation ends, so that
// AddressSanitizer sees the first element too many.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "core/arrays.h"
#include "core/dispatch.h"
#include "cpu/parallel.h"

namespace gem_fast::test {

using cpu::kThisThread;

inline std::mt19937_64& generator() {
  static std::mt19937_64 engine(1);
  return engine;
}

inline int64_t random_int(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(generator());
}
inline double normal() { return std::normal_distribution<double>()(generator()); }

inline const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return "float32";
    case DType::kFloat64: return "float64";
    case DType::kBFloat16: return "bfloat16";
    default: return "float16";
  }
}

inline int64_t bytes_of(DType dtype) {
  int64_t bytes = 0;
  GEM_FAST_DISPATCH_DTYPE(dtype, bytes = sizeof(T));
  return bytes;
}

inline double epsilon_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return 0x1p-23;
    case DType::kFloat64: return 0x1p-52;
    case DType::kBFloat16: return 0x1p-7;
    default: return 0x1p-10;
  }
}

// `count` elements that begin `offset` elements after an address that vector loads could use.
class Array {
 public:
  Array(DType dtype, int64_t count, int64_t offset = 0)
      : dtype_(dtype), count_(count), offset_(offset), bytes_((count + offset) * bytes_of(dtype)) {
    data_.reset(static_cast<unsigned char*>(malloc(std::max<int64_t>(bytes_, 1))));
    for (int64_t i = 0; i < count; ++i) set(i, 0.0);
  }

  void* data() const { return data_.get() + offset_ * bytes_of(dtype_); }
  int64_t count() const { return count_; }

  double get(int64_t i) const {
    double x = 0.0;
    GEM_FAST_DISPATCH_DTYPE(dtype_, x = static_cast<double>(static_cast<Compute<T>>(static_cast<T*>(data())[i])));
    return x;
  }
  void set(int64_t i, double x) {
    GEM_FAST_DISPATCH_DTYPE(dtype_, static_cast<T*>(data())[i] = static_cast<T>(static_cast<Compute<T>>(x)));
  }

  Array copy() const {
    Array other(dtype_, count_, offset_);
    std::copy_n(data_.get(), bytes_, other.data_.get());
    return other;
  }
  bool same_bits(const Array& other) const {
    const auto* a = static_cast<unsigned char*>(data());
    const auto* b = static_cast<unsigned char*>(other.data());
    return std::equal(a, a + count_ * bytes_of(dtype_), b);
  }

 private:
  struct Free {
    void operator()(unsigned char* x) const { free(x); }
  };
  DType dtype_;
  int64_t count_, offset_, bytes_;
  std::unique_ptr<unsigned char, Free> data_;
};

// g in several tensors, and G.
struct Problem {
  DType dtype;
  int64_t t, p, stride;
  Array G;
  std::vector<Array> grads;
  std::vector<TensorRef> items;

  Problem(DType dtype, int64_t t, const std::vector<int64_t>& sizes, int64_t padding = 0, int64_t offset = 0)
      : dtype(dtype), t(t), p(sum(sizes)), stride(p + padding), G(dtype, t > 0 ? (t - 1) * stride + p : 0, offset) {
    for (int64_t i = 0; i < G.count(); ++i) G.set(i, normal());
    for (const int64_t size : sizes) {
      grads.emplace_back(dtype, size, offset);
      for (int64_t i = 0; i < size; ++i) grads.back().set(i, normal());
    }
    point_at_grads();
  }

  Problem(const Problem& other) : dtype(other.dtype), t(other.t), p(other.p), stride(other.stride), G(other.G.copy()) {
    for (const Array& x : other.grads) grads.push_back(x.copy());
    point_at_grads();
  }

  RowMatrix rows() const { return {G.data(), stride, t, p, dtype}; }
  TensorList list() const { return {items.data(), static_cast<int64_t>(items.size())}; }
  double row(int64_t k, int64_t i) const { return G.get(k * stride + i); }
  std::vector<double> g() const {
    std::vector<double> all;
    for (const Array& x : grads) {
      for (int64_t i = 0; i < x.count(); ++i) all.push_back(x.get(i));
    }
    return all;
  }
  // Adds s times the sum of G's rows to g: many violated constraints for a negative s, none for a large one.
  void shift(double s) {
    int64_t i = 0;
    for (Array& x : grads) {
      for (int64_t j = 0; j < x.count(); ++j, ++i) {
        double total = x.get(j);
        for (int64_t k = 0; k < t; ++k) total += s * row(k, i);
        x.set(j, total);
      }
    }
  }
  bool same_grads(const Problem& other) const {
    for (size_t i = 0; i < grads.size(); ++i) {
      if (!grads[i].same_bits(other.grads[i])) return false;
    }
    return true;
  }
  std::string name() const {
    return std::string(name_of(dtype)) + " t=" + std::to_string(t) + " p=" + std::to_string(p) +
           " tensors=" + std::to_string(grads.size()) + " stride=" + std::to_string(stride);
  }

 private:
  static int64_t sum(const std::vector<int64_t>& sizes) {
    int64_t total = 0;
    for (const int64_t size : sizes) total += size;
    return total;
  }
  void point_at_grads() {
    int64_t offset = 0;
    for (const Array& x : grads) {
      items.push_back({x.count() > 0 ? x.data() : nullptr, x.count(), offset});
      offset += x.count();
    }
  }
};

// ---- checks
// ----------------------------------------------------------------------------------------------------------

inline int& failures() {
  static int count = 0;
  return count;
}
inline int& checks() {
  static int count = 0;
  return count;
}

inline void expect(bool condition, const std::string& what) {
  ++checks();
  if (condition) return;
  if (++failures() <= 20) fprintf(stderr, "FAILED: %s\n", what.c_str());
}

}  // namespace gem_fast::test
