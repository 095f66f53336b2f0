// From the element type known at run time to the one known at compile time.
#pragma once

#include "core/types.h"

// Runs the code given with T being the element type of `dtype`.
#define GEM_FAST_DISPATCH_DTYPE(dtype, ...)                                                                            \
  switch (dtype) {                                                                                                     \
    case ::gem_fast::DType::kFloat32: {                                                                                \
      using T = float;                                                                                                 \
      __VA_ARGS__;                                                                                                     \
      break;                                                                                                           \
    }                                                                                                                  \
    case ::gem_fast::DType::kFloat64: {                                                                                \
      using T = double;                                                                                                \
      __VA_ARGS__;                                                                                                     \
      break;                                                                                                           \
    }                                                                                                                  \
    case ::gem_fast::DType::kBFloat16: {                                                                               \
      using T = ::gem_fast::BFloat16;                                                                                  \
      __VA_ARGS__;                                                                                                     \
      break;                                                                                                           \
    }                                                                                                                  \
    case ::gem_fast::DType::kFloat16: {                                                                                \
      using T = ::gem_fast::Float16;                                                                                   \
      __VA_ARGS__;                                                                                                     \
      break;                                                                                                           \
    }                                                                                                                  \
  }

// The same for float32 and float64 alone.
#define GEM_FAST_DISPATCH_FLOAT_OR_DOUBLE(dtype, ...)                                                                  \
  if ((dtype) == ::gem_fast::DType::kFloat64) {                                                                        \
    using T = double;                                                                                                  \
    __VA_ARGS__;                                                                                                       \
  } else {                                                                                                             \
    using T = float;                                                                                                   \
    __VA_ARGS__;                                                                                                       \
  }
