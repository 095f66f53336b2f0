// Launching a kernel, with every error of the CUDA runtime turned into an exception.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/stream.h"

namespace gem_fast::cuda {

inline void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  const std::string hint = error == cudaErrorNoKernelImageForDevice
                               ? "; gem_fast.build_info()['cuda_architectures'] lists what this build is for, and "
                                 "TORCH_CUDA_ARCH_LIST chooses it when gem_fast is built"
                               : "";
  throw std::runtime_error("CUDA must run gem_fast's kernels, got \"" + std::string(cudaGetErrorString(error)) + "\"" +
                           hint);
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0;
  int value = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

// Every device has this much shared memory for a block; more must be asked for.
inline constexpr int64_t kSharedBytes = 48 * 1024;

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes, Stream stream,
            const Arguments&... arguments) {
  static_assert((sizeof(Parameters) + ...) <= 4096, "kernel parameters take at most 4 KB");
  if (blocks == 0) return;
  if (shared_bytes > kSharedBytes) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)));
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
}

}  // namespace gem_fast::cuda
