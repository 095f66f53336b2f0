#include "cpu/projection/pack.h"

#include <cstring>

#include "core/dispatch.h"
#include "cpu/projection/spans.h"

namespace gem_fast::cpu {

void pack(const TensorList& tensors, void* row, int64_t p, DType dtype, const Executor& executor) {
  constexpr int64_t kGrain = 32768;
  GEM_FAST_DISPATCH_DTYPE(dtype, {
    for_each_span(tensors, p, kGrain, executor, [&](const Span& span) {
      T* to = static_cast<T*>(row) + span.offset;
      if (span.tensor->data == nullptr) {
        std::memset(to, 0, span.numel * sizeof(T));
      } else {
        std::memcpy(to, static_cast<const T*>(span.tensor->data) + span.begin, span.numel * sizeof(T));
      }
    });
  });
}

}  // namespace gem_fast::cpu
