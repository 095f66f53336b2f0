// What every operator checks of its arguments, on any device: an error is one sentence.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <ostream>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "core/types.h"

namespace gem_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

template <class Error = std::invalid_argument, class... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw Error(message.str());
}

// A tensor's shape in the text of an error, or "none" for an absent tensor. Shapes are asked for in every call of an
// operator, so the text is made only where it is written.
struct ShapeText {
  const Tensor* x;
};

inline ShapeText shape_of(const Tensor& x) { return {&x}; }
inline ShapeText shape_of(const std::optional<Tensor>& x) { return {x.has_value() ? &*x : nullptr}; }

inline std::ostream& operator<<(std::ostream& text, ShapeText shape) {
  if (shape.x == nullptr) return text << "none";
  const int64_t dim = shape.x->dim();
  text << "(";
  for (int64_t d = 0; d < dim; ++d) text << (d > 0 ? ", " : "") << shape.x->size(d);
  return text << (dim == 1 ? ",)" : ")");
}

inline const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    default: return "another dtype";
  }
}

inline DType dtype_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Double: return DType::kFloat64;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    default:
      check(false, name, " must be float32, float64, bfloat16 or float16, got another dtype");
      return DType::kFloat32;
  }
}

// The element type of layers: half precision has no sums of its own.
inline DType float_or_double(const Tensor& x, const char* name) {
  const DType dtype = dtype_of(x, name);
  check(dtype == DType::kFloat32 || dtype == DType::kFloat64, name, " must be float32 or float64, got ",
        name_of(x.scalar_type()));
  return dtype;
}

inline void check_double(const Tensor& x, const char* name) {
  check(x.scalar_type() == ScalarType::Double, name, " must be float64, got ", name_of(x.scalar_type()));
}

inline void check_not_negative(double x, const char* name) {
  check(std::isfinite(x) && x >= 0.0, name, " must be finite and not negative, got ", x);
}

// A tensor that is written to must not hold one element in two places.
inline void check_writable(const Tensors& list, const char* name) {
  for (size_t i = 0; i < list.size(); ++i) {
    for (int64_t d = 0; d < list[i].dim(); ++d) {
      check(list[i].stride(d) != 0 || list[i].size(d) <= 1, name, "[", i,
            "] must have memory of its own for every element, got an expanded tensor of shape ", shape_of(list[i]));
    }
  }
}

}  // namespace gem_fast
