// Reading G and g in blocks of columns: what gram and gram_row_sums share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "core/arrays.h"
#include "cpu/projection/spans.h"
#include "cpu/simd.h"

namespace gem_fast::cpu {

// Columns per block: short enough that a float32 lane sums few products before float64 takes over, and that the
// rows of a block stay in the fast caches.
inline constexpr int64_t kBlockColumns = 1024;

// Doubles that the partial sums of all slabs may take together.
inline constexpr int64_t kPartials = int64_t{1} << 22;
inline constexpr int64_t kMaxSlabs = 64;

// p is cut into slabs whose number depends on the problem's size alone, never on the number of threads: partial
// sums are added in the same order everywhere, so the same input gives the same bits.
struct Slabs {
  int64_t count;
  int64_t width;  // a multiple of kBlockColumns

  Slabs(int64_t p, int64_t most) {
    const int64_t blocks = std::max<int64_t>(1, (p + kBlockColumns - 1) / kBlockColumns);
    const int64_t wanted = std::clamp<int64_t>(blocks / 4, 1, most);
    width = (blocks + wanted - 1) / wanted * kBlockColumns;
    count = std::max<int64_t>(1, (p + width - 1) / width);
  }
};

template <class T, class C>
GEM_FAST_KERNEL void widen(const T* from, C* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<C>(static_cast<Compute<T>>(from[i]));
}

// Columns [begin, begin + n) of one row of G as C, readable up to `padded` (zeros beyond n). Points into G itself
// where nothing needs converting or padding, else into `buffer` (kBlockColumns elements).
template <class T, class C>
GEM_FAST_KERNEL const C* row_block(const T* row, int64_t begin, int64_t n, int64_t padded, C* buffer) {
  if constexpr (sizeof(T) == sizeof(C)) {
    if (n == padded) return reinterpret_cast<const C*>(row + begin);
  }
  widen(row + begin, buffer, n);
  for (int64_t i = n; i < padded; ++i) buffer[i] = C(0);
  return buffer;
}

// The same for the flattened gradient, whose blocks may straddle tensors.
template <class T, class C>
GEM_FAST_KERNEL const C* gradient_block(const TensorList& g, int64_t begin, int64_t n, int64_t padded, C* buffer) {
  const TensorRef* s = tensor_at(g, begin);
  if (begin + n <= s->offset + s->numel) {
    return row_block<T, C>(static_cast<const T*>(s->data), begin - s->offset, n, padded, buffer);
  }
  int64_t done = 0;
  for (; done < n; ++s) {
    const int64_t skip = begin + done - s->offset;
    const int64_t take = std::min(s->numel - skip, n - done);
    if (take <= 0) continue;
    widen(static_cast<const T*>(s->data) + skip, buffer + done, take);
    done += take;
  }
  for (int64_t i = n; i < padded; ++i) buffer[i] = C(0);
  return buffer;
}

// The sum of all lanes: pairwise in C down to four, then in float64.
template <class C, int N>
GEM_FAST_KERNEL double lane_sum(const typename Lanes<C, N>::type& lanes) {
  if constexpr (N > 4) {
    typename Lanes<C, N / 2>::type low, high;
    memcpy(&low, &lanes, sizeof low);
    memcpy(&high, reinterpret_cast<const char*>(&lanes) + sizeof low, sizeof high);
    return lane_sum<C, N / 2>(low + high);
  } else {
    double sum = 0.0;
    for (int i = 0; i < N; ++i) sum += static_cast<double>(lanes[i]);
    return sum;
  }
}

}  // namespace gem_fast::cpu
