// The stream that the kernels of a call are enqueued on: cudaStream_t, by the name that CUDA declares it with, so that
// files compiled without CUDA's headers can hand it over.
#pragma once

struct CUstream_st;

namespace gem_fast::cuda {

using Stream = CUstream_st*;

}  // namespace gem_fast::cuda
