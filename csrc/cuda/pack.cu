#include "cuda/launch.h"
#include "cuda/pack.h"
#include "cuda/tensor_list.h"
#include "cuda/vector.h"

namespace gem_fast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVectorsPerThread = 4;

template <class Word>
constexpr int kTile = kThreads * kVectorsPerThread * kPerVector<Word>;

// Words of the element's size: packing moves bits.
template <class Word>
__global__ void __launch_bounds__(kThreads, 1) pack_kernel(const __grid_constant__ KernelTensorList list, Word* row) {
  constexpr int kV = kPerVector<Word>;
  const auto tile = static_cast<int32_t>(blockIdx.x);
  const int s = list.of_tile(tile);
  const int64_t numel = list.numel(s);
  const auto* from = static_cast<const Word*>(list.data[s]);
  Word* to = row + list.offset[s];
  const int64_t first = static_cast<int64_t>(tile - list.first_tile[s]) * kTile<Word> + threadIdx.x * kV;
#pragma unroll
  for (int k = 0; k < kVectorsPerThread; ++k) {
    const int64_t at = first + static_cast<int64_t>(k) * kThreads * kV;
    const int64_t count = numel - at;
    if (count <= 0) return;
    const bool whole = count >= kV;
    Vector<Word> words{};
    if (from != nullptr) {
      words = whole && is_aligned(from + at) ? read_vector(from + at) : read_elements(from + at, count);
    }
    if (whole && is_aligned(to + at)) {
      *reinterpret_cast<Vector<Word>*>(to + at) = words;
    } else {
      write_elements(words, count, to + at);
    }
  }
}

template <class Word>
void pack_words(const TensorList& tensors, void* row, Stream stream) {
  for_each_kernel_list(tensors, kTile<Word>, [&](const KernelTensorList& list) {
    launch(pack_kernel<Word>, list.tiles, kThreads, 0, stream, list, static_cast<Word*>(row));
  });
}

}  // namespace

void pack(const TensorList& tensors, void* row, DType dtype, Stream stream) {
  switch (dtype) {
    case DType::kFloat64: return pack_words<uint64_t>(tensors, row, stream);
    case DType::kFloat32: return pack_words<uint32_t>(tensors, row, stream);
    case DType::kBFloat16:
    case DType::kFloat16: return pack_words<uint16_t>(tensors, row, stream);
  }
}

}  // namespace gem_fast::cuda
